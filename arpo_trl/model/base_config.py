"""What is known of the base model before its weights are loaded: its config.json, and whether the launch splits it."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..recipe.keys import Recipe


def load_config(recipe: Recipe) -> PreTrainedConfig:
    """Return the base model's config. Raises OSError or ValueError if it can't be loaded."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(recipe.model_name_or_path, **hub_kwargs(recipe))
    return config


def hub_kwargs(recipe: Recipe) -> dict[str, Any]:
    """Return where the model is loaded from, and whether its own code may run: only for an unknown architecture."""
    return {
        "revision": recipe.model_revision,
        "cache_dir": recipe.cache_dir,
        "trust_remote_code": recipe.trust_remote_code and _values(recipe).get("model_type") not in CONFIG_MAPPING,
    }


def quantization(recipe: Recipe) -> dict[str, Any]:
    """Return how the base is already quantized, by its config.json; empty if it isn't."""
    return _values(recipe).get("quantization_config") or {}


def splits_model(recipe: Recipe) -> bool:
    """Return whether FSDP or ZeRO-3 splits the model: without an Accelerator, but after `to_sft_config`."""
    fsdp = recipe.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    return bool(fsdp or is_deepspeed_zero3_enabled())


def compute_dtype(recipe: Recipe) -> torch.dtype | None:
    """Return the half-precision dtype that the recipe computes in; None for float32."""
    if recipe.bf16 or recipe.pure_bf16:
        return torch.bfloat16
    return torch.float16 if recipe.fp16 else None


def _values(recipe: Recipe) -> dict[str, Any]:
    """Return config.json as it is; empty if it can't be read, which loading the model reports."""
    path = Path(recipe.model_name_or_path, "config.json").absolute()
    changed = path.stat().st_mtime_ns if path.is_file() else 0
    name = str(path.parent) if changed else recipe.model_name_or_path
    try:
        return _read(name, recipe.model_revision, recipe.cache_dir, changed)
    except (OSError, ValueError):
        return {}


@functools.lru_cache(maxsize=8)
def _read(name: str, revision: str, cache_dir: str | None, changed: int) -> dict[str, Any]:
    values: dict[str, Any]
    values, _ = PreTrainedConfig.get_config_dict(name, revision=revision, cache_dir=cache_dir)
    return values
