"""YAML + overrides -> Recipe. Imports no torch."""

from .keys import Recipe
from .read import read_recipe

__all__ = ["Recipe", "read_recipe"]
