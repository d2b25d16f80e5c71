"""dataset_info.json -> DatasetInfo: LLaMA-Factory's registry of datasets, with its keys and their meanings.

What is wrong with an entry ends a recipe that uses the dataset, and is a notice for every other recipe, so that
LLaMA-Factory's own registry can be pointed at. Nothing heavy is imported: a wrong name is answered at once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from os.path import isdir, isfile
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from ..errors import DatasetError, RowError, in_one_line
from ..recipe.keys import Recipe, in_words
from .strict_json import EXCERPT, excerpt, parse_json

# Each format's columns, by key, with the name of those that have a default.
COLUMNS: dict[str, dict[str, str | None]] = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"}
    | dict.fromkeys(("history", "system", "tools")),
    "sharegpt": {"messages": "conversations", "system": None, "tools": None},
    "openai": {"messages": "messages", "system": None, "tools": None},
}
NEEDED = ("messages", "response")
_TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")
_SHAREGPT = ("from", "value", "human", "gpt", "observation", "function_call", "system")
_OPENAI = ("role", "content", "user", "assistant", "tool", "function_call", "system")
TAGS: dict[str, dict[str, str]] = {
    "alpaca": {},
    "sharegpt": dict(zip(_TAGS, _SHAREGPT, strict=True)),
    "openai": dict(zip(_TAGS, _OPENAI, strict=True)),
}
REFUSED = {
    "ranking": "holds preference pairs, which SFT does not read",
    "ms_hub_url": "lies on ModelScope; set hf_hub_url, or download it and give file_name instead",
    "om_hub_url": "lies on Modelers; set hf_hub_url, or download it and give file_name instead",
    "script_url": "is a loading script, which datasets >= 4 no longer runs; set hf_hub_url, or give file_name instead",
    "cloud_file_name": "lies in cloud storage; set hf_hub_url, or download it and give file_name instead",
}
MEDIA = ("images", "videos", "audios")
SHOWN = 12


class Entry(BaseModel):
    """One dataset as the registry has it."""

    model_config = ConfigDict(strict=True, extra="allow")

    file_name: str | None = None
    hf_hub_url: str | None = None
    formatting: Literal["alpaca", "sharegpt", "openai"] = "alpaca"
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: Annotated[int, Field(gt=0)] | None = None
    columns: dict[str, str] = {}
    tags: dict[str, str] = {}


@dataclass(frozen=True)
class DatasetInfo:
    """One dataset of the registry. A location reads "file: dataset.columns.key".

    `columns`: by key; a key that is not there has no column. As in LLaMA-Factory, an entry without `columns` has the
    format's defaults, and where it has `columns`, none for what they leave out, but for the column of the messages or
    of the response, without which there are no rows. `tags` that are left out keep their defaults.
    `named`: the location of each column that the entry names. `media`: its columns of images, videos and audios.
    `mistakes`: what is wrong with the entry. `refused`: why SFT can't read the dataset. `notices`: what has no effect.
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
    columns: dict[str, str] = field(default_factory=lambda: _defaults("alpaca"))
    named: dict[str, str] = field(default_factory=dict)
    media: tuple[str, ...] = ()
    tags: dict[str, str] = field(default_factory=dict)
    mistakes: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def folder_name(self) -> str:
        """The name for a folder: a dataset's name is text and never a path."""
        if re.fullmatch(r"\w[\w.-]{0,39}", self.name):
            return self.name
        digest = hashlib.sha256(self.name.encode(errors="surrogatepass")).hexdigest()[:8]
        return re.sub(r"[^\w-]", "_", self.name)[:40] + f"-{digest}"


def select_datasets(recipe: Recipe) -> list[DatasetInfo]:
    """What the recipe names, each once; nothing where `tokenized_path` holds what LLaMA-Factory saved.

    Raises:
        DatasetError: with every name that can't be used.
    """
    if not (recipe.dataset or recipe.eval_dataset) or saved_by_llamafactory(recipe):
        return []
    registry = find_registry(recipe)
    problems: list[str] = []
    infos: dict[str, DatasetInfo] = {}
    asked = [("dataset", name) for name in recipe.dataset] + [("eval_dataset", name) for name in recipe.eval_dataset]
    for key, name in asked:
        if info := registry.get(name):
            infos[name] = info
            problems += [*info.mistakes, *info.refused]
        else:
            what = f"no such dataset in {recipe.dataset_dir}/dataset_info.json{_nearest(name, registry)}"
            problems.append(str(recipe.error(key, f"{name}: {what}")))
        if key == "eval_dataset" and recipe.streaming and name in recipe.dataset:
            what = f"{name}: is streamed, since dataset names it too; hold rows out with val_size"
            problems.append(str(recipe.error(key, what)))
    if problems:
        raise DatasetError(list(dict.fromkeys(problems)))
    return list(infos.values())


def saved_by_llamafactory(recipe: Recipe) -> Path | None:
    """`tokenized_path`, if it is itself a folder of `save_to_disk`; we save each dataset in a folder inside."""
    if not recipe.tokenized_path:
        return None
    folder = Path(recipe.tokenized_path)
    return folder if any(isfile(folder / name) for name in ("dataset_dict.json", "state.json")) else None


def find_registry(recipe: Recipe) -> dict[str, DatasetInfo]:
    """The registry that `dataset_dir` names: in a folder, in a dataset repository of the hub, or none.

    As in LLaMA-Factory: `REMOTE:owner/name` is such a repository, and `ONLINE` means that the names are the hub's.

    Raises:
        DatasetError: if it is not there, or no object of datasets.
    """
    if recipe.dataset_dir == "ONLINE":
        names = [*recipe.dataset, *recipe.eval_dataset]
        return {name: DatasetInfo(name, f"{recipe.path}: {name}", hub=name) for name in names}
    try:
        if recipe.dataset_dir.startswith("REMOTE:"):
            return read_registry(_download_registry(recipe.dataset_dir.removeprefix("REMOTE:"), recipe.cache_dir))
        return read_registry(Path(recipe.dataset_dir))
    except DatasetError as error:
        raise DatasetError(str(recipe.error("dataset_dir", str(error)))) from None


def _download_registry(name: str, cache_dir: str | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(name, "dataset_info.json", repo_type="dataset", cache_dir=cache_dir)).parent
    except (OSError, ValueError, HfHubHTTPError) as error:
        what = f"the hub gives no dataset_info.json of this dataset repository ({in_one_line(error)})"
        raise DatasetError(f"{name}: {what}") from None


def read_registry(dataset_dir: Path) -> dict[str, DatasetInfo]:
    """Read `dataset_dir/dataset_info.json`.

    Raises:
        DatasetError: if it is not there, or no object of datasets.
    """
    path = dataset_dir / "dataset_info.json"
    if not isfile(path):
        found = "not a file" if isdir(path.parent) and path.exists() else "no such file"
        raise DatasetError(f"{path}: {found}; expected a folder with a dataset_info.json")
    try:
        entries = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read ({error})") from None
    except RowError as error:
        raise DatasetError(f"{path}: {error}") from None
    if not isinstance(entries, dict):
        raise DatasetError(f"{path}: expected an object of datasets, found {excerpt(entries, EXCERPT)}")
    return {name: _to_info(path, name, entry) for name, entry in entries.items()}


def _to_info(path: Path, name: str, value: object) -> DatasetInfo:
    place = f"{path}: {name}"
    try:
        entry = Entry.model_validate(_without_nulls(value))
    except ValidationError as error:
        return DatasetInfo(name, place, mistakes=tuple(_what_is_wrong(place, wrong) for wrong in error.errors()))
    defaults = _defaults(entry.formatting)
    if entry.columns:
        defaults = {key: column for key, column in defaults.items() if key in NEEDED}
    named = {key: column for key, column in entry.columns.items() if key in COLUMNS[entry.formatting]}
    findings = [(kind, place + text) for kind, text in _findings(entry)]
    return DatasetInfo(
        name=name,
        place=place,
        path=path.parent / entry.file_name if entry.file_name and not entry.hf_hub_url else None,
        hub=entry.hf_hub_url,
        columns=defaults | named,
        named={key: f"{place}.columns.{key}" for key in named},
        media=tuple(column for key, column in entry.columns.items() if key in MEDIA),
        tags=TAGS[entry.formatting] | entry.tags,
        mistakes=tuple(text for kind, text in findings if kind == "mistake"),
        refused=tuple(text for kind, text in findings if kind == "refused"),
        notices=tuple(text for kind, text in findings if kind == "notice"),
        **entry.model_dump(include={"formatting", "subset", "split", "folder", "num_samples"}),
    )


def _without_nulls(value: object) -> object:
    """As in LLaMA-Factory, null means not given."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return value


def _defaults(formatting: str) -> dict[str, str]:
    return {key: column for key, column in COLUMNS[formatting].items() if column}


def _what_is_wrong(place: str, wrong: ErrorDetails) -> str:
    keys = wrong["loc"]
    schema = Entry.model_json_schema()["properties"][keys[0]] if keys else {"type": "object"}
    expected = in_words(schema) if len(keys) < 2 else "a string"
    return f"{'.'.join([place, *map(str, keys)])}: expected {expected}, found {excerpt(wrong['input'], EXCERPT)}"


def _findings(entry: Entry) -> Iterator[tuple[str, str]]:
    """What is to be said of an entry: ("mistake", "refused" or "notice", its key and the text)."""
    file_name, hub, others = entry.file_name, entry.hf_hub_url, entry.model_extra or {}
    if file_name and re.search(r"^[a-zA-Z][\w+.-]+:/|://|::", file_name):
        yield "mistake", f".file_name: expected a path, found the address {file_name!r}; download it first"
    if not (file_name or hub or REFUSED.keys() & others.keys()):
        yield "mistake", ": expected file_name or hf_hub_url, found neither"
    if not hub and {part.strip().partition("[")[0] for part in entry.split.split("+")} != {"train"}:
        yield "mistake", f".split: expected train or a part of it, such as train[:100], found {entry.split!r}"
    tags = TAGS[entry.formatting] | entry.tags
    if same := [tag for tag in tags if list(tags.values()).count(tags[tag]) > 1]:
        yield "mistake", f".tags: {' and '.join(same)} are both {tags[same[0]]!r}"
    for key, given in others.items():
        if key not in REFUSED:
            yield "notice", f".{key}: no such key{_nearest(key, [*Entry.model_fields, *REFUSED])}; no effect"
        elif given and not (hub and key != "ranking"):  # LLaMA-Factory, too, takes the hub's data first.
            yield "refused", f".{key}: the dataset {REFUSED[key]}"
    if "kto_tag" in entry.columns:
        yield "refused", ".columns.kto_tag: the dataset holds preference data, which SFT does not read"
    if entry.formatting == "alpaca" and entry.columns and not {"prompt", "query"} & entry.columns.keys():
        yield "notice", ".columns: names neither prompt nor query, so every prompt is empty, as in LLaMA-Factory"
    yield from _unknown_names(".columns", entry.formatting, entry.columns, COLUMNS)
    if entry.formatting != "alpaca":
        yield from _unknown_names(".tags", entry.formatting, entry.tags, TAGS)


def _unknown_names(
    place: str, formatting: str, given: dict[str, str], table: Mapping[str, Mapping[str, object]]
) -> Iterator[tuple[str, str]]:
    """What `columns` or `tags` hold that the format has not. LLaMA-Factory passes over it.

    It looks like a mistake if it resembles a key that is not given, or if no key of `columns` is one of the format's.
    """
    known = table[formatting]
    for key in given:
        if key in known or key in (*MEDIA, "kto_tag"):
            continue
        near = get_close_matches(key, known, n=1)
        other = next((form for form in table if key in table[form]), None)
        hint = f"; it belongs to formatting {other}" if other else _nearest(key, known)
        text = f"{place}.{key}: no such key for formatting {formatting}{hint}"
        if (near and near[0] not in given) or (table is COLUMNS and not given.keys() & known.keys()):
            yield "mistake", text
        else:
            yield "notice", f"{text}; no effect"


def _nearest(key: str, known: Collection[str]) -> str:
    if nearest := get_close_matches(key, known, n=1):
        return f"; the nearest is {nearest[0]}"
    shown = ", ".join(islice(known, SHOWN)) or "none"
    return f"; there are {shown}" + (f" and {len(known) - SHOWN:,} more" if len(known) > SHOWN else "")
