"""Fixtures of the data room."""

from pathlib import Path

import datasets
import pytest
from bench import Bench
from transformers import PreTrainedTokenizerBase


@pytest.fixture
def bench(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return Bench(tmp_path, tiny_tokenizer)
