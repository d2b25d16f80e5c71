"""The model as the recipe wants it: its dtype, and what of it is trained. Adapters are adapters.py's."""

from __future__ import annotations

import copy
import re
from typing import Any, cast

import torch
from accelerate import PartialState
from peft import PeftModel
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl.trainer.sft_config import SFTConfig

from ..errors import in_one_line
from ..recipe.keys import Recipe
from .adapters import trained_blocks, with_adapter
from .sft_config import (
    load_model_config,
    model_init_kwargs,
    rope_is_ignored,
    settle_packed,
    splits_model,
    to_quantization_config,
    unpack_whole,
)


def load_model(recipe: Recipe) -> tuple[PreTrainedModel | PeftModel, torch.dtype | None]:
    """The model in its training dtype, and the dtype to save it in: that of the base model's own file.

    Raises:
        RecipeError: the model or an adapter can't be loaded, or they do not go together.
    """
    set_seed(recipe.seed)  # Trainer's own comes after the adapter has been drawn
    model, file_dtype = _load_base(recipe)
    if recipe.trains_adapter:
        peft_model = with_adapter(recipe, model)
        codes = [name for name, p in peft_model.named_parameters() if p.dtype is torch.int16]  # AQLM's
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(peft_model, codes)  # no backend sends them
        return peft_model, None
    freeze(recipe, model)
    return model, file_dtype


def _load_base(recipe: Recipe) -> tuple[PreTrainedModel, torch.dtype | None]:
    """The base model. Code in its folder runs only for an architecture that transformers does not have."""
    kwargs = model_init_kwargs(recipe)
    name = recipe.model_name_or_path
    try:
        config = load_model_config(recipe)
        given = kwargs | unpack_whole(config)
        if quantization := to_quantization_config(recipe):
            given = kwargs | {"quantization_config": quantization}  # a None would hide that the base is quantized
        elif settle_packed(config):
            given = _for_packed(recipe, config, kwargs)
        found: Any = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **given)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise recipe.error("model_name_or_path", f"{name} could not be loaded: {in_one_line(error)}") from error
    model: PreTrainedModel
    model, loaded = found
    for kind in ("missing", "unexpected"):
        if keys := loaded[f"{kind}_keys"]:
            raise recipe.error(
                "model_name_or_path",
                f"{name}: its weights do not fit its config.json: {len(keys)} {kind} keys, {min(keys)} first; "
                f"expected the files of one {config.model_type} model",
            )
    if model.base_model is model and hasattr(model, "model"):
        model.base_model_prefix = "model"  # Llama4ForCausalLM of transformers 5.23 names one that it does not have
    _keep_gradients(model)
    types = [getattr(module, "rope_type", None) for module in model.modules()]
    if "rope_parameters" in kwargs and recipe.rope_scaling not in types:
        raise rope_is_ignored(recipe, config)
    _settle_balancing_loss(recipe, model.config.get_text_config())
    return model, getattr(config, "dtype", None)


def _keep_gradients(model: PreTrainedModel) -> None:
    """Have quantized layers pass their gradients on, also after an evaluation."""
    layer: Any
    for layer in model.modules():
        # In an evaluation a Linear4bit of bitsandbytes 0.50 packs its weights for a kernel that has no gradients, and the
        # first forward of a layer of gptqmodel 7.7 takes such a kernel for good. Both on CPUs.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
        if hasattr(layer, "linear_mode"):
            layer.linear_mode = "train"
        if hasattr(layer, "codebooks"):  # peft 0.21 adds in place to AQLM's output, a view where there is a bias
            layer.register_forward_hook(lambda layer, args, output: output.clone())


def _for_packed(recipe: Recipe, config: PreTrainedConfig, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What `from_pretrained` is told of a base that is quantized already: the config that `settle_packed` changed."""
    if splits_model(recipe):
        raise recipe.error(
            "model_name_or_path",
            f"{recipe.model_name_or_path} is quantized already, and can't be split by FSDP or DeepSpeed ZeRO-3; "
            "launch with accelerate_configs/multi_gpu.yaml",
        )
    rope: dict[str, Any] = {
        key: kwargs[key] for key in ("rope_parameters", "max_position_embeddings") if key in kwargs
    }
    config.update(rope)
    given = {key: value for key, value in kwargs.items() if key not in rope} | {"config": config}
    if torch.accelerator.is_available():
        given["device_map"] = {"": PartialState().device}  # the kernel is chosen for the device
    return given


def _settle_balancing_loss(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Refuse a mixture's balancing loss where there is no mixture; else name its experts as TRL asks for them."""
    if not recipe.moe_aux_loss_coef:
        return
    if not hasattr(config, "output_router_logits"):
        raise recipe.error(
            "moe_aux_loss_coef", f"{config.model_type} has no router whose loss could be added; remove the line"
        )
    if not hasattr(config, "num_experts"):  # Granite's and Phi's mixtures: trl 1.16, add_fused_lm_head
        config.num_experts = config.num_local_experts


def frozen_copy(model: PreTrainedModel | PeftModel, args: SFTConfig) -> PreTrainedModel:
    """The model as it is now, with its adapter, in the dtype that the run computes in: for a loss to compare with."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    found = copy.deepcopy(model.get_base_model() if isinstance(model, PeftModel) else model).requires_grad_(False)
    return cast(PreTrainedModel, found.to(dtype=dtype).eval())


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


# --- some layers ---


def freeze(recipe: Recipe, model: PreTrainedModel) -> None:
    """Freeze what the recipe does not train, or not at first."""
    if recipe.use_badam:
        _train_one_block(recipe, model)
    elif recipe.finetuning_type == "freeze":
        _train_some_modules(recipe, model)
    else:
        return
    if recipe.use_reentrant_gc:
        model.enable_input_require_grads()  # a reentrant checkpoint has no gradient where its input has none


def _train_one_block(recipe: Recipe, model: PreTrainedModel) -> None:
    """Train the first block: the step that takes most memory. The optimizer goes on from block to block."""
    found = [(re.match(r".*layers\.[^.]*\.", name), parameter) for name, parameter in model.named_parameters()]
    blocks = list(dict.fromkeys(match[0] for match, _ in found if match))
    if not blocks:
        raise recipe.error("use_badam", f"{model.config.model_type} has no blocks named layers; remove the line")
    if (start := recipe.badam_start_block or 0) >= len(blocks):
        raise recipe.error("badam_start_block", f"expected a number below {len(blocks)}, found {start}")
    for match, parameter in found:
        parameter.requires_grad = match is not None and match[0] == blocks[0]


def _train_some_modules(recipe: Recipe, model: PreTrainedModel) -> None:
    """Train some modules of some blocks, and modules outside them.

    As LLaMA-Factory's freeze tuning, but that a name is a module's whole name: there `norm` is `input_layernorm` too.
    """
    blocks = model.config.get_text_config().num_hidden_layers
    chosen = trained_blocks(recipe, blocks)
    inside: set[str] = set()
    outside: set[str] = set()
    for name, parameter in model.named_parameters():
        block = re.search(r"\.(\d+)\.([^.]+)\.", name)
        if block:
            number, module = int(block[1]), block[2]
            inside.add(module)
            wanted = {module, "all"} & {*recipe.freeze_trainable_modules} and number in chosen
        else:
            module = name.split(".")[-2]
            outside.add(module)
            wanted = module in recipe.freeze_extra_modules
        parameter.requires_grad = bool(wanted)
        if wanted and not recipe.pure_bf16:
            parameter.data = parameter.data.float()
    for key, given, there in (
        ("freeze_trainable_modules", recipe.freeze_trainable_modules, {"all", *inside}),
        ("freeze_extra_modules", recipe.freeze_extra_modules, outside),
    ):
        if unknown := [name for name in given if name not in there]:
            raise recipe.error(key, f"no module {unknown[0]}; there are {', '.join(sorted(there))}")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise recipe.error(
            "freeze_trainable_layers",
            f"{recipe.freeze_trainable_layers} leaves nothing to train; expected some of {blocks} layers",
        )
