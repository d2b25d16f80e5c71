"""`dataset` takes a registry's names, data files and datasets of the Hub; a file's format is recognized by its columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arpo_trl.data.sources import check_datasets, select_datasets, uses_hub
from arpo_trl.errors import DatasetError
from arpo_trl.recipe import Recipe

USER, REPLY = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
TOOLS = [{"name": "search"}]

# a row -> the format, whether it is a pair, and the columns that are read
FORMATS: list[tuple[dict[str, Any], str, bool, dict[str, str]]] = [
    ({"messages": [USER, REPLY]}, "openai", False, {"messages": "messages"}),
    ({"messages": [USER, REPLY], "tools": TOOLS}, "openai", False, {"messages": "messages", "tools": "tools"}),
    ({"conversations": [HUMAN, GPT]}, "sharegpt", False, {"messages": "conversations"}),
    ({"conversations": [USER, REPLY], "id": 1}, "openai", False, {"messages": "conversations"}),
    ({"messages": [HUMAN, GPT], "system": "s"}, "sharegpt", False, {"messages": "messages", "system": "system"}),
    (
        {"instruction": "q", "input": "", "output": "a", "history": []},
        "alpaca",
        False,
        {"prompt": "instruction", "query": "input", "response": "output", "history": "history"},
    ),
    ({"prompt": "q", "completion": "a"}, "alpaca", False, {"prompt": "prompt", "response": "completion"}),
    (
        {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT},
        "sharegpt",
        True,
        {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    ),
    (
        {"instruction": "q", "chosen": "a", "rejected": "b"},
        "alpaca",
        True,
        {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
    ),
    (
        {"chosen": [USER, REPLY], "rejected": [USER, {**REPLY, "content": "no"}]},
        "openai",
        True,
        {"chosen": "chosen", "rejected": "rejected"},
    ),
]


def recipe(*datasets: str, **keys: Any) -> Recipe:
    keys = {"dataset": list(datasets), "dataset_dir": "no_registry"} | keys
    return Recipe(model_name_or_path="m", output_dir="out", do_train=True, **keys)


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("row", "formatting", "is_pair", "columns"), FORMATS)
def test_the_format_of_a_file_is_recognized_and_reported(
    row: dict[str, Any], formatting: str, is_pair: bool, columns: dict[str, str], tmp_path: Path
) -> None:
    name = write(tmp_path / "rows.jsonl", row, row)
    keys = {"stage": "dpo"} if is_pair else {}
    (info,) = select_datasets(recipe(name, **keys))
    assert (info.formatting, info.ranking, info.path) == (formatting, is_pair, Path(name))
    needed = {"messages", "prompt", "response", "chosen", "rejected", *columns}
    assert {key: column for key, column in info.columns.items() if key in needed and key in columns} == columns
    (notice,) = check_datasets(recipe(name, **keys)).notices
    kind = f"{formatting}{' pairs' * is_pair}"
    assert notice.startswith(f"{name}: recognized as {kind} by its columns (")


def test_a_column_of_a_later_row_is_read(tmp_path: Path) -> None:
    name = write(tmp_path / "rows.jsonl", {"messages": [USER, REPLY]}, {"messages": [USER, REPLY], "tools": TOOLS})
    (info,) = select_datasets(recipe(name))
    assert info.columns["tools"] == "tools"


def test_the_name_of_a_registry_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("rows.jsonl"), {"messages": [USER, REPLY]})
    write(Path("other.jsonl"), {"instruction": "q", "output": "a"})
    Path("dataset_info.json").write_text(json.dumps({"rows.jsonl": {"file_name": "other.jsonl"}}), encoding="utf-8")
    (info,) = select_datasets(recipe("rows.jsonl", dataset_dir="."))
    assert info.path == Path("other.jsonl")
    assert check_datasets(recipe("rows.jsonl", dataset_dir=".")).notices == []


def test_unknown_columns_and_names_are_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("rows.jsonl"), {"text": "q"})
    with pytest.raises(DatasetError, match=r"rows.jsonl: format not recognized \(found columns: text; expected"):
        check_datasets(recipe("rows.jsonl"))
    Path("dataset_info.json").write_text(json.dumps({"toy": {"file_name": "rows.jsonl"}}), encoding="utf-8")
    for name in ("toi", "missing.jsonl", "a/b/c", "data/missing.jsonl"):
        file = "no such file, and " if name.endswith(".jsonl") else ""
        with pytest.raises(DatasetError, match=f"{name}: {file}no such dataset in dataset_info.json"):
            check_datasets(recipe(name, dataset_dir="."))
    with pytest.raises(DatasetError, match=r"did you mean toy\?"):
        check_datasets(recipe("toi", dataset_dir="."))


def test_exactly_owner_and_name_is_a_dataset_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the same name takes the Hub's place, as `load_dataset` has it."""
    monkeypatch.chdir(tmp_path)
    folder = Path("owner/rows")
    folder.mkdir(parents=True)
    write(folder / "train.jsonl", {"messages": [USER, REPLY]}, {"messages": [USER, REPLY]})
    assert uses_hub(recipe("owner/rows"))
    (info,) = select_datasets(recipe("owner/rows"))
    assert (info.hf_hub_url, info.formatting) == ("owner/rows", "openai")
