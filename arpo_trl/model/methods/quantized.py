"""Bases whose files are already quantized: GPTQ, AWQ and AQLM under LoRA; MXFP4 and FP8, which are dequantized."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config
from trl.trainer.sft_config import SFTConfig

from ...errors import RecipeError
from ...recipe.keys import Recipe
from ...recipe.methods import QUANTIZED_PACKAGES
from ..base import quantization
from ..split import find_split
from ..weights import Model, linear_layers, without_adapter
from .method import AdapterConfig, Keywords, Method, Parts


def is_quantized(recipe: Recipe) -> bool:
    """Return whether the base is quantized: by the recipe, or already in its files."""
    return bool(recipe.quantization_bit or quantization(recipe))


class Quantized(Method):
    def quantization_config(self) -> Keywords:
        return quantization(self.recipe)

    def check_config(self, config: PreTrainedConfig, args: SFTConfig) -> None:
        about = quantization(self.recipe)
        is_aqlm_8 = about.get("quant_method") == "aqlm" and about["nbits_per_codebook"] == 8
        if is_aqlm_8 and self.recipe.do_train and not torch.accelerator.is_available():
            problem = "aqlm 1.1.7 has no backward pass for 8-bit codebooks on a CPU; use a model with 16 bits (1x16)"
            raise self.recipe.error("model_name_or_path", problem)

    def from_pretrained(self, kwargs: Keywords, config: PreTrainedConfig) -> Keywords:
        kwargs = kwargs | dequantized(config)
        if not set_trainable_backend(config):
            return kwargs
        if find_split(self.recipe).shards_weights:
            problem = f"{self.recipe.model_name_or_path} is quantized and can't be split by FSDP or DeepSpeed ZeRO-3"
            fix = "launch with accelerate_configs/multi_gpu.yaml"
            raise self.recipe.error("model_name_or_path", f"{problem}; {fix}")
        rope: Keywords = {key: kwargs[key] for key in ("rope_parameters", "max_position_embeddings") if key in kwargs}
        config.update(rope)
        kwargs = {key: value for key, value in kwargs.items() if key not in rope} | {"config": config}
        if torch.accelerator.is_available():
            kwargs["device_map"] = {"": PartialState().device}  # the kernel is chosen for the device
        return kwargs

    def prepare_base(self, model: PreTrainedModel) -> None:
        """Have quantized layers pass gradients on, also after an evaluation."""
        layer: Any
        for layer in model.modules():
            # In an evaluation a Linear4bit of bitsandbytes 0.50 packs its weights for a kernel without gradients, and the
            # first forward pass of a layer of gptqmodel 7.7 selects such a kernel for good. Both on CPUs.
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False
            if hasattr(layer, "linear_mode"):
                layer.linear_mode = "train"
            if hasattr(layer, "codebooks"):  # peft 0.21 adds in place to AQLM's output, a view where there is a bias
                layer.register_forward_hook(lambda layer, args, output: output.clone())

    def adapter_config(self, config: AdapterConfig, model: PreTrainedModel) -> AdapterConfig:
        """Replace "all-linear", for which PEFT finds none of the layers of GPTQ, AWQ and AQLM, by their names."""
        if getattr(config, "target_modules", None) == "all-linear" and hasattr(model, "quantization_method"):
            config.target_modules = sorted({name.rpartition(".")[2] for name in linear_layers(model)})
        return config

    def prepare_adapter(self, model: PeftModel) -> None:
        codes = [name for name, p in model.named_parameters() if p.dtype is torch.int16]  # AQLM's
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, codes)  # no backend sends them

    def memory(self, parts: Parts, model: Model, args: SFTConfig) -> Parts:
        config = self.quantization_config()
        base, activations = without_adapter(model), parts["activations"]
        linear = [layer.weight for layer in base.base_model.modules() if isinstance(layer, nn.Linear)]  # not the head
        weights = [weight for weight in linear if not weight.requires_grad]
        if config.get("quant_method") in ("gptq", "awq"):  # the backward pass needs what the forward pass unpacked
            layers = base.config.get_text_config().num_hidden_layers if args.activation_checkpointing else 1
            activations += sum(weight.nbytes for weight in weights) // layers
        return {"weights": parts["weights"] - _saved(weights, config), "activations": activations}


def set_trainable_backend(config: PreTrainedConfig) -> bool:
    """Have a base of GPTQ, AWQ or AQLM unpacked by kernels that have a backward pass. Return whether it is one."""
    packed, method = getattr(config, "quantization_config", None) or {}, _method(config)
    if method in ("gptq", "awq"):
        packed["backend"] = "auto_trainable"  # the fastest kernels of gptqmodel have none
    elif method == "aqlm" and (names := packed.get("linear_weights_not_to_quantize")):
        # Its files name weights. transformers 5.24 looks for modules, and would replace the head that is not quantized:
        # https://github.com/huggingface/transformers/pull/44577
        packed["linear_weights_not_to_quantize"] = [name.removesuffix(".weight") for name in names]
    return method in ("gptq", "awq", "aqlm")


def dequantized(config: PreTrainedConfig) -> Keywords:
    """Return the arguments of `from_pretrained` that dequantize MXFP4 or FP8 (gpt-oss, DeepSeek-V3), as LLaMA-Factory does.

    transformers 5.24 does so by itself only where it finds no kernel for them, and these have no backward pass.
    """
    config_class = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}.get(_method(config))
    return {"quantization_config": config_class(dequantize=True)} if config_class else {}


def require_mergeable(config: PreTrainedConfig, adapter: Path) -> None:
    """Raise RecipeError if the adapter's base is quantized in a way that no adapter can be merged into."""
    method = _method(config)
    if method in QUANTIZED_PACKAGES:
        raise RecipeError(
            f"{adapter}: its base is quantized with {method.upper()}, so it can't be merged. Use it as it is: "
            f"arpo-trl chat {adapter}"
        )


def _method(config: PreTrainedConfig) -> str:
    method: str = (getattr(config, "quantization_config", None) or {}).get("quant_method", "")
    return method


def _saved(weights: list[Tensor], config: Mapping[str, Any]) -> int:
    """Return the bytes that quantization saves, by the base's config.json. bitsandbytes' scales are left out."""
    bits, codebooks = 4.0 * config.get("load_in_4bit", False) or 8.0 * config.get("load_in_8bit", False), 0
    if config.get("quant_method") == "aqlm":
        group = config["in_group_size"] * config["out_group_size"]
        bits = config["num_codebooks"] * (8 if config["nbits_per_codebook"] <= 8 else 16) / group
        codebooks = config["num_codebooks"] * 2 ** config["nbits_per_codebook"] * group
    elif size := config.get("group_size"):
        bits = config["bits"] + (16 + config["bits"]) / abs(size)  # -1: a group is a column, its cost is negligible
    if not bits:
        return 0
    return sum(w.nbytes - int(w.numel() * bits / 8) - codebooks * w.element_size() for w in weights)
