"""Types of a recipe's values, stricter than pydantic's: true is not 1, and a string is not a list of characters."""

from __future__ import annotations

import functools
import json
import os
import re
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from .llamafactory import check_template_name
from .yaml_file import BACKSLASHES, shorten

if TYPE_CHECKING:
    import regex


def key(default: Any, help: str, to: str = "", **limits: Any) -> Any:
    """Return a field of a recipe. `to`: its name in TRL, transformers or PEFT, if it has another name there."""
    return Field(default, description=help, json_schema_extra={"to": to}, **limits)


LARGEST = 2**31 - 1  # torch and numpy multiply counts of rows, tokens and steps in 64 bits


def _not_a_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError
    return value


def _whole(value: object) -> object:
    if isinstance(value, int | float) and abs(value) > LARGEST:
        raise ValueError(f"expected an integer <= {LARGEST}, found {shorten(value)}")
    return _not_a_bool(value)


def _at_most(value: object) -> object:
    """Read a number of rows too large to count as all rows, as LLaMA-Factory does."""
    return min(value, LARGEST) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _attention(value: object) -> object:
    """Read the values of LLaMA-Factory up to 0.7: true and false, then off."""
    older = {True: "fa2", False: "auto", "off": "disabled"}
    return older.get(value, value) if isinstance(value, bool | str) else value


def _number(value: object) -> object:
    if isinstance(value, int | float) and 1e15 < abs(value) < float("inf"):
        raise ValueError(f"expected a number <= 1e15, found {value}")
    return _not_a_bool(value)


def _split(value: object) -> object:
    """Split `a, b`, LLaMA-Factory's notation of a list."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


TRACKERS = frozenset(
    "azure_ml clearml codecarbon comet_ml dagshub dvclive flyte kubeflow mlflow neptune swanlab tensorboard trackio wandb".split()
)
"""Names in transformers 5.23; a test compares them."""


def _trackers(value: object) -> object:
    names = [] if value in ("none", ["none"]) else _split(value)
    for name in names if isinstance(names, list) else []:
        if name not in [*TRACKERS, "all"]:
            raise ValueError(f"expected none, all or a list of {', '.join(sorted(TRACKERS))}, found {shorten(name)}")
    return names


_OTHER_STAGES = {
    "pt": "use TRL's SFTTrainer on rows with a `text` column",
    "rm": "use TRL's RewardTrainer",
    "kto": "use TRL's KTOTrainer",
    "ppo": "TRL has removed PPO; use its GRPOTrainer or RLOOTrainer",
}


def from_json(value: object) -> object:
    """Parse a mapping in a flag: `'{"num_cycles": 2}'`."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _settings(value: object) -> object:
    settings = from_json(value)
    if not isinstance(settings, dict | None):
        raise ValueError(f"expected a mapping, found {shorten(value)}")
    return settings


def _to_words(value: object) -> object:
    """Join `[full_shard, auto_wrap]` to `full_shard auto_wrap`."""
    if value is True or value is False:
        return "full_shard" if value else None
    return " ".join(value) if isinstance(value, list) and all(isinstance(part, str) for part in value) else value


def _known_stage(value: object) -> object:
    if value not in ("sft", "dpo"):
        other = f"; {_OTHER_STAGES[value]}" if value in list(_OTHER_STAGES) else ""
        raise ValueError(f"expected sft or dpo, found {shorten(value)}{other}")
    return value


def _known_template(value: str) -> str:
    if problem := check_template_name(value):
        raise ValueError(problem)
    return value


@functools.cache
def compile_span(entry: str) -> regex.Pattern[str]:
    """Compile an entry of mask_spans: a name means `<name>..</name>`, anything else is a regular expression.

    `.` matches line ends too. Unlike re, the package regex can limit the time of a search.

    Raises:
        ValueError: it is not a valid regular expression.
    """
    import regex  # imported on first use

    if re.fullmatch(r"[\w-]+", entry):
        entry = rf"<{entry}(?:\s[^>]*)?>.*?</{entry}\s*>"
    try:
        return regex.compile(entry, regex.DOTALL)
    except regex.error as error:
        raise ValueError(f"expected a tag name or a regular expression, found {shorten(entry)} ({error})") from None


def _spans(value: object) -> object:
    """Split names at commas; a regular expression may contain commas."""
    names = isinstance(value, str) and re.fullmatch(r"[\w\s,-]*", value)
    return _split(value) if names or not isinstance(value, str) else [value]


def _is_span(value: str) -> str:
    compile_span(value)
    return value


def _tools(value: object) -> object:
    """Read `python` as a mapping, too, and the JSON text of one."""
    value = from_json(value)
    if isinstance(value, str):
        value = {value: value}
    if not isinstance(value, dict) or not all(isinstance(part, str) for pair in value.items() for part in pair):
        raise ValueError(
            f"expected python, or a mapping with lines NAME: python or NAME: COMMAND, found {shorten(value)}"
        )
    if unknown := [name for name, tool in value.items() if name == tool != "python"]:
        raise ValueError(f"the tool {unknown[0]!r} has no command (expected {unknown[0]!r}: COMMAND)")
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0), BeforeValidator(_whole)]
Rows = Annotated[Count, BeforeValidator(_at_most)]
Attention = Annotated[Literal["auto", "disabled", "sdpa", "fa2", "fa3", "flex"], BeforeValidator(_attention)]
Seed = Annotated[int, Field(ge=0, lt=2**32), BeforeValidator(_not_a_bool)]  # numpy's range
Workers = Annotated[int, Field(ge=0), BeforeValidator(_whole)]
Names = Annotated[list[str], BeforeValidator(_split, json_schema_input_type=str | list[str])]
Numbers = Annotated[
    list[Number],
    BeforeValidator(_split, json_schema_input_type=float | str | list[float]),
    Field(json_schema_extra={"words": "numbers such as 0.7,0.3"}),
]
Spans = Annotated[
    list[Annotated[str, Field(min_length=1), AfterValidator(_is_span)]],
    BeforeValidator(_spans, json_schema_input_type=str | list[str]),
]


def _location(value: str) -> str:
    """Expand ~, because libraries treat it differently. A control character is a backslash that YAML has read."""
    if re.search("[\x00-\x1f\x7f-\x9f]", value):
        raise ValueError(f"expected a path without control characters, found {shorten(value)}; {BACKSLASHES}")
    return os.path.expanduser(value)  # noqa: PTH111  (Path would rewrite it)


def _not_empty(value: str) -> str:
    if not value:  # as a path, the working directory
        raise ValueError("expected a path, found ''")
    return value


# A path or a hub id.
Location = Annotated[str, AfterValidator(_location)]
RequiredLocation = Annotated[Location, AfterValidator(_not_empty)]
Locations = Annotated[list[Location], BeforeValidator(_split, json_schema_input_type=str | list[str])]
Settings = Annotated[
    dict[str, object] | None, BeforeValidator(_settings, json_schema_input_type=dict[str, object] | str | None)
]
Tools = Annotated[dict[str, str], BeforeValidator(_tools, json_schema_input_type=dict[str, str] | str)]
Words = Annotated[str | None, BeforeValidator(_to_words, json_schema_input_type=bool | str | list[str] | None)]
Trackers = Annotated[list[str], BeforeValidator(_trackers, json_schema_input_type=str | list[str])]
Stage = Annotated[Literal["sft", "dpo"], BeforeValidator(_known_stage)]
TemplateName = Annotated[Location, AfterValidator(_known_template)]
