"""Text -> JSON values. Every text that should be JSON is read here: files, columns, tool calls, the registry.

Python's json also reads NaN, Infinity, 1e400 (as infinity) and an object that has a key twice (the last one wins). Each
would reach the model as something that the text does not say, so each is refused.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import islice
from typing import Never

from ..errors import RowError

DEEPEST = 100  # No row needs more, and what walks, pickles or renders rows by recursion can take it.
EXCERPT = 60
SPACE, TOO_DEEP = " \t\n\r", "not JSON that can be read (nested too deeply)"


def parse_json(text: str) -> object:
    """A whole text's value.

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
        what = error.msg.removesuffix(" at")  # "Invalid control character at"
        raise RowError(f"not JSON ({what} at {place}): {text[:EXCERPT].strip()!r}") from None


def decode_json(text: str, at: int) -> tuple[object, int]:
    """The value that begins at `at`, and where it ends.

    Raises:
        json.JSONDecodeError: if there is none.
        RowError: if it is nested too deeply, has a key twice, or holds a number that JSON or Python does not have.
    """
    try:
        value, end = _DECODER.raw_decode(text, at)
        if text.count("[", at, end) + text.count("{", at, end) > DEEPEST < _depth(value):
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
        raise RowError(f"not JSON that can be read (an object has the key {key[:EXCERPT]!r} twice)")
    return value


def _to_int(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:  # sys.get_int_max_str_digits()
        raise RowError(f"not JSON that can be read (a number of {len(digits):,} digits)") from None


def _to_float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise RowError(f"not JSON that can be read (the number {digits[:EXCERPT]} is too large)")
    return value


def _refuse_constant(name: str) -> Never:
    raise RowError(f"not JSON ({name} is no JSON value)")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_to_object, parse_int=_to_int, parse_float=_to_float, parse_constant=_refuse_constant
)


def excerpt(value: object, most: int) -> str:
    """The first `most` characters of a value as JSON, whatever it holds (a date, bytes). It encodes no more than it needs."""
    pieces = json.JSONEncoder(ensure_ascii=False, default=repr, skipkeys=True).iterencode(value)
    return "".join(islice(pieces, most))[:most]
