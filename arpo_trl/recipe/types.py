"""The types of a recipe's values. pydantic takes true for 1 and text for a list of characters; a person would not."""

from __future__ import annotations

import functools
import json
import os
import re
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from .llamafactory import check_template_name
from .yaml_file import shorten

if TYPE_CHECKING:
    import regex

LARGEST = 2**31 - 1  # of a whole number: torch and numpy count rows, tokens and steps in 64 bits, and multiply them


def _not_a_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError
    return value


def _whole(value: object) -> object:
    if isinstance(value, int | float) and abs(value) > LARGEST:
        raise ValueError(f"expected a whole number of at most {LARGEST}, found {shorten(value)}")
    return _not_a_bool(value)


def _at_most(value: object) -> object:
    """More rows than can be counted: all of them, as in LLaMA-Factory."""
    return min(value, LARGEST) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _attention(value: object) -> object:
    """How LLaMA-Factory's releases until 0.7 wrote it: true and false, then off."""
    older = {True: "fa2", False: "auto", "off": "disabled"}
    return older.get(value, value) if isinstance(value, bool | str) else value


def _number(value: object) -> object:
    if isinstance(value, int | float) and 1e15 < abs(value) < float("inf"):
        raise ValueError(f"expected a number of at most 1e15, found {value}")
    return _not_a_bool(value)


def _split(value: object) -> object:
    """`a, b` is LLaMA-Factory's way to write a list."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


TRACKERS = frozenset(
    "azure_ml clearml codecarbon comet_ml dagshub dvclive flyte kubeflow mlflow neptune swanlab tensorboard trackio wandb".split()
)
"""The names in transformers 5.23; a test compares them."""


def _trackers(value: object) -> object:
    names = [] if value in ("none", ["none"]) else _split(value)
    for name in names if isinstance(names, list) else []:
        if name not in [*TRACKERS, "all"]:
            raise ValueError(f"expected none, all, or some of {', '.join(sorted(TRACKERS))}; found {shorten(name)}")
    return names


_OTHER_STAGES = {
    "pt": "plain text is not trained on here; TRL's SFTTrainer does it with rows of a column `text`",
    "rm": "TRL's RewardTrainer trains reward models",
    "dpo": "TRL's DPOTrainer trains on preference pairs",
    "kto": "TRL's KTOTrainer trains on replies that were judged good or bad",
    "ppo": "TRL no longer has PPO; its GRPOTrainer and RLOOTrainer are for reinforcement learning",
}


def from_json(value: object) -> object:
    """`'{"num_cycles": 2}'` is how flags give a mapping."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _settings(value: object) -> object:
    found = from_json(value)
    if not isinstance(found, dict | None):
        raise ValueError(f"expected a mapping, found {shorten(value)}")
    return found


def _to_words(value: object) -> object:
    """`[full_shard, auto_wrap]` is another way to write `full_shard auto_wrap`."""
    if value is True or value is False:
        return "full_shard" if value else None
    return " ".join(value) if isinstance(value, list) and all(isinstance(part, str) for part in value) else value


def _sft_only(value: object) -> object:
    if value != "sft":
        other = f"; {_OTHER_STAGES[value]}" if value in list(_OTHER_STAGES) else ""
        raise ValueError(f"expected sft, found {shorten(value)}{other}")
    return value


def _known_template(value: str) -> str:
    if problem := check_template_name(value):
        raise ValueError(problem)
    return value


@functools.cache
def compile_span(entry: str) -> regex.Pattern[str]:
    """An entry of mask_spans: a name stands for `<name>..</name>`, anything else is a regular expression.

    `.` matches line ends too. The package regex has what re has not: a limit to the time that a search takes.

    Raises:
        ValueError: if it is no regular expression, or one that matches nothing but the empty text.
    """
    import regex  # only for those who ask for spans

    if re.fullmatch(r"[\w-]+", entry):
        entry = rf"<{entry}(?:\s[^>]*)?>.*?</{entry}\s*>"
    try:
        return regex.compile(entry, regex.DOTALL)
    except regex.error as error:
        raise ValueError(f"expected a tag's name or a regular expression, found {shorten(entry)} ({error})") from None


def _spans(value: object) -> object:
    """Names may be written as one text with commas; a regular expression may hold commas of its own."""
    names = isinstance(value, str) and re.fullmatch(r"[\w\s,-]*", value)
    return _split(value) if names or not isinstance(value, str) else [value]


def _is_span(value: str) -> str:
    compile_span(value)
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
Number = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Count = Annotated[int, Field(gt=0), BeforeValidator(_whole)]
Rows = Annotated[Count, BeforeValidator(_at_most)]
Attention = Annotated[Literal["auto", "disabled", "sdpa", "fa2", "fa3", "flex"], BeforeValidator(_attention)]
Seed = Annotated[int, Field(ge=0, lt=2**32), BeforeValidator(_not_a_bool)]  # numpy's range
Workers = Annotated[int, Field(ge=0), BeforeValidator(_whole)]
Names = Annotated[list[str], BeforeValidator(_split, json_schema_input_type=str | list[str])]
Numbers = Annotated[list[Number], BeforeValidator(_split, json_schema_input_type=float | str | list[float])]
Spans = Annotated[
    list[Annotated[str, Field(min_length=1), AfterValidator(_is_span)]],
    BeforeValidator(_spans, json_schema_input_type=str | list[str]),
]
# A path, or a name on the hub. ~ is expanded here, once, because libraries disagree about it.
Location = Annotated[str, AfterValidator(os.path.expanduser)]
Locations = Annotated[list[Location], BeforeValidator(_split, json_schema_input_type=str | list[str])]
Settings = Annotated[
    dict[str, object] | None, BeforeValidator(_settings, json_schema_input_type=dict[str, object] | str | None)
]
Words = Annotated[str | None, BeforeValidator(_to_words, json_schema_input_type=bool | str | list[str] | None)]
Trackers = Annotated[list[str], BeforeValidator(_trackers, json_schema_input_type=str | list[str])]
Stage = Annotated[Literal["sft"], BeforeValidator(_sft_only, json_schema_input_type=Literal["sft"])]
TemplateName = Annotated[Location, AfterValidator(_known_template)]
