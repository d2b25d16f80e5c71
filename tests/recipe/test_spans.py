"""mask_spans: tag names or regular expressions, as a string or a list."""

from typing import Any

import pytest
from pydantic import ValidationError

from arpo_trl.recipe import Recipe
from arpo_trl.recipe.types import compile_span


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ("result", ["result"]),
        ("result, python", ["result", "python"]),
        (r"\d{1,2}", [r"\d{1,2}"]),  # commas in an expression do not separate entries
        (["result", r"a,b|c"], ["result", r"a,b|c"]),
        ([], []),
    ],
)
def test_names_and_expressions_are_accepted(given: Any, read: list[str]) -> None:
    assert Recipe(model_name_or_path="m", output_dir="o", mask_spans=given).mask_spans == read


@pytest.mark.parametrize("given", ["(result", ["result", "["], [""], {"a": 1}, [7.5, None]])
def test_other_values_are_rejected_before_any_row_is_read(given: Any) -> None:
    with pytest.raises(ValidationError):
        Recipe(model_name_or_path="m", output_dir="o", mask_spans=given)


@pytest.mark.parametrize(
    ("entry", "text", "found"),
    [
        ("result", "a<result>\n7\n</result>b<result/>", ["<result>\n7\n</result>"]),
        ("result", '<result id="1">7</result >', ['<result id="1">7</result >']),
        ("result", "<result>7</result><result>8</result>", ["<result>7</result>", "<result>8</result>"]),
        ("result", "<results>7</results> <result>8", []),  # another tag, and an unclosed one
        (r"\[.*\]", "x[1\n2]y", ["[1\n2]"]),
    ],
)
def test_a_name_matches_the_tag_and_its_content(entry: str, text: str, found: list[str]) -> None:
    assert [match[0] for match in compile_span(entry).finditer(text)] == found
