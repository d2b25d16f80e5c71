"""The model as the recipe trains it: its weights, their dtype, and for LoRA its adapter (adapters.py)."""

from collections.abc import Collection
from typing import cast

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from ..errors import in_one_line
from ..recipe.keys import Recipe
from .adapters import with_adapter
from .base import load_config, load_weights
from .base_files import BaseFiles, read_base_files
from .methods.chosen import methods_of
from .sft_config import model_init_kwargs, rope_error
from .weights import Model


def load_model(recipe: Recipe) -> tuple[Model, BaseFiles | None]:
    """Return the model in its training dtype, and what to save as in the base's files, or None for LoRA.

    Raises:
        RecipeError: the model or an adapter can't be loaded, or they are incompatible.
    """
    set_seed(recipe.seed)  # Trainer sets it again, but after the adapter is initialized
    try:
        config = load_config(recipe)
        kwargs = model_init_kwargs(recipe, config)
        model = load_weights(recipe.model_name_or_path, config, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        what = f"{recipe.model_name_or_path} can't be loaded ({in_one_line(error)})"
        raise recipe.error("model_name_or_path", what) from error
    rope_types = [getattr(module, "rope_type", None) for module in model.modules()]
    if "rope_parameters" in kwargs and recipe.rope_scaling not in rope_types:
        raise rope_error(recipe, config)
    for method in methods_of(recipe):
        method.prepare_base(model)
    if recipe.trains_adapter:
        return with_adapter(recipe, model), None
    return model, read_base_files(recipe.model_name_or_path, model, recipe.model_revision, recipe.cache_dir)


def stop_after_calls(model: Model, tokenizer: PreTrainedTokenizerBase, call_end: str | None) -> None:
    """Have `generate` also stop at the token that ends a reply with calls, if it is another one (gpt-oss, GLM)."""
    config = model.generation_config
    if call_end and config is not None:
        config.eos_token_id = end_tokens(model, tokenizer, cast(int, tokenizer.convert_tokens_to_ids(call_end)))


def end_tokens(model: Model, tokenizer: PreTrainedTokenizerBase, call_end: int | None = None) -> list[int]:
    """Return the ids that end a reply: the end-of-turn token, that of a call, and those of the generation config."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ends = [tokenizer.eos_token_id, call_end, *(configured if isinstance(configured, list) else [configured])]
    return list(dict.fromkeys(end for end in ends if end is not None))


def through_end(ids: list[int], ends: Collection[int]) -> list[int]:
    """Return the ids through the first end token, or all of them."""
    last = next((at for at, token in enumerate(ids) if token in ends), len(ids))
    return ids[: last + 1]
