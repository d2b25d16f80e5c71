"""Freeze tuning and LLaMA Pro: train some of the layers."""

import re

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from ...recipe.keys import Recipe
from .method import AdapterConfig, Keywords, Method


class Freeze(Method):
    def from_pretrained(self, kwargs: Keywords, config: PreTrainedConfig) -> Keywords:
        """Load in float32 what would be in the file's dtype: some of it is trained."""
        return kwargs | {"dtype": torch.float32} if kwargs["dtype"] == "auto" else kwargs

    def prepare_base(self, model: PreTrainedModel) -> None:
        """Train some modules of some layers, and modules outside them.

        As in LLaMA-Factory, except that a name is a module's full name: there `norm` matches `input_layernorm` too.
        """
        recipe = self.recipe
        layers = model.config.get_text_config().num_hidden_layers
        chosen = trained_layers(recipe, layers)
        inside: set[str] = set()
        outside: set[str] = set()
        for name, parameter in model.named_parameters():
            layer = re.search(r"\.(\d+)\.([^.]+)\.", name)
            if layer:
                number, module = int(layer[1]), layer[2]
                inside.add(module)
                trained = bool({module, "all"} & {*recipe.freeze_trainable_modules}) and number in chosen
            else:
                module = name.split(".")[-2]
                outside.add(module)
                trained = module in recipe.freeze_extra_modules
            trained &= parameter.requires_grad  # text reaches it
            parameter.requires_grad = trained
            if trained and not recipe.pure_bf16:
                parameter.data = parameter.data.float()
        for key, names, known in (
            ("freeze_trainable_modules", recipe.freeze_trainable_modules, {"all", *inside}),
            ("freeze_extra_modules", recipe.freeze_extra_modules, outside),
        ):
            if unknown := [name for name in names if name not in known]:
                expected = f"expected some of {', '.join(sorted(known))}"
                raise recipe.error(key, f"the model has no module {unknown[0]}; {expected}")
        if not any(parameter.requires_grad for parameter in model.parameters()):
            problem = f"{recipe.freeze_trainable_layers} leaves nothing to train; the model has {layers} layers"
            raise recipe.error("freeze_trainable_layers", problem)
        if recipe.use_reentrant_gc:
            model.enable_input_require_grads()  # a reentrant checkpoint has no gradient where its input has none


class LlamaPro(Method):
    """LLaMA Pro (https://arxiv.org/abs/2401.02415) under LoRA: leave the other layers without an adapter."""

    def adapter_config(self, config: AdapterConfig, model: PreTrainedModel) -> AdapterConfig:
        chosen = trained_layers(self.recipe, model.config.get_text_config().num_hidden_layers)
        layers = {name: re.search(r"\.(\d+)\.", f".{name}") for name, _ in model.named_modules()}
        others = [name for name, layer in layers.items() if layer and int(layer[1]) not in chosen]
        config.exclude_modules = [*(config.exclude_modules or ()), *others]
        return config


def trained_layers(recipe: Recipe, layers: int) -> range:
    """Return the layers to train: the last, the first, or with `use_llama_pro` every n-th.

    LLaMA Pro adds a new layer after each n - 1 old ones, and trains the new ones.
    """
    count = recipe.freeze_trainable_layers
    if recipe.use_llama_pro:
        if count < 1 or layers % count:
            problem = f"expected a divisor of the model's {layers} layers (use_llama_pro), found {count}"
            raise recipe.error("freeze_trainable_layers", problem)
        return range(layers // count - 1, layers, layers // count)
    return range(max(0, layers - count), layers) if count > 0 else range(min(-count, layers))
