"""QLoRA: LoRA on a base that bitsandbytes quantizes while it is loaded. https://arxiv.org/abs/2305.14314"""

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from ...recipe.keys import Recipe
from ...recipe.preference import unmergeable
from ..base import compute_dtype
from .method import Keywords
from .quantized import Quantized


class Qlora(Quantized):
    def quantization_config(self) -> Keywords:
        return {f"load_in_{self.recipe.quantization_bit}bit": True}

    def from_pretrained(self, kwargs: Keywords, config: PreTrainedConfig) -> Keywords:
        return kwargs | {"quantization_config": to_bitsandbytes_config(self.recipe)}

    def prepare_base(self, model: PreTrainedModel) -> None:
        if self.recipe.adapters_to_merge:
            raise unmergeable(self.recipe, "a quantized base")
        super().prepare_base(model)


def to_bitsandbytes_config(recipe: Recipe) -> BitsAndBytesConfig:
    if recipe.quantization_bit == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = compute_dtype(recipe) or torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=recipe.quantization_type,
        bnb_4bit_use_double_quant=recipe.double_quantization,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # FSDP shards only what has one dtype
    )
