"""`--preview` shows rows as the tokens that a run would train on."""

from pathlib import Path

import pytest

from arpo_trl.preview import preview
from arpo_trl.recipe import Recipe


def test_preview_marks_what_is_trained_without_colour(chat_recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    preview(chat_recipe, 2)
    lines = capsys.readouterr().out.splitlines()
    assert "\x1b" not in "".join(lines)
    assert [line for line in lines if line.startswith("+ ") and "^" not in line][1:] == [
        "+ 👍🏽",
        "+ Answer 0<|im_end|>",
        "+ 👍🏽",
        "+ Answer 1<|im_end|>",
    ]
    assert "  日本 0<|im_end|>" in lines
    assert sum("tokens trained" in line for line in lines) == 2


def test_preview_names_rows_that_it_cannot_show(chat_recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    preview(chat_recipe, 11)
    assert f"{Path(chat_recipe.dataset_dir) / 'd.jsonl'}:11: dropped (not JSON" in capsys.readouterr().out
