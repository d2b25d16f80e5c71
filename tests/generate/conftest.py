"""Tiny models that have learned to call python, each trained once for all tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import small_rollout


@pytest.fixture(scope="session")
def train_once(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Train on rows in one form: "turns", "inside" or "tools"."""
    return functools.cache(lambda form: small_rollout.train(tmp_path_factory.mktemp(form), tiny_model, form))


@pytest.fixture(scope="session")
def tools(train_once: Callable[[str], Path]) -> Path:
    return train_once("tools")


@pytest.fixture(scope="session")
def turns(train_once: Callable[[str], Path]) -> Path:
    return train_once("turns")
