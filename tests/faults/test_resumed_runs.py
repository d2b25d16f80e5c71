"""A run killed or stopped at its last step, an epoch's end or an evaluation ends like an uninterrupted one."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeRecipe
from runs import differing, log_without_times
from test_signals import at_call, send, status
from transformers import TrainerState

from arpo_trl.__main__ import main
from arpo_trl.report.log_file import lines_until
from arpo_trl.run_folder import list_checkpoints
from arpo_trl.training.callbacks import StopEarly
from arpo_trl.training.signals import StopOnSignal
from arpo_trl.training.trainer import ArpoTrainer, Window, _LogState

EVALUATED = {"eval_dataset": "rows", "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}


def same_end(run: Path, whole: Path) -> bool:
    """Whether two finished runs have the same weights, log and newest checkpoint, to the bit."""
    assert status(run) == status(whole) == "finished"
    ends = [list_checkpoints(folder)[-1] for folder in (run, whole)]
    assert ends[0].name == ends[1].name
    assert log_without_times(run) == log_without_times(whole)
    assert differing(*ends) == []
    return (run / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def killed() -> None:
    raise KeyboardInterrupt  # nothing of ours catches it


@pytest.mark.parametrize(
    ("cls", "method", "call", "changes"),
    [
        pytest.param(ArpoTrainer, "save_final_model", 1, {"max_steps": 3}, id="in_the_final_save"),
        pytest.param(StopEarly, "on_train_end", 1, {**EVALUATED, "learning_rate": 0.0, "early_stopping_steps": 2,
                     "load_best_model_at_end": True}, id="after_stopping_early"),
        pytest.param(StopOnSignal, "on_save", 1, {"max_steps": 6, "save_steps": 4, "eval_dataset": "rows",
                     "eval_strategy": "epoch", "logging_strategy": "epoch"}, id="after_a_save_at_an_epochs_end"),
        pytest.param(ArpoTrainer, "training_step", 4, {**EVALUATED, "eval_on_start": True}, id="eval_on_start"),
    ],
)  # fmt: skip
def test_a_killed_run_ends_like_an_uninterrupted_one(
    cls: Any,
    method: str,
    call: int,
    changes: dict[str, Any],
    make_recipe: MakeRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No step too many, no evaluation twice, none left out; a finished run that is resumed once more is left as it is."""
    path = str(make_recipe(lr_scheduler_type="constant", **changes))
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main([path, f"output_dir={whole}"]) == 0
    with monkeypatch.context() as patch:
        at_call(patch, method, call, killed, cls)
        assert main([path]) == 130
    assert main([path]) == 0
    assert same_end(run, whole)
    assert main([path, "resume_from_checkpoint=true"]) == 0
    assert same_end(run, whole)


@pytest.mark.parametrize("call", [1, 5, 10], ids=["in_the_first", "in_a_later_one", "in_the_last"])
def test_a_signal_stops_an_evaluation_at_its_next_batch(
    call: int,
    make_recipe: MakeRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is reported at once, and saved with the steps before the evaluation, which the resumed run repeats."""
    changes = EVALUATED | {"load_best_model_at_end": True, "save_total_limit": 1, "max_steps": 5}
    path = str(make_recipe(lr_scheduler_type="constant", **changes))
    with monkeypatch.context() as patch:
        at_call(patch, "prediction_step", 2 * call, send(signal.SIGTERM))  # 8 rows, 2 a batch, 4 batches
        assert main([path]) == 128 + signal.SIGTERM
    step = (2 * call - 1) // 4 + 1
    out = capsys.readouterr().out
    assert "SIGTERM: stopping after this step or evaluation batch" in out
    assert f"stopped by SIGTERM at step {step}, checkpoint saved" in out
    assert list_checkpoints(tmp_path / "run")[-1].name == f"checkpoint-{step}"
    assert main([path]) == 0
    assert main([path, f"output_dir={tmp_path / 'whole'}"]) == 0
    assert same_end(tmp_path / "run", tmp_path / "whole")


def test_a_signal_in_the_evaluation_before_the_first_step_has_nothing_to_save(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is reported; the same command starts the run."""
    path = str(make_recipe(eval_on_start=True, **EVALUATED))
    with monkeypatch.context() as patch:
        at_call(patch, "prediction_step", 1, send(signal.SIGTERM))
        assert main([path]) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM before the first step, nothing to save" in capsys.readouterr().out
    assert list_checkpoints(tmp_path / "run") == []
    assert main([path]) == 0


def test_early_stopping_counts_in_the_log() -> None:
    """Evaluations in a row that are no better than the best, without the one before the first step."""
    from types import SimpleNamespace

    args = SimpleNamespace(metric_for_best_model="loss", greater_is_better=False)
    control = SimpleNamespace(should_training_stop=False)
    losses = [0.5, 3.0, 2.0, 2.0, 2.5]  # the first at step 0
    for count in range(len(losses) + 1):
        history = [{"eval_loss": loss, "step": step} for step, loss in enumerate(losses[:count])]
        StopEarly(2).on_evaluate(args, SimpleNamespace(log_history=history), control)
        assert control.should_training_stop == (count == 5)


def test_the_lines_of_a_stopped_evaluation_are_dropped() -> None:
    """Those at the checkpoint's step that its state does not have."""
    lines = [{"current_steps": 1}, {"current_steps": 2, "loss": 1.0}, {"current_steps": 2, "eval_a_loss": 2.0}]
    state = TrainerState(global_step=2, log_history=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    assert lines_until(lines, state) == lines[:2]
    assert lines_until([*lines, {"current_steps": 3}], state) == lines[:2]


def test_a_run_killed_while_writing_results_can_be_resumed(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """A file that a kill left empty is written again."""
    path = str(make_recipe())
    assert main([path]) == 0
    run = tmp_path / "run"
    first = (run / "all_results.json").read_bytes()
    shutil.copytree(run, tmp_path / "again")
    (tmp_path / "again" / "all_results.json").write_bytes(b"")
    assert main([path, f"output_dir={tmp_path / 'again'}", "resume_from_checkpoint=true"]) == 0
    assert first and b"train_loss" in (tmp_path / "again" / "all_results.json").read_bytes()


def test_the_unfinished_log_line_of_a_checkpoint_is_continued() -> None:
    from types import SimpleNamespace

    metrics = {"entropy": [6.5, 6.25], "mean_token_accuracy": [0.5, 0.25]}
    saved = {"loss_sum": 13.5, "last_logged": 3, "metrics": metrics, "seen_tokens": 123, "trained_tokens": 45}
    saved |= {"pairs": 2, "pair_sums": {"rewards/margins": 0.5}}
    state = TrainerState(global_step=5, max_steps=9, stateful_callbacks={"_LogState": saved})  # type: ignore[arg-type]
    trainer: Any = SimpleNamespace(window=Window())
    state.compute_steps = lambda *args: None  # type: ignore[method-assign]
    args: Any = SimpleNamespace(eval_on_start=True)
    _LogState(trainer).on_train_begin(args, state, SimpleNamespace())  # type: ignore[arg-type]
    assert not args.eval_on_start
    figures = {"entropy": [6.5, 6.25], "mean_token_accuracy": [0.5, 0.25]}
    assert trainer.window == Window(
        loss_sum=13.5,
        last_logged=3,
        metrics=figures,
        seen_tokens=123,
        trained_tokens=45,
        pairs=2,
        pair_sums={"rewards/margins": 0.5},
    )
    assert not trainer.pending_evaluation
