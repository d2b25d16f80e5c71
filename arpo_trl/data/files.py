"""Files -> rows, one at a time, each with the line it stands on. No row passes through Arrow unless its file is Arrow.

Arrow would give every object the keys of all others, filled with nulls, and would name a broken line by its own count.
A file of any size is read in a bounded amount of memory, but for .json, whose text is held whole.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count, islice
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import DatasetError, RowError, in_one_line, printable
from ..recipe.keys import Recipe
from .registry import DatasetInfo, find_registry, select_datasets
from .strict_json import decode_json, parse_json

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset, IterableDataset

LONGEST_ROW = 64 << 20
ROWS_AT_ONCE = 256
Lines = Iterator[tuple[int | str, object]]


class Row(NamedTuple):
    """`value` is a RowError where the row could not even be read."""

    place: str
    value: object


def check_datasets(recipe: Recipe) -> Recipe:
    """Look at the datasets that a recipe names, before anything heavy is imported: their entries and their files.

    Returns:
        The recipe, with what the registry says of its datasets among its notices.

    Raises:
        DatasetError: with every name that can't be used, or every file that is not there.
    """
    infos = select_datasets(recipe)
    problems = []
    for info in infos:
        try:
            if info.path and not recipe.tokenized_path:  # What is encoded already needs no raw data.
                find_files(info.path)
        except DatasetError as error:
            key = "dataset" if info.name in recipe.dataset else "eval_dataset"
            problems.append(str(recipe.error(key, f"{info.name}: {error}")))
    if problems:
        raise DatasetError(problems)
    lines = [line for info in infos for line in info.notices]
    for info in find_registry(recipe).values() if infos else ():
        if info not in infos:
            lines += [f"{line}; no effect here: the recipe does not use it" for line in info.mistakes]
    return recipe.with_notices(*map(printable, lines))


def find_files(path: Path) -> list[Path]:
    """The file, or a folder's files that can be read, by name.

    Raises:
        DatasetError: if there is none.
    """
    kinds = ", ".join(READERS)
    if path.is_dir():
        inside = [file for file in sorted(path.iterdir()) if not _is_about_data(file)]
        strange = [file.name for file in inside if not file.is_file() or file.suffix.lower() not in READERS]
        if strange or not inside:
            found = ", ".join(strange[:5]) or "none"
            raise DatasetError(f"{path}: expected only files of kind {kinds} in the folder, found {found}")
        return inside
    if not path.is_file():
        raise DatasetError(f"{path}: no such file")
    if path.suffix.lower() not in READERS:
        raise DatasetError(f"{path}: expected a file of kind {kinds}, found {path.suffix or 'no suffix'}")
    return [path]


def _is_about_data(file: Path) -> bool:
    if file.suffix.lower() in READERS:
        return file.name.startswith(".") or file.name == "dataset_info.json"
    return re.match(r"[._]|readme|license", file.name, re.IGNORECASE) is not None


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of one file, in its order.

    Raises:
        DatasetError: if the file can't be read past some place, or is another one at the end than at the beginning.
    """
    try:
        before = _stamp(path.stat())
        for line, value in READERS[path.suffix.lower()](path):
            yield Row(f"{path}:{line}", value)
        after = _stamp(path.stat())
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error})") from None
    if after != before:
        raise _changed(path)


_stamp = attrgetter("st_ino", "st_size", "st_mtime_ns")


def _changed(what: Path | str) -> DatasetError:
    return DatasetError(f"{what}: was replaced or written to while it was read; start again when nothing writes to it")


def read_dataset(info: DatasetInfo, streaming: bool) -> Iterator[Row]:
    """A dataset's rows, read as they are asked for.

    Raises:
        DatasetError: if it isn't there.
    """
    if info.path:
        files = find_files(info.path)
        return _read_files(files) if info.split == "train" else _read_part(files, info)
    tables = _load_hub(info, streaming).with_format("arrow").iter(ROWS_AT_ONCE)
    values = chain.from_iterable(map(_to_values, tables))
    return (Row(f"{info.hub}:{number}", value) for number, value in enumerate(values, 1))


def size_of(info: DatasetInfo) -> int:
    """Bytes of a dataset, on disk or as the hub's library holds it."""
    if info.path:
        return sum(file.stat().st_size for file in find_files(info.path))
    return int(_load_hub(info, streaming=False).data.nbytes)


def _read_files(files: list[Path]) -> Iterator[Row]:
    return chain.from_iterable(map(read_rows, files))


def _read_part(files: list[Path], info: DatasetInfo) -> Iterator[Row]:
    """The rows of `split: train[10:20]`, as `datasets` counts them. The files are read once more, to count them."""
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(info.split).to_absolute({"train": sum(1 for _ in _read_files(files))})
    except (ValueError, AssertionError) as error:
        raise DatasetError(f"{info.place}.split: {error}") from None
    for part in parts:
        yield from islice(_read_files(files), part.from_, part.to)


def fingerprint(info: DatasetInfo, streaming: bool) -> str:
    """The content's hash; of a stream, its files' names, sizes and times.

    Raises:
        DatasetError: if the dataset isn't there.
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
    """Raises DatasetError if the dataset's fingerprint is no longer the one of `before` its rows were read."""
    if fingerprint(info, streaming=False) != before:
        raise _changed(info.path or info.name)


def _load_hub(info: DatasetInfo, streaming: bool) -> Dataset | IterableDataset:
    """A dataset of the Hugging Face hub, or a local folder in the hub's form."""
    from datasets import load_dataset

    try:
        return load_dataset(info.hub, info.subset, data_dir=info.folder, split=info.split, streaming=streaming)
    except Exception as error:  # load_dataset raises what its many backends raise
        raise DatasetError(f"{info.place}: {info.hub} cannot be loaded ({in_one_line(error)})") from None


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
                yield line, _parse_line(raw.removeprefix(b"\xef\xbb\xbf"))  # Files joined have one in the middle, too.


def _parse_line(raw: bytes) -> object:
    try:
        return parse_json(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 (byte {error.start + 1} of the line)")
    except RowError as error:
        return error


def _read_json(path: Path) -> Lines:
    """An array; a file that begins with an object is read as JSON lines.

    The place of a row is its line, and its column too where an earlier row stands on the same line.
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
            f"{path}:{error.lineno}: not JSON ({error.msg}, near {near!r}); nothing after it can be read: mend it, or store "
            "one row a line as .jsonl"
        ) from None


def _read_array(text: str) -> Iterator[tuple[int, object]]:
    """Where each element begins, and its value.

    Raises:
        json.JSONDecodeError: past a broken element, where nobody can say where the next one begins.
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
        raise json.JSONDecodeError(f"{error.msg} in the row that begins at line {line}", text, error.pos) from None


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
                if None in row:
                    yield line, RowError(f"not CSV (more fields than the header's {len(columns)})")
                else:
                    yield line, row
        except csv.Error as error:  # A quote that nobody closes swallows rows, and nobody knows how many.
            raise DatasetError(
                f"{path}:{reader.reader.line_num}: not CSV ({error}); the rows before it are in doubt"
            ) from None


def _require_distinct(path: Path, columns: Iterable[str]) -> None:
    if twice := [column for column, times in Counter(columns).items() if times > 1]:
        raise DatasetError(f"{path}: has the column {twice[0]!r} twice; rename or remove one")


def _read_arrow(path: Path) -> Lines:
    import pyarrow

    number = 0
    try:
        for batch in _read_batches(path):
            batch.validate(full=True)  # Reading a value of a damaged batch can end the process.
            _require_distinct(path, batch.schema.names)
            for value in _to_values(batch):
                number += 1
                yield number, value
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DatasetError(f"{path}:{number + 1}: cannot be read ({in_one_line(error)})") from None


def _read_batches(path: Path) -> Iterator[pyarrow.RecordBatch]:
    """Of Parquet, or of either form of Arrow: the file, and the stream that `datasets` writes."""
    import pyarrow.parquet

    if path.suffix.lower() == ".parquet":
        yield from pyarrow.parquet.ParquetFile(path).iter_batches(ROWS_AT_ONCE)
        return
    with pyarrow.OSFile(str(path)) as source:  # A memory map ends the process if the file becomes shorter.
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
    """Arrow gives a struct a null for every key that only others have; they are no part of the row.

    Columns stay, and so do the nulls of a JSON value, which `datasets` >= 5 stores as its text.
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
