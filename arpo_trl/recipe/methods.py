"""The rare methods: their keys, rules and packages. Their behavior is in model/methods/.

To delete a method, delete its block of keys, its file in model/methods/ and the lines that name it here and in
model/methods/chosen.py.
"""

import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal

from pydantic import BaseModel

from .preference import compare_with_adapter
from .types import Count, Names, Number, Whole, key

# A `Recipe`, which inherits from the class below, so that this file can't import it.
_Recipe = Any


# One key per line.
# fmt: off
class AdvancedKeys(BaseModel):
    # --- GaLore ---
    use_galore: bool = key(False, "Use the GaLore optimizer (full only)", "optim, optim_args, optim_target_modules")
    galore_target: Names = key(["all"], "GaLore: modules to project", "optim_target_modules")
    galore_rank: Count = key(16, "GaLore: rank of the projected gradients", "optim_args")
    galore_update_interval: Count = key(200, "GaLore: steps between projections", "optim_args")
    galore_scale: Number = key(2.0, "GaLore: scale of the update", "optim_args", gt=0)
    galore_proj_type: Literal["std", "reverse_std", "right", "left", "full"] = key("std", "GaLore: type of projection", "optim_args")
    galore_layerwise: bool = key(False, "GaLore: update layer by layer, to save memory", "optim")

    # --- APOLLO ---
    use_apollo: bool = key(False, "Use the APOLLO optimizer (full only)", "optim, optim_args, optim_target_modules")
    apollo_target: Names = key(["all"], "APOLLO: modules to project", "optim_target_modules")
    apollo_rank: Count = key(16, "APOLLO: rank of the projected gradients", "optim_args")
    apollo_update_interval: Count = key(200, "APOLLO: steps between projections", "optim_args")
    apollo_scale: Number = key(32.0, "APOLLO: scale of the update", "optim_args", gt=0)
    apollo_proj: Literal["svd", "random"] = key("random", "APOLLO: how the projection is found", "optim_args")
    apollo_proj_type: Literal["std", "right", "left"] = key("std", "APOLLO: type of projection", "optim_args")
    apollo_scale_type: Literal["channel", "tensor"] = key("channel", "APOLLO: what shares a scale", "optim_args")
    apollo_layerwise: bool = key(False, "APOLLO: update layer by layer, to save memory", "optim")

    # --- Muon ---
    use_muon: bool = key(False, "Use Muon for matrices inside the layers, AdamW for the rest", "the optimizer")

    # --- Adam-mini ---
    use_adam_mini: bool = key(False, "Use the Adam-mini optimizer (full only)", "the optimizer")

    # --- BAdam ---
    use_badam: bool = key(False, "BAdam: train one block of layers at a time, weights in their file's dtype", "the optimizer")
    badam_start_block: Whole | None = key(None, "BAdam: first block; set by badam_switch_mode if omitted", ge=0)
    badam_switch_mode: Literal["ascending", "descending", "random", "fixed"] = key("ascending", "BAdam: order of the blocks")
    badam_switch_interval: Count = key(50, "BAdam: steps before the next block")

    # --- OFT ---
    oft_rank: Whole = key(0, "OFT: blocks per layer; requires oft_block_size: 0", "OFTConfig(r)", ge=0)
    oft_block_size: Whole = key(32, "OFT: size of a block", "OFTConfig", ge=0)
    oft_target: Names = key(["all"], "OFT: modules to adapt, as lora_target", "target_modules")
    module_dropout: Number = key(0.0, "OFT: share of blocks dropped in a step", "OFTConfig", ge=0, lt=1)

    # --- LoRA+ ---
    loraplus_lr_ratio: Number | None = key(None, "LoRA+: ratio of the learning rates of B and A", "the optimizer")
    loraplus_lr_embedding: Number = key(1e-6, "LoRA+: learning rate of adapted embeddings", "the optimizer", ge=0)

    # --- PiSSA ---
    pissa_init: bool = key(False, "PiSSA: initialize LoRA from the weights' principal components", "init_lora_weights")
    pissa_iter: Whole = key(16, "PiSSA: iterations of the fast SVD; -1 is an exact SVD", "init_lora_weights", ge=-1)

    # --- Freeze tuning and LLaMA Pro ---
    freeze_trainable_layers: Whole = key(2, "Number of final layers to train; negative counts from the first")
    freeze_trainable_modules: Names = key(["all"], "Modules to train in those layers (self_attn, mlp, ...)")
    freeze_extra_modules: Names = key([], "Modules to train outside the layers (norm, ...)")
    use_llama_pro: bool = key(False, "LLaMA Pro: train every n-th layer, freeze_trainable_layers in total")

    # --- Quantization of the base by bitsandbytes (QLoRA) ---
    quantization_bit: Literal[4, 8] | None = key(None, "Quantize the base model (LoRA only)", "load_in_4bit/8bit")
    quantization_method: Literal["bnb", "bitsandbytes"] = key("bnb", "Library that quantizes: bitsandbytes")
    quantization_type: Literal["nf4", "fp4"] = key("nf4", "4-bit data type", "bnb_4bit_quant_type")
    double_quantization: bool = key(True, "Quantize the 4-bit scales too", "bnb_4bit_use_double_quant")

    # --- Mixtures of experts (MoE) ---
    moe_aux_loss_coef: Number | None = key(None, "MoE: weight of the load balancing loss", "router_aux_loss_coef")

    # --- EAFT ---
    use_eaft_loss: bool = key(False, "EAFT loss: weigh each token by the model's uncertainty")
    eaft_alpha: Number = key(1.0, "EAFT: exponent of that weight", ge=0)

    # --- ASFT ---
    use_asft_loss: bool = key(False, "ASFT loss: DFT plus a KL divergence from the initial model")
    asft_alpha: Number = key(0.1, "ASFT: weight of the KL divergence", ge=0)
# fmt: on


# --- what follows from the keys ---

LOSSES = ["use_eaft_loss", "use_asft_loss"]
"""Keys that set the training loss."""
OPTIMIZERS = [
    "use_galore",
    "use_apollo",
    "use_muon",
    "use_adam_mini",
    "use_badam",
]
"""Keys that replace `optim`."""
PACKAGES = {
    "use_galore": "galore_torch",
    "use_apollo": "apollo_torch",
    "use_adam_mini": "adam_mini",
    "use_badam": "badam",
    "quantization_bit": "bitsandbytes",
}
"""The package that a key needs."""
OPTIM_PACKAGES = {
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "torch_4bit torch_8bit": "torchao",
    "bnb 8bit 32bit paged lion ademamix": "bitsandbytes",
    "schedule_free": "schedulefree",
    "lomo": "lomo_optim",
    "grokadamw": "grokadamw",
    "stable_adamw": "optimi",
    "anyprecision": "torchdistx",
    "torch_xla": "torch_xla",
    "npu": "torch_npu",
}
"""The package that a value of `optim` needs, by words in its name; the first that matches counts."""
QUANTIZED_PACKAGES = {
    "gptq": "gptqmodel optimum",  # PEFT requires optimum
    "awq": "gptqmodel optimum",  # transformers 5.24 reads AWQ with gptqmodel
    "aqlm": "aqlm",
    "bitsandbytes": "bitsandbytes",
}
"""The packages that read a quantized base, by its quantization method."""
MAY_CHANGE = {"moe_aux_loss_coef", "use_eaft_loss", "eaft_alpha", "use_asft_loss", "asft_alpha", "module_dropout"}
"""Keys of what is computed in each step, which no checkpoint contains."""
CANNOT_CHANGE = frozenset(AdvancedKeys.model_fields) - MAY_CHANGE
"""Keys of the methods' weights and optimizer states, which a checkpoint contains."""

# A key, the condition that is true if it conflicts with others, and what to do. One rule per line.
# fmt: off
RULES: list[tuple[str, Callable[[_Recipe], object], str]] = [
    ("fp16", lambda r: r.fp16 and r.use_badam, "not supported with use_badam; use bf16: true"),
    ("badam_switch_mode", lambda r: r.use_badam and r.badam_switch_mode == "fixed" and r.badam_start_block is None, "the mode fixed requires badam_start_block"),
    ("use_badam", lambda r: r.use_badam and int(os.environ.get("WORLD_SIZE", "1")) > 1, "not supported on several processes; remove the line"),
    ("oft_rank", lambda r: r.finetuning_type == "oft" and bool(r.oft_rank) == bool(r.oft_block_size), "set one of oft_rank and oft_block_size, and the other to 0"),
    ("loraplus_lr_ratio", lambda r: r.loraplus_lr_ratio and r.finetuning_type != "lora", "requires finetuning_type: lora"),
    ("pissa_init", lambda r: r.pissa_init and r.finetuning_type != "lora", "requires finetuning_type: lora"),
    ("pissa_init", lambda r: r.pissa_init and r.quantization_bit, "not supported with quantization_bit; remove one"),
    ("pissa_iter", lambda r: r.pissa_iter == 0, "expected an integer > 0, or -1 for an exact SVD, found 0"),
    ("use_llama_pro", lambda r: r.use_llama_pro and r.finetuning_type not in ("freeze", "lora"), "requires finetuning_type: freeze or lora"),
    ("quantization_bit", lambda r: r.quantization_bit and not r.trains_adapter, "full training of a quantized model is not supported; use finetuning_type: lora"),
    ("use_asft_loss", lambda r: r.use_asft_loss and r.quantization_bit, "not supported with quantization_bit; remove one"),
]
# fmt: on


def quantized_conflicts(recipe: _Recipe, config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each key that conflicts with a base that is already quantized. `config`: its config.json."""
    method = _quantized_with(config)
    if not method:
        return
    base = f"{recipe.model_name_or_path} is quantized with {method.upper()}"
    if missing := [name for name in QUANTIZED_PACKAGES[method].split() if importlib.util.find_spec(name) is None]:
        fix = f"pip install {' '.join(missing)}, or use the unquantized model and quantization_bit: 4"
        yield "model_name_or_path", f"{base}, which needs {' and '.join(missing)}; {fix}"
    if recipe.do_train and not recipe.trains_adapter:
        yield "finetuning_type", f"{base}, which does not support full training; use finetuning_type: lora"
    for name in ("use_dora", "pissa_init", "use_asft_loss"):
        if getattr(recipe, name) and (name, method) != ("use_dora", "bitsandbytes"):
            yield name, f"not supported: {base}; remove the line"
    if recipe.adapters_to_merge:
        fix = f"keep one and create_new_adapter: false{compare_with_adapter(recipe)}"
        yield "adapter_name_or_path", f"{base}, so no adapter can be merged into it; {fix}"


def keep_quantization(recipe: _Recipe, config: dict[str, Any]) -> _Recipe:
    """Return the recipe without `quantization_bit` if the base is already quantized."""
    method = _quantized_with(config)
    if not (method and recipe.quantization_bit):
        return recipe
    notice = recipe.error("quantization_bit", f"ignored: the model is already quantized with {method.upper()}")
    return recipe.model_copy(update={"quantization_bit": None}).with_notices(str(notice))


def _quantized_with(config: dict[str, Any]) -> str | None:
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    return method if method in QUANTIZED_PACKAGES else None


def layerwise_key(recipe: _Recipe) -> str | None:
    """Return the key that has transformers update layer by layer in the backward pass, if one is set."""
    for name in OPTIMIZERS:
        layerwise = f"{name.removeprefix('use_')}_layerwise"
        if getattr(recipe, name) and getattr(recipe, layerwise, False):
            return layerwise
    return "optim" if "layerwise" in str(recipe.optim) else None


def silence_libraries() -> None:
    """Silence the methods' libraries where a user can't act on their messages. Call before torch is imported."""
    for name in (
        "bitsandbytes.backends.cpu",  # it looks for a kernel on the hub at import, also where none is used
        # The memory of a step is measured instead of estimated: grouped_mm has no fake implementation in float32 (torch 2.13).
        "torch._subclasses.fake_tensor",
    ):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # for its children
        logging.getLogger(name).addFilter(lambda record: False)  # torch sets levels again when it is imported
    warnings.filterwarnings("ignore", module=r"galore_torch\b.*")
    # peft 0.21 looks for the rank of fused experts among modules only: https://github.com/huggingface/peft/pull/3588
    warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", module="peft")
    if importlib.util.find_spec("logbar"):  # gptqmodel's, which prints a banner whenever peft is imported
        importlib.import_module("logbar").LogBar.shared().setLevel("ERROR")


def optim_package(optim: str) -> dict[str, str]:
    """Return the package that a value of `optim` needs, as {"optim": package}; empty if it needs none."""
    for words, package in OPTIM_PACKAGES.items():
        if any(word in optim for word in words.split()):
            return {"optim": package}
    return {}


def notices(recipe: _Recipe) -> Iterator[str]:
    """Yield what a user should know before the run starts."""
    if name := layerwise_key(recipe):
        yield f"{name}: checkpoints lack the optimizer state, so a resumed run starts it from zero; preflight is skipped"
    if getattr(recipe, "quantization_bit", None) and recipe.quantization_method == "bitsandbytes":
        yield "quantization_method: bitsandbytes means bnb; LLaMA-Factory loads the model unquantized, without a warning"


def find_conflicts(recipe: _Recipe) -> Iterator[tuple[str, str]]:
    """Yield each key that conflicts with another, with what to do."""
    yield from ((name, fix) for name, is_wrong, fix in RULES if is_wrong(recipe))
    yield from _loss_conflicts(recipe)
    yield from _optimizer_conflicts(recipe)
    if name := layerwise_key(recipe):
        if recipe.gradient_accumulation_steps != 1:
            yield name, "updates at each batch; set gradient_accumulation_steps: 1"
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            yield name, "not supported on several processes; remove the line"


def _loss_conflicts(recipe: _Recipe) -> Iterator[tuple[str, str]]:
    """Allow one loss. Label smoothing requires the default loss, the load balancing loss requires one of TRL's."""
    own = [name for name in LOSSES if getattr(recipe, name)]
    losses = own + ["use_dft_loss"] * recipe.use_dft_loss
    losses += ["loss_type"] * ("loss_type" in recipe.model_fields_set and (bool(losses) or recipe.loss_type == "dft"))
    losses += ["label_smoothing_factor"] * bool(losses and recipe.label_smoothing_factor)
    losses += ["moe_aux_loss_coef"] * bool(own and recipe.moe_aux_loss_coef)
    if len(losses) > 1:
        yield losses[0], f"{losses[1]} is set too; keep one"


def _optimizer_conflicts(recipe: _Recipe) -> Iterator[tuple[str, str]]:
    """Allow one optimizer, without DeepSpeed, which flattens the matrices that these optimizers need."""
    optimizers = [name for name in OPTIMIZERS if getattr(recipe, name)]
    if not optimizers:
        return
    name, *others = optimizers + ["loraplus_lr_ratio"] * bool(recipe.loraplus_lr_ratio)
    others += ["optim"] * ("optim" in recipe.model_fields_set)
    yield from ((name, f"{other} is set too; keep one") for other in others)
    if name != "use_muon" and recipe.finetuning_type != "full":
        yield name, "requires finetuning_type: full"
    if recipe.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        yield name, "not supported with deepspeed; remove one"
