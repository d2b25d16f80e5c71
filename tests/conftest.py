"""Shared fixtures: a tiny Qwen2 and its tokenizer. No network, no GPU."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# One thread, here and in the processes that tests start: tiny matrices, and a second thread mostly waits.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", WANDB_MODE="offline", OMP_NUM_THREADS="1")

import datasets
import make_tiny_model
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from arpo_trl.recipe import Recipe, read_recipe

_LORA_RECIPE = "model_name_or_path: m\noutput_dir: {folder}/out\ndo_train: true\nfinetuning_type: lora\ndataset: a\n"


@pytest.fixture(scope="session", autouse=True)
def bf16_instructions() -> Iterator[None]:
    """Let `bf16: true` compute in bfloat16 on every CPU, as with `force_bf16`; a test may replace the capabilities."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder: Qwen2, 2 layers, about 0.2 M parameters in bfloat16, Qwen2.5's template and special tokens."""
    folder = tmp_path_factory.mktemp("tiny_model")
    tokenizer = make_tiny_model.train_tokenizer(make_tiny_model.TOY_DATA, rows=200, vocab_size=1024)
    make_tiny_model.save(tokenizer, make_tiny_model.make_model(tokenizer, hidden_size=64, layers=2, seed=0), folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def recipe_of(tmp_path: Path) -> Any:
    """A recipe from `key=value` lines."""

    def make(*lines: str) -> Recipe:
        path = tmp_path / "r.yaml"
        path.write_text(_LORA_RECIPE.format(folder=tmp_path), encoding="utf-8")
        return read_recipe(path, lines)

    return make


_ROWS = [
    {"messages": [{"role": "user", "content": f"日本 {n}"}, {"role": "assistant", "content": f"👍🏽\nAnswer {n}"}]}
    for n in range(10)
]


@pytest.fixture
def chat_recipe(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe over ten rows in two scripts and emoji, and an eleventh that is broken."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lines = [*map(json.dumps, _ROWS), "{"]
    (tmp_path / "d.jsonl").write_text("\n".join(lines), encoding="utf-8")
    registry = {"d": {"file_name": "d.jsonl", "formatting": "openai"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(registry), encoding="utf-8")
    return Recipe(
        model_name_or_path=str(tiny_model),
        finetuning_type="full",
        do_train=True,
        dataset=["d"],
        dataset_dir=str(tmp_path),
        max_dropped=0.1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_steps=2,
        num_train_epochs=2,
        output_dir=str(tmp_path / "out"),
    )
