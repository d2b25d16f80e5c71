"""The command line: which word is what, and what becomes of errors. Exit codes of whole runs: tests/faults."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_run

from arpo_trl.__main__ import main


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Path:
    folder = tmp_path / "lr=1e-5"  # not an override, though it looks like one
    folder.mkdir()
    data = small_run.write_data(folder / "data")
    return small_run.write_recipe(folder, tiny_model, dataset="counting,greetings", dataset_dir=str(data))


def test_the_number_of_rows_may_stand_anywhere(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for argv in (["--preview", str(recipe), "2"], ["--preview", "2", str(recipe)], [str(recipe), "--preview", "2"]):
        assert main([*argv, "dataset=greetings"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] == shown[2]
    assert "greet Bob" in shown[0] and "greet Cy" not in shown[0] and "count to" not in shown[0]


def test_a_key_written_as_an_option_is_told_how_to_write_it(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(recipe), "--learning_rate=1e-5"]) == 2
    assert capsys.readouterr().err == "--learning_rate=1e-5: no such option; write learning_rate=1e-5\n"
    assert main([str(recipe), "--chek"]) == 2
    assert capsys.readouterr().err.startswith("--chek: no such option; options are --check, ")


def test_two_recipes_are_one_too_many(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(recipe), str(recipe)]) == 2
    assert capsys.readouterr().err.startswith("expected one recipe, found 2: ")


def test_what_nobody_expected_shows_its_traceback_where_no_log_has_it(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arpo_trl.run.check.describe_tokens", lambda rows: 1 / 0)
    assert main([str(recipe), "--check"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.rstrip().endswith("ZeroDivisionError: division by zero")
