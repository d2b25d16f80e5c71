"""A small run of `arpo_trl.training.train.train`, in this process: 12 rows, 4 steps, the tiny model, on the CPU."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

from arpo_trl.recipe import Recipe, read_recipe
from arpo_trl.training.train import train

# peft 0.21 still asks for transformers' old name of activation checkpointing.
QUIET = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, which may then be written again: Windows replaces no file that `load_file` has mapped."""
    return safetensors.torch.load(path.read_bytes())


def write_data(folder: Path) -> Path:
    """Two datasets of unlike length, `counting` (12 rows) and `greetings` (5 rows)."""
    folder.mkdir(parents=True, exist_ok=True)
    counting = [{"instruction": f"count to {n}", "output": " ".join(map(str, range(n)))} for n in range(2, 26, 2)]
    greetings = [{"instruction": f"greet {name}", "output": f"hi {name}"} for name in "Ada Bob Cy Di Ed".split()]
    (folder / "counting.json").write_text(json.dumps(counting), encoding="utf-8")
    (folder / "greetings.json").write_text(json.dumps(greetings), encoding="utf-8")
    info = {name: {"file_name": f"{name}.json"} for name in ("counting", "greetings")}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return folder


def write_recipe(folder: Path, model: Path, **keys: Any) -> Path:
    """folder/recipe.yaml, of four steps that write to folder/run; `keys` say on what, and change it."""
    values = {
        "model_name_or_path": str(model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "template": "qwen",
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values | keys), encoding="utf-8")
    return path


def make_recipe(folder: Path, model: Path, **changes: Any) -> Recipe:
    """A recipe whose every file is in `folder`; its output_dir is folder/run."""
    values = {
        "dataset": "counting",
        "dataset_dir": str(write_data(folder / "data")),
        "tokenized_path": str(folder / "tokenized"),
        "plot_loss": True,
    }
    return read_recipe(write_recipe(folder, model, **values | changes))


def run(folder: Path, model: Path, **changes: Any) -> Path:
    """Run a recipe of `make_recipe` and return its output folder."""
    make_recipe(folder, model, **changes)
    return run_recipe(folder / "recipe.yaml")


def run_recipe(path: Path) -> Path:
    """Run a recipe that writes to run/ beside it, and return that folder; this process keeps its signal handlers."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert train(read_recipe(path)).exit_code == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return path.parent / "run"
