"""Models with layers that dense Llama-like models lack: routers (Llama 4, Phi-MoE) and Mamba's kernels."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from ...recipe.keys import Recipe
from .method import AdapterConfig, Method


class Architectures(Method):
    @staticmethod
    def applies(recipe: Recipe) -> bool:
        return True

    def prepare_base(self, model: PreTrainedModel) -> None:
        if model.base_model is model and hasattr(model, "model"):
            model.base_model_prefix = "model"  # Llama4ForCausalLM of transformers 5.23 names one that does not exist

    def adapter_config(self, config: AdapterConfig, model: PreTrainedModel) -> AdapterConfig:
        """Exclude from `lora_target: all` the linear layers that PEFT 0.21 can't adapt.

        A router that is a Linear with its own forward (Llama 4, Phi-MoE) returns several tensors. Mamba's kernels read
        the weights of out_proj and conv1d without calling the adapter.
        """
        if "all" not in getattr(self.recipe, f"{self.recipe.finetuning_type}_target"):
            return config
        modules = {(name.rsplit(".", 1)[-1], type(module)) for name, module in model.named_modules()}
        excluded = {name for name, cls in modules if issubclass(cls, nn.Linear) and "Router" in cls.__name__}
        if any(name == "conv1d" for name, _ in modules):
            excluded |= {"conv1d", "out_proj"}
        if excluded:
            config.exclude_modules = sorted(excluded)
        return config
