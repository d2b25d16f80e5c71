"""JSON as RFC 8259 has it, and excerpts of anything as JSON."""

import json
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from typing import Any

import pytest

from arpo_trl.data.strict_json import excerpt, parse_json
from arpo_trl.errors import RowError

NOT_JSON = {
    "NaN": "not JSON (NaN is not a JSON value)",
    '{"a": [-Infinity]}': "not JSON (-Infinity is not a JSON value)",
    "1e400": "unsupported JSON (the number 1e400 is too large)",
    '[{"a": -1.5E+999}]': "unsupported JSON (the number -1.5E+999 is too large)",
    '{"a": 1, "b": {"c": 1, "c": 1}}': "unsupported JSON (duplicate key 'c')",
    '{"a": "\x01"}': 'not JSON (Invalid control character at column 8): \'{"a": "\\x01"}\'',
    "": "not JSON (Expecting value at column 1): ''",
    "{}\n{": "not JSON (Extra data at column 3): '{}\\n{'",
    "{\n1}": "not JSON (Expecting property name enclosed in double quotes at line 2, column 1): '{\\n1}'",
}


@pytest.mark.parametrize("text", NOT_JSON)
def test_python_extensions_of_json_are_errors(text: str) -> None:
    with pytest.raises(RowError) as error:
        parse_json(text)
    assert str(error.value) == NOT_JSON[text]


def test_json_is_read_unchanged() -> None:
    text = (
        '\t{"a": [1, -0, 1e2, 1.5, true, null, "\\u0000\\ud83d\\ude00", 123456789012345678901234567890], "": {}}\r\n'
    )
    assert parse_json(text) == json.loads(text)


class Counted(list[str]):
    """A list that knows how many of its elements were read."""

    read = 0

    def __iter__(self) -> Iterator[str]:
        for element in super().__iter__():
            self.read += 1
            yield element


def test_an_excerpt_is_json_of_any_value_and_reads_no_more_than_needed() -> None:
    value = {"a": [1, None, True, "é"], "b": {}, "c": []}
    assert excerpt(value, 1000) == json.dumps(value, ensure_ascii=False)
    assert excerpt(value, 9) == json.dumps(value)[:9]
    strange = [date(2026, 1, 2), b"\xff" * 999, Decimal("1.5"), {1: 2}, {(1, 2): 3}]
    assert excerpt(strange, 60) == """["datetime.date(2026, 1, 2)", "b'""" + "\\\\xff" * 5 + "\\\\"
    assert excerpt(strange, 10**4).endswith(""" "Decimal('1.5')", {"1": 2}, {}]""")  # JSON has no such key
    deep: list[Any] = []
    for _ in range(10**5):
        deep = [deep]
    assert excerpt(deep, 50) == "[" * 50
    long = Counted(["x" * 999] * 999)
    assert len(excerpt(long, 160)) == 160 and long.read <= 160
