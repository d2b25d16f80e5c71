"""From files to encoded datasets: every row is accounted for, whatever its file, its neighbours or the workers."""

import csv
import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import small_run
from transformers import PreTrainedTokenizerBase

from arpo_trl.data import cache
from arpo_trl.data import files as rows
from arpo_trl.data import prepare as dataset
from arpo_trl.data.encode import encode_rows
from arpo_trl.data.files import read_rows
from arpo_trl.data.labels import IGNORED
from arpo_trl.data.prepare import PreparedData, prepare_datasets
from arpo_trl.errors import DatasetError, RecipeError, RowError
from arpo_trl.recipe import Recipe
from arpo_trl.run.check import check
from arpo_trl.run.train import train


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
        given = {
            "dataset": list(self.entries),
            "dataset_dir": str(self.folder),
            "cutoff_len": 256,
            "output_dir": str(self.folder / "out"),
        }
        return Recipe(model_name_or_path="unused", **(given | keys))

    def prepare(self, **keys: Any) -> PreparedData:
        """As a run does that gets as far as its model: `row_audit.jsonl` is written."""
        data = prepare_datasets(self.recipe(**keys), self.tokenizer)
        data.write_audit(self.folder / "out" / "row_audit.jsonl")
        return data

    def findings(self) -> list[dict[str, str]]:
        text = (self.folder / "out" / "row_audit.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def replies(self, data: Any) -> list[str]:
        """What is trained in each row."""
        return [self.tokenizer.decode([label for label in one["labels"] if label != IGNORED]) for one in data]


@pytest.fixture
def bench(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return Bench(tmp_path, tiny_tokenizer)


def answers(*numbers: int) -> list[str]:
    return [f"Answer {number}<|im_end|>\n" for number in numbers]


# Files


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".arrow"])
def test_a_file_of_any_kind_gives_the_same_rows(suffix: str, bench: Bench) -> None:
    path = bench.add("d", numbered(3), suffix)
    data = bench.prepare()
    assert bench.replies(data.train) == answers(0, 1, 2)
    assert [one.rpartition(":")[0] for one in data.train["source"]] == [str(path)] * 3


def test_a_csv_holds_alpaca_rows(bench: Bench) -> None:
    path = bench.add("d", b"", ".csv", formatting="alpaca")
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["instruction", "output"], ['two\n"lines"', "Answer 0"], ["é", "Answer 1"]])
    data = bench.prepare()
    assert bench.replies(data.train) == answers(0, 1)
    assert data.train["source"][:] == [f"{path}:2", f"{path}:4"]


def test_a_folder_is_read_by_name_and_holds_nothing_else(bench: Bench) -> None:
    folder = bench.folder / "many"
    folder.mkdir()
    write(folder / "b.jsonl", numbered(1, start=1))
    write(folder / "a.parquet", numbered(1))
    write(folder / "license_qa.jsonl", numbered(1, start=2))
    for about in ("README.md", "LICENSE", "_SUCCESS", "._b.jsonl"):
        (folder / about).write_text("about", encoding="utf-8")
    bench.register("d", file_name="many")
    assert bench.replies(bench.prepare().train) == answers(0, 1, 2)
    (folder / "c.json.gz").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"expected only files of kind .* in the folder, found c.json.gz"):
        bench.prepare()


def test_a_json_file_may_hold_a_row_a_line(bench: Bench) -> None:
    bench.add("d", write(bench.folder / "x.jsonl", numbered(2)).read_bytes(), ".json")
    assert bench.replies(bench.prepare().train) == answers(0, 1)


def test_glob_characters_are_a_name_and_dots_may_leave_the_folder(bench: Bench) -> None:
    inner = bench.folder / "inner"
    inner.mkdir()
    write(bench.folder / "a[1]*.jsonl", numbered(1))
    (inner / "dataset_info.json").write_text(
        '{"d": {"file_name": "../a[1]*.jsonl", "formatting": "sharegpt"}}', encoding="utf-8"
    )
    assert bench.replies(bench.prepare(dataset=["d"], dataset_dir=str(inner)).train) == answers(0)


def test_a_dataset_of_the_hub(bench: Bench) -> None:
    """A local folder stands for the hub: load_dataset takes both."""
    (bench.folder / "repo").mkdir()
    write(bench.folder / "repo" / "train.jsonl", [row(tools='[{"name": "f"}]'), row("Q", "B")])
    bench.register("d", hf_hub_url=str(bench.folder / "repo"))
    data = bench.prepare(cutoff_len=4096)
    assert bench.replies(data.train) == ["A<|im_end|>\n", "B<|im_end|>\n"]
    assert data.train["source"][1] == f"{bench.folder / 'repo'}:2"
    bench.register("d", hf_hub_url=str(bench.folder / "repo"), split="test")
    with pytest.raises(DatasetError, match=r"dataset_info.json:1: d: .* cannot be loaded"):
        bench.prepare()


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_nulls_that_arrow_filled_in_reach_no_prompt(suffix: str, bench: Bench) -> None:
    calls = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": "x"}}]
    turns = [{"role": "user", "content": "Q"}]
    turns += [{"role": "assistant", "content": "", "tool_calls": [{"function": call} for call in calls]}]  # type: ignore[dict-item]
    bench.add("d", [{"messages": turns}], suffix, formatting="openai")
    (text,) = bench.replies(bench.prepare().train)
    assert '{"name": "f", "arguments": {"a": 1}}' in text and '{"name": "g", "arguments": {"b": "x"}}' in text


# Broken files and rows

GOOD = json.dumps(row()).encode()
BROKEN_LINES: dict[str, tuple[bytes, str]] = {
    "not JSON": (b'{"conversations": [}', "not JSON (Expecting value at column 20): '{\"conversations\": [}'"),
    "cut off": (GOOD[:30], "not JSON ("),
    "two rows on a line": (GOOD + b" " + GOOD, "not JSON (Extra data at column"),
    "not UTF-8": (GOOD.replace(b"Q", b"\xff"), "not UTF-8 (byte 48 of the line)"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "not UTF-8 (byte 1 of the line)"),
    "half a surrogate pair": (GOOD.replace(b"Q", b"\\ud83d"), "not UTF-8: the text holds half a surrogate pair"),
    "nested too deeply": (b"[" * 100_000, "not JSON that can be read (nested too deeply)"),
    "nested too deeply to walk": (b"[" * 900 + b"]" * 900, "not JSON that can be read (nested too deeply)"),
    "a number without end": (b"9" * 5000, "not JSON that can be read (a number of 5,000 digits)"),
    "a number": (b"7", "not an object but a number"),
    "an unknown role": (
        GOOD.replace(b"human", b"person"),
        "unknown role: conversations[0] is from 'person'; the tags",
    ),
    "no reply that trains": (
        GOOD.replace(b'"A"', b'"A", "loss": false'),
        "no trained token: every reply is kept silent",
    ),
    "only labels past the cutoff": (GOOD.replace(b'"Q"', b'"' + b"Q " * 999 + b'"'), "only labels past the cutoff"),
}


@pytest.mark.parametrize("kind", BROKEN_LINES)
def test_a_broken_line_is_dropped_and_named(kind: str, bench: Bench) -> None:
    line, reason = BROKEN_LINES[kind]
    path = bench.add("d", GOOD + b"\n\n" + line + b"\n" + GOOD)
    data = bench.prepare(max_dropped=0.5)
    assert data.train["source"][:] == [f"{path}:1", f"{path}:4"]
    (finding,) = bench.findings()
    assert (finding["dataset"], finding["place"], finding["outcome"]) == ("d", f"{path}:3", "dropped")
    assert finding["reason"].startswith(reason)


def test_line_3501_is_called_3501(bench: Bench) -> None:
    path = bench.add("d", b"".join(GOOD + b"\n" if line != 3501 else b"{\n" for line in range(1, 4001)))
    data = bench.prepare()
    assert bench.findings()[0]["place"] == f"{path}:3501"
    assert data.audit.lines() == [
        "d: 4,000 rows: 3,999 kept, 0 shortened, 0 lost their final answer, 1 dropped; "
        f"{data.audit.datasets['d'].tokens:,} tokens, {data.audit.datasets['d'].trained_tokens:,} trained"
    ]


def test_more_dropped_than_allowed_stops_the_run_with_the_first_reasons(bench: Bench) -> None:
    path = bench.add("d", (GOOD + b"\n") * 9 + b"{\n")
    with pytest.raises(DatasetError) as error:
        bench.prepare()
    (listed,) = bench.folder.glob("cache/arpo_trl/d-*/audit.jsonl")
    assert len(listed.read_text().splitlines()) == 1 and not (bench.folder / "out").exists()
    assert str(error.value).splitlines() == [
        f"d: 1 of 10 rows dropped, max_dropped allows a share of 0.05; all are in {listed}, the first are",
        f"  {path}:10: not JSON (Expecting property name enclosed in double quotes at column 2): '{{'",
    ]
    assert bench.prepare(max_dropped=0.1).audit.datasets["d"].dropped == 1
    with pytest.raises(DatasetError):
        bench.prepare(max_dropped=0)


def test_a_dataset_of_broken_rows_alone_stops_the_run_whatever_is_allowed(bench: Bench) -> None:
    bench.add("d", b"{\n")
    with pytest.raises(DatasetError, match="1 of 1 rows dropped"):
        bench.prepare(max_dropped=1)


BROKEN_FILES: dict[str, tuple[str, bytes, str]] = {
    "a broken element": (
        ".json",
        b'[\n {"a": 1},\n {"a": 2,\n  "b" 3},\n {"a": 4, "c": "a long text, so that the end is far away"}]',
        "4: not JSON (Expecting ':' delimiter near ",
    ),
    "a comma missing": (".json", b"[{}\n{}]", "2: not JSON (expected a comma or the end of the array, found '{}]')"),
    "an end missing": (
        ".json",
        b"[{},",
        "1: not JSON (Expecting value near 'the end of the file'); the row begins at",
    ),
    "something after": (".json", b"[{}]\n[{}]", "2: not JSON (expected nothing after the array, found '[{}]')"),
    "no array": (".json", b'"x"', "1: not JSON (expected an array of rows, found '\"x\"')"),
    "a quote never closed": (
        ".csv",
        b'a,b\n"1,2\n3,4\n',
        "3: not CSV (unexpected end of data); the rows before it",
    ),
    "no parquet": (".parquet", b"PAR1 or so", "1: cannot be read ("),
    "no arrow": (".arrow", b"ARROW1 or so", "1: cannot be read ("),
}


@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_a_file_that_cannot_be_read_on_is_refused_at_its_line(kind: str, bench: Bench) -> None:
    suffix, content, message = BROKEN_FILES[kind]
    path = bench.add("d", content, suffix)
    with pytest.raises(DatasetError) as error:
        bench.prepare(max_dropped=1)
    assert str(error.value).startswith(f"{path}:{message}")
    assert "\n" not in str(error.value)


def test_a_csv_row_with_too_many_fields_is_dropped(bench: Bench) -> None:
    path = bench.add("d", b"instruction,output\nQ,A\nQ,A,B\n", ".csv", formatting="alpaca")
    bench.prepare(max_dropped=0.5)
    assert [bench.findings()[0][key] for key in ("place", "reason")] == [
        f"{path}:3",
        "not CSV (more fields than the header's 2)",
    ]


MISSING: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown name": ({"dataset": ["nope"]}, "dataset: nope: no such dataset in {0}/dataset_info.json; there are d"),
    "an empty file": ({"file_name": "empty.jsonl"}, "d: no rows"),
    "a missing file": ({"file_name": "none.jsonl"}, "{0}/none.jsonl: no such file"),
    "a file of another kind": (
        {"file_name": "d.txt"},
        "{0}/d.txt: expected a file of kind .json, .jsonl, .csv, .parquet, .arrow, found .txt",
    ),
    "an empty folder": (
        {"file_name": "folder"},
        "{0}/folder: expected only files of kind .json, .jsonl, .csv, .parquet, .arrow in the folder, found none",
    ),
    "a loading script": (
        {"script_url": "s.py"},
        "{0}/dataset_info.json:1: d: script_url: the dataset is a loading script, which datasets >= 4 no longer runs; "
        "set hf_hub_url or file_name",
    ),
}


@pytest.mark.parametrize("kind", MISSING)
def test_what_is_missing_is_one_line(kind: str, bench: Bench) -> None:
    keys, message = MISSING[kind]
    (bench.folder / "empty.jsonl").touch()
    (bench.folder / "d.txt").touch()
    (bench.folder / "folder").mkdir()
    bench.add("d", numbered(1))
    if "dataset" not in keys:
        bench.register("d", **keys)
    with pytest.raises(DatasetError) as error:
        bench.prepare(dataset=keys.get("dataset", ["d"]))
    assert str(error.value) == message.format(bench.folder)


def test_rows_on_one_line_have_their_column(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, {"a": 2},\n{"a": 3}]', encoding="utf-8")
    assert [one.place for one in read_rows(path)] == [f"{path}:1", f"{path}:1:12", f"{path}:2"]


def test_an_element_that_python_does_not_read_is_dropped_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    path.write_text(f'[{{"a": {"9" * 5000}}}, {"[" * 200 + "]" * 200}, {{"a": 1}}]', encoding="utf-8")
    for chunk in (1 << 20, 50):
        monkeypatch.setattr(rows, "CHUNK", chunk)
        number, deep, good = (one.value for one in read_rows(path))
        assert str(number) == "not JSON that can be read (a number of 5,000 digits)"
        assert str(deep) == "not JSON that can be read (nested too deeply)"
        assert good == {"a": 1}


def test_an_excerpt_is_json_of_anything_and_reads_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    value = {"a": [1, None, True, "é"], "b": {}, "c": []}
    assert rows.excerpt(value, 1000) == json.dumps(value, ensure_ascii=False)
    assert rows.excerpt(value, 9) == json.dumps(value)[:9]
    strange = [date(2026, 1, 2), b"\xff" * 999, Decimal("1.5"), {1: 2}, {(1, 2): 3}]
    assert rows.excerpt(strange, 60) == """["datetime.date(2026, 1, 2)", "b'""" + "\\\\xff" * 5 + "\\\\"
    deep: list[Any] = []
    for _ in range(10**5):
        deep = [deep]
    assert rows.excerpt(deep, 50) == "[" * 50
    lengths: list[int] = []
    monkeypatch.setattr(rows.json, "dumps", lambda value, **_: lengths.append(len(value)) or '"')
    rows.excerpt(["x" * (1 << 20)] * (1 << 20), 160)
    assert max(lengths) <= 160 and len(lengths) <= 160


def test_a_large_array_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the pieces: a number, a literal, an escape or a character cut in two is one thing all the same."""
    values = [{"n": 12345, "t": True, "s": 'a "quote" \\ \u1234 日本\n', "l": [1.5e10, None]}, 17, "text", [], -0.5]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    for chunk in (1, 2, 3, 7, 50):
        monkeypatch.setattr(rows, "CHUNK", chunk)
        assert [one.value for one in read_rows(path)] == values


def test_a_line_beyond_all_measure_is_dropped_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "LONGEST_ROW", 100)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"a": "x" * 500}) + '\n{"a": 1}\n', encoding="utf-8")
    first, second = read_rows(path)
    assert isinstance(first.value, RowError) and first.place == f"{path}:1"
    assert (second.value, second.place) == ({"a": 1}, f"{path}:2")


# The audit


def test_the_audit_counts_every_fate(bench: Bench) -> None:
    long = " ".join(["word"] * 400)
    two = row(reply="A")["conversations"]
    bench.add("d", [row(), row(reply=long), {"conversations": [*two, *row(long, "B")["conversations"]]}, row(long), 3])
    data = bench.prepare(max_dropped=0.5, cutoff_len=128)
    counts = data.audit.datasets["d"]
    assert (counts.kept, counts.shortened, counts.lost_answer, counts.dropped, counts.rows) == (1, 1, 1, 2, 5)
    assert counts.tokens == sum(len(ids) for ids in data.train["input_ids"])
    assert [finding["outcome"] for finding in bench.findings()] == ["shortened", "lost_answer", "dropped", "dropped"]
    assert bench.findings()[0]["reason"].endswith("tokens past the cutoff of 128")
    assert bench.findings()[3]["excerpt"] == "3"


def test_turns_after_the_last_reply_are_accounted_for(bench: Bench) -> None:
    more = [{"from": "human", "value": "R"}, {"from": "human", "value": "S"}]
    short, long = row(), row(reply="word " * 400)
    bench.add("d", [{"conversations": one["conversations"] + more} for one in (short, long)])
    data = bench.prepare(cutoff_len=128)
    counts = data.audit.datasets["d"]
    assert (counts.kept, counts.shortened) == (0, 2)
    assert bench.findings()[0]["reason"] == "2 turns after the last reply"
    assert re.fullmatch(
        r"2 turns after the last reply and \d+ tokens past the cutoff of 128", bench.findings()[1]["reason"]
    )


def test_a_row_that_keeps_all_its_replies_silent_is_dropped_for_that(bench: Bench) -> None:
    """Also where it is cut, or only its last reply would be trained."""
    long, two = row("word " * 400), row()
    long["conversations"][1]["loss"] = False
    two["conversations"] = [*two["conversations"], *row()["conversations"]]
    two["conversations"][3]["loss"] = False
    bench.add("d", [row(), long, two])
    bench.prepare(max_dropped=0.7, mask_history=True, cutoff_len=128)
    assert [one["reason"] for one in bench.findings()] == ["no trained token: the last reply is kept silent"] * 2
    bench.prepare(max_dropped=0.7, cutoff_len=128)
    assert [one["reason"] for one in bench.findings()] == ["no trained token: every reply is kept silent"]


def test_a_reply_without_its_end_of_turn_is_dropped_in_whatever_row(bench: Bench) -> None:
    """Behind the rows that the gate looks at, too."""
    own = bench.tokenizer.chat_template
    try:
        bench.tokenizer.chat_template = str(own).replace(
            "message.content + '<|im_end|>'",
            "message.content + ('' if message.content == 'endless' else '<|im_end|>')",
        )
        assert bench.tokenizer.chat_template != own
        path = bench.add("d", [*numbered(40), row(reply="endless")])
        assert len(bench.prepare().train) == 40
    finally:
        bench.tokenizer.chat_template = own
    (finding,) = bench.findings()
    assert finding["place"] == f"{path}:41"
    assert finding["reason"] == "the template ends message 2 without its end-of-turn token"


def test_nothing_is_written_into_output_dir_before_there_is_a_run(chat_recipe: Recipe) -> None:
    """Not by --check, and not by a start that is refused."""
    kept = Path(chat_recipe.output_dir) / "row_audit.jsonl"
    kept.parent.mkdir()
    kept.write_text("of an earlier run")
    check(chat_recipe)
    with pytest.raises(DatasetError, match="1 of 11 rows dropped"):
        train(chat_recipe.model_copy(update={"max_dropped": 0.0}))
    assert kept.read_text() == "of an earlier run"
    evaluated = {"do_train": False, "do_eval": True, "dataset": [], "eval_dataset": ["d"]}
    assert train(chat_recipe.model_copy(update=evaluated)) == 0
    assert json.loads(kept.read_text())["outcome"] == "dropped"


def test_a_run_that_may_not_go_on_keeps_its_list_of_rows(tmp_path: Path, tiny_model: Path) -> None:
    folder = small_run.run(tmp_path, tiny_model, cutoff_len=80)
    before = (folder / "row_audit.jsonl").read_text()
    assert "past the cutoff of 80" in before
    manifest = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(manifest | {"status": "stopped"}))
    with pytest.raises(RecipeError, match="cutoff_len: 80 -> 70"):
        small_run.run(tmp_path, tiny_model, cutoff_len=70, overwrite_cache=True)
    assert (folder / "row_audit.jsonl").read_text() == before


def test_check_says_where_the_rows_lie_that_were_not_kept(
    chat_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    check(chat_recipe)
    start = "each row that was not simply kept is in "
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(start))
    assert json.loads(Path(line.removeprefix(start)).read_text())["place"].endswith("d.jsonl:11")
    check(chat_recipe.model_copy(update={"max_samples": 10}))
    assert start not in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_row_with_a_date_can_be_dropped(suffix: str, bench: Bench) -> None:
    strange = {"on": datetime(2026, 1, 2), "raw": b"\xff", "price": Decimal("1.5")}
    bench.add("d", [row(**strange), row(**strange) | {"conversations": []}], suffix)
    assert len(bench.prepare(max_dropped=0.5).train) == 1
    assert bench.findings()[0]["excerpt"].startswith('{"conversations": [], "on": "datetime.datetime(2026, 1, 2, ')


# Columns that the registry names

ALPACA = {"instruction": "Q", "input": "I", "output": "A"}


def test_a_named_column_that_no_row_has_is_refused(bench: Bench) -> None:
    bench.add("d", [ALPACA] * 3, formatting="alpaca", columns={"query": "inputt", "system": "sys_promt"})
    with pytest.raises(DatasetError) as error:
        bench.prepare()
    assert str(error.value).splitlines() == [
        f"{bench.folder / 'dataset_info.json'}:1: d: columns.{key}: expected a column {column!r}, found none in 3 rows; "
        "they have input, instruction, output; mend the name, or take the key out of columns"
        for key, column in (("query", "inputt"), ("system", "sys_promt"))
    ]
    assert not list(bench.folder.glob("cache/arpo_trl/*"))


def test_a_named_column_may_be_in_some_rows_alone(bench: Bench) -> None:
    """An Arrow file's column is there even if it is null in every row."""
    bench.add("d", [*numbered(2), row(sys="S"), row()], columns={"system": "sys"})
    assert len(bench.prepare(preprocessing_batch_size=1).train) == 4
    bench.add("e", [row(sys=None)] * 2, ".parquet", columns={"system": "sys"})
    assert len(bench.prepare(dataset=["e"]).train) == 2


def test_the_first_rows_of_a_dataset_are_not_judged_for_all_of_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.add("d", [*numbered(5), row(sys="S")], columns={"system": "sys"})
    assert len(bench.prepare(max_samples=3).train) == 3
    monkeypatch.setattr(cache, "ROWS_BEFORE_JUDGED", 4)
    with pytest.raises(DatasetError, match=r"columns.system: expected a column 'sys', found none in 4 rows"):
        bench.prepare(max_samples=4)


def test_a_stream_is_refused_for_a_named_column_once_it_is_judged(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.add("d", [*numbered(6), row(sys="S")], columns={"system": "sys"})
    keys: dict[str, Any] = {"streaming": True, "disable_shuffling": True, "preprocessing_batch_size": 1}
    assert len(list(bench.prepare(**keys).train)) == 7
    monkeypatch.setattr(dataset, "ROWS_BEFORE_JUDGED", 3)
    with pytest.raises(DatasetError, match=r"columns.system: expected a column 'sys', found none in 3 rows"):
        list(bench.prepare(**keys).train)


# Several datasets


def test_datasets_are_joined_in_their_order_and_cut_to_max_samples(bench: Bench) -> None:
    bench.add("a", numbered(3))
    bench.add("b", numbered(3, start=10))
    assert bench.replies(bench.prepare(max_samples=2).train) == answers(0, 1, 10, 11)
    assert bench.replies(bench.prepare(dataset=["b", "a"], max_samples=1).train) == answers(10, 0)


def test_interleaving_stops_with_the_shortest_or_with_the_longest(bench: Bench) -> None:
    bench.add("a", numbered(4))
    bench.add("b", numbered(2, start=10))
    under = bench.replies(bench.prepare(mix_strategy="interleave_under").train)
    assert under == answers(0, 10, 1, 11)
    over = bench.replies(bench.prepare(mix_strategy="interleave_over").train)
    assert set(over) == set(answers(0, 1, 2, 3, 10, 11)) and len(over) == 8
    keys: dict[str, Any] = {"mix_strategy": "interleave_over", "interleave_probs": [0.9, 0.1]}
    shares = bench.replies(bench.prepare(**keys).train)
    assert shares == bench.replies(bench.prepare(**keys).train)
    assert shares != bench.replies(bench.prepare(**keys, seed=1).train)


def test_num_samples_are_drawn_at_random_and_again_if_there_are_fewer(bench: Bench) -> None:
    bench.add("a", numbered(5), num_samples=3)
    bench.add("b", numbered(2, start=10), num_samples=5)
    drawn = bench.replies(bench.prepare().train)
    assert len(set(drawn[:3])) == 3 and set(drawn[:3]) <= set(answers(*range(5)))
    assert sorted(drawn[3:]) in (sorted(answers(10, 10, 11, 11, last)) for last in (10, 11))
    assert drawn == bench.replies(bench.prepare().train)
    assert drawn != bench.replies(bench.prepare(seed=7).train)
    assert len(bench.prepare(max_samples=1).train) == 2


@pytest.mark.parametrize(("val_size", "held_out"), [(0.25, 2), (3, 3)])
def test_val_size_is_a_share_or_a_number(val_size: float, held_out: int, bench: Bench) -> None:
    bench.add("a", numbered(8))
    data = bench.prepare(val_size=val_size)
    train, held = bench.replies(data.train), bench.replies(data.eval["validation"])
    assert len(held) == held_out and sorted(train + held) == answers(*range(8))
    assert held == bench.replies(bench.prepare(val_size=val_size).eval["validation"])


def test_a_val_size_of_all_rows_is_refused(bench: Bench) -> None:
    bench.add("a", numbered(3))
    with pytest.raises(DatasetError, match="val_size: 5 of 3 rows leaves nothing on one side"):
        bench.prepare(val_size=5)


def test_eval_datasets_keep_their_names(bench: Bench) -> None:
    bench.add("a", numbered(2))
    bench.add("b", numbered(1, start=10))
    data = bench.prepare(dataset=["a"], eval_dataset=["b"])
    assert bench.replies(data.train) == answers(0, 1)
    assert {name: bench.replies(rows) for name, rows in data.eval.items()} == {"b": answers(10)}
    assert set(data.fingerprints) == {"a", "b"}
    assert len(bench.prepare(dataset=[], eval_dataset=["b"]).train) == 0


# Kept encodings


def test_rows_are_encoded_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.add("d", [*numbered(3), 3])
    keys: dict[str, Any] = {"max_dropped": 0.5}
    first = bench.prepare(**keys)
    (bench.folder / "out" / "row_audit.jsonl").unlink()
    monkeypatch.setattr(cache, "encode_rows", None)
    second = bench.prepare(**keys)
    assert second.train[:] == first.train[:] and second.audit == first.audit
    assert len(bench.findings()) == 1
    with pytest.raises(TypeError):
        bench.prepare(**keys, overwrite_cache=True)
    with pytest.raises(TypeError):
        bench.prepare(**keys, mask_history=True)


def test_a_changed_file_is_encoded_again(bench: Bench) -> None:
    bench.add("d", numbered(1))
    first = bench.prepare()
    bench.add("d", numbered(1, start=7))
    second = bench.prepare()
    assert bench.replies(second.train) == answers(7)
    assert first.fingerprints != second.fingerprints


def test_tokenized_path_is_written_once_and_refused_when_what_is_behind_it_changed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.add("d", numbered(2))
    path = bench.folder / "tokenized"
    keys: dict[str, Any] = {"tokenized_path": str(path)}
    assert bench.replies(bench.prepare(**keys).train) == answers(0, 1)
    with monkeypatch.context() as context:
        context.setattr(cache, "encode_rows", None)
        assert bench.replies(bench.prepare(**keys).train) == answers(0, 1)
    with pytest.raises(DatasetError) as error:
        bench.prepare(**keys, cutoff_len=100)
    assert str(error.value) == (
        f"tokenized_path: {path / 'd'} was made with another cutoff_len; set overwrite_cache: true to make it again, "
        "or name another tokenized_path"
    )
    bench.add("d", numbered(2, start=5))
    own = bench.tokenizer.chat_template
    try:
        bench.tokenizer.chat_template = str(own).replace("You are Qwen", "You are")
        with pytest.raises(DatasetError, match="was made with another data and another template;"):
            bench.prepare(**keys)
    finally:
        bench.tokenizer.chat_template = own
    assert bench.replies(bench.prepare(**keys, overwrite_cache=True).train) == answers(5, 6)


def test_a_tokenized_path_needs_no_raw_data(bench: Bench) -> None:
    path = bench.add("d", numbered(2))
    keys: dict[str, Any] = {"tokenized_path": str(bench.folder / "tokenized")}
    first = bench.prepare(**keys)
    path.unlink()
    second = bench.prepare(**keys)
    assert second.train[:] == first.train[:] and second.fingerprints == first.fingerprints
    with pytest.raises(DatasetError, match="was made with another mask_history"):
        bench.prepare(**keys, mask_history=True)


def test_a_folder_that_is_not_ours_is_no_tokenized_path(bench: Bench) -> None:
    bench.add("d", numbered(2))
    (bench.folder / "theirs" / "d").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"not written by arpo_trl \(no prepared.json\)"):
        bench.prepare(tokenized_path=str(bench.folder / "theirs"))


def test_a_folder_that_is_not_ours_is_never_replaced(bench: Bench) -> None:
    bench.add("d", numbered(2))
    (bench.folder / "theirs" / "d").mkdir(parents=True)
    (bench.folder / "theirs" / "d" / "precious.txt").touch()
    with pytest.raises(DatasetError, match=r"not written by arpo_trl \(no prepared.json\)"):
        bench.prepare(tokenized_path=str(bench.folder / "theirs"), overwrite_cache=True)
    assert (bench.folder / "theirs" / "d" / "precious.txt").exists()


@pytest.mark.parametrize("left", [None, "", "{}"])
def test_half_a_folder_in_the_cache_counts_as_none(left: str | None, bench: Bench) -> None:
    """As a kill within a removal leaves it: rows.arrow may be there or not."""
    bench.add("d", numbered(2))
    bench.prepare()
    (prepared,) = bench.folder.glob("cache/arpo_trl/*/prepared.json")
    prepared.unlink()
    if left is not None:
        prepared.write_text(left)
    assert bench.replies(bench.prepare().train) == answers(0, 1)
    assert [path.name for path in prepared.parent.parent.iterdir()] == [prepared.parent.name]


def test_what_dead_runs_left_is_removed_after_a_day(bench: Bench) -> None:
    beside = bench.folder / "tokenized"
    for name in ("d.unfinished-dead", "d.unfinished-alive", "d.unfinished-busy", "d.123", "notes"):
        (beside / name).mkdir(parents=True)
        (beside / name / "rows.arrow").touch()
    yesterday = time.time() - 25 * 3600
    for path in [*beside.glob("*/rows.arrow"), *beside.iterdir()]:
        if path.parent.name != "d.unfinished-busy" and path.name != "d.unfinished-alive":
            os.utime(path, (yesterday, yesterday))
    bench.add("d", numbered(2))
    bench.prepare(tokenized_path=str(beside))
    assert sorted(path.name for path in beside.iterdir()) == [
        "d",
        "d.123",
        "d.unfinished-alive",
        "d.unfinished-busy",
        "notes",
    ]


def test_other_code_encodes_again(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit changes no version."""
    bench.add("d", numbered(2))
    keys = {"tokenized_path": str(bench.folder / "tokenized")}
    first = bench.prepare()
    bench.prepare(**keys)
    source = tmp_path / "source"
    shutil.copytree(Path(cache.__file__).parent, source)
    hashes = {cache.hash_of_sources()}
    monkeypatch.setattr(cache, "files", lambda _: source)
    for name in ("files", "messages", "tokenizer", "labels", "encode"):
        with (source / f"{name}.py").open("a") as file:
            file.write("# an edit")
        hashes.add(cache.hash_of_sources.__wrapped__())
    assert len(hashes) == 6
    monkeypatch.setattr(cache, "hash_of_sources", lambda: "another")
    with pytest.raises(DatasetError, match="was made with another arpo_trl; set overwrite_cache: true"):
        bench.prepare(**keys)
    assert bench.prepare().train[:] == first.train[:]
    assert len(list(bench.folder.glob("cache/arpo_trl/d-*"))) == 2


# Workers, processes, streams


def test_any_number_of_workers_gives_the_same_rows(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.add("d", [*numbered(50), 3, *numbered(50, start=50)])
    one = bench.prepare()
    monkeypatch.setattr(cache, "PROCESSES_PAY_FROM", 0)
    pids: set[int] = set()

    def watched(*args: Any) -> Any:
        for batch in encode_rows(*args):
            pids.update(child.pid for child in multiprocessing.active_children() if child.pid)
            yield batch

    monkeypatch.setattr(cache, "encode_rows", watched)
    two = bench.prepare(preprocessing_num_workers=2, preprocessing_batch_size=7, overwrite_cache=True)
    assert one.train[:] == two.train[:] and one.audit == two.audit
    assert len(pids) == 2


def test_several_processes_encode_also_a_dataset_of_the_hub(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    (bench.folder / "repo").mkdir()
    write(bench.folder / "repo" / "train.jsonl", numbered(20))
    bench.register("d", hf_hub_url=str(bench.folder / "repo"))
    seen = []

    def watched(*args: Any) -> Any:
        for batch in encode_rows(*args):
            seen.append(len(multiprocessing.active_children()))
            yield batch

    monkeypatch.setattr(cache, "encode_rows", watched)
    monkeypatch.setattr(cache, "PROCESSES_PAY_FROM", 500)
    data = bench.prepare(preprocessing_num_workers=2, preprocessing_batch_size=3)
    assert bench.replies(data.train) == answers(*range(20)) and seen[0] == 2
    seen.clear()
    monkeypatch.setattr(cache, "PROCESSES_PAY_FROM", 50_000)
    bench.prepare(preprocessing_num_workers=2, overwrite_cache=True)
    assert seen == [0]


RANK = """
import json, sys
from pathlib import Path
from accelerate import PartialState
from transformers import AutoTokenizer
from arpo_trl.data import cache
from arpo_trl.data import prepare as dataset
from arpo_trl.recipe import Recipe

model, folder = sys.argv[1:]
state = PartialState(cpu=True)
if not state.is_main_process:
    cache.encode_rows = None  # only the main process may need it
recipe = Recipe(model_name_or_path=model, dataset=["d"], dataset_dir=folder, output_dir=f"{folder}/out", overwrite_cache=True)
data = dataset.prepare_datasets(recipe, AutoTokenizer.from_pretrained(model))
Path(folder, f"rank{state.process_index}.json").write_text(json.dumps(data.train[:]))
state.destroy_process_group()
"""


def run_ranks(bench: Bench, script: str, *args: str, **per_rank: tuple[str, str]) -> None:
    """Two processes of one run; `per_rank` are environment variables."""
    (bench.folder / "rank.py").write_text(script, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(bench.folder / "rank.py"), *args]
    own = [{name: values[rank] for name, values in per_rank.items()} for rank in (0, 1)]
    ranks = [subprocess.Popen(command, env={**os.environ, **world, **env}) for env in own]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]


def test_on_two_processes_the_main_one_prepares_and_the_other_reads(bench: Bench, tiny_model: Path) -> None:
    bench.add("d", numbered(5))
    cached = (str(bench.folder / "cache"),) * 2
    ranks = ("0", "1")
    run_ranks(bench, RANK, str(tiny_model), str(bench.folder), RANK=ranks, LOCAL_RANK=ranks, HF_DATASETS_CACHE=cached)
    first, second = (json.loads((bench.folder / f"rank{rank}.json").read_text()) for rank in "01")
    assert first == second and len(first["labels"]) == 5


NODE = """
import json, os, sys
from pathlib import Path
from accelerate import PartialState
from transformers import AutoTokenizer
from arpo_trl.data.prepare import prepare_datasets
from arpo_trl.recipe import Recipe

model, folder = sys.argv[1:]
state = PartialState(cpu=True)
os.chdir(os.environ["DISK"])
recipe = Recipe(model_name_or_path=model, dataset=["d"], dataset_dir=folder, output_dir="out", overwrite_cache=True,
                tokenized_path="tokenized", cutoff_len=200)
prepare_datasets(recipe, AutoTokenizer.from_pretrained(model))
state.destroy_process_group()
"""


def test_each_node_without_a_shared_disk_encodes_again(bench: Bench, tiny_model: Path) -> None:
    """Also where the second one's tokenized_path is stale, which only the first one's is not."""
    bench.add("d", numbered(5))
    disks = [bench.folder / "first", bench.folder / "second"]
    bench.prepare(tokenized_path=str(disks[0] / "tokenized"), cutoff_len=200)
    bench.prepare(tokenized_path=str(disks[1] / "tokenized"), cutoff_len=100)
    first, second = (disk / "tokenized" / "d" / "prepared.json" for disk in disks)
    before = first.read_text()
    run_ranks(
        bench,
        NODE,
        str(tiny_model),
        str(bench.folder),
        RANK=("0", "1"),
        LOCAL_RANK=("0", "0"),
        DISK=(str(disks[0]), str(disks[1])),
    )
    assert first.read_text() == second.read_text() != before


RACE = """
import json, sys, time
from pathlib import Path
from transformers import AutoTokenizer
from arpo_trl.data.prepare import prepare_datasets
from arpo_trl.recipe import Recipe

model, folder, me, other = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
for number in range(1, 21):
    Path(folder, f"{me}.{number}").touch()
    end = time.monotonic() + 60
    while not Path(folder, f"{other}.{number}").exists():
        assert time.monotonic() < end, "the other one has died"
    # Odd turns: a name that neither has encoded. Even turns: one that both encode again.
    keys = {"max_samples": number} if number % 2 else {"tokenized_path": f"{folder}/tokenized", "overwrite_cache": True}
    recipe = Recipe(model_name_or_path=model, dataset=["d"], dataset_dir=folder, output_dir="out", **keys)
    rows = prepare_datasets(recipe, tokenizer).train[:]
    assert len(rows["labels"]) == keys.get("max_samples", 40), number
"""


def test_two_runs_may_encode_the_same_data_at_once(bench: Bench, tiny_model: Path) -> None:
    bench.add("d", numbered(40))
    (bench.folder / "race.py").write_text(RACE, encoding="utf-8")
    environment = {**os.environ, "HF_DATASETS_CACHE": str(bench.folder / "cache")}
    command = [sys.executable, str(bench.folder / "race.py"), str(tiny_model), str(bench.folder)]
    runs = [subprocess.Popen([*command, *names], env=environment) for names in ("ab", "ba")]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    assert not [*bench.folder.glob("cache/arpo_trl/*.unfinished-*"), *bench.folder.glob("tokenized/*.unfinished-*")]


def test_a_stream_gives_the_same_rows_and_counts_them_once(bench: Bench) -> None:
    bench.add("a", [*numbered(4), 3])
    bench.add("b", numbered(2, start=10))
    data = bench.prepare(streaming=True, disable_shuffling=True, max_dropped=0.5)
    assert bench.replies(data.train) == answers(0, 1, 2, 3, 10, 11)
    assert bench.replies(data.train) == answers(0, 1, 2, 3, 10, 11)
    assert data.audit.datasets["a"].rows == 5 and len(bench.findings()) == 1
    mixed = bench.prepare(
        streaming=True, disable_shuffling=True, max_dropped=0.5, mix_strategy="interleave_under", val_size=1
    )
    assert bench.replies(mixed.eval["validation"]) == answers(0)
    assert bench.replies(mixed.train) == answers(10, 1, 11)


def test_a_stream_stops_when_too_many_rows_are_dropped(bench: Bench) -> None:
    bench.add("a", [*numbered(4), 3])
    data = bench.prepare(streaming=True, disable_shuffling=True)
    with pytest.raises(DatasetError, match="1 of 5 rows dropped"):
        list(data.train)


def test_a_stream_lists_its_rows_once_there_is_a_run(bench: Bench) -> None:
    """Also those that were read before it, to hold rows out."""
    bench.add("a", [3, *numbered(3), "text"])
    data = prepare_datasets(
        bench.recipe(streaming=True, disable_shuffling=True, max_dropped=0.5, val_size=2), bench.tokenizer
    )
    assert not (bench.folder / "out").exists()
    data.write_audit(bench.folder / "out" / "row_audit.jsonl")
    assert [one["excerpt"] for one in bench.findings()] == ["3", '"text"']
    assert bench.replies(data.train) == answers(2) and len(bench.findings()) == 2


def test_a_stream_is_not_evaluated_on(bench: Bench) -> None:
    bench.add("a", numbered(2))
    with pytest.raises(DatasetError) as error:
        bench.prepare(streaming=True, eval_dataset=["a"])
    assert str(error.value) == (
        "eval_dataset: a: is streamed, since dataset names it too; hold rows out with val_size"
    )
    assert len(bench.prepare(eval_dataset=["a"]).eval["a"]) == 2


def test_an_unknown_name_is_told_with_its_key(bench: Bench) -> None:
    bench.add("a", numbered(2))
    with pytest.raises(DatasetError) as error:
        bench.prepare(dataset=["x"], eval_dataset=["a", "y"])
    there = f"no such dataset in {bench.folder}/dataset_info.json; there are a"
    assert str(error.value).splitlines() == [f"dataset: x: {there}", f"eval_dataset: y: {there}"]


def test_the_gate_stands_before_every_dataset(bench: Bench) -> None:
    path = bench.add("a", numbered(1))
    own = bench.tokenizer.eos_token
    try:
        bench.tokenizer.eos_token = "<|endoftext|>"
        with pytest.raises(DatasetError) as error:
            bench.prepare()
    finally:
        bench.tokenizer.eos_token = own
    assert str(error.value).startswith(f"{path}:1: the gate before training stopped here: a turn does not end in")
