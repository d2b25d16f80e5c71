"""dataset_info.json -> DatasetInfo: LLaMA-Factory's registry of datasets, read strictly.

Every entry is checked, used or not, because a key that nobody reads is how a dataset ends up with the wrong columns.
What LLaMA-Factory knows and this package does not do (preference pairs, images, other hubs) is refused only when the
dataset is used, so that LLaMA-Factory's own registry can be pointed at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..errors import DatasetError

COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
    "openai": {"messages": "messages"},
}
OPTIONAL_COLUMNS = {
    "alpaca": ("history", "system", "tools"),
    "sharegpt": ("system", "tools"),
    "openai": ("system", "tools"),
}
TAGS = {
    "alpaca": {},
    "sharegpt": {
        "role_tag": "from",
        "content_tag": "value",
        "user_tag": "human",
        "assistant_tag": "gpt",
        "observation_tag": "observation",
        "function_tag": "function_call",
        "system_tag": "system",
    },
    "openai": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "observation_tag": "tool",
        "function_tag": "function_call",
        "system_tag": "system",
    },
}
REFUSED = {
    "ranking": "holds preference pairs, which SFT does not read",
    "ms_hub_url": "lies on ModelScope; download it and set file_name, or set hf_hub_url",
    "om_hub_url": "lies on Modelers; download it and set file_name, or set hf_hub_url",
    "script_url": "is a loading script, which datasets >= 4 no longer runs; set hf_hub_url or file_name",
    "cloud_file_name": "lies in cloud storage; download it and set file_name",
}
REFUSED_COLUMNS = {
    **dict.fromkeys(("images", "videos", "audios"), "is multimodal; arpo_trl trains on text"),
    **dict.fromkeys(("chosen", "rejected", "kto_tag"), "holds preference data, which SFT does not read"),
}


@dataclass(frozen=True)
class DatasetInfo:
    """One dataset of the registry.

    What the entry leaves out of `columns` and `tags` has its default. The columns `system`, `history` and `tools` are
    read under these names unless the entry gives others (LLaMA-Factory passes over them unless it names them).
    `named`: where the entry names each column that it gives, "file:line: dataset: columns.key".
    """

    name: str
    place: str
    formatting: str = "alpaca"
    path: Path | None = None
    hub: str | None = None
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: int | None = None
    columns: dict[str, str] = field(default_factory=lambda: dict(COLUMNS["alpaca"]))
    named: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    refused: str | None = None


def read_registry(dataset_dir: Path) -> dict[str, DatasetInfo]:
    """Read `dataset_dir/dataset_info.json`.

    Raises:
        DatasetError: with every problem found, each with its line.
    """
    path = Path(dataset_dir) / "dataset_info.json"
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file; dataset_dir must be a folder with a dataset_info.json") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read ({error})") from None
    problems: list[str] = []
    infos: dict[str, DatasetInfo] = {}
    try:
        if not isinstance(json.loads(text), dict):
            raise DatasetError(f"{path}:1: expected an object of datasets, found {text.lstrip()[:1]!r}")
        entries = list(_members(text, 0))
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno})") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of thousands of digits
        raise DatasetError(f"{path}: cannot be read ({error})") from None
    for name, entry, start, line in entries:
        place = f"{path}:{line}"
        if name in infos:
            problems.append(f"{place}: dataset {name!r} is there twice")
        elif not isinstance(entry, dict):
            problems.append(f"{place}: {name}: expected an object, found {json.dumps(entry)[:40]}")
        else:
            infos[name] = _read_entry(path, name, line, entry, list(_members(text, start)), text, problems)
    if problems:
        raise DatasetError(problems)
    return infos


def _read_entry(
    path: Path,
    name: str,
    line: int,
    entry: dict[str, Any],
    members: list[tuple[str, Any, int, int]],
    text: str,
    problems: list[str],
) -> DatasetInfo:
    def problem(at: int, message: str) -> None:
        problems.append(f"{path}:{at}: {name}: {message}")

    lines = {key: at for key, _, _, at in members}
    formatting = entry.get("formatting", "alpaca")
    if formatting not in list(COLUMNS):
        problem(lines["formatting"], f"formatting: expected {', '.join(COLUMNS)}, found {formatting!r}")
        formatting = "alpaca"
    known = ("file_name", "hf_hub_url", "formatting", "subset", "split", "folder", "num_samples", "columns", "tags")
    columns, tags = dict(COLUMNS[formatting]), dict(TAGS[formatting])
    named_columns: dict[str, str] = {}
    known_columns = (*columns, *OPTIONAL_COLUMNS[formatting])
    refused = None
    seen: set[str] = set()
    for key, value, start, at in members:
        if key in seen:
            problem(at, f"{key}: is there twice")
        seen.add(key)
        if key in REFUSED:
            if value and not (key.endswith("hub_url") and "hf_hub_url" in entry):
                refused = f"{path}:{at}: {name}: {key}: the dataset {REFUSED[key]}"
        elif key not in known:
            problem(at, f"{key}: no such key{_nearest(key, (*known, *REFUSED))}")
        elif key in ("columns", "tags"):
            if not isinstance(value, dict):
                problem(at, f"{key}: expected an object, found {json.dumps(value)[:40]}")
                continue
            allowed = known_columns if key == "columns" else tuple(TAGS["sharegpt"])
            for inner, named, _, inner_at in _members(text, start):
                if key == "columns" and inner in REFUSED_COLUMNS:
                    refused = f"{path}:{inner_at}: {name}: columns.{inner}: the dataset {REFUSED_COLUMNS[inner]}"
                elif inner not in allowed:
                    other = next((form for form in COLUMNS if inner in (*COLUMNS[form], *OPTIONAL_COLUMNS[form])), "")
                    hint = f"; it belongs to formatting {other}" if other else _nearest(inner, allowed)
                    problem(inner_at, f"{key}.{inner}: no such key for formatting {formatting}{hint}")
                elif not isinstance(named, str):
                    problem(inner_at, f"{key}.{inner}: expected a name, found {json.dumps(named)[:40]}")
                elif key == "columns":
                    columns[inner] = named
                    named_columns[inner] = f"{path}:{inner_at}: {name}: columns.{inner}"
                else:
                    tags[inner] = named
        elif key == "num_samples":
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                problem(at, f"num_samples: expected a whole number above 0, found {json.dumps(value)[:40]}")
        elif key != "formatting" and not isinstance(value, str):
            problem(at, f"{key}: expected text, found {json.dumps(value)[:40]}")
    given = entry.get("columns")
    if isinstance(given, dict) and "prompt" in given and "query" not in given:
        columns.pop("query", None)  # As in LLaMA-Factory: {"prompt": "input"} must not have the input twice.
    file_name = entry.get("file_name")
    if isinstance(file_name, str) and re.search(r"^[a-zA-Z][\w+.-]+:/|://|::", file_name):
        problem(lines["file_name"], f"file_name: expected a path, found the address {file_name!r}; download it first")
    hub = entry.get("hf_hub_url")
    if not (file_name or hub or refused):
        problem(line, "expected file_name or hf_hub_url, found neither")
    ours = [key for key in tags if list(tags.values()).count(tags[key]) > 1]
    if ours:
        problem(lines.get("tags", line), f"tags: {' and '.join(ours)} are both {tags[ours[0]]!r}")
    return DatasetInfo(
        name=name,
        place=f"{path}:{line}",
        formatting=formatting,
        path=path.parent / file_name if isinstance(file_name, str) and not hub else None,
        hub=hub,
        subset=entry.get("subset"),
        split=entry.get("split", "train"),
        folder=entry.get("folder"),
        num_samples=entry.get("num_samples"),
        columns=columns,
        named=named_columns,
        tags=tags,
        refused=refused,
    )


def _members(text: str, start: int) -> Iterator[tuple[str, Any, int, int]]:
    """The members of the JSON object at `start`: (key, value, where the value starts, the key's line).

    json.loads keeps neither the lines nor a key that is there twice.
    """
    decoder = json.JSONDecoder()
    space = re.compile(r"[\s,:]*")
    at = text.index("{", start) + 1
    while text[(at := space.match(text, at).end())] != "}":  # type: ignore[union-attr]
        line = text.count("\n", 0, at) + 1
        key, at = decoder.raw_decode(text, at)
        at = space.match(text, at).end()  # type: ignore[union-attr]
        value, end = decoder.raw_decode(text, at)
        yield key, value, at, line
        at = end


def _nearest(key: str, known: tuple[str, ...]) -> str:
    nearest = get_close_matches(key, known, n=1)
    return f"; the nearest is {nearest[0]}" if nearest else f"; there are {', '.join(known)}"
