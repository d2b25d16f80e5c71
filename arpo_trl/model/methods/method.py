"""The places at which a rare method changes full or LoRA training."""

from pathlib import Path
from typing import Any

from peft import LoraConfig, OFTConfig, PeftModel
from transformers import PreTrainedConfig, PreTrainedModel
from trl.trainer.sft_config import SFTConfig

from ...recipe.keys import Recipe
from ..weights import Model

AdapterConfig = LoraConfig | OFTConfig
Keywords = dict[str, Any]
"""Arguments of a library's constructor."""
Parts = dict[str, int]
"""Bytes of parts of memory.Memory."""


class Method:
    """A rare method. Each function is called once in a run, in this order; by default it changes nothing."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.adapter_targets: set[str] = set()
        """Names that `lora_target` may hold although no module has them; set by `adapter_config`."""

    def sft_config(self) -> Keywords:
        """Return arguments of SFTConfig."""
        return {}

    def check_config(self, config: PreTrainedConfig, args: SFTConfig) -> None:
        """Raise RecipeError for a model, known by its config.json, a launch or a machine that the method does not support."""

    def from_pretrained(self, kwargs: Keywords, config: PreTrainedConfig) -> Keywords:
        """Return the arguments of `from_pretrained`, changed. `config` is the base's, and may be changed too."""
        return kwargs

    def prepare_base(self, model: PreTrainedModel) -> None:
        """Change the loaded base model, or for an estimate its copy on the meta device. Raises RecipeError."""

    def adapter_config(self, config: AdapterConfig, model: PreTrainedModel) -> AdapterConfig:
        """Return the config of the new adapter, changed."""
        return config

    def prepare_adapter(self, model: PeftModel) -> None:
        """Change the model with its adapter, and write what the method keeps of it."""

    def memory(self, parts: Parts, model: Model, args: SFTConfig) -> Parts:
        """Return the bytes of each part of memory.Memory that the method changes."""
        return {}

    def trainer_kwargs(self, model: Model, args: SFTConfig) -> Keywords:
        """Return arguments of ArpoTrainer: optimizer_cls_and_kwargs, callbacks, objective, reference."""
        return {}

    def finish(self, model: Model, output_dir: Path) -> None:
        """Change the model saved in `output_dir`. Called on the main process."""
