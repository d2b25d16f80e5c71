"""Supervised fine-tuning of tool-using chat models from LLaMA-Factory recipes, on Accelerate and TRL.

    from arpo_trl import read_recipe, train

    train(read_recipe("recipes/qwen_toy.yaml", ["max_steps=10"]))

Nothing heavy is imported before it is used: reading a recipe needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data.prepare import prepare_datasets
    from .errors import DatasetError, RecipeError, RowError, RunFailed
    from .recipe import Recipe, read_recipe
    from .run.train import train

__version__ = "0.1.0"
__all__ = [
    "DatasetError",
    "Recipe",
    "RecipeError",
    "RowError",
    "RunFailed",
    "prepare_datasets",
    "read_recipe",
    "train",
]

_MODULES = {
    "DatasetError": "errors",
    "Recipe": "recipe",
    "RecipeError": "errors",
    "RowError": "errors",
    "RunFailed": "errors",
    "prepare_datasets": "data.prepare",
    "read_recipe": "recipe",
    "train": "run.train",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
