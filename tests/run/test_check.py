"""`--check` says what a run would do and cost, and loads no weights to say it."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from arpo_trl.errors import RecipeError
from arpo_trl.recipe import Recipe
from arpo_trl.run.check import check, checkpoint_steps, count_steps


def test_check_says_what_the_run_would_do(
    chat_recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10**9))
    check(chat_recipe)
    lines = capsys.readouterr().out.splitlines()
    assert "cutoff_len: 2048" in lines
    assert any(
        line.startswith("d: 11 rows: 10 kept, 0 shortened, 0 lost their final answer, 1 dropped; ") for line in lines
    )
    assert any(line.startswith("tokens a row: mean ") and "p95" in line for line in lines)
    assert any(line.startswith("trained: ") and line.endswith("%)") for line in lines)
    assert "3 steps an epoch, 6 in total" in lines
    assert any(re.fullmatch(r"[\d,]+ parameters, all trained", line) for line in lines)
    assert lines[-1].startswith("3 checkpoints at steps 2, 4, 6 of 0.00 GB each, 3 kept; ")
    assert lines[-1].endswith("1.00 GB free")


def test_check_of_a_stream_says_what_is_unknown(chat_recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    stream = chat_recipe.model_copy(update={"streaming": True})
    stream.trl["max_steps"] = 4
    check(stream)
    assert "4 steps in total; the rows are read and counted as the run goes" in capsys.readouterr().out.splitlines()


def test_check_of_an_evaluation_says_what_is_evaluated(
    chat_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    check(chat_recipe.model_copy(update={"do_train": False, "do_eval": True, "dataset": [], "eval_dataset": ["d"]}))
    assert capsys.readouterr().out.splitlines()[-1].startswith("d: 11 rows: 10 kept, ")


def test_check_counts_what_is_trained_on_not_what_is_held_out(
    chat_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    check(chat_recipe.model_copy(update={"val_size": 0.4}))
    lines = capsys.readouterr().out.splitlines()
    assert "2 steps an epoch, 4 in total" in lines
    whole = int(next(line for line in lines if line.startswith("d: ")).split("; ")[1].split()[0].replace(",", ""))
    seen = int(
        next(line for line in lines if line.startswith("trained: ")).split(" of ")[1].split()[0].replace(",", "")
    )
    assert 0 < seen < whole


def test_check_counts_an_adapter_alone(chat_recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    check(chat_recipe.model_copy(update={"finetuning_type": "lora"}))
    parameters = next(line for line in capsys.readouterr().out.splitlines() if " trained (" in line)
    whole, trained = (int(part.split()[0].replace(",", "")) for part in parameters.split(" parameters, "))
    assert 0 < trained < whole / 2


def test_check_refuses_a_disk_that_is_too_small(chat_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10))
    reason = (
        r"output_dir: disk full: the whole run needs 0.007 GB and .*out has 0.000 GB free; free some space, keep fewer"
    )
    with pytest.raises(RecipeError, match=reason):
        check(chat_recipe)


def test_check_needs_a_model_not_only_a_tokenizer(chat_recipe: Recipe, tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(RecipeError, match=r"model_name_or_path: .*: no model there") as error:
        check(chat_recipe.model_copy(update={"model_name_or_path": str(tmp_path / "tokenizer")}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, (3, 6)),
        ({"world_size": 2}, (2, 4)),
        ({"max_steps": 5}, (3, 5)),
        ({"num_train_epochs": 0.5}, (3, 2)),
        ({"per_device_train_batch_size": 100}, (1, 2)),
    ],
)
def test_steps_are_counted_as_the_trainer_does(changes: dict[str, Any], steps: tuple[int, int]) -> None:
    given = {"per_device_train_batch_size": 2, "world_size": 1, "gradient_accumulation_steps": 2}
    args: Any = SimpleNamespace(**(given | {"max_steps": -1, "num_train_epochs": 2} | changes))
    assert count_steps(args, rows=10) == steps


@pytest.mark.parametrize(
    ("strategy", "every", "steps"),
    [("no", 2, []), ("steps", 3, [3, 6, 7]), ("steps", 0.5, [4, 7]), ("epoch", 2, [3, 6, 7]), ("steps", 100, [7])],
)
def test_a_checkpoint_is_written_every_so_often_and_at_the_end(strategy: str, every: float, steps: list[int]) -> None:
    args: Any = SimpleNamespace(save_strategy=strategy, save_steps=every)
    assert checkpoint_steps(args, an_epoch=3, total=7) == steps
