"""A small run, in this process: 20 rows, seeded, in float32, on the CPU."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl.trainer.sft_config import SFTConfig

from arpo_trl.run_folder import read_lines
from arpo_trl.training.callbacks import BeforeFirstStep
from arpo_trl.training.checkpoints import newest_complete_checkpoint
from arpo_trl.training.preflight import run_preflight
from arpo_trl.training.trainer import ArpoTrainer
from arpo_trl.training.trainer_log import TrainerLog

MakeRecipe = Callable[..., Path]
TIMES = {"elapsed_time", "remaining_time", "elapsed_seconds", "tokens_per_second", "trained_tokens_per_second"}
MEASURED = TIMES | {"peak_memory_gb"}


FILE_OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate"}
"""Audit events of what changes a folder."""


def make_link(link: Path, folder: Path) -> bool:
    """Make a symbolic link, and return whether it is one: Windows needs a privilege, and Wine makes a file."""
    try:
        link.symlink_to(folder, target_is_directory=True)
    except OSError:
        return False
    return link.resolve() == folder.resolve()


class StopAt(TrainerCallback):
    """Saves and stops, as a signal does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True


def make_rows() -> Dataset:
    rng = random.Random(1)
    ids = [[rng.randrange(300, 400) for _ in range(rng.randrange(6, 40))] for _ in range(20)]
    return Dataset.from_list(
        [
            {"input_ids": row, "labels": [-100, -100, *row[2:]], "source": f"rows.jsonl:{i + 1}"}
            for i, row in enumerate(ids)
        ]
    )


def make_trainer(
    folder: Path,
    model: Path,
    lora: bool = False,
    preflight: bool = False,
    stream: bool = False,
    on_save_error: str = "stop",
    **changes: Any,
) -> ArpoTrainer:
    set_seed(3)
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": True,
        "max_steps": 8,
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
    adapter = LoraConfig(r=4, lora_dropout=0.3, target_modules="all-linear", task_type="CAUSAL_LM")
    folder.mkdir(parents=True, exist_ok=True)
    rows: Any = make_rows()
    if stream:
        rows = rows.to_iterable_dataset().shuffle(seed=3, buffer_size=8)
    trainer = ArpoTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=SFTConfig(**values | changes),
        train_dataset=rows,
        eval_dataset=make_rows() if "eval_strategy" in changes else None,
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=adapter if lora else None,
        on_save_error=on_save_error,
    )
    trainer.add_callback(TrainerLog(folder / "trainer_log.jsonl", False, trainer))
    if preflight:
        trainer.add_callback(BeforeFirstStep(lambda: run_preflight(trainer)))
    return trainer


def train(folder: Path, model: Path, stop_at: int | None = None, **changes: Any) -> ArpoTrainer:
    """Run, or resume from the newest complete checkpoint in `folder`."""
    trainer = make_trainer(folder, model, **changes)
    if stop_at:
        trainer.add_callback(StopAt(stop_at))
    checkpoint, lines = newest_complete_checkpoint(folder)
    assert not lines
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer


def saved_state(checkpoint: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint: weights and both moments."""
    weights = load_file(next(p for p in checkpoint.glob("*model.safetensors")))
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    return weights | {f"{i}.{name}": value for i, state in moments.items() for name, value in state.items()}


def differing(a: Path, b: Path) -> list[str]:
    """Names of the tensors whose bits differ between two checkpoints."""
    left, right = saved_state(a), saved_state(b)
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(left[name], right[name])]


def log_without_times(folder: Path) -> list[dict[str, Any]]:
    def kept(key: str) -> bool:
        return key not in MEASURED and not key.endswith(("_runtime", "_per_second"))

    return [{k: v for k, v in line.items() if kept(k)} for line in read_lines(folder / "trainer_log.jsonl")]
