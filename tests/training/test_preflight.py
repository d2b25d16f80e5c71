"""The preflight costs one step and leaves no trace."""

from __future__ import annotations

import random
import re
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_run
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "faults"))
from runs import differing, log_without_times, make_rows, make_trainer, train

from arpo_trl.model.memory import longest_batch
from arpo_trl.recipe import Recipe
from arpo_trl.training import preflight
from arpo_trl.training.callbacks import BeforeFirstStep
from arpo_trl.training.preflight import preserve_training_state, run_preflight
from arpo_trl.training.trainer import ArpoTrainer

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": True},
        {"packing": True},
        {"padding_free": True},
        {"eval_strategy": "steps", "eval_steps": 2, "gradient_accumulation_steps": 2},
    ],
    ids=["lora_dropout", "packing", "padding_free", "evaluation"],
)
def test_a_preflight_does_not_change_the_run(changes: dict[str, Any], tmp_path: Path, tiny_model: Path) -> None:
    """Weights, moments and log are the same bits."""
    for name in (False, True):
        train(tmp_path / str(name), tiny_model, stop_at=4, preflight=name, logging_steps=1, **changes)
    assert differing(tmp_path / "False" / "checkpoint-4", tmp_path / "True" / "checkpoint-4") == []
    assert log_without_times(tmp_path / "False") == log_without_times(tmp_path / "True")


def test_the_training_state_is_restored(tmp_path: Path, tiny_model: Path) -> None:
    trainer: Any = make_trainer(tmp_path, tiny_model, lora=True)
    trainer.create_optimizer_and_scheduler(8)

    def state() -> list[Any]:
        return [
            {name: p.detach().clone() for name, p in trainer.model.named_parameters()},
            {name: p.grad for name, p in trainer.model.named_parameters()},
            trainer.optimizer.state_dict()["state"],
            torch.get_rng_state().clone(),
            random.getstate(),
            [np.array(part) for part in list(np.random.get_state())[1:3]],
            asdict(trainer.window),
            list(trainer.batches),
            trainer.model.training,
            trainer.accelerator.gradient_state.sync_gradients,
        ]

    before = state()
    with preserve_training_state(trainer):
        inputs = trainer.data_collator(longest_batch(trainer.train_dataset, 2)[0])
        trainer.training_step(trainer.model_wrapped, inputs, torch.tensor(10))
        assert trainer.model.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.weight.grad is not None
        assert not torch.equal(torch.get_rng_state(), before[3])  # the dropout drew
        random.random(), np.random.rand()
    assert _same(state(), before)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))
    return bool(a == b)


def test_a_preflight_runs_one_training_and_one_eval_batch(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Any] = []
    evaluated: list[Any] = []
    step, predict = ArpoTrainer.training_step, ArpoTrainer.prediction_step

    def training_step(self: Any, model: Any, inputs: Any, *args: Any) -> Any:
        trained.append(inputs["input_ids"].shape)
        return step(self, model, inputs, *args)

    def prediction_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        evaluated.append(inputs["input_ids"].shape)
        return predict(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(ArpoTrainer, "training_step", training_step)
    monkeypatch.setattr(ArpoTrainer, "prediction_step", prediction_step)
    changes: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 5,
        "per_device_eval_batch_size": 3,
        "max_steps": 1,
    }
    train(tmp_path, tiny_model, preflight=True, **changes)
    longest = max(len(row["input_ids"]) for row in make_rows())
    assert trained[0] == (2, longest) and len(trained) == 2
    assert evaluated[0] == (3, longest)


def test_a_preflight_prints_the_peak_and_the_time(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, tiny_model, preflight=True, max_steps=1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("preflight")]
    assert re.search(r"\(\d+ tokens\) ok, peak (\d\.\d\d GB|\d+\.\d MB); about 0:00:0\d for 1 step$", line)


def test_a_run_that_needs_little_memory_skips_the_training_batch(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The longest rows to evaluate on, which the estimate does not cover, are run nevertheless."""
    passes: list[str] = []
    for name in ("training_step", "prediction_step"):
        method = getattr(ArpoTrainer, name)

        def counted(*args: Any, name: str = name, method: Any = method, **kwargs: Any) -> Any:
            passes.append(name)
            return method(*args, **kwargs)

        monkeypatch.setattr(ArpoTrainer, name, counted)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    small_run.run(tmp_path, tiny_model, max_steps=2, val_size=2, eval_strategy="steps", eval_steps=5)
    assert passes == ["prediction_step", "training_step", "training_step", "prediction_step"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("preflight")]
    assert re.fullmatch(
        r"preflight  skipped: the longest batch needs only about \d+\.\d MB \(to force it, set preflight: true\)", line
    )


@pytest.mark.parametrize(
    ("setting", "peak", "device", "processes", "is_skipped"),
    [
        ("auto", 3.9e9, "cpu", 1, True),
        ("auto", 4.1e9, "cpu", 1, False),
        ("auto", None, "cpu", 1, False),
        (True, 3.9e9, "cpu", 1, False),
        ("auto", 3.9e9, "cuda", 1, False),
        ("auto", 3.9e9, "cpu", 2, False),
    ],
)
def test_auto_skips_the_longest_batch_on_a_cpu_if_it_needs_little_memory(
    setting: str | bool,
    peak: float | None,
    device: str,
    processes: int,
    is_skipped: bool,
    chat_recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = peak and SimpleNamespace(peak=peak)
    monkeypatch.setattr(preflight, "estimate_memory", lambda *args: memory)
    args = SimpleNamespace(device=torch.device(device), world_size=processes)
    trainer: Any = SimpleNamespace(args=args, train_dataset=make_rows())
    given = chat_recipe.model_copy(update={"preflight": setting})
    assert (preflight.find_skip_reason(given, trainer) is not None) is is_skipped
    trainer.train_dataset = make_rows().to_iterable_dataset()
    assert preflight.find_skip_reason(given, trainer) is None


def test_an_estimate_draws_no_random_number(tmp_path: Path, tiny_model: Path, chat_recipe: Recipe) -> None:
    trainer = make_trainer(tmp_path, tiny_model)
    before = torch.get_rng_state()
    assert preflight.find_skip_reason(chat_recipe, trainer)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("memory", "peak", "recomputes"),
    [(16e9, 10e9, False), (16e9, 15e9, True), (16e9, None, True), (None, 10e9, True)],
    ids=["fits", "too_near_the_edge", "out_of_memory", "memory_not_known"],
)
def test_auto_keeps_activations_only_if_the_longest_batch_fits(
    memory: float | None,
    peak: float | None,
    recomputes: bool,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There is no GPU here: its size and the peak are given, and the step that is out of memory fails as CUDA's does."""
    trainer: Any = make_trainer(tmp_path, tiny_model, max_steps=1)
    step, tried = trainer.training_step, []

    def training_step(*args: Any) -> Any:
        tried.append(trainer.model.is_activation_checkpointing)
        if peak is None and not tried[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(*args)

    monkeypatch.setattr(trainer, "training_step", training_step)
    monkeypatch.setattr(preflight, "gpu_memory", lambda: memory)
    monkeypatch.setattr(preflight, "peak_memory", lambda: peak or 0)
    trainer.add_callback(BeforeFirstStep(lambda: run_preflight(trainer, choose_checkpointing=True)))
    trainer.train()
    assert tried[0] is (memory is None)
    assert tried[-1] is trainer.args.activation_checkpointing is recomputes
