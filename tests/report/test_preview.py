"""`--preview` shows rows as the tokens that a run would train on."""

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from arpo_trl.__main__ import main
from arpo_trl.errors import DatasetError
from arpo_trl.recipe import Recipe
from arpo_trl.report.preview import preview


def test_preview_marks_trained_tokens_without_color(
    chat_recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a terminal with colours, and the same text without."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    preview(chat_recipe, 2)
    coloured = capsys.readouterr().out
    assert re.search("\x1b\\[[0-9;]*32m👍", coloured)  # green
    assert "\x1b[1;32m" in coloured and "\x1b[32m" in coloured  # a token is shaded other than its neighbours
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


def test_preview_reports_dropped_rows(chat_recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    preview(chat_recipe, 11)
    assert f"{Path(chat_recipe.dataset_dir) / 'd.jsonl'}:11: dropped (not JSON" in capsys.readouterr().out


def write_rows(recipe: Recipe, rows: list[dict[str, Any]], file_name: str = "d.jsonl", **entry: Any) -> Recipe:
    """The recipe with these rows as its data set."""
    folder = Path(recipe.dataset_dir)
    (folder / file_name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    info = {"d": {"file_name": file_name, "formatting": "sharegpt", **entry}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return recipe


def turns(question: str, reply: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": reply}]}


def test_preview_shows_masked_spans_and_ignored_columns(
    chat_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    row = turns("Q", "<python>7</python>\n<result>\n7\n</result>\n<answer>7</answer>")
    preview(write_rows(chat_recipe, [{**row, "id": 7}]).model_copy(update={"mask_spans": ["result"]}), 1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("+ (green) is trained on, - (yellow) is masked by mask_spans, the rest is context")
    assert [line for line in lines if line.startswith("- ") and "^" not in line] == [
        "- <result>",
        "- 7",
        "- </result>",
    ]
    assert sum(line.startswith("- ^ ") and line.endswith(" tokens masked by mask_spans") for line in lines) == 1
    assert "+ <answer>7</answer><|im_end|>" in lines
    assert {"ignored column `id` (1 row)", "mask_spans: result: 1 match"} <= set(lines)


def test_data_cannot_control_the_terminal(
    chat_recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Title, clear screen, hidden text, clipboard, direction of writing; and brackets are no markup."""
    evil = "\x1b]0;OWNED\x07\x1b[2J\x1b[8m\x1b]52;c;cm0=\x07\u202egpj.exe\x9b2J\r[bold]a[/bold][/]"
    rows = [{**turns(f"hi {evil}", f"yo {evil}"), evil: 1}, {evil: evil}]
    recipe = write_rows(chat_recipe, rows, "d[bold].jsonl")
    preview(recipe, 2)
    out = capsys.readouterr().out
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", out)
    assert out.count(r"\x1b]0;OWNED\x07\x1b[2J") == 3 and out.count("[bold]a[/bold][/]") == 3
    assert out.count("d[bold].jsonl:1: ") == 1 and "d[bold].jsonl:2: dropped (missing field: conversations)" in out


def test_preview_explains_a_missing_column(chat_recipe: Recipe) -> None:
    recipe = write_rows(chat_recipe, [turns("Q", "A")], columns={"messages": "messges"})
    with pytest.raises(DatasetError, match=r"columns\.messages: column 'messges' is missing in 1 of 1 rows \(found"):
        preview(recipe, 1)


def test_any_text_can_be_shown_on_any_terminal(chat_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """cp1252 is what Windows has where nobody chose: Chinese is escaped there, and no reason to stop."""
    recipe = write_rows(chat_recipe, [turns("问题 日本", "答案 👍")])
    path = Path(recipe.dataset_dir) / "recipe.yaml"
    keys = {"model_name_or_path": recipe.model_name_or_path, "do_train": True, "dataset": "d"}
    keys |= {"dataset_dir": recipe.dataset_dir, "output_dir": str(path.with_name("out"))}
    path.write_text(json.dumps(keys), encoding="utf-8")
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main([str(path), "--preview"]) == 0
    terminal.flush()
    shown = terminal.buffer.getvalue().decode("cp1252")  # type: ignore[attr-defined]
    assert r"\u95ee\u9898" in shown and "tokens trained" in shown
