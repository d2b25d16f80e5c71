"""The rare methods that a recipe uses."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel
from trl.trainer.sft_config import SFTConfig

from ...recipe.keys import Recipe
from .adam_mini import AdamMini
from .architectures import Architectures
from .asft import Asft
from .badam import Badam
from .eaft import Eaft
from .freeze import Freeze, LlamaPro
from .loraplus import LoraPlus
from .low_rank import Apollo, Galore
from .method import Method
from .moe import Moe
from .muon import Muon
from .oft import Oft
from .pissa import Pissa
from .qlora import Qlora
from .quantized import Quantized

METHODS: tuple[type[Method], ...] = (
    Architectures,
    Quantized,
    Qlora,
    Oft,
    Moe,
    Pissa,
    Freeze,
    LlamaPro,
    LoraPlus,
    Galore,
    Apollo,
    Muon,
    AdamMini,
    Badam,
    Eaft,
    Asft,
)
"""In the order in which they are applied: an adapter's config is replaced (OFT) before it is changed."""


def methods_of(recipe: Recipe) -> list[Method]:
    return [method(recipe) for method in METHODS if method.applies(recipe)]


def trainer_kwargs(recipe: Recipe, model: PreTrainedModel | PeftModel, args: SFTConfig) -> dict[str, Any]:
    """Return the optimizer, loss and callbacks of the rare methods, as arguments of ArpoTrainer."""
    kwargs: dict[str, Any] = {}
    for method in methods_of(recipe):
        kwargs |= method.trainer_kwargs(model, args)
    return kwargs
