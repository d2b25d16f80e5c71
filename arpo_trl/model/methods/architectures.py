"""Models with layers that dense Llama-like models lack: vision towers, indexers, routers and Mamba's kernels."""

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ..weights import is_inside, unreached_by_text
from .method import AdapterConfig, Method


class Architectures(Method):
    def prepare_base(self, model: PreTrainedModel) -> None:
        if model.base_model is model and hasattr(model, "model"):
            model.base_model_prefix = "model"  # Llama4ForCausalLM of transformers 5.23 names one that does not exist
        # As LLaMA-Factory freezes a vision tower. DDP also stops at trained weights without a gradient.
        unreached = unreached_by_text(model)
        for name, parameter in model.named_parameters():
            if is_inside(name, unreached):
                parameter.requires_grad = False

    def adapter_config(self, config: AdapterConfig, model: PreTrainedModel) -> AdapterConfig:
        """Exclude from the adapter what text does not reach, and from `lora_target: all` what PEFT 0.21 can't adapt.

        These are subclasses of Linear with their own forward pass: routers that return several tensors (Llama 4,
        Phi-MoE) and grouped projections (DeepSeek V4). Mamba's kernels read the weights of out_proj and conv1d without
        calling the adapter.
        """
        unreached = unreached_by_text(model)
        excluded = {
            name for name, module in model.named_modules() if is_inside(name, unreached) and not [*module.children()]
        }
        if "all" in getattr(self.recipe, f"{self.recipe.finetuning_type}_target"):
            modules = [(name.rpartition(".")[2], module) for name, module in model.named_modules()]
            excluded |= {name for name, module in modules if _has_other_output(module)}
            if any(name == "conv1d" for name, _ in modules):
                excluded |= {"conv1d", "out_proj"}
        if excluded:
            config.exclude_modules = sorted(excluded)
        return config


def _has_other_output(layer: nn.Module) -> bool:
    """Return whether the output of a Linear with its own forward pass is not that of a Linear, to which PEFT adds.

    Falcon's Linear has its own forward pass and a Linear's output. PEFT has separate adapters for bitsandbytes' layers.
    """
    quantized = type(layer).__module__.startswith(("bitsandbytes", "gptqmodel", "transformers.integrations"))
    if not isinstance(layer, nn.Linear) or type(layer).forward is nn.Linear.forward or quantized:
        return False
    tensors = {name: torch.empty_like(p, device="meta") for name, p in layer.named_parameters()}
    tensors["weight"] = torch.empty(layer.out_features, layer.in_features, device="meta")  # ZeRO-3's is empty
    try:
        output: object = functional_call(layer, tensors, torch.empty(1, 3, layer.in_features, device="meta"))
    except RuntimeError:
        return True
    return not isinstance(output, torch.Tensor) or output.shape != (1, 3, layer.out_features)
