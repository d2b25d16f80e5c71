"""k steps, a resume and k more steps give the same bits as 2k steps: weights, optimizer and log."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import SFTConfig

from arpo_trl.callbacks import TrainerLog, read_log
from arpo_trl.checkpoints import newest_whole_checkpoint
from arpo_trl.preflight import Preflight
from arpo_trl.trainer import ArpoTrainer

# peft 0.21 still asks for transformers' old name of activation checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

STEPS = 8
TIMES = {"elapsed_time", "remaining_time", "elapsed_seconds", "tokens_per_second", "trained_tokens_per_second"}
MEASURED = TIMES | {"peak_memory_gb"}


class StopAt(TrainerCallback):  # type: ignore[misc]
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = control.should_training_stop = state.global_step == self.step


def rows() -> Dataset:
    rng = random.Random(1)
    lengths = [rng.randrange(6, 40) for _ in range(20)]
    ids = [[rng.randrange(300, 400) for _ in range(n)] for n in lengths]
    return Dataset.from_list(
        [{"input_ids": row, "labels": [-100, -100, *row[2:]], "source": f"r:{i}"} for i, row in enumerate(ids)]
    )


def run(folder: Path, model: Path, stop_at: int | None, lora: bool = False, preflight: bool = False, **changes: Any) -> Any:
    set_seed(3)
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "logging_steps": 3,
        "save_strategy": "no",
        "report_to": "none",
        "max_length": None,
        "disable_tqdm": True,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "seed": 3,
    }
    if changes.get("packing"):
        values |= {"max_length": 64, "dataset_kwargs": None}
    trainer = ArpoTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=SFTConfig(**values | changes),
        train_dataset=rows(),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None,
    )
    trainer.add_callback(TrainerLog(trainer, folder / "trainer_log.jsonl", plot=False))
    if stop_at:
        trainer.add_callback(StopAt(stop_at))
    if preflight:
        trainer.add_callback(Preflight(trainer))
    checkpoint, lines = newest_whole_checkpoint(folder)
    assert not lines
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer


def saved_state(folder: Path) -> dict[str, Any]:
    weights = load_file(next(p for p in folder.glob("*model.safetensors")))
    moments = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    return weights | {f"{i}.{name}": value for i, state in moments.items() for name, value in state.items()}


def log_without_times(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in read_log(folder / "trainer_log.jsonl")]


@pytest.mark.parametrize(
    ("stop_at", "changes"),
    [
        pytest.param(4, {}, id="mid_epoch"),
        pytest.param(5, {"per_device_train_batch_size": 4}, id="at_an_epochs_end"),
        pytest.param(4, {"gradient_accumulation_steps": 2}, id="accumulation_2"),
        pytest.param(4, {"gradient_accumulation_steps": 3, "max_steps": 8}, id="accumulation_that_does_not_divide"),
        pytest.param(4, {"lora": True}, id="lora_dropout"),
        pytest.param(3, {"packing": True, "logging_steps": 2}, id="packing"),
        pytest.param(4, {"dataloader_num_workers": 2}, id="two_dataloader_workers"),
        pytest.param(4, {"preflight": True, "lora": True}, id="preflight_before_each_session"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(
    stop_at: int, changes: dict[str, Any], tmp_path: Path, tiny_model: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, tiny_model, stop_at=STEPS, **{**changes, "preflight": False})
    run(parts, tiny_model, stop_at=stop_at, **changes)
    run(parts, tiny_model, stop_at=STEPS, **changes)
    expected, found = (saved_state(folder / f"checkpoint-{STEPS}") for folder in (whole, parts))
    assert expected.keys() == found.keys()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert different == []
    assert log_without_times(parts) == log_without_times(whole)
    assert len(log_without_times(whole)) == STEPS // changes.get("logging_steps", 3)
