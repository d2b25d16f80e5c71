"""The names in `dataset` and `eval_dataset` -> DatasetInfo.

A name is an entry of the registry, else the path of a data file, else a dataset of the Hub. The format of the last two is
recognized by the columns of their first rows.
"""

import functools
import re
from itertools import islice
from os.path import isfile, lexists
from pathlib import Path

from ..errors import DatasetError, printable
from ..recipe.keys import Recipe
from .files import READERS, find_files, read_dataset
from .registry import COLUMNS, SHOWN, TAGS, DatasetInfo, find_registry, nearest_name, saved_by_llamafactory

SAMPLED = 100  # rows whose columns are looked at
OPTIONAL = ("history", "system", "tools", "answer")


def check_datasets(recipe: Recipe) -> Recipe:
    """Check the entries and files of the recipe's datasets, before anything heavy is imported.

    Returns:
        The recipe, with notices about its datasets.

    Raises:
        DatasetError: names every dataset that can't be used, or every missing file.
    """
    infos = select_datasets(recipe)
    problems = []
    for info in infos:
        try:
            if info.path and not recipe.tokenized_path:  # Encoded rows need no raw data.
                find_files(info.path)
        except DatasetError as error:
            key = "dataset" if info.name in recipe.dataset else "eval_dataset"
            problems.append(str(recipe.error(key, f"{info.name}: {error}")))
    if problems:
        raise DatasetError(problems)
    lines = [line for info in infos for line in info.findings("unknown", "notice")]
    registry = _read_registry(recipe)
    lines += [f"{info.name}: {_describe(info)}" for info in infos if info.name not in registry]
    for info in registry.values():
        if info not in infos:
            lines += [f"{line} (ignored: not used by this recipe)" for line in info.findings("mistake")]
    return recipe.with_notices(*map(printable, lines))


def select_datasets(recipe: Recipe) -> list[DatasetInfo]:
    """Return the datasets that the recipe names, each once; none if `tokenized_path` was saved by LLaMA-Factory.

    Raises:
        DatasetError: names every dataset that can't be used.
    """
    if not (recipe.dataset or recipe.eval_dataset) or saved_by_llamafactory(recipe):
        return []
    registry = _read_registry(recipe)
    problems: list[str] = []
    infos: dict[str, DatasetInfo] = {}
    names = [("dataset", name) for name in recipe.dataset] + [("eval_dataset", name) for name in recipe.eval_dataset]
    for key, name in names:
        try:
            info = infos[name] = registry.get(name) or _read_unregistered(name, recipe, registry)
            mistakes = [*info.findings("mistake", "unsupported"), *_of_another_stage(info, recipe.stage)]
            problems += mistakes
            if mistakes:  # a misspelled key may be the cause
                problems += info.findings("unknown")
        except DatasetError as error:
            problems.append(str(recipe.error(key, str(error))))
        if key == "eval_dataset" and recipe.streaming and name in recipe.dataset:
            problem = f"{name}: not supported with streaming; use val_size"
            problems.append(str(recipe.error(key, problem)))
    if problems:
        raise DatasetError(list(dict.fromkeys(problems)))
    return list(infos.values())


def uses_hub(recipe: Recipe) -> bool:
    """Return whether a dataset is loaded from the Hub. Raises DatasetError if the registry can't be read."""
    names = [*recipe.dataset, *recipe.eval_dataset]
    if not names or saved_by_llamafactory(recipe):
        return False
    registry = _read_registry(recipe)
    return any(registry[name].hf_hub_url if name in registry else _is_hub_name(name) for name in names)


def _read_registry(recipe: Recipe) -> dict[str, DatasetInfo]:
    """Return the registry; empty if it is missing and no name could only be one of its entries."""
    names = [*recipe.dataset, *recipe.eval_dataset]
    is_elsewhere = recipe.dataset_dir == "ONLINE" or recipe.dataset_dir.startswith("REMOTE:")
    has_registry = is_elsewhere or lexists(Path(recipe.dataset_dir, "dataset_info.json"))
    is_needed = not all(_is_data_file(name) or _is_hub_name(name) for name in names)
    return find_registry(recipe) if has_registry or is_needed else {}


def _is_data_file(name: str) -> bool:
    return Path(name).suffix.lower() in READERS and isfile(name)


def _is_hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and Path(name).suffix.lower() not in READERS


def _read_unregistered(name: str, recipe: Recipe, registry: dict[str, DatasetInfo]) -> DatasetInfo:
    """Return the entry that a data file or a dataset of the Hub would have.

    Raises:
        DatasetError: `name` is neither, its rows can't be read, or their format is not recognized.
    """
    if _is_data_file(name):
        return _recognize(name, "file_name", False, Path(name).stat().st_mtime_ns)
    if _is_hub_name(name):
        return _recognize(name, "hf_hub_url", recipe.streaming, 0)
    file = "no such file, and " if Path(name).suffix.lower() in READERS else ""
    registered = Path(recipe.dataset_dir) / "dataset_info.json"
    raise DatasetError(f"{name}: {file}no such dataset in {registered}{nearest_name(name, registry)}")


@functools.lru_cache(maxsize=8)
def _recognize(name: str, source: str, streaming: bool, changed: int) -> DatasetInfo:
    """Read the first rows; `changed` distinguishes a file from its earlier content."""
    unknown = DatasetInfo.read(name, Path("dataset"), {source: name})
    sampled = [row.value for row in islice(read_dataset(unknown, streaming), SAMPLED)]
    rows = [value for value in sampled if isinstance(value, dict)]
    columns = {str(column): value for row in reversed(rows) for column, value in row.items() if value is not None}
    if (entry := _to_entry(columns)) is None:
        shown = ", ".join(list(columns)[:SHOWN]) or "none"
        raise DatasetError(
            f"{name}: format not recognized (found columns: {shown}; expected messages, conversations, or instruction and "
            "output). Register it in dataset_info.json with its columns"
        )
    return DatasetInfo.read(name, Path("dataset"), {source: name, **entry})


def _to_entry(columns: dict[str, object]) -> dict[str, object] | None:
    """Return the format and the columns of rows by an example of each column, or None if they have no known format."""
    is_pair = {"chosen", "rejected"} <= columns.keys()
    reply = {"chosen": "chosen", "rejected": "rejected"} if is_pair else {}
    named = {key: key for key in OPTIONAL if key in columns}
    for column in ("messages", "conversations"):
        if formatting := _format_of_turns(columns.get(column)):
            named = {key: name for key, name in named.items() if key in COLUMNS[formatting]}
            return {"formatting": formatting, "ranking": is_pair, "columns": {"messages": column} | reply | named}
    for prompt, response in (("instruction", "output"), ("prompt", "response"), ("prompt", "completion")):
        answers = reply or {"response": response}
        if {prompt, *answers.values()} <= columns.keys() and isinstance(columns[prompt], str):
            query = {"query": "input"} if "input" in columns else {}
            return {
                "formatting": "alpaca",
                "ranking": is_pair,
                "columns": {"prompt": prompt} | query | answers | named,
            }
    if is_pair and (formatting := _format_of_turns(columns["chosen"])):  # each side is a complete conversation
        named = {key: name for key, name in named.items() if key in COLUMNS[formatting]}
        return {"formatting": formatting, "ranking": True, "columns": reply | named}
    return None


def _format_of_turns(turns: object) -> str | None:
    turn = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    tags = {name: {TAGS[name]["role_tag"], TAGS[name]["content_tag"]} for name in ("openai", "sharegpt")}
    return next((name for name, keys in tags.items() if keys <= turn.keys()), None)


def _describe(info: DatasetInfo) -> str:
    columns = ", ".join(dict.fromkeys(info.columns.values()))
    return f"recognized as {info.formatting}{' pairs' * info.ranking} by its columns ({columns}); not in dataset_info.json"


def _of_another_stage(info: DatasetInfo, stage: str) -> list[str]:
    if info.ranking and stage != "dpo":
        return [f"{info.place}.ranking: preference pairs are not supported in stage: {stage}; set stage: dpo"]
    if stage == "dpo" and not info.ranking:
        expected = "expected ranking: true, and columns chosen and rejected"
        return [f"{info.place}: not declared as preference pairs, which stage: dpo needs ({expected})"]
    return []
