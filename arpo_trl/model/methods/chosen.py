"""The rare methods that a recipe uses."""

from collections.abc import Callable

from trl.trainer.sft_config import SFTConfig

from ...recipe.keys import Recipe
from ..base import quantization
from ..weights import Model
from .adam_mini import AdamMini
from .architectures import Architectures
from .asft import Asft
from .badam import Badam
from .eaft import Eaft
from .freeze import Freeze, LlamaPro
from .loraplus import LoraPlus
from .low_rank import Apollo, Galore
from .method import Keywords, Method
from .moe import Moe
from .muon import Muon
from .oft import Oft
from .pissa import Pissa
from .qlora import Qlora
from .quantized import Quantized

METHODS: dict[type[Method], Callable[[Recipe], object]] = {
    Architectures: lambda recipe: True,
    Quantized: quantization,
    Qlora: lambda recipe: recipe.quantization_bit,
    Oft: lambda recipe: recipe.finetuning_type == "oft",
    Moe: lambda recipe: recipe.trains_adapter or recipe.moe_aux_loss_coef,
    Pissa: lambda recipe: recipe.finetuning_type == "lora",  # also to resume the adapter of a PiSSA checkpoint
    Freeze: lambda recipe: recipe.finetuning_type == "freeze",
    LlamaPro: lambda recipe: recipe.use_llama_pro and recipe.finetuning_type == "lora",
    LoraPlus: lambda recipe: recipe.loraplus_lr_ratio is not None,
    Galore: lambda recipe: recipe.use_galore or "galore" in recipe.optim,
    Apollo: lambda recipe: recipe.use_apollo or "apollo" in recipe.optim,
    Muon: lambda recipe: recipe.use_muon,
    AdamMini: lambda recipe: recipe.use_adam_mini,
    Badam: lambda recipe: recipe.use_badam,
    Eaft: lambda recipe: recipe.use_eaft_loss,
    Asft: lambda recipe: recipe.use_asft_loss,
}
"""Each method and when a recipe uses it, in the order in which they are applied: OFT replaces an adapter's config before others
change it."""


def methods_of(recipe: Recipe) -> list[Method]:
    return [method(recipe) for method, is_used in METHODS.items() if is_used(recipe)]


def trainer_kwargs(recipe: Recipe, model: Model, args: SFTConfig) -> Keywords:
    """Return the optimizer, loss and callbacks of the rare methods, as arguments of ArpoTrainer."""
    kwargs: Keywords = {}
    for method in methods_of(recipe):
        kwargs |= method.trainer_kwargs(model, args)
    return kwargs
