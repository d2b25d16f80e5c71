"""PiSSA: start LoRA from the weights' principal components. https://arxiv.org/abs/2404.02948

It moves the principal part W0 = B0 A0 of a weight into the adapter and leaves W - W0 as the base. What was learned is
B A - B0 A0: plain LoRA of twice the rank, for the unchanged base. Checkpoints keep B and A, so that a resume is exact.
"""

import shutil
import warnings
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from ..split import find_split
from ..weights import Model
from .method import AdapterConfig, Method

START = "pissa_start"
"""Folder of the output_dir that holds the initial adapter during the run."""


class Pissa(Method):
    def prepare_base(self, model: PreTrainedModel) -> None:
        recipe = self.recipe
        unsupported = {"use_dora": recipe.use_dora, "additional_target": recipe.additional_target}
        unsupported["FSDP or DeepSpeed ZeRO-3"] = find_split(recipe).shards_weights
        if recipe.pissa_init and any(unsupported.values()):
            names = ", ".join(name for name, value in unsupported.items() if value)
            raise recipe.error("pissa_init", f"can't be converted to plain LoRA with {names}; remove one")

    def adapter_config(self, config: AdapterConfig, model: PreTrainedModel) -> AdapterConfig:
        if self.recipe.pissa_init:
            assert isinstance(config, LoraConfig)
            start: Any = "pissa" if self.recipe.pissa_iter == -1 else f"pissa_niter_{self.recipe.pissa_iter}"
            config.init_lora_weights = start
        return config

    def prepare_adapter(self, model: PeftModel) -> None:
        """Save B0 and A0 as an adapter that PEFT can subtract: one whose config does not name PiSSA."""
        if not (_is_pissa(model) and self.recipe.do_train and PartialState().is_main_process):
            return
        config: Any = model.peft_config["default"]
        start, config.init_lora_weights = config.init_lora_weights, True
        model.save_pretrained(str(Path(self.recipe.output_dir) / START))
        config.init_lora_weights = start

    def finish(self, model: Model, output_dir: Path) -> None:
        """Convert the saved adapter to plain LoRA."""
        if not (isinstance(model, PeftModel) and _is_pissa(model)):
            return
        start = output_dir / START
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "PiSSA changes the base weights")  # it advises what is done here
            model.save_pretrained(str(output_dir), path_initial_model_for_weight_conversion=str(start))
        shutil.rmtree(start)


def _is_pissa(model: PeftModel) -> bool:
    return str(getattr(model.peft_config["default"], "init_lora_weights", None)).startswith("pissa")
