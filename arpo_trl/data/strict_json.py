"""Text -> JSON values: files, columns, tool calls, the registry.

Python's json also accepts NaN, Infinity, 1e400 (as infinity) and duplicate keys (the last one wins). Each would reach the
model as something that the text does not say, so each is an error here.
"""

import json
import math
from collections import Counter
from itertools import islice
from typing import Never

from ..errors import RowError

MAX_DEPTH = 100  # safe for code that walks, pickles or renders rows recursively
EXCERPT = 60
SPACE, TOO_DEEP = " \t\n\r", "unsupported JSON (nested too deeply)"


def parse_json(text: str) -> object:
    """Parse a complete text. Raises RowError if it is not JSON, or JSON that `decode_json` does not support."""
    text = text.rstrip(SPACE)
    try:
        value, at = decode_json(text, len(text) - len(text.lstrip(SPACE)))
        if at < len(text):
            raise json.JSONDecodeError("Extra data", text, at)
        return value
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, " * (error.lineno > 1) + f"column {error.colno}"
        what = error.msg.removesuffix(" at")  # "Invalid control character at"
        raise RowError(f"not JSON ({what} at {place}): {text[:EXCERPT].strip()!r}") from None


def decode_json(text: str, at: int) -> tuple[object, int]:
    """Parse the value that starts at `at`, and return it with its end.

    Raises:
        json.JSONDecodeError: there is none.
        RowError: it is nested too deeply, has a duplicate key, or a number that JSON or Python lacks.
    """
    try:
        value, end = _DECODER.raw_decode(text, at)
        if text.count("[", at, end) + text.count("{", at, end) > MAX_DEPTH < _depth(value):
            raise RowError(TOO_DEEP)
    except RecursionError:
        raise RowError(TOO_DEEP) from None
    return value, end


def _depth(value: object) -> int:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inside), default=0)


def _to_object(members: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(members)
    if len(value) < len(members):
        key = next(key for key, times in Counter(key for key, _ in members).items() if times > 1)
        raise RowError(f"unsupported JSON (duplicate key {key[:EXCERPT]!r})")
    return value


def _to_int(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # sys.get_int_max_str_digits()
        raise RowError(f"unsupported JSON (a number with {len(digits):,} digits)") from None


def _to_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise RowError(f"unsupported JSON (the number {digits[:EXCERPT]} is too large)")
    return value


def _reject_constant(name: str) -> Never:
    raise RowError(f"not JSON ({name} is not a JSON value)")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_to_object, parse_int=_to_int, parse_float=_to_float, parse_constant=_reject_constant
)


def excerpt(value: object, most: int) -> str:
    """Return the first `most` characters of any value as JSON (dates and bytes too), without encoding the rest."""
    pieces = json.JSONEncoder(ensure_ascii=False, default=repr, skipkeys=True).iterencode(value)
    return "".join(islice(pieces, most))[:most]
