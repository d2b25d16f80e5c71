"""Files -> rows, one at a time, each with its line. Only rows of Arrow files pass through Arrow.

Arrow would give every object the keys of all others, filled with nulls, and would lose the line numbers. Memory is bounded
for files of any size, except .json, whose text is loaded completely.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain, count, islice
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import DatasetError, RowError, in_one_line, reason
from .registry import DatasetInfo
from .strict_json import decode_json, parse_json

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset, IterableDataset

LONGEST_ROW = 64 << 20
ROWS_AT_ONCE = 256
Lines = Iterator[tuple[int | str, object]]


class Row(NamedTuple):
    """A row and its location. `value` is a RowError if the row can't be read."""

    place: str
    value: object


def find_files(path: Path) -> list[Path]:
    """Return the file, or the data files of a folder, sorted by name. Raises DatasetError if there are none."""
    kinds = ", ".join(READERS)
    if path.is_dir():
        inside = [file for file in sorted(path.iterdir()) if not _is_about_data(file)]
        others = [file.name for file in inside if not file.is_file() or file.suffix.lower() not in READERS]
        if others or not inside:
            raise DatasetError(f"{path}: expected only {kinds} files, found {', '.join(others[:5]) or 'none'}")
        return inside
    if not path.is_file():
        raise DatasetError(f"{path}: no such file")
    if path.suffix.lower() not in READERS:
        raise DatasetError(f"{path}: expected one of {kinds}, found {path.suffix or 'no suffix'}")
    return [path]


def _is_about_data(file: Path) -> bool:
    if file.suffix.lower() in READERS:
        return file.name.startswith(".") or file.name == "dataset_info.json"
    return re.match(r"[._]|readme|license", file.name, re.IGNORECASE) is not None


def read_rows(path: Path) -> Iterator[Row]:
    """Read the rows of one file, in order. Raises DatasetError if it can't be read, or changes while it is read."""
    try:
        before = _stamp(path.stat())
        for line, value in READERS[path.suffix.lower()](path):
            yield Row(f"{path}:{line}", value)
        after = _stamp(path.stat())
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({reason(error)})") from None
    if after != before:
        raise _changed(path)


_stamp = attrgetter("st_ino", "st_size", "st_mtime_ns")


def _changed(what: Path | str) -> DatasetError:
    return DatasetError(f"{what}: changed while it was read; start again once nothing writes to it")


def read_dataset(info: DatasetInfo, streaming: bool) -> Iterator[Row]:
    """Read the rows of a dataset lazily. Raises DatasetError if it is missing."""
    if info.path:
        files = find_files(info.path)
        return chain.from_iterable(map(read_rows, files)) if info.split == "train" else _read_part(files, info)
    tables = _load_hub(info, streaming).with_format("arrow").iter(ROWS_AT_ONCE)
    values = chain.from_iterable(map(_to_values, tables))
    return (Row(f"{info.hf_hub_url}:{number}", value) for number, value in enumerate(values, 1))


def estimate_rows(info: DatasetInfo) -> int:
    """Return about how many rows a dataset has, without parsing them, for a progress bar; 0 if unknown.

    A JSON row has the column of its messages once: quotes inside a text are escaped.
    """
    if info.path is None:
        return len(_load_hub(info, streaming=False))
    import pyarrow.parquet

    column = f'"{info.columns.get("messages") or info.columns.get("prompt")}"'.encode()
    rows = 0
    for path in find_files(info.path):
        if path.suffix.lower() == ".parquet":
            with suppress(pyarrow.ArrowException):  # reported where it is read
                rows += pyarrow.parquet.read_metadata(path).num_rows
        elif path.suffix.lower() != ".arrow":
            with path.open("rb") as file:
                rows += sum(line.count(b"\n" if path.suffix.lower() == ".csv" else column) for line in file)
    return rows


def _read_part(files: list[Path], info: DatasetInfo) -> Iterator[Row]:
    """Read the rows of `split: train[10:20]`, as `datasets` counts them; needs one more pass to count the rows."""
    from datasets import ReadInstruction

    try:
        total = sum(1 for path in files for _ in read_rows(path))
        parts = ReadInstruction.from_spec(info.split).to_absolute({"train": total})
    except (ValueError, AssertionError) as error:
        raise DatasetError(f"{info.place}.split: {error}") from None
    for part in parts:
        yield from islice(chain.from_iterable(map(read_rows, files)), part.from_, part.to)


def fingerprint(info: DatasetInfo, streaming: bool) -> str:
    """Hash the content of a dataset; for a stream, the names, sizes and times of its files.

    Raises:
        DatasetError: the dataset is missing.
    """
    if info.path is None:
        return str(getattr(_load_hub(info, streaming), "_fingerprint", "streamed"))
    content = hashlib.sha256(b"" if info.split == "train" else info.split.encode())
    for path in find_files(info.path):
        if streaming:
            content.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
            continue
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
    return content.hexdigest()


def require_unchanged(info: DatasetInfo, before: str) -> None:
    """Raise DatasetError if the dataset's fingerprint differs from the one `before` its rows were read."""
    if fingerprint(info, streaming=False) != before:
        raise _changed(info.path or info.name)


def _load_hub(info: DatasetInfo, streaming: bool) -> Dataset | IterableDataset:
    """Load a dataset of the Hugging Face Hub, or a local folder in the same layout."""
    from datasets import load_dataset

    try:
        return load_dataset(info.hf_hub_url, info.subset, data_dir=info.folder, split=info.split, streaming=streaming)
    except Exception as error:  # load_dataset raises what its many backends raise
        raise DatasetError(f"{info.place}: {info.hf_hub_url} cannot be loaded ({in_one_line(error)})") from None


def _read_jsonl(path: Path) -> Lines:
    with path.open("rb") as file:
        for line in count(1):
            raw = file.readline(LONGEST_ROW)
            if not raw:
                return
            if len(raw) == LONGEST_ROW and not raw.endswith(b"\n"):
                while (rest := file.readline(LONGEST_ROW)) and not rest.endswith(b"\n"):
                    pass
                yield line, RowError(f"longer than {LONGEST_ROW >> 20} MiB")
            elif raw.strip():
                yield line, _parse_line(raw.removeprefix(b"\xef\xbb\xbf"))  # also in the middle of concatenated files


def _parse_line(raw: bytes) -> object:
    try:
        return parse_json(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 (byte {error.start + 1} of the line)")
    except RowError as error:
        return error


def _read_json(path: Path) -> Lines:
    """Read an array; a file that starts with an object is read as JSON lines.

    The location of a row is its line, with the column if an earlier row starts on the same line.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        text = file.read()
    if re.match(r"\s*({|\Z)", text):
        yield from _read_jsonl(path)
        return
    line, line_start, counted, last = 1, 0, 0, 0
    try:
        for at, value in _read_array(text):
            if newlines := text.count("\n", counted, at):
                line, line_start = line + newlines, text.rindex("\n", counted, at) + 1
            yield line if line != last else f"{line}:{at - line_start + 1}", value
            counted, last = at, line
    except json.JSONDecodeError as error:
        near = text[max(error.pos - 30, 0) : error.pos + 30]
        raise DatasetError(
            f"{path}:{error.lineno}: not JSON ({error.msg}, near {near!r}), so the rest can't be read; fix it, or store one "
            "row per line as .jsonl"
        ) from None


def _read_array(text: str) -> Iterator[tuple[int, object]]:
    """Yield the start of each element, and its value.

    Raises:
        json.JSONDecodeError: an element is broken, so that the start of the next one is unknown.
    """
    space = re.compile(r"\s*")

    def skip(at: int) -> int:
        return space.match(text, at).end()  # type: ignore[union-attr]

    at, before = skip(0), "["
    while text.startswith(before, at):
        at = skip(at + 1)
        if before == "[" and text.startswith("]", at):
            break
        value, end = _decode_element(text, at)
        yield at, value
        at, before = skip(end), ","
    if not text.startswith("]", at):
        expected = "an array of rows" if before == "[" else "a comma or the end of the array"
        raise json.JSONDecodeError(f"Expecting {expected}", text, at)
    if (at := skip(at + 1)) < len(text):
        raise json.JSONDecodeError("Expecting nothing after the array", text, at)


def _decode_element(text: str, at: int) -> tuple[object, int]:
    try:
        value, end = decode_json(text, at)
        text[at:end].encode("utf-8")
        return value, end
    except UnicodeEncodeError:
        return RowError("not UTF-8"), end
    except RowError as reason:
        try:
            return reason, json.JSONDecoder(parse_int=float).raw_decode(text, at)[1]
        except RecursionError:
            raise json.JSONDecodeError("Nested too deeply", text, at) from None
    except json.JSONDecodeError as error:
        line = text.count("\n", 0, at) + 1
        raise json.JSONDecodeError(f"{error.msg} in the row that starts at line {line}", text, error.pos) from None


def _read_csv(path: Path) -> Lines:
    csv.field_size_limit(LONGEST_ROW)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            columns = reader.fieldnames or ()
            _require_distinct(path, columns)
            for row in reader:
                fields = [field for field in row.values() if isinstance(field, str)]
                line = reader.line_num - sum(field.count("\n") for field in fields)
                extra = RowError(f"not CSV (more fields than the header's {len(columns)})")
                yield line, extra if None in row else row
        except csv.Error as error:  # An unclosed quote swallows an unknown number of rows.
            line = reader.reader.line_num
            raise DatasetError(
                f"{path}:{line}: not CSV ({error}); look for an unclosed quote in this or an earlier row"
            ) from None


def _require_distinct(path: Path, columns: Iterable[str]) -> None:
    if twice := [column for column, times in Counter(columns).items() if times > 1]:
        raise DatasetError(f"{path}: duplicate column {twice[0]!r}; rename or remove one")


def _read_arrow(path: Path) -> Lines:
    import pyarrow

    number = 0
    try:
        for batch in _read_batches(path):
            batch.validate(full=True)  # Reading a value of a corrupt batch can crash the process.
            _require_distinct(path, batch.schema.names)
            for value in _to_values(batch):
                number += 1
                yield number, value
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DatasetError(f"{path}:{number + 1}: cannot be read ({in_one_line(error)})") from None


def _read_batches(path: Path) -> Iterator[pyarrow.RecordBatch]:
    """Read Parquet, or either Arrow format: the file format, and the stream format that `datasets` writes."""
    import pyarrow.parquet

    if path.suffix.lower() == ".parquet":
        yield from pyarrow.parquet.ParquetFile(path).iter_batches(ROWS_AT_ONCE)
        return
    with pyarrow.OSFile(str(path)) as source:  # A memory map crashes the process if the file shrinks.
        try:
            reader = pyarrow.ipc.open_file(source)
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        except pyarrow.ArrowInvalid:
            source.seek(0)
            yield from pyarrow.ipc.open_stream(source)


def _to_values(batch: pyarrow.RecordBatch | pyarrow.Table) -> Iterator[object]:
    types = {field.name: field.type for field in batch.schema}
    for row in batch.to_pylist():
        try:
            yield {column: _to_value(value, types[column]) for column, value in row.items()}
        except RowError as error:
            yield error


def _to_value(value: object, kind: pyarrow.DataType) -> object:
    """Remove the nulls that Arrow adds to a struct for keys that only other rows have.

    Null columns stay, and so do the nulls of a JSON value, which `datasets` >= 5 stores as text.
    """
    import pyarrow

    if isinstance(value, str) and isinstance(kind, pyarrow.JsonType):
        return parse_json(value)
    if isinstance(value, dict) and pyarrow.types.is_struct(kind):
        return {key.name: _to_value(value[key.name], key.type) for key in kind if value[key.name] is not None}
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_to_value(inner, kind.value_type) for inner in value]
    return value


READERS: dict[str, Callable[[Path], Lines]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_arrow,
    ".arrow": _read_arrow,
}
