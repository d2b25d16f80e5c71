"""`--preview` shows rows as the tokens that a run would train on."""

import re
from pathlib import Path

import pytest

from arpo_trl.recipe import Recipe
from arpo_trl.report.preview import preview


def test_preview_marks_what_is_trained_without_colour(
    chat_recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal with colours, and the same text without."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    preview(chat_recipe, 2)
    coloured = capsys.readouterr().out
    assert re.search("\x1b\\[[0-9;]*32m👍", coloured)  # green
    monkeypatch.delenv("FORCE_COLOR")
    preview(chat_recipe, 2)
    plain = capsys.readouterr().out
    assert re.sub("\x1b\\[[0-9;]*m", "", coloured) == plain
    lines = plain.splitlines()
    assert "\x1b" not in plain
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
