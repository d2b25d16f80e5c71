"""Train tool-using chat models from LLaMA-Factory recipes, on Accelerate and TRL.

    from arpo_trl import train

    result = train("recipes/qwen_toy.yaml", ["max_steps=10"])

torch is imported on first use: reading a recipe does not need it.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

# Threads of torch's OpenMP that wait for each other without spinning: on a busy machine, spinning made a run 8 times slower.
# Set before torch is imported, which reads it once; a value that the user set stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from .errors import DatasetError, RecipeError, RowError, RunFailed
from .recipe import Recipe, read_recipe
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .data.prepare import prepare_datasets
    from .data.tokenizer import load_tokenizer
    from .training.train import Result, train

__all__ = [
    "DatasetError",
    "Recipe",
    "RecipeError",
    "Result",
    "RowError",
    "RunFailed",
    "load_tokenizer",
    "prepare_datasets",
    "read_recipe",
    "train",
]


def __getattr__(name: str) -> object:
    """Import what needs torch on first use (PEP 562)."""
    modules = {
        "load_tokenizer": ".data.tokenizer",
        "prepare_datasets": ".data.prepare",
        "Result": ".training.train",
        "train": ".training.train",
    }
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(modules[name], __name__), name)
