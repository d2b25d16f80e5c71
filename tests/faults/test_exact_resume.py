"""k steps, a resume and k more steps give the same bits as 2k steps: weights, optimizer and log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import differing, log_without_times, train

# peft 0.21 still asks for transformers' old name of activation checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

STEPS = 8
SECOND_EPOCH = {"per_device_train_batch_size": 4}  # 20 rows, 5 steps


@pytest.mark.parametrize(
    ("stop_at", "changes"),
    [
        pytest.param(4, {}, id="mid_epoch"),
        pytest.param(5, {"per_device_train_batch_size": 4}, id="at_an_epochs_end"),
        pytest.param(4, {"gradient_accumulation_steps": 2}, id="accumulation_2"),
        pytest.param(4, {"gradient_accumulation_steps": 3}, id="accumulation_that_does_not_divide"),
        pytest.param(4, {"lora": True}, id="lora_dropout"),
        pytest.param(3, {"packing": True, "logging_steps": 2}, id="packing"),
        pytest.param(4, {"dataloader_num_workers": 2}, id="two_dataloader_workers"),
        pytest.param(7, {**SECOND_EPOCH, "train_sampling_strategy": "group_by_length"}, id="by_length_in_epoch_2"),
        pytest.param(7, {**SECOND_EPOCH, "train_sampling_strategy": "batch_rebalance"}, id="rebalanced_in_epoch_2"),
        pytest.param(7, {**SECOND_EPOCH, "stream": True}, id="a_stream_in_its_second_pass"),
        pytest.param(4, {"stream": True, "dataloader_num_workers": 1}, id="a_stream_read_by_a_worker"),
        pytest.param(4, {"eval_strategy": "steps", "eval_steps": 2, "lora": True}, id="evaluations_draw_nothing"),
        pytest.param(4, {"preflight": True, "lora": True}, id="preflight_before_each_session"),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_run_bit_for_bit(
    stop_at: int, changes: dict[str, Any], tmp_path: Path, tiny_model: Path
) -> None:
    """The resumed run has the weights, moments and log of the run that never stopped."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, tiny_model, stop_at=STEPS, **{**changes, "preflight": False})
    train(parts, tiny_model, stop_at=stop_at, **changes)
    train(parts, tiny_model, stop_at=STEPS, **changes)
    assert differing(*(folder / f"checkpoint-{STEPS}" for folder in (whole, parts))) == []
    assert log_without_times(parts) == log_without_times(whole)
    assert sum("loss" in line for line in log_without_times(whole)) == STEPS // changes.get("logging_steps", 3)
