"""What belongs to LoRA: the adapter that is trained, the earlier ones under it, and PiSSA.

An adapter is worth nothing without the base that it was trained on. Two kinds of recipe change that base in memory, so
each leaves the run's folder with what makes its adapter usable: earlier adapters merged into the base (the merged base
is saved beside the new adapter, which names it), and PiSSA (the adapter is turned into plain LoRA when the run ends).
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import LoraConfig, OFTConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..errors import in_one_line
from ..recipe.keys import Recipe
from .sft_config import to_adapter_config

MERGED_BASE = "merged_base"
PISSA_START = "pissa_start"


def with_adapter(recipe: Recipe, model: PreTrainedModel) -> PeftModel:
    """The model under the adapter that is trained.

    As in LLaMA-Factory: of `adapter_name_or_path` the last is trained on, those before it are merged into the base;
    `create_new_adapter` merges them all.
    """
    adapters = recipe.adapter_name_or_path
    to_merge = adapters if recipe.create_new_adapter else adapters[:-1]
    _check_adapters(recipe, to_merge)
    base_name = recipe.model_name_or_path
    for adapter in to_merge:
        model = _load_adapter(recipe, model, adapter, is_trainable=False).merge_and_unload(safe_merge=True)
    if to_merge and recipe.do_train:
        base_name = str(Path(recipe.output_dir) / MERGED_BASE)
        if PartialState().is_main_process:
            model.save_pretrained(base_name)
    if to_merge == adapters:
        peft_model = new_adapter(recipe, model)
    else:
        peft_model = _load_adapter(recipe, model, adapters[-1], is_trainable=True)
    peft_model.peft_config["default"].base_model_name_or_path = base_name
    peft_model.create_or_update_model_card = lambda output_dir: None  # type: ignore[method-assign] # into a user's README
    if _starts_from_pissa(peft_model) and recipe.do_train and PartialState().is_main_process:
        _save_pissa_start(peft_model, Path(recipe.output_dir) / PISSA_START)
    return peft_model


def new_adapter(recipe: Recipe, model: PreTrainedModel) -> PeftModel:
    """The model under an untrained adapter. Raises RecipeError for modules that it does not have."""
    target = f"{recipe.finetuning_type}_target"
    targets = getattr(recipe, target)
    config = to_adapter_config(recipe, tied=model.config.tie_word_embeddings)
    try:
        fused = _fused_by_peft(model, config)
    except ValueError as error:
        raise recipe.error(target, str(error)) from error
    if fused is not None:
        for key in ("lora_dropout", "use_dora", "pissa_init"):
            if getattr(recipe, key):
                way_out = "remove the line, or name other layers in lora_target"
                raise recipe.error(key, f"PEFT's LoRA of experts has none; {way_out}")
    names = [f".{name}" for name, _ in model.named_modules()]
    for key, wanted in ((target, targets), ("additional_target", recipe.additional_target)):
        known = [*names, *(f".{name}" for name in fused or () if key == target)]
        if unknown := [one for one in wanted if one != "all" and not any(name.endswith(f".{one}") for name in known)]:
            weights = model.named_parameters()
            there = {name.split(".")[-2] for name, weight in weights if weight.ndim > 1 or key == "additional_target"}
            there |= {name.rpartition(".")[2] for name in _linear_layers(model)}  # also where the weights are packed
            raise recipe.error(key, f"no module {unknown[0]}; there are {', '.join(sorted(there))}")
    if "all" in targets and hasattr(model, "quantization_method"):
        config.target_modules = sorted({name.rpartition(".")[2] for name in _linear_layers(model)})
    excluded = _not_for_lora(model) if "all" in targets else []
    if recipe.use_llama_pro:
        chosen = trained_blocks(recipe, model.config.get_text_config().num_hidden_layers)
        blocks = {name: re.search(r"\.(\d+)\.", name) for name in names}
        excluded += [name[1:] for name, block in blocks.items() if block and int(block[1]) not in chosen]
    config.exclude_modules = excluded or None
    if isinstance(config, LoraConfig) and fused and not recipe.quantization_bit:
        beside = [name.split(".") for name in _linear_layers(model) if name.rpartition(".")[2] in fused]
        config.target_parameters = sorted({".".join([*name[-2:], "weight"]) for name in beside})
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise recipe.error(target, in_one_line(error)) from error


def _fused_by_peft(model: PreTrainedModel, config: LoraConfig | OFTConfig) -> set[str] | None:
    """Names of targets (gate_proj, ...) for which PEFT 0.21 adapts the fused experts of transformers 5, and these alone.

    Linear layers of these names, in shared experts and dense blocks, would be left out. None: it adapts no experts.
    """
    converted = copy.deepcopy(config)
    convert_peft_config_for_transformers(converted, model, None)
    if not isinstance(converted, LoraConfig) or not converted.target_parameters:
        return None
    given = config.target_modules
    names = {name.rpartition(".")[2] for name in _linear_layers(model)} if isinstance(given, str) else {*(given or ())}
    return names - {*(converted.target_modules or ())}


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """All but the head, torch's own or not: PEFT's all-linear finds none of GPTQ's, AWQ's and AQLM's."""
    modules = model.named_modules()
    linear = [
        (name, one) for name, one in modules if isinstance(one, torch.nn.Linear) or "Linear" in type(one).__name__
    ]
    return [name for name, one in linear if one is not model.get_output_embeddings()]


def _not_for_lora(model: PreTrainedModel) -> list[str]:
    """Names of linear layers that PEFT 0.21 cannot adapt, so that `lora_target: all` leaves them out.

    A router that is a Linear with a forward of its own (Llama 4, Phi-MoE) returns several tensors. Mamba's kernels
    read the weights of out_proj and conv1d past the adapter.
    """
    modules = {(name.rsplit(".", 1)[-1], type(module)) for name, module in model.named_modules()}
    found = {name for name, cls in modules if issubclass(cls, torch.nn.Linear) and "Router" in cls.__name__}
    if any(name == "conv1d" for name, _ in modules):
        found |= {"conv1d", "out_proj"}
    return sorted(found)


def trained_blocks(recipe: Recipe, blocks: int) -> range:
    """Which of the model's blocks are trained: the last, the first, or with `use_llama_pro` every n-th.

    LLaMA Pro (https://arxiv.org/abs/2401.02415) puts a new block behind each n - 1 old ones, and trains these alone.
    """
    count = recipe.freeze_trainable_layers
    if recipe.use_llama_pro:
        if count < 1 or blocks % count:
            raise recipe.error(
                "freeze_trainable_layers", f"use_llama_pro trains every n-th of {blocks} layers, found {count}"
            )
        return range(blocks // count - 1, blocks, blocks // count)
    return range(max(0, blocks - count), blocks) if count > 0 else range(min(-count, blocks))


def _check_adapters(recipe: Recipe, to_merge: list[str]) -> None:
    split = any(os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("FSDP", "DEEPSPEED"))
    base = "a base that FSDP or DeepSpeed splits" if split else "a quantized base" if recipe.quantization_bit else ""
    if to_merge and base:
        raise recipe.error(
            "adapter_name_or_path",
            f"{to_merge[0]} can't be merged into {base}; merge it first "
            f"(arpo-trl merge {to_merge[0]} OUT) and name OUT in model_name_or_path",
        )
    beside = {"use_dora": recipe.use_dora, "additional_target": recipe.additional_target, "FSDP or DeepSpeed": split}
    if recipe.pissa_init and any(beside.values()):
        names = ", ".join(name for name, given in beside.items() if given)
        raise recipe.error("pissa_init", f"can't become plain LoRA at the end with {names}; remove one")


def _load_adapter(recipe: Recipe, model: PreTrainedModel, adapter: str, is_trainable: bool) -> PeftModel:
    """The model under an adapter of an earlier run.

    PEFT 0.21 warns of what the adapter lacks and trains that anew; of what the model lacks it says nothing
    (https://github.com/huggingface/peft/issues/2699).
    """
    hub: dict[str, Any] = {"revision": recipe.model_revision, "cache_dir": recipe.cache_dir}  # as LLaMA-Factory
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*missing adapter keys")
            peft_model = PeftModel.from_pretrained(model, adapter, is_trainable=is_trainable, **hub)
            weights = load_peft_weights(adapter, device="cpu", **hub)
    except (OSError, ValueError, RuntimeError, UserWarning) as error:
        what = f"{adapter} could not be loaded: {in_one_line(error)}"
        raise recipe.error("adapter_name_or_path", what) from error
    saved = {name for name in weights if ".lora_" in name or ".oft_" in name}
    if extra := saved - get_peft_model_state_dict(peft_model).keys():
        raise recipe.error(
            "adapter_name_or_path", f"{adapter} does not fit the model, which has no module for {min(extra)}"
        )
    return peft_model


def keep_adapter_in_float32(model: PreTrainedModel | PeftModel) -> None:
    """Undo TRL's cast of a quantized model's adapter to bfloat16 and PEFT's copies of whole modules in the base's dtype.

    In bfloat16 a step below 1/256 of a weight rounds to nothing, also in an adapter. ZeRO-3 alone needs one dtype
    (https://github.com/huggingface/trl/issues/6089).
    """
    if not isinstance(model, PeftModel) or is_deepspeed_zero3_enabled():
        return
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


# --- PiSSA (https://arxiv.org/abs/2404.02948) ---
# It moves the weight's principal part W0 = B0 A0 into the adapter and leaves W - W0 as the base. What was learnt is
# B A - B0 A0: plain LoRA of twice the rank, for the base as it was. Checkpoints keep B and A, so that a resume is exact.


def _starts_from_pissa(model: PeftModel) -> bool:
    return str(getattr(model.peft_config["default"], "init_lora_weights", None)).startswith("pissa")


def _save_pissa_start(model: PeftModel, folder: Path) -> None:
    """Keep B0 and A0, as an adapter that PEFT can subtract: one that says nothing of PiSSA."""
    config: Any = model.peft_config["default"]
    start, config.init_lora_weights = config.init_lora_weights, True
    model.save_pretrained(str(folder))
    config.init_lora_weights = start


def turn_pissa_into_lora(model: Any, output_dir: Path) -> None:
    """Replace the saved PiSSA adapter in `output_dir` by its plain LoRA; leave any other as it is."""
    if isinstance(model, PeftModel) and _starts_from_pissa(model):
        start = output_dir / PISSA_START
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "PiSSA changes the base weights")  # PEFT's advice is to do just this
            model.save_pretrained(str(output_dir), path_initial_model_for_weight_conversion=str(start))
        shutil.rmtree(start)
