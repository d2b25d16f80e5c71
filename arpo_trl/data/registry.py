"""dataset_info.json -> DatasetInfo: LLaMA-Factory's registry of datasets, with its keys and their meanings.

A mistake in an entry is an error for recipes that use the dataset, and a notice for others, so that LLaMA-Factory's own
registry can be used. Imports nothing heavy, so that a wrong name is reported at once.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from itertools import islice
from os.path import isdir, isfile
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from ..errors import DatasetError, RowError, in_one_line, reason
from ..machine import find_invalid_name
from ..recipe.keys import Recipe, in_words
from .strict_json import EXCERPT, excerpt, parse_json

# The columns of each format by key, with their default names.
COLUMNS: dict[str, dict[str, str | None]] = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"}
    | dict.fromkeys(("history", "system", "tools", "answer")),
    "sharegpt": {"messages": "conversations", "system": None, "tools": None, "answer": None},
    "openai": {"messages": "messages", "system": None, "tools": None, "answer": None},
}
PROVENANCE = ("source", "sample", "scores")
"""Columns of the rows that `arpo-trl select` writes; they are not trained on."""
PAIR_COLUMNS: dict[str, str | None] = {"chosen": "chosen", "rejected": "rejected"}
NEEDED = ("messages", "response")
_TAGS = ("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")
_SHAREGPT = ("from", "value", "human", "gpt", "observation", "function_call", "system")
_OPENAI = ("role", "content", "user", "assistant", "tool", "function_call", "system")
TAGS: dict[str, dict[str, str]] = {
    "alpaca": {},
    "sharegpt": dict(zip(_TAGS, _SHAREGPT, strict=True)),
    "openai": dict(zip(_TAGS, _OPENAI, strict=True)),
}
UNSUPPORTED = {
    "ms_hub_url": "ModelScope is not supported; set hf_hub_url, or download the data and set file_name",
    "om_hub_url": "Modelers is not supported; set hf_hub_url, or download the data and set file_name",
    "script_url": "loading scripts are not supported by datasets >= 4; set hf_hub_url or file_name",
    "cloud_file_name": "cloud storage is not supported; set hf_hub_url, or download the data and set file_name",
}
MEDIA = ("images", "videos", "audios")
SHOWN = 12


def _read_ranking(value: object) -> object:
    if isinstance(value, str) and value.lower() == "true":
        return True
    if isinstance(value, str):
        raise ValueError(f"expected true or false, found the text {value!r}, which LLaMA-Factory reads as true")
    return value


class DatasetInfo(BaseModel):
    """One dataset of the registry, by LLaMA-Factory's keys. A location reads "file: dataset.columns.key".

    As in LLaMA-Factory, an entry without `columns` has the defaults of its format, and an entry with `columns` only these
    and the column of the messages or of the response. Omitted `tags` have their defaults.
    """

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    file_name: str | None = None
    hf_hub_url: str | None = None
    formatting: Literal["alpaca", "sharegpt", "openai"] = "alpaca"
    subset: str | None = None
    split: str = "train"
    folder: str | None = None
    num_samples: Annotated[int, Field(gt=0)] | None = None
    columns: dict[str, str] = {}
    tags: dict[str, str] = {}
    ranking: Annotated[bool, BeforeValidator(_read_ranking)] = False

    _name: str = ""
    _file: Path = Path("dataset_info.json")
    _named: frozenset[str] = frozenset()
    _findings: list[tuple[str, str]] = []

    def model_post_init(self, context: Any) -> None:
        """Check the entry, then fill in the defaults."""
        self._findings = list(_check_entry(self))
        known = self.known_columns
        self._named = frozenset(self.columns.keys() & known.keys())
        needed = (*NEEDED, *PAIR_COLUMNS) if self.columns else known
        defaults = {key: column for key, column in known.items() if column and key in needed}
        self.columns.update(defaults | self.columns)
        self.tags.update(TAGS[self.formatting] | self.tags)

    @classmethod
    def read(cls, name: str, file: Path, entry: object) -> DatasetInfo:
        """Read the entry of a registry file; null means not set, and so does the empty name of a column."""
        try:
            info = cls.model_validate(_without_unset(entry))
        except ValidationError as error:
            info = cls()
            info._findings = [("mistake", _describe_mistake(details)) for details in error.errors()]
        info._name, info._file = name, file
        return info

    @property
    def known_columns(self) -> dict[str, str | None]:
        """The columns that its format has, with their default names."""
        return COLUMNS[self.formatting] | (PAIR_COLUMNS if self.ranking else {})

    @property
    def name(self) -> str:
        return self._name

    @property
    def place(self) -> str:
        return f"{self._file}: {self._name}"

    @property
    def named(self) -> frozenset[str]:
        """The keys of the columns that the entry sets."""
        return self._named

    @property
    def media(self) -> list[str]:
        """The columns of images, videos and audios."""
        return [column for key, column in self.columns.items() if key in MEDIA]

    @property
    def path(self) -> Path | None:
        """The file or folder, relative to the registry; None for a Hub dataset, which takes precedence."""
        return self._file.parent / self.file_name if self.file_name and not self.hf_hub_url else None

    @property
    def folder_name(self) -> str:
        """The name as a folder name: a dataset's name may be any text, but is never a path.

        A digest tells names apart that Windows takes for the same folder, `d` and `D`, and changes those it reserves.
        """
        is_plain = re.fullmatch(r"\w[\w.-]{0,39}", self.name) and not find_invalid_name(self.name)
        if is_plain and self.name == self.name.lower():
            return self.name
        digest = hashlib.sha256(self.name.encode(errors="surrogatepass")).hexdigest()[:8]
        return re.sub(r"[^\w-]", "_", self.name)[:40] + f"-{digest}"

    def findings(self, *kinds: Literal["mistake", "unsupported", "unknown", "notice"]) -> list[str]:
        """List what is wrong with the entry, why SFT can't read the dataset, or which keys are ignored."""
        return [self.place + text for kind, text in self._findings if kind in kinds]


def saved_by_llamafactory(recipe: Recipe) -> Path | None:
    """Return `tokenized_path` if `save_to_disk` wrote this folder itself; ours contains a folder for each dataset."""
    if not recipe.tokenized_path:
        return None
    folder = Path(recipe.tokenized_path)
    return folder if any(isfile(folder / name) for name in ("dataset_dict.json", "state.json")) else None


def find_registry(recipe: Recipe) -> dict[str, DatasetInfo]:
    """Read the registry in `dataset_dir`.

    As in LLaMA-Factory, `REMOTE:owner/name` is a dataset repository of the Hub, and `ONLINE` means that the names are the
    Hub's.

    Raises:
        DatasetError: it is missing, or not an object of datasets.
    """
    if recipe.dataset_dir == "ONLINE":
        names = [*recipe.dataset, *recipe.eval_dataset]
        return {name: DatasetInfo.read(name, Path(str(recipe.path)), {"hf_hub_url": name}) for name in names}
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
        problem = f"dataset_info.json of this dataset repository can't be downloaded ({in_one_line(error)})"
        raise DatasetError(f"{name}: {problem}") from None


def read_registry(dataset_dir: Path) -> dict[str, DatasetInfo]:
    """Read `dataset_dir/dataset_info.json`. Raises DatasetError if it is missing, or not an object of datasets."""
    path = dataset_dir / "dataset_info.json"
    if not isfile(path):
        if isdir(path.parent) and path.exists():
            raise DatasetError(f"{path}: expected a regular file")
        problem = "no dataset_info.json in this folder" if isdir(dataset_dir) else "no such folder"
        raise DatasetError(f"{dataset_dir}: {problem}; expected the folder of dataset_info.json")
    try:
        entries = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read ({reason(error)})") from None
    except RowError as error:
        raise DatasetError(f"{path}: {error}") from None
    if not isinstance(entries, dict):
        raise DatasetError(f"{path}: expected an object of datasets, found {excerpt(entries, EXCERPT)}")
    return {name: DatasetInfo.read(name, path, entry) for name, entry in entries.items()}


def _without_unset(value: object, *unset: str) -> object:
    """Remove what is null, or in the columns "", which LLaMA-Factory does not read either."""
    if not isinstance(value, dict):
        return value
    inside = {key: _without_unset(inner, *[""] * (key == "columns")) for key, inner in value.items()}
    return {key: inner for key, inner in inside.items() if inner not in (None, *unset)}


def _describe_mistake(details: ErrorDetails) -> str:
    keys = details["loc"]
    if reason := details.get("ctx", {}).get("error"):
        return f"{''.join(f'.{key}' for key in keys)}: {reason}"
    schema = DatasetInfo.model_json_schema()["properties"][keys[0]] if keys else {"type": "object"}
    expected = in_words(schema) if len(keys) < 2 else "a string"
    return f"{''.join(f'.{key}' for key in keys)}: expected {expected}, found {excerpt(details['input'], EXCERPT)}"


def _check_entry(entry: DatasetInfo) -> Iterator[tuple[str, str]]:
    """Yield the findings of an entry as in the file: ("mistake", "unsupported", "unknown" or "notice", its key and the text)."""
    file_name, hub, others = entry.file_name, entry.hf_hub_url, entry.model_extra or {}
    if file_name and re.search(r"^[a-zA-Z][\w+.-]+:/|://|::", file_name):
        yield "mistake", f".file_name: expected a path, found the address {file_name!r}; download it first"
    if not (file_name or hub or UNSUPPORTED.keys() & others.keys()):
        yield "mistake", ": expected file_name or hf_hub_url, found neither"
    if not hub and {part.strip().partition("[")[0] for part in entry.split.split("+")} != {"train"}:
        yield "mistake", f".split: expected train or a part of it, such as train[:100], found {entry.split!r}"
    tags = TAGS[entry.formatting] | entry.tags
    if same := [tag for tag in tags if list(tags.values()).count(tags[tag]) > 1]:
        yield "mistake", f".tags: {' and '.join(same)} are both {tags[same[0]]!r}"
    for key, value in others.items():
        if key not in UNSUPPORTED:
            nearest = nearest_name(key, [*DatasetInfo.model_fields, *UNSUPPORTED])
            yield "unknown", f".{key}: ignored, unknown key{nearest}"
        elif value and not hub:  # LLaMA-Factory also prefers the data on the Hub.
            yield "unsupported", f".{key}: {UNSUPPORTED[key]}"
    if "kto_tag" in entry.columns:
        yield "unsupported", ".columns.kto_tag: KTO rows are not supported"
    if entry.ranking and len(named := PAIR_COLUMNS.keys() & entry.columns.keys()) == 1:
        yield "mistake", f".columns: expected chosen and rejected, found only {next(iter(named))}"
    if entry.formatting == "alpaca" and entry.columns and not {"prompt", "query"} & entry.columns.keys():
        yield "notice", ".columns: neither prompt nor query is set, so every prompt is empty, as in LLaMA-Factory"
    columns = COLUMNS | {entry.formatting: entry.known_columns}
    yield from _unknown_names(".columns", entry.formatting, entry.columns, columns)
    if entry.formatting != "alpaca":
        yield from _unknown_names(".tags", entry.formatting, entry.tags, TAGS)


def _unknown_names(
    place: str, formatting: str, names: dict[str, str], table: Mapping[str, Mapping[str, object]]
) -> Iterator[tuple[str, str]]:
    """Yield the keys of `columns` or `tags` that the format does not have; LLaMA-Factory ignores them.

    One is a mistake if it resembles a key that is not set, or if no key of `columns` is one of the format's.
    """
    known = table[formatting]
    for key in names:
        if key in known or key in (*MEDIA, "kto_tag"):
            continue
        near = get_close_matches(key, known, n=1)
        other = next((form for form in table if key in table[form]), None)
        hint = f"; it belongs to formatting: {other}" if other else nearest_name(key, known)
        text = f"unknown key with formatting: {formatting}{hint}"
        if (near and near[0] not in names) or (place == ".columns" and not names.keys() & known.keys()):
            yield "mistake", f"{place}.{key}: {text}"
        else:
            yield "unknown", f"{place}.{key}: ignored, {text}"


def nearest_name(key: str, known: Collection[str]) -> str:
    if nearest := get_close_matches(key, known, n=1):
        return f"; did you mean {nearest[0]}?"
    shown = ", ".join(islice(known, SHOWN)) or "none"
    return f"; expected {'one of ' * (len(known) > 1)}{shown}" + (
        f" and {len(known) - SHOWN:,} more" if len(known) > SHOWN else ""
    )
