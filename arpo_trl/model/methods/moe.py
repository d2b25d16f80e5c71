"""Mixtures of experts (MoE): their load balancing loss, and LoRA of experts that transformers 5 stores as one tensor."""

import contextlib
import copy
from collections.abc import Iterator

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from transformers import PreTrainedConfig, PreTrainedModel

from ..weights import linear_layers
from .method import AdapterConfig, Keywords, Method


class Moe(Method):
    def sft_config(self) -> Keywords:
        return {"router_aux_loss_coef": self.recipe.moe_aux_loss_coef or 0.0}

    def prepare_base(self, model: PreTrainedModel) -> None:
        """Check that there are experts to balance, and name their number as TRL expects it."""
        config = model.config.get_text_config()
        if not self.recipe.moe_aux_loss_coef:
            return
        if not hasattr(config, "output_router_logits"):
            problem = f"not supported: {config.model_type} has no router; remove the line"
            raise self.recipe.error("moe_aux_loss_coef", problem)
        if not hasattr(config, "num_experts"):  # Granite's and Phi's: trl 1.16, add_fused_lm_head
            config.num_experts = config.num_local_experts

    def adapter_config(self, config: AdapterConfig, model: PreTrainedModel) -> AdapterConfig:
        """Adapt linear layers in shared experts and dense blocks, too: PEFT leaves out those with names of experts."""
        recipe = self.recipe
        try:
            fused = _fused_targets(config, model)
        except ValueError as error:
            raise recipe.error(f"{recipe.finetuning_type}_target", str(error)) from error
        if fused is None or not isinstance(config, LoraConfig):
            return config
        for key in ("lora_dropout", "use_dora", "pissa_init"):
            if getattr(recipe, key):
                fix = "remove the line, or set lora_target to other layers"
                raise recipe.error(key, f"not supported by PEFT for LoRA on MoE experts; {fix}")
        self.adapter_targets = fused
        if fused and not recipe.quantization_bit:
            others = [name.split(".") for name in linear_layers(model) if name.rpartition(".")[2] in fused]
            config.target_parameters = sorted({".".join([*name[-2:], "weight"]) for name in others})
        return config


def _fused_targets(config: AdapterConfig, model: PreTrainedModel) -> set[str] | None:
    """Return the targets (gate_proj, ...) for which PEFT 0.21 adapts fused experts; None if it adapts no experts."""
    converted = copy.deepcopy(config)
    convert_peft_config_for_transformers(converted, model, None)
    if not isinstance(converted, LoraConfig) or not converted.target_parameters:
        return None
    targets = getattr(config, "target_modules", None)
    names = {name.rpartition(".")[2] for name in linear_layers(model)} if isinstance(targets, str) else targets
    return {*(names or ())} - {*(converted.target_modules or ())}


@contextlib.contextmanager
def router_loss_kept(config: PreTrainedConfig) -> Iterator[None]:
    """Restore the coefficient of the balancing loss in config.json: TRL writes 0 for a recipe without that loss."""
    text_config = config.get_text_config()
    coefficient = getattr(text_config, "router_aux_loss_coef", None)
    yield
    if coefficient is not None and not getattr(text_config, "router_aux_loss_coef", None):
        text_config.router_aux_loss_coef = coefficient
