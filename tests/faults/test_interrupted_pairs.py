"""stage: dpo resumes bit for bit after Ctrl-C, SIGTERM and kill -9; the reference is never read from a checkpoint."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import differing, log_without_times
from small_pairs import write_pairs
from small_run import QUIET
from test_signals import at_call, send, status

from arpo_trl.__main__ import main
from arpo_trl.run_folder import list_checkpoints
from arpo_trl.training import reference
from arpo_trl.training.preference import PairScores, score_pairs

pytestmark = QUIET

ROOT = Path(__file__).parents[2]
KILLED = """
import os, signal, sys
from arpo_trl.__main__ import main
from arpo_trl.training.trainer import ArpoTrainer

real, calls = ArpoTrainer.training_step, 0
def training_step(*args, **kwargs):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), getattr(signal, "SIGKILL", 9))
    return real(*args, **kwargs)
ArpoTrainer.training_step = training_step
main([sys.argv[1]])
"""


@pytest.mark.parametrize(
    ("keys", "kill"),
    [
        ({"finetuning_type": "lora", "gradient_accumulation_steps": 2, "logging_steps": 2}, True),
        ({"finetuning_type": "full", "pref_ftx": 0.1}, False),
        ({"finetuning_type": "full", "precompute_ref_log_probs": True, "padding_free": True}, False),
    ],
    ids=["lora", "full", "precomputed"],
)
def test_an_interrupted_run_is_the_uninterrupted_one_bit_for_bit(
    keys: dict[str, Any], kill: bool, make_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the evaluation at step 3, kill -9 in step 5, SIGTERM in step 5: weights, moments, log and metrics."""
    keys = {**keys, "max_steps": 6, "val_size": 2, "eval_strategy": "steps", "eval_steps": 3, "preflight": "auto"}
    data, run, whole = write_pairs(tmp_path / "data"), tmp_path / "run", tmp_path / "whole"
    path = str(make_recipe(stage="dpo", dataset="pairs", dataset_dir=str(data), lr_scheduler_type="constant", **keys))
    assert main([path, f"output_dir={whole}"]) == 0
    with monkeypatch.context() as patch:
        at_call(patch, "prediction_step", 2, send(signal.SIGINT))  # the first is the preflight's
        assert main([path]) == 130
    assert [p.name for p in list_checkpoints(run)] == ["checkpoint-2", "checkpoint-3"]
    if kill:  # two batches to a step: the third is of step 5
        command = [sys.executable, "-c", KILLED, path, "3"]
        killed = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300).returncode
        assert killed == (9 if sys.platform == "win32" else -9)
        assert list_checkpoints(run)[-1].name == "checkpoint-4" and status(run) == "running"
    with monkeypatch.context() as patch:
        at_call(patch, "training_step", 1 if kill else 2, send(signal.SIGTERM))
        assert main([path]) == 143
    assert list_checkpoints(run)[-1].name == "checkpoint-5"
    assert main([path]) == 0
    assert differing(run / "checkpoint-6", whole / "checkpoint-6") == []
    assert log_without_times(run) == log_without_times(whole)
    (name,) = {"model.safetensors", "adapter_model.safetensors"} & {p.name for p in whole.iterdir()}
    assert (run / name).read_bytes() == (whole / name).read_bytes()
    stored = run / "reference_log_probs.npz"
    assert stored.exists() == bool(keys.get("precompute_ref_log_probs"))
    if stored.exists():
        assert stored.read_bytes() == (whole / stored.name).read_bytes()


def test_a_nan_stops_the_run_and_names_its_pair(
    make_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In a step its batch's pairs, before step 1 the first one; neither saves anything of the step."""
    data = write_pairs(tmp_path / "data")
    keys = {"stage": "dpo", "dataset": "pairs", "dataset_dir": str(data), "disable_shuffling": True}
    path, run = str(make_recipe(**keys, per_device_train_batch_size=1, save_steps=1, max_steps=3)), tmp_path / "run"
    steps = 0

    def spoiled(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        scores = score_pairs(*args)
        return scores if steps != at else PairScores(scores.loss * torch.nan, scores.real, scores.metrics)

    monkeypatch.setattr(reference, "score_pairs", spoiled)
    at = 1  # the check before step 1 computes the first pair twice
    assert main([path]) == 1
    assert (
        f"first pair: the loss is nan; nothing of this step was saved. Rows in its batch: {data / 'pairs.json'}:"
        in (capsys.readouterr().err)
    )
    assert list_checkpoints(run) == []
    steps, at = 0, 4
    assert main([path]) == 1
    assert f"step 2: the loss is nan; nothing of this step was saved. Rows in its batch: {data / 'pairs.json'}:" in (
        capsys.readouterr().err
    )
    assert [p.name for p in list_checkpoints(run)] == ["checkpoint-1"]
