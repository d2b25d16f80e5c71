"""The model as the recipe trains it: its weights, their dtype, and for LoRA its adapter (adapters.py)."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..errors import in_one_line
from ..recipe.keys import Recipe
from .adapters import with_adapter
from .base_config import load_config
from .methods.chosen import methods_of
from .sft_config import model_init_kwargs, rope_error


def load_model(recipe: Recipe) -> tuple[PreTrainedModel | PeftModel, torch.dtype | None]:
    """Return the model in its training dtype, and the dtype to save it in: that of the base model's file.

    Raises:
        RecipeError: the model or an adapter can't be loaded, or they are incompatible.
    """
    set_seed(recipe.seed)  # Trainer sets it again, but after the adapter is initialized
    model, file_dtype = _load_base(recipe)
    return (with_adapter(recipe, model), None) if recipe.trains_adapter else (model, file_dtype)


def _load_base(recipe: Recipe) -> tuple[PreTrainedModel, torch.dtype | None]:
    """Load the base model. Code in its folder runs only for an architecture that transformers lacks."""
    name = recipe.model_name_or_path
    try:
        config = load_config(recipe)
        kwargs = model_init_kwargs(recipe, config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **kwargs)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise recipe.error("model_name_or_path", f"{name} can't be loaded ({in_one_line(error)})") from error
    model: PreTrainedModel
    model, info = loaded
    for kind in ("missing", "unexpected"):
        if keys := info[f"{kind}_keys"]:
            raise recipe.error(
                "model_name_or_path",
                f"{name}: its weights don't match its config.json: {len(keys)} {kind} keys, the first is {min(keys)}; "
                f"expected the files of one {config.model_type} model",
            )
    rope_types = [getattr(module, "rope_type", None) for module in model.modules()]
    if "rope_parameters" in kwargs and recipe.rope_scaling not in rope_types:
        raise rope_error(recipe, config)
    for method in methods_of(recipe):
        method.prepare_base(model)
    return model, getattr(config, "dtype", None)


def stop_after_calls(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, call_end: str | None
) -> None:
    """Let `generate` stop, too, at the token that ends a reply with calls, where it is another one (gpt-oss, GLM)."""
    config = model.generation_config
    if call_end and config is not None:
        config.eos_token_id = end_tokens(model, tokenizer, cast(int, tokenizer.convert_tokens_to_ids(call_end)))


def end_tokens(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, call_end: int | None = None
) -> list[int]:
    """The ids that end a reply: the end-of-turn token, that of a call, and those of the model's generation config."""
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = [tokenizer.eos_token_id, call_end, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(end for end in ends if end is not None))
