"""`train` takes a recipe as a dict, a path or a Recipe, rows as a Dataset, and returns what the run has produced."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_run
import yaml
from datasets import Dataset

from arpo_trl import RecipeError, load_tokenizer, read_recipe, train
from arpo_trl.training import trainer as trainer_module

pytestmark = small_run.QUIET
BEST = {"val_size": 2, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "preflight": False}


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Restore the signal handlers that a run replaces."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def values(folder: Path, model: Path, **keys: Any) -> dict[str, Any]:
    recipe = small_run.make_recipe(folder, model, **keys)
    loaded: dict[str, Any] = yaml.safe_load(Path(recipe.path).read_text(encoding="utf-8"))
    return loaded


def test_a_dict_trains_and_the_result_has_the_figures(tiny_model: Path, tmp_path: Path) -> None:
    result = train(values(tmp_path, tiny_model, **BEST) | {"output_dir": tmp_path / "run"}, ["logging_steps=2"])
    assert (result.exit_code, result.stopped_by, result.output_dir) == (0, None, tmp_path / "run")
    assert [row["current_steps"] for row in result.history if "loss" in row] == [2, 4]
    assert {"train_loss", "train_runtime"} <= result.metrics.keys()
    assert result.best_checkpoint and (result.best_checkpoint / "model.safetensors").is_file()


def test_rows_of_a_dataset_are_trained_on(tiny_model: Path, tmp_path: Path) -> None:
    keys = values(tmp_path, tiny_model, max_steps=1, preflight=False)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": None}]
    result = train(keys, rows=Dataset.from_list([{"messages": turns}] * 3))
    log = (result.output_dir / "training.log").read_text(encoding="utf-8")
    path = result.output_dir / "rows.parquet"
    assert result.exit_code == 0 and f"{path}: recognized as openai" in log and f"{path}: 3 rows: 3 intact" in log


def test_a_stopped_run_names_the_signal(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = trainer_module.ArpoTrainer.training_step

    def stopped(self: Any, *args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(trainer_module.ArpoTrainer, "training_step", stopped)
    result = train(values(tmp_path, tiny_model, preflight=False))
    assert (result.exit_code, result.stopped_by, result.metrics) == (143, "SIGTERM", {})
    assert result.best_checkpoint is None


def test_a_dict_s_problems_are_listed() -> None:
    with pytest.raises(
        RecipeError, match=r"recipe: 2 problems\n(.*\n)*.*lerning_rate: unknown key; did you mean learning_rate"
    ):
        read_recipe({"lerning_rate": 1e-5, "bf16": "perhaps", "model_name_or_path": "m", "output_dir": "o"})


def test_the_tokenizer_is_that_of_training(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(read_recipe(values(tmp_path, tiny_model)))
    assert tokenizer.eos_token == "<|im_end|>"
