"""The LoRA adapter that is trained, and the earlier ones below it.

An adapter is of use only with the base that it was trained on. Where earlier adapters are merged into the base, the
merged base is saved in the run's folder, and the new adapter names it.
"""

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from peft import LoraModel, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..errors import in_one_line
from ..recipe.keys import Recipe
from ..recipe.preference import unmergeable
from .methods.chosen import methods_of
from .methods.method import AdapterConfig
from .sft_config import to_lora_config
from .split import find_split
from .weights import Model, linear_layers


def with_adapter(recipe: Recipe, model: PreTrainedModel) -> PeftModel:
    """Return the model with the adapter to train.

    As in LLaMA-Factory: the last of `adapter_name_or_path` is trained further, those before it are merged into the
    base; with `create_new_adapter` all are merged.
    """
    adapters, to_merge = recipe.adapter_name_or_path, recipe.adapters_to_merge
    if to_merge and find_split(recipe).shards_weights:
        raise unmergeable(recipe, "a base that FSDP or DeepSpeed splits")
    base_name = recipe.model_name_or_path
    for adapter in to_merge:
        model = _load_adapter(recipe, model, adapter, is_trainable=False).merge_and_unload(safe_merge=True)
    if to_merge and recipe.do_train:
        base_name = str(Path(recipe.output_dir) / "merged_base")
        if PartialState().is_main_process:
            model.save_pretrained(base_name)
    if to_merge == adapters:
        peft_model = new_adapter(recipe, model)
    else:
        peft_model = _load_adapter(recipe, model, adapters[-1], is_trainable=True)
    peft_model.peft_config["default"].base_model_name_or_path = base_name
    peft_model.create_or_update_model_card = lambda output_dir: None  # type: ignore[method-assign] # it edits a user's README
    for method in methods_of(recipe):
        method.prepare_adapter(peft_model)
    return peft_model


def new_adapter(recipe: Recipe, model: PreTrainedModel) -> PeftModel:
    """Return the model with an untrained adapter. Raises RecipeError for modules that the model lacks."""
    config: AdapterConfig = to_lora_config(recipe, tied=getattr(model.config, "tie_word_embeddings", False))
    target = f"{recipe.finetuning_type}_target"
    expert_targets: set[str] = set()
    for method in methods_of(recipe):
        config = method.adapter_config(config, model)
        expert_targets |= method.adapter_targets
    _check_targets(recipe, target, model, expert_targets)
    _check_targets(recipe, "additional_target", model)
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise recipe.error(target, in_one_line(error)) from error


def _check_targets(recipe: Recipe, key: str, model: PreTrainedModel, others: Collection[str] = ()) -> None:
    """Raise RecipeError if the key names a module that the model lacks."""
    ends = [f".{name}" for name in ("all", *dict(model.named_modules()), *others)]
    unknown = [name for name in getattr(recipe, key) if not any(end.endswith(f".{name}") for end in ends)]
    if unknown:
        weights = model.named_parameters()
        known = {name.split(".")[-2] for name, weight in weights if weight.ndim > 1 or key == "additional_target"}
        known |= {name.rpartition(".")[2] for name in linear_layers(model)}  # also where the weights are packed
        raise recipe.error(key, f"the model has no module {unknown[0]}; expected some of {', '.join(sorted(known))}")


def _load_adapter(recipe: Recipe, model: PreTrainedModel, adapter: str, is_trainable: bool) -> PeftModel:
    """Return the model with an adapter of an earlier run.

    PEFT 0.21 only warns of weights that the adapter lacks, and ignores those that the model lacks
    (https://github.com/huggingface/peft/issues/2699).
    """
    hub: dict[str, Any] = {"revision": recipe.model_revision, "cache_dir": recipe.cache_dir}  # as LLaMA-Factory
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*missing adapter keys")
            peft_model = PeftModel.from_pretrained(model, adapter, is_trainable=is_trainable, **hub)
            weights = load_peft_weights(adapter, device="cpu", **hub)
    except (OSError, ValueError, RuntimeError, UserWarning) as error:
        problem = f"{adapter} can't be loaded ({in_one_line(error)}). Use the folder of an adapter of this model"
        raise recipe.error("adapter_name_or_path", problem) from error
    prefix = cast(LoraModel, peft_model.base_model).prefix  # of the adapter's modules: lora_
    saved = {name for name in weights if f".{prefix}" in name}
    if extra := saved - get_peft_model_state_dict(peft_model).keys():
        problem = f"{adapter} is of another model: this one has no module for {min(extra)}"
        raise recipe.error("adapter_name_or_path", problem)
    return peft_model


def keep_adapter_in_float32(model: Model) -> None:
    """Undo TRL's cast of a quantized model's adapter to bfloat16, and PEFT's copies of modules in the base's dtype.

    In bfloat16 a step below 1/256 of a weight rounds to zero, also in an adapter. Only ZeRO-3 needs a single dtype
    (https://github.com/huggingface/trl/issues/6089).
    """
    if not isinstance(model, PeftModel) or is_deepspeed_zero3_enabled():
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
