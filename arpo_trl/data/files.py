"""Files -> rows, one at a time, each with the line it stands on. No row passes through Arrow unless its file is Arrow.

Arrow would give every object the keys of all others, filled with nulls, and would name a broken line by its own count.
A file of any size is read in a bounded amount of memory.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DatasetError, RowError
from .registry import DatasetInfo

CHUNK = 1 << 20
LONGEST_ROW = 64 << 20
DEEPEST = 100  # No row needs more, and what walks, pickles or renders rows by recursion can take it.
EXCERPT = 60


class Row(NamedTuple):
    """`value` is the reason where the row could not even be read."""

    place: str
    value: Any | RowError


def find_files(path: Path) -> list[Path]:
    """The file, or a folder's files that can be read, by name.

    Raises:
        DatasetError: if there is none.
    """
    kinds = ", ".join(READERS)
    if path.is_dir():
        ours, about = re.compile(r"\.|dataset_info\.json$"), re.compile(r"_|(?i:readme|license)")
        inside = sorted(file for file in path.iterdir() if not ours.match(file.name))
        inside = [file for file in inside if file.suffix.lower() in READERS or not about.match(file.name)]
        strange = [file.name for file in inside if file.is_dir() or file.suffix.lower() not in READERS]
        if strange or not inside:
            found = f"found {', '.join(strange[:5])}" if strange else "found none"
            raise DatasetError(f"{path}: expected only files of kind {kinds} in the folder, {found}")
        return inside
    if not path.is_file():
        raise DatasetError(f"{path}: no such file")
    if path.suffix.lower() not in READERS:
        raise DatasetError(f"{path}: expected a file of kind {kinds}, found {path.suffix or 'no suffix'}")
    return [path]


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of one file, in its order.

    Raises:
        DatasetError: if the file can't be read past some place.
    """
    try:
        for line, value in READERS[path.suffix.lower()](path):
            yield Row(f"{path}:{line}", value)
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error})") from None


def read_dataset(info: DatasetInfo, streaming: bool) -> tuple[int, Iterator[Row]]:
    """A dataset's size in bytes (0: not known before it is read) and its rows, read as they are asked for.

    Raises:
        DatasetError: if it isn't there.
    """
    if info.path is None:
        dataset = _load_hub(info, streaming)
        size = 0 if streaming else dataset.data.nbytes
        return size, (Row(f"{info.hub}:{number}", _as_row(row)) for number, row in enumerate(dataset, 1))
    files = find_files(info.path)
    return sum(file.stat().st_size for file in files), chain.from_iterable(map(read_rows, files))


def fingerprint(info: DatasetInfo, streaming: bool) -> str:
    """The content's hash; of a stream, its files' names, sizes and times.

    Raises:
        DatasetError: if the dataset isn't there.
    """
    if info.path is None:
        return str(getattr(_load_hub(info, streaming), "_fingerprint", "streamed"))
    content = hashlib.sha256()
    for path in find_files(info.path):
        if streaming:
            content.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
            continue
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
    return content.hexdigest()


def _load_hub(info: DatasetInfo, streaming: bool) -> Any:
    """A dataset of the Hugging Face hub, or a local folder in the hub's form."""
    from datasets import load_dataset

    try:
        return load_dataset(info.hub, info.subset, data_dir=info.folder, split=info.split, streaming=streaming)
    except Exception as error:  # load_dataset raises what its many backends raise
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise DatasetError(f"{info.place}: {info.name}: {info.hub} cannot be loaded ({reason[0][:200]})") from None


def _read_jsonl(path: Path) -> Iterator[tuple[int | str, Any]]:
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
                yield line, _parse_line(raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw)


def _parse_line(raw: bytes) -> Any:
    try:
        return parse_json(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowError(f"not UTF-8 (byte {error.start + 1} of the line)")
    except RowError as error:
        return error


def parse_json(text: str) -> Any:
    """A whole text's value. Every text of a data file that should be JSON, in whatever column, is read here.

    Raises:
        RowError: if it is not JSON, or JSON that `decode_json` does not read.
    """
    text = text.rstrip(SPACE)
    try:
        value, at = decode_json(text, len(text) - len(text.lstrip(SPACE)))
        if at < len(text):
            raise json.JSONDecodeError("Extra data", text, at)
        return value
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " * (error.lineno > 1) + f"column {error.colno}"
        raise RowError(f"not JSON ({error.msg} at {place}): {text[:EXCERPT].strip()!r}") from None


def decode_json(text: str, at: int) -> tuple[Any, int]:
    """The value that begins at `at`, and where it ends.

    Raises:
        json.JSONDecodeError: if there is none.
        RowError: if it is nested too deeply, or holds a number that Python does not read.
    """
    try:
        value, end = _DECODER.raw_decode(text, at)
    except RecursionError:
        raise RowError(TOO_DEEP) from None
    if text.count("[", at, end) + text.count("{", at, end) > DEEPEST:
        layer = [value]
        for _ in range(DEEPEST):
            layer = [inner for outer in layer for inner in _inside(outer)]
        if layer:
            raise RowError(TOO_DEEP)
    return value, end


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _to_int(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # sys.get_int_max_str_digits()
        raise RowError(f"not JSON that can be read (a number of {len(digits):,} digits)") from None


SPACE, TOO_DEEP = " \t\n\r", "not JSON that can be read (nested too deeply)"
_DECODER = json.JSONDecoder(parse_int=_to_int)


def excerpt(value: Any, most: int) -> str:
    """The first `most` characters of a value as JSON, whatever it holds (a date, bytes) and however large it is."""
    text = ""
    for piece in _to_json(value, most):
        text += piece
        if len(text) >= most:
            break
    return text[:most]


def _to_json(value: Any, most: int) -> Iterator[str]:
    if isinstance(value, dict):
        for number, (key, inner) in enumerate(value.items()):
            yield ", " if number else "{"
            yield from _to_json(str(key), most)
            yield ": "
            yield from _to_json(inner, most)
        yield "}" if value else "{}"
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield ", " if number else "["
            yield from _to_json(inner, most)
        yield "]" if value else "[]"
    else:
        yield json.dumps(value[:most] if isinstance(value, str | bytes) else value, ensure_ascii=False, default=repr)


def _read_json(path: Path) -> Iterator[tuple[int | str, Any]]:
    """An array, element by element; a file that begins with an object is read as JSON lines.

    The place of a row is its line, and its column too where an earlier row stands on the same line.

    Past a broken element nobody can say where the next one begins, so the file is refused there.
    """
    space = re.compile(r"\s*")
    text, at, line, column, last = "", 0, 1, 1, 0

    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:

        def fill() -> bool:
            nonlocal text, at
            more = file.read(max(CHUNK, len(text) - at))
            text, at = text[at:] + more, 0
            return bool(more)

        def advance(end: int) -> None:
            nonlocal at, line, column
            newlines = text.count("\n", at, end)
            line, column = line + newlines, end - text.rfind("\n", at, end) if newlines else column + end - at
            at = end

        def peek() -> str:
            while True:
                advance(space.match(text, at).end())  # type: ignore[union-attr]
                if at < len(text) or not fill():
                    return text[at : at + 1]

        def expected(what: str) -> DatasetError:
            found = repr(text[at : at + 30]) if text[at:] else "the end of the file"
            return DatasetError(f"{path}:{line}: not JSON (expected {what}, found {found})")

        first = peek()
        if first == "{":
            yield from _read_jsonl(path)
            return
        if first not in ("[", ""):
            raise expected("an array of rows")
        opening = "["
        while first:
            if text[at : at + 1] != opening:
                raise expected("a comma or the end of the array")
            advance(at + 1)
            if peek() == "]" and opening == "[":
                break
            while True:
                try:
                    try:
                        value, end = decode_json(text, at)
                    except RowError as reason:  # Most often its end can be found all the same.
                        value, end = reason, json.JSONDecoder(parse_int=float).raw_decode(text, at)[1]
                    if end < len(text) or not fill():  # a number at the buffer's end may go on
                        break
                except RecursionError:
                    raise DatasetError(
                        f"{path}:{line}: {TOO_DEEP}; nothing after it can be read: mend it, or store one row a line as .jsonl"
                    ) from None
                except json.JSONDecodeError as error:
                    unfinished = error.pos > len(text) - 32 or error.msg.startswith("Unterminated string")
                    if unfinished and len(text) - at < LONGEST_ROW and fill():
                        continue
                    broken = line + text.count("\n", at, error.pos)
                    near = text[max(error.pos - 30, at) : error.pos + 30] or "the end of the file"
                    raise DatasetError(
                        f"{path}:{broken}: not JSON ({error.msg} near {near!r}); the row begins at line {line}, and "
                        "nothing after it can be read: mend it, or store one row a line as .jsonl"
                    ) from None
            try:
                text[at:end].encode("utf-8")
            except UnicodeEncodeError:
                value = RowError("not UTF-8")
            yield line if line != last else f"{line}:{column}", value
            last = line
            advance(end)
            if peek() == "]":
                break
            opening = ","
        if first:
            advance(at + 1)
            if peek():
                raise expected("nothing after the array")


def _read_csv(path: Path) -> Iterator[tuple[int | str, Any]]:
    csv.field_size_limit(LONGEST_ROW)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for row in reader:
                fields = [field for field in row.values() if isinstance(field, str)]
                line = reader.line_num - sum(field.count("\n") for field in fields)
                if None in row:
                    yield line, RowError(f"not CSV (more fields than the header's {len(reader.fieldnames or ())})")
                else:
                    yield line, row
        except csv.Error as error:  # A quote that nobody closes swallows rows, and nobody knows how many.
            raise DatasetError(
                f"{path}:{reader.reader.line_num}: not CSV ({error}); the rows before it are in doubt"
            ) from None


def _read_parquet(path: Path) -> Iterator[tuple[int | str, Any]]:
    import pyarrow.parquet

    yield from _read_batches(path, lambda: pyarrow.parquet.ParquetFile(path).iter_batches(256))


def _read_arrow(path: Path) -> Iterator[tuple[int | str, Any]]:
    import pyarrow

    def batches() -> Iterator[Any]:
        with pyarrow.memory_map(str(path)) as source:
            try:
                reader = pyarrow.ipc.open_file(source)
                yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
            except pyarrow.ArrowInvalid:
                source.seek(0)
                yield from pyarrow.ipc.open_stream(source)

    yield from _read_batches(path, batches)


def _read_batches(path: Path, batches: Callable[[], Iterator[Any]]) -> Iterator[tuple[int | str, Any]]:
    import pyarrow

    number = 0
    try:
        for batch in batches():
            for row in batch.to_pylist():
                number += 1
                yield number, _as_row(row)
    except pyarrow.ArrowException as error:
        raise DatasetError(f"{path}:{number + 1}: cannot be read ({str(error).splitlines()[0][:200]})") from None


def _as_row(row: dict[str, Any]) -> dict[str, Any]:
    """Arrow gives an object a null for every key that only others have; they are no part of the row. Columns stay."""
    return {column: _without_nulls(value) for column, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


READERS: dict[str, Callable[[Path], Iterator[tuple[int | str, Any]]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
