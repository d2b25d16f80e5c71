"""OFT: an adapter that rotates weights. https://arxiv.org/abs/2306.07280"""

from peft import OFTConfig
from transformers import PreTrainedModel

from .method import AdapterConfig, Method


class Oft(Method):
    def adapter_config(self, config: AdapterConfig, model: PreTrainedModel) -> AdapterConfig:
        recipe = self.recipe
        return OFTConfig(
            task_type="CAUSAL_LM",
            r=recipe.oft_rank,
            oft_block_size=recipe.oft_block_size,
            module_dropout=recipe.module_dropout,
            target_modules="all-linear" if "all" in recipe.oft_target else recipe.oft_target,
            modules_to_save=recipe.additional_target or None,
        )
