"""The base model: its config.json, and loading its weights."""

import functools
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..errors import RecipeError
from ..recipe.keys import Recipe
from ..report.manifest import find_manifest
from .weights import is_text_part


def load_config(recipe: Recipe) -> PreTrainedConfig:
    """Return the base model's config. Raises OSError or ValueError if it can't be loaded."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(recipe.model_name_or_path, **hub_kwargs(recipe))
    return config


def load_weights(name: str | Path, config: PreTrainedConfig, /, **kwargs: Any) -> PreTrainedModel:
    """Return the model of a folder or a hub ID, whose config is `config`. `kwargs`: of `from_pretrained`.

    Raises:
        OSError, ImportError, ValueError, RuntimeError: it can't be loaded, or its weights don't match its config.json.
    """
    values = config.to_dict()
    model: PreTrainedModel
    model, info = auto_class(config).from_pretrained(name, output_loading_info=True, **kwargs)
    if is_text_part(model, values):  # the keys of the other parts: llama4's, not named by its class
        own = {f"{'.'.join(name.split('.')[:2])}." for name, _ in model.named_parameters()}
        own |= {"language_model."}
        info["unexpected_keys"] = [
            key for key in info["unexpected_keys"] if key.startswith(tuple(own)) or ".language_model." in key
        ]
    for kind in ("missing", "unexpected"):
        if keys := info[f"{kind}_keys"]:
            raise ValueError(
                f"its weights don't match its config.json: {len(keys)} {kind} keys, the first is {min(keys)}; "
                f"expected the files of one {model.config.model_type} model"
            )
    return model


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the class that loads the model: of its text part, or of all parts if transformers has no class for that one.

    Raises:
        ValueError: the model does not generate text.
    """
    own_code = getattr(config, "auto_map", ())
    if type(config) in AutoModelForCausalLM._model_mapping or "AutoModelForCausalLM" in own_code:
        return AutoModelForCausalLM
    if type(config) in AutoModelForImageTextToText._model_mapping:
        return AutoModelForImageTextToText
    what = f"{config.model_type} has no causal language model in transformers"
    raise ValueError(f"{what}; use a decoder-only text model")


def base_of(folder: Path | str) -> str:
    """Return the base of an adapter's folder, or else the model itself."""
    if (Path(folder) / "adapter_config.json").is_file():
        return str(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)
    return str(folder)


def runs_code(folder: Path, base: str, trust_remote_code: bool) -> bool:
    """Return whether to run the code in the base's files: if transformers lacks the architecture and the user trusts it.

    Raises:
        RecipeError: the code is needed and not trusted. run.json does not count: anyone may have written it.
    """
    try:
        values, _ = PreTrainedConfig.get_config_dict(base)
    except (OSError, ValueError):
        return False  # reported by the load
    if "auto_map" not in values or values.get("model_type") in CONFIG_MAPPING:
        return False
    if trust_remote_code:
        return True
    manifest = find_manifest(folder)
    trusted = manifest is not None and manifest.recipe.get("trust_remote_code") is True
    trained = ", as its training did (trust_remote_code: true in run.json)" if trusted else ""
    raise RecipeError(
        f"{base}: model type {values.get('model_type')} runs Python code from this folder{trained}. "
        "Read that code, then add --trust-remote-code"
    )


def hub_kwargs(recipe: Recipe) -> dict[str, Any]:
    """Return where to load the model from, and whether to run its code: only if transformers lacks the architecture."""
    trusted = recipe.trust_remote_code and _config_values(recipe).get("model_type") not in CONFIG_MAPPING
    return {"revision": recipe.model_revision, "cache_dir": recipe.cache_dir, "trust_remote_code": trusted}


def quantization(recipe: Recipe) -> dict[str, Any]:
    """Return the quantization_config in the base's config.json; empty if it has none."""
    return _config_values(recipe).get("quantization_config") or {}


def lacks_bf16_instructions() -> bool:
    """Return whether torch computes on a CPU whose bfloat16 products are a plain loop, 10 to 30 times slower than float32."""
    known: dict[str, int] = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.13 or later
    has_none = bool(known) and not any(known[name] for name in known if name.endswith("bf16"))
    return has_none and not torch.accelerator.is_available()


def uses_bf16_autocast(recipe: Recipe) -> bool:
    """Return whether `bf16: true` computes in bfloat16: not on a CPU that lacks its instructions."""
    return recipe.bf16 and not recipe.pure_bf16 and (recipe.force_bf16 or not lacks_bf16_instructions())


def uses_fp16(recipe: Recipe) -> bool:
    """Return whether `fp16: true` computes in float16: not on a CPU, where Accelerate 1.15 ignores it."""
    return recipe.fp16 and torch.accelerator.is_available() and not recipe.trl.get("use_cpu")


def compute_dtype(recipe: Recipe) -> torch.dtype | None:
    """Return the half-precision dtype that the recipe computes in; None for float32."""
    if recipe.pure_bf16 or uses_bf16_autocast(recipe):
        return torch.bfloat16
    return torch.float16 if uses_fp16(recipe) else None


def _config_values(recipe: Recipe) -> dict[str, Any]:
    """Return the base's config.json as a dict; empty if it can't be read, which `load_config` reports."""
    path = Path(recipe.model_name_or_path, "config.json").absolute()
    changed = path.stat().st_mtime_ns if path.is_file() else 0
    name = str(path.parent) if changed else recipe.model_name_or_path
    try:
        return _read_config(name, recipe.model_revision, recipe.cache_dir, changed)
    except (OSError, ValueError):
        return {}


@functools.lru_cache(maxsize=8)
def _read_config(name: str, revision: str, cache_dir: str | None, changed: int) -> dict[str, Any]:
    values: dict[str, Any]
    values, _ = PreTrainedConfig.get_config_dict(name, revision=revision, cache_dir=cache_dir)
    return values
