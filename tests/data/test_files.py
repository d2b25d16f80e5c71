"""From files to rows: every row is accounted for, whatever its file and its neighbours."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from bench import GOOD, Bench, answers, numbered, row, write

from arpo_trl.data import cache, files
from arpo_trl.data.files import fingerprint, read_dataset, read_rows
from arpo_trl.data.registry import DatasetInfo
from arpo_trl.errors import DatasetError, RowError


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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX only")
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
    os.mkfifo(folder / "d.jsonl")  # reading it would wait for ever
    with pytest.raises(DatasetError, match=r"expected only .* files, found c.json.gz, d.jsonl"):
        bench.prepare()


def test_a_json_file_may_hold_a_row_a_line(bench: Bench) -> None:
    bench.add("d", write(bench.folder / "x.jsonl", numbered(2)).read_bytes(), ".json")
    assert bench.replies(bench.prepare().train) == answers(0, 1)


def test_glob_characters_are_a_name_and_dots_may_leave_the_folder(bench: Bench) -> None:
    inner = bench.folder / "inner"
    inner.mkdir()
    name = "a[1].jsonl" if sys.platform == "win32" else "a[1]*.jsonl"  # Windows allows no asterisk
    write(bench.folder / name, numbered(1))
    (inner / "dataset_info.json").write_text(
        json.dumps({"d": {"file_name": f"../{name}", "formatting": "sharegpt"}}), encoding="utf-8"
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
    with pytest.raises(DatasetError, match=r"dataset_info.json: d: .* cannot be loaded"):
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

BROKEN_LINES: dict[str, tuple[bytes, str]] = {
    "not JSON": (b'{"conversations": [}', "not JSON (Expecting value at column 20): '{\"conversations\": [}'"),
    "cut off": (GOOD[:30], "not JSON ("),
    "two rows on a line": (GOOD + b" " + GOOD, "not JSON (Extra data at column"),
    "not UTF-8": (GOOD.replace(b"Q", b"\xff"), "not UTF-8 (byte 48 of the line)"),
    "UTF-16": (GOOD.decode().encode("utf-16"), "not UTF-8 (byte 1 of the line)"),
    "half a surrogate pair": (GOOD.replace(b"Q", b"\\ud83d"), "not UTF-8: the text contains a lone surrogate"),
    "nested too deeply": (b"[" * 100_000, "unsupported JSON (nested too deeply)"),
    "nested too deeply to walk": (b"[" * 900 + b"]" * 900, "unsupported JSON (nested too deeply)"),
    "a number without end": (b"9" * 5000, "unsupported JSON (a number with 5,000 digits)"),
    "a number": (b"7", "expected an object, found a number"),
    "an unknown role": (
        GOOD.replace(b"human", b"person"),
        "unknown role: conversations[0] is from 'person', expected one of",
    ),
    "no reply that trains": (
        GOOD.replace(b'"A"', b'"A", "loss": false'),
        "no trained token: every reply has loss: false",
    ),
    "all trained tokens are past cutoff_len": (
        GOOD.replace(b'"Q"', b'"' + b"Q " * 999 + b'"'),
        "all trained tokens are past cutoff_len",
    ),
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
        "d: 4,000 rows: 3,999 intact, 0 shortened, 0 truncated before the final answer, 1 dropped; "
        f"{data.audit.datasets['d'].tokens:,} tokens, {data.audit.datasets['d'].trained_tokens:,} trained"
    ]


BROKEN_FILES: dict[str, tuple[str, bytes, str]] = {
    "a broken element": (
        ".json",
        b'[\n {"a": 1},\n {"a": 2,\n  "b" 3},\n {"a": 4, "c": "a long text, so that the end is far away"}]',
        "4: not JSON (Expecting ':' delimiter in the row that starts at line 3, near '",
    ),
    "a comma missing": (
        ".json",
        b"[{}\n{}]",
        r"2: not JSON (Expecting a comma or the end of the array, near '[{}\n{}]')",
    ),
    "an end missing": (
        ".json",
        b"[{},",
        "1: not JSON (Expecting value in the row that starts at line 1, near '[{},'), so the rest can't be read",
    ),
    "something after": (".json", b"[{}]\n[{}]", r"2: not JSON (Expecting nothing after the array, near '[{}]\n[{}]')"),
    "a comma too many": (
        ".json",
        b"[{},]",
        "1: not JSON (Expecting value in the row that starts at line 1, near '[{},]')",
    ),
    "nested without end": (".json", b"[\n" + b"[" * 10**6, "2: not JSON (Nested too deeply, near '"),
    "no array": (".json", b'"x"', "1: not JSON (Expecting an array of rows, near '\"x\"')"),
    "a quote never closed": (
        ".csv",
        b'a,b\n"1,2\n3,4\n',
        "3: not CSV (unexpected end of data); look for an unclosed quote in this or an earlier row",
    ),
    "no parquet": (".parquet", b"PAR1 or so", "1: cannot be read ("),
    "no arrow": (".arrow", b"ARROW1 or so", "1: cannot be read ("),
}


@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_a_broken_file_is_an_error_with_its_line(kind: str, bench: Bench) -> None:
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
    "an unknown name": (
        {"dataset": ["nope"]},
        "dataset: nope: no such dataset in {0}{1}dataset_info.json; expected d",
    ),
    "a path of no file": (
        {"dataset": ["none.jsonl"]},
        "dataset: none.jsonl: no such file, and no such dataset in {0}{1}dataset_info.json; expected d",
    ),
    "an empty file": ({"file_name": "empty.jsonl"}, "d: no rows"),
    "a missing file": ({"file_name": "none.jsonl"}, "{0}{1}none.jsonl: no such file"),
    "a file of another kind": (
        {"file_name": "d.txt"},
        "{0}{1}d.txt: expected one of .json, .jsonl, .csv, .parquet, .arrow, found .txt",
    ),
    "an empty folder": (
        {"file_name": "folder"},
        "{0}{1}folder: expected only .json, .jsonl, .csv, .parquet, .arrow files, found none",
    ),
    "a loading script": (
        {"script_url": "s.py"},
        "{0}{1}dataset_info.json: d.script_url: loading scripts are not supported by datasets >= 4; set hf_hub_url "
        "or file_name",
    ),
}


@pytest.mark.parametrize("kind", MISSING)
def test_missing_data_is_an_error_of_one_line(kind: str, bench: Bench) -> None:
    keys, message = MISSING[kind]
    (bench.folder / "empty.jsonl").touch()
    (bench.folder / "d.txt").touch()
    (bench.folder / "folder").mkdir()
    bench.add("d", numbered(1))
    if "dataset" not in keys:
        bench.register("d", **keys)
    with pytest.raises(DatasetError) as error:
        bench.prepare(dataset=keys.get("dataset", ["d"]))
    assert str(error.value) == message.format(bench.folder, os.sep)


def test_rows_on_one_line_have_their_column(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, {"a": 2},\n{"a": 3}]', encoding="utf-8")
    assert [one.place for one in read_rows(path)] == [f"{path}:1", f"{path}:1:12", f"{path}:2"]


def test_only_an_element_that_python_rejects_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(f'[{{"a": {"9" * 5000}}}, {"[" * 200 + "]" * 200}, {{"a": 1}}]', encoding="utf-8")
    number, deep, good = (one.value for one in read_rows(path))
    assert str(number) == "unsupported JSON (a number with 5,000 digits)"
    assert str(deep) == "unsupported JSON (nested too deeply)"
    assert good == {"a": 1}


def test_an_array_may_be_written_in_any_way(tmp_path: Path) -> None:
    values = [{"n": 12345, "t": True, "s": 'a "quote" \\ \u1234 日本\n', "l": [1.5e10, None]}, 17, "text", [], -0.5]
    path = tmp_path / "a.json"
    for indent, bom, ends in ((None, "", "\n"), (1, "\ufeff", "\r\n")):
        text = bom + "\n" + json.dumps(values, indent=indent, ensure_ascii=not bom) + " \n"
        path.write_text(text, encoding="utf-8", newline=ends)
        assert [one.value for one in read_rows(path)] == values
    assert [one.place for one in read_rows(path)] == [f"{path}:{line}" for line in (3, 12, 13, 14, 15)]


def test_only_an_oversized_line_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST_ROW", 100)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"a": "x" * 500}) + '\n{"a": 1}\n', encoding="utf-8")
    first, second = read_rows(path)
    assert isinstance(first.value, RowError) and first.place == f"{path}:1"
    assert (second.value, second.place) == ({"a": 1}, f"{path}:2")


DAMAGED = """
import random, sys
from pathlib import Path
from arpo_trl.data.files import read_rows
from arpo_trl.errors import DatasetError, RowError

for path in map(Path, sys.argv[2:]):
    whole, chance, ends = path.read_bytes(), random.Random(0), {"rows": 0, "refused": 0}
    for _ in range(int(sys.argv[1])):
        damaged = bytearray(whole)
        for _ in range(chance.choice((1, 1, 1, 3, 20))):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged[: chance.choice((len(damaged), len(damaged), chance.randrange(len(damaged))))])
        try:
            ends["rows"] += all(isinstance(row.value, (dict, RowError)) for row in read_rows(path))
        except DatasetError as error:
            assert str(error).startswith(f"{path}:") and "\\n" not in str(error), error
            ends["refused"] += 1
    print(ends["rows"], ends["refused"])
"""


def test_a_corrupt_file_gives_rows_or_an_error(tmp_path: Path) -> None:
    """Without a check of its buffers, pyarrow ends the process on some of them."""
    rows = [row(f"Question {n}", more=n / 3, system="s" if n % 2 else None) for n in range(20)]
    paths = [write(tmp_path / name, rows) for name in ("stream.arrow", "rows.parquet", "file.arrow")]
    table = pa.ipc.open_stream(paths[0].read_bytes()).read_all()
    with pa.OSFile(str(paths[2]), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    command = [sys.executable, "-c", DAMAGED, "200", *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        kept, refused = map(int, line.split())
        assert kept + refused == 200 and kept > 10 and refused > 50
    assert len(done.stdout.splitlines()) == len(paths)


def test_a_file_with_a_duplicate_column_is_an_error(tmp_path: Path) -> None:
    """Of two columns of one name the last would be read, and nobody would know."""
    for path in (tmp_path / "a.csv", tmp_path / "a.arrow"):
        if path.suffix == ".csv":
            path.write_text("instruction,output,output\nQ,A,B\n")
        else:
            table = pa.table([["Q"], ["A"], ["B"]], names=["instruction", "output", "output"])
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
        with pytest.raises(DatasetError) as error:
            list(read_rows(path))
        assert str(error.value) == f"{path}: duplicate column 'output'; rename or remove one"


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet", ".arrow"])
@pytest.mark.parametrize("how", ["it grows", "it is replaced", "it is gone"])
def test_a_file_that_changes_while_it_is_read_is_noticed(suffix: str, how: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    if sys.platform == "win32" and how != "it grows" and suffix != ".json":
        pytest.skip("Windows removes no open file")
    if suffix == ".csv":
        path.write_text("a,b\n" + "1,2\n" * 1000)
    else:
        write(path, [{"a": n} for n in range(1000)])
    lines = read_rows(path)
    next(lines)
    if how == "it grows":
        with path.open("ab") as file:
            file.write(b"\n")
    else:
        whole = path.read_bytes()
        path.unlink()
        if how == "it is replaced":
            (tmp_path / "other").touch()  # takes the number of the file that went
            path.write_bytes(whole)
    with pytest.raises(DatasetError) as error:
        list(lines)
    reason = "cannot be read" if how == "it is gone" else "changed while it was read; start again"
    assert str(error.value).startswith(f"{path}: ") and reason in str(error.value)


def test_a_file_that_changes_between_its_hash_and_its_rows_is_noticed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the cache would keep the new rows under the old content's name."""
    path = bench.add("d", numbered(2))
    hashed = cache.fingerprint

    def hash_then_replace(info: Any, streaming: bool) -> str:
        found = hashed(info, streaming)
        write(path, numbered(2, start=7))
        return found

    monkeypatch.setattr(cache, "fingerprint", hash_then_replace)
    with pytest.raises(DatasetError, match=r"d.jsonl: changed while it was read; start again"):
        bench.prepare()
    monkeypatch.undo()


SPLITS = {
    "train[:2]": [0, 1],
    "train[2:4]": [2, 3],
    "train[-2:]": [4, 5],
    "train[50%:]": [3, 4, 5],
    "train[:1]+train[5:]": [0, 5],
    "train[4:]+train[:1]": [4, 5, 0],
    "train": [0, 1, 2, 3, 4, 5],
}


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_of_a_file_has_the_rows_that_datasets_selects(split: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"n": number} for number in range(6)])
    info = DatasetInfo(file_name=str(path), split=split)
    for streaming in (False, True):
        assert [one.value["n"] for one in read_dataset(info, streaming)] == SPLITS[split]
    assert (fingerprint(info, False) == fingerprint(DatasetInfo(file_name=str(path)), False)) == (split == "train")
    theirs = datasets.load_dataset("json", data_files=str(path), split=split, cache_dir=str(tmp_path / "cache"))
    assert theirs["n"][:] == SPLITS[split]


def test_an_invalid_split_is_an_error_of_one_line(tmp_path: Path) -> None:
    path, registry = write(tmp_path / "a.jsonl", [{"n": 1}]), tmp_path / "dataset_info.json"
    for split in ("train[a]", "train[:200%]", "train[1:2:3]"):
        with pytest.raises(DatasetError, match=r"dataset_info.json: d.split: [^\n]+$"):
            list(read_dataset(DatasetInfo.read("d", registry, {"file_name": path.name, "split": split}), False))


def test_nulls_of_the_row_stay_and_nulls_added_by_arrow_are_removed(bench: Bench) -> None:
    """`datasets` types objects of different keys as JSON and keeps what they hold; a struct it fills with nulls."""
    calls = [{"function": {"name": "f", "arguments": given}} for given in ({"city": None, "n": 5}, {"x": [None]})]
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "", "tool_calls": calls}]
    folder = bench.folder / "repo"
    folder.mkdir()
    write(folder / "train.jsonl", [{"messages": turns}, {"messages": turns[:1]}])
    loaded = datasets.load_dataset(str(folder), split="train")
    loaded.to_parquet(str(bench.folder / "a.parquet"))
    loaded.save_to_disk(str(bench.folder / "saved"))
    (saved,) = (bench.folder / "saved").glob("*.arrow")
    hub = DatasetInfo(hf_hub_url=str(folder))
    for rows in (
        read_rows(folder / "train.jsonl"),
        read_rows(bench.folder / "a.parquet"),
        read_rows(saved),
        read_dataset(hub, streaming=False),
        read_dataset(hub, streaming=True),
    ):
        assert [one.value for one in rows] == [{"messages": turns}, {"messages": turns[:1]}]


@pytest.mark.parametrize("text", ["\ufeff{0}\r\n\ufeff{0}\r\n", "{0}\n\n \t{0}  \n\n", "{0}\n{0}"])
def test_byte_order_marks_and_line_ends_are_not_part_of_a_row(text: str, tmp_path: Path) -> None:
    for suffix in (".jsonl", ".json"):
        path = tmp_path / f"a{suffix}"
        path.write_text(text.replace("{0}", '{"a": "\\u0000\u2028"}'), encoding="utf-8", newline="")
        assert [one.value for one in read_rows(path)] == [{"a": "\x00\u2028"}] * 2
