"""NaN, infinity and no memory: the run stops within a step, before anything is saved, and names the cause."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import MakeRecipe, make_rows, make_trainer, train

from arpo_trl.__main__ import main
from arpo_trl.errors import RunFailed
from arpo_trl.machine import is_out_of_memory
from arpo_trl.run_folder import list_checkpoints
from arpo_trl.training import trainer as trainer_module


class _Times(torch.autograd.Function):
    """Times 1 on the way forward, times `factor` on the way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0] * ctx.factor, None


def spoil(trainer: Any, monkeypatch: pytest.MonkeyPatch, call: int, value: float, gradient: bool = False) -> None:
    """Multiply the loss, or its gradient, by `value` at the n-th micro-batch."""
    compute_loss, calls = trainer.compute_loss, 0

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        loss = compute_loss(*args, **kwargs)
        if calls != call:
            return loss
        times: Any = _Times
        return times.apply(loss, value) if gradient else loss * value

    monkeypatch.setattr(trainer, "compute_loss", spoilt)


def rows_of_step(step: int, rows_a_step: int) -> set[str]:
    sources = make_rows()["source"]
    return set(sources[(step - 1) * rows_a_step : step * rows_a_step])


@pytest.mark.parametrize(
    ("gradient", "value", "changes"),
    [
        pytest.param(False, float("nan"), {}, id="nan_loss"),
        pytest.param(False, -float("inf"), {}, id="infinite_loss"),
        pytest.param(True, float("nan"), {}, id="nan_gradient"),
        pytest.param(True, float("inf"), {}, id="infinite_gradient"),
        pytest.param(True, float("inf"), {"max_grad_norm": 0.0}, id="infinite_gradient_without_clipping"),
        pytest.param(True, float("nan"), {"lora": True}, id="nan_gradient_of_an_adapter"),
    ],
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_non_finite_value_stops_the_run_at_its_step(
    gradient: bool,
    value: float,
    changes: dict[str, Any],
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The step and its rows are named, and nothing of the step is saved."""
    changes = {"train_sampling_strategy": "sequential", **changes}
    trainer = make_trainer(tmp_path, tiny_model, max_steps=3, save_strategy="steps", save_steps=1, **changes)
    spoil(trainer, monkeypatch, 2, value, gradient)
    with pytest.raises(RunFailed, match=f"step 2: the {'gradient' if gradient else 'loss'} is ") as error:
        trainer.train()
    assert "Rows in its batch: rows.jsonl:3, rows.jsonl:4. Lower learning_rate" in str(error.value)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-1"]


def test_the_rows_of_all_accumulated_batches_are_named(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is of all of them; a NaN loss names those up to it."""
    accumulate: dict[str, Any] = {"gradient_accumulation_steps": 3, "train_sampling_strategy": "sequential"}
    for gradient, last in ((True, 12), (False, 10)):
        trainer = make_trainer(tmp_path, tiny_model, max_steps=3, **accumulate)
        spoil(trainer, monkeypatch, 5, float("nan"), gradient)
        with pytest.raises(RunFailed, match="step 2: ") as error:
            trainer.train()
        names = str(error.value).split("batch: ")[1].split(". ")[0].split(", ")
        assert names == [f"rows.jsonl:{n}" for n in range(7, last + 1)]


@pytest.mark.parametrize("changes", [{"packing": True}, {"padding_free": True}], ids=["packing", "padding_free"])
def test_padding_free_rows_are_named(
    changes: dict[str, Any], tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A packed batch names the rows that were packed into it, no others."""
    trainer = make_trainer(tmp_path, tiny_model, **changes)
    seen: list[Any] = []
    step = trainer.training_step

    def watch(model: Any, inputs: Any, *args: Any) -> Any:
        seen[:] = [inputs["input_ids"]]
        return step(model, inputs, *args)

    monkeypatch.setattr(trainer, "training_step", watch)
    spoil(trainer, monkeypatch, 1, float("nan"))
    with pytest.raises(RunFailed, match="step 1: the loss is nan") as error:
        trainer.train()
    names = set(str(error.value).split("batch: ")[1].split(". ")[0].split(", "))
    tokens = sum(len(row["input_ids"]) for row in make_rows() if row["source"] in names)
    assert tokens == seen[0].numel()


def test_a_broken_weight_is_named(tmp_path: Path, tiny_model: Path) -> None:
    """A NaN in the base model stops step 1, or the preflight, by the weight's name."""
    trainer = make_trainer(tmp_path, tiny_model, preflight=True)
    with torch.no_grad():
        trainer.model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(RunFailed, match=r"its weight model.layers.1.mlp.up_proj.weight is not finite"):
        trainer.train()


def test_a_nan_gives_one_line_and_exit_code_1(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No final model, no checkpoint, and run.json does not say finished."""
    real = trainer_module.ArpoTrainer.compute_loss
    monkeypatch.setattr(trainer_module.ArpoTrainer, "compute_loss", lambda *a, **k: real(*a, **k) * float("nan"))
    assert main([str(make_recipe())]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "the loss is nan" in line]
    assert f"{Path('data', 'rows.json')}:" in line
    assert line in (tmp_path / "run" / "training.log").read_text(encoding="utf-8").splitlines()
    assert not (tmp_path / "run" / "model.safetensors").exists() and list_checkpoints(tmp_path / "run") == []
    assert '"status": "running"' in (tmp_path / "run" / "run.json").read_text()


# --- no memory ---

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory: you tried to allocate"
    ),
    OSError("The paging file is too small for this operation to complete. (os error 1455)"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 18.00 GB)"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: f"{type(e).__name__}_{str(e)[:20]}")
def test_an_out_of_memory_error_is_recognized(error: Exception) -> None:
    """CUDA, cuBLAS, MPS, the CPU and Python each say it in their own way."""
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("memory")])
def test_another_error_is_not_taken_for_out_of_memory(error: Exception) -> None:
    """Its own words are kept."""
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    ("where", "changes", "expected"),
    [
        (
            "compute_loss",
            {},
            r"with a training batch of 2 x \d+ tokens\. Try in this order: lower per_device_train_batch_size .*; ",
        ),
        (
            "compute_loss",
            {"per_device_train_batch_size": 1},
            r"1 x \d+ tokens\. .* order: lower cutoff_len .*; finetuning_type",
        ),
        (
            "compute_loss",
            {"activation_checkpointing": False},
            r"train_batch_size .*; gradient_checkpointing: true .*; lower cut",
        ),
        ("create_optimizer", {}, "with a model of this size"),
        ("_get_grad_norm", {}, r"training batch of 2 x \d+ tokens"),
        (
            "prediction_step",
            {"eval_strategy": "steps", "eval_steps": 1},
            r"order: lower per_device_eval_batch_size .*; lower cutoff",
        ),
    ],
    ids=["training", "training_one_row", "without_checkpointing", "optimizer", "step", "evaluation"],
)
def test_out_of_memory_gives_one_line_with_the_shape_and_the_fixes(
    where: str,
    changes: dict[str, Any],
    expected: str,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is cheapest to change comes first."""
    trainer: Any = make_trainer(tmp_path, tiny_model, **changes)

    def run_out_of_memory(*args: Any, **kwargs: Any) -> Any:
        raise OUT_OF_MEMORY[0]

    if where == "prediction_step":
        where = "compute_loss"
        real = trainer.compute_loss
        monkeypatch.setattr(trainer, where, lambda m, *a, **k: real(m, *a, **k) if m.training else run_out_of_memory())
    else:
        monkeypatch.setattr(trainer, where, run_out_of_memory)
    with pytest.raises(RunFailed, match="step [12]: out of memory on cpu.*" + expected):
        trainer.train()


def test_an_unexpected_error_gives_one_line_and_a_traceback_in_the_log(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1; the line names the error, our line, and the log."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes\ncannot be multiplied")

    monkeypatch.setattr(trainer_module.ArpoTrainer, "compute_loss", fail)
    assert main([str(make_recipe())]) == 1
    error = capsys.readouterr().err
    log = tmp_path / "run" / "training.log"
    assert error.splitlines()[-1].startswith("RuntimeError: mat1 and mat2 shapes cannot be multiplied (arpo_trl/")
    assert error.splitlines()[-1].endswith(f"; the traceback is in {log}") and "Traceback" not in error
    assert "Traceback (most recent call last)" in log.read_text(encoding="utf-8")


def test_the_preflight_detects_a_row_that_does_not_fit(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch that would die at its turn dies before step 1."""
    longest = max(len(row["input_ids"]) for row in make_rows())
    for preflight, step in ((True, 0), (False, 1)):
        trainer: Any = make_trainer(tmp_path, tiny_model, preflight=preflight)
        real = trainer.compute_loss

        def reject_the_longest(model: Any, inputs: Any, *args: Any, real: Any = real, **kwargs: Any) -> Any:
            if inputs["input_ids"].shape[1] >= longest:
                raise OUT_OF_MEMORY[0]
            return real(model, inputs, *args, **kwargs)

        monkeypatch.setattr(trainer, "compute_loss", reject_the_longest)
        with pytest.raises(RunFailed, match=f"2 x {longest} tokens"):
            trainer.train()
        assert (trainer.state.global_step >= step) if step else trainer.state.global_step == 0


def test_a_run_stopped_by_a_nan_resumes_from_its_last_checkpoint(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the broken step is in it."""
    changes: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, tiny_model, **changes)
    spoil(trainer, monkeypatch, 3, float("inf"), gradient=True)
    with pytest.raises(RunFailed, match="step 3"):
        trainer.train()
    assert train(tmp_path, tiny_model, **changes).state.global_step == 3
