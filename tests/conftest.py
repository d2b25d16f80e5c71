"""What many tests share: a tiny Qwen2 with a tokenizer of its own. No network, no GPU."""

from __future__ import annotations

import os
from pathlib import Path

# One thread, here and in the processes that tests start: tiny matrices, and a second thread mostly waits.
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", OMP_NUM_THREADS="1")

import make_tiny_model
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase


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
