"""A folder with datasets and a recipe over them, shared by the tests of data/."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from transformers import PreTrainedTokenizerBase

from arpo_trl.data.labels import IGNORED
from arpo_trl.data.prepare import PreparedData, prepare_datasets
from arpo_trl.data.template_probe import find_template
from arpo_trl.data.tokenizer import _read_stops
from arpo_trl.recipe import Recipe


def row(question: str = "Q", reply: str = "A", **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": reply}], **more}


def numbered(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [row(f"Question {number}", f"Answer {number}") for number in range(start, start + count)]


def write(path: Path, values: list[Any]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(values, indent=2), encoding="utf-8")
    else:
        table = pa.Table.from_pylist(values)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(table, path)
        else:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
    return path


class Bench:
    """A folder with datasets, and a recipe over them."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.folder, self.tokenizer, self.entries = folder, tokenizer, {}  # type: ignore[var-annotated]

    def add(self, name: str, values: Any, suffix: str = ".jsonl", **entry: Any) -> Path:
        path = self.folder / f"{name}{suffix}"
        if isinstance(values, bytes):
            path.write_bytes(values)
        else:
            write(path, values)
        self.register(name, file_name=path.name, **entry)
        return path

    def register(self, name: str, **entry: Any) -> None:
        self.entries[name] = {"formatting": "sharegpt", **entry}
        (self.folder / "dataset_info.json").write_text(json.dumps(self.entries), encoding="utf-8")

    def recipe(self, **keys: Any) -> Recipe:
        given: dict[str, Any] = {
            "dataset": list(self.entries),
            "dataset_dir": str(self.folder),
            "cutoff_len": 256,
            "output_dir": str(self.folder / "out"),
        }
        return Recipe(model_name_or_path="unused", **(given | keys))

    def prepare(self, **keys: Any) -> PreparedData:
        """As a run does that gets as far as its model: `row_audit.jsonl` is written."""
        own = Recipe(model_name_or_path=self.tokenizer.name_or_path, output_dir="unused")
        template = find_template(self.tokenizer, stops=_read_stops(own, self.tokenizer))
        data = prepare_datasets(self.recipe(**keys), template)
        data.write_audit(self.folder / "out" / "row_audit.jsonl")
        return data

    def findings(self) -> list[dict[str, str]]:
        text = (self.folder / "out" / "row_audit.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def replies(self, data: Any) -> list[str]:
        """What is trained in each row."""
        return [str(self.tokenizer.decode([label for label in one["labels"] if label != IGNORED])) for one in data]


def answers(*numbers: int) -> list[str]:
    return [f"Answer {number}<|im_end|>\n" for number in numbers]


GOOD = json.dumps(row()).encode()
