"""GaLore and APOLLO: project gradients to a low rank, to save memory. https://arxiv.org/abs/2403.03507, 2412.05270"""

import importlib
from typing import Any, ClassVar

import torch
from accelerate.utils import send_to_device
from transformers import TrainerCallback, TrainerState, TrainingArguments
from trl.trainer.sft_config import SFTConfig

from ..weights import Model
from .method import Keywords, Method

# In LLaMA-Factory, `all` is every linear layer but the head.
_ALL_BUT_THE_HEAD = r"(?!.*(lm_head|output_layer)).*"


class LowRank(Method):
    """What GaLore and APOLLO share."""

    name: ClassVar[str]
    module: ClassVar[str]
    optim_args: ClassVar[str]

    def sft_config(self) -> Keywords:
        """Return the method's keys as transformers takes them. (Its GaLore keeps galore_torch's epsilon, 1e-6.)"""
        name = self.name
        if not getattr(self.recipe, f"use_{name}"):
            return {}
        target, layerwise = getattr(self.recipe, f"{name}_target"), getattr(self.recipe, f"{name}_layerwise")
        args = {arg: getattr(self.recipe, f"{name}_{arg}") for arg in self.optim_args.split()}
        return {
            "optim": f"{name}_adamw{'_layerwise' * layerwise}",
            "optim_args": ",".join(f"{key}={value}" for key, value in args.items()).replace(
                "update_interval", "update_proj_gap"
            ),
            "optim_target_modules": _ALL_BUT_THE_HEAD if "all" in target else target,
        }

    def trainer_kwargs(self, model: Model, args: SFTConfig) -> Keywords:
        return {"callbacks": [ProjectionsOnResume(self.module)]}


class Galore(LowRank):
    name, module = "galore", "galore_torch.adamw"
    optim_args = "rank update_interval scale proj_type"


class Apollo(LowRank):
    name, module = "apollo", "apollo_torch.apollo"
    optim_args = "rank update_interval scale proj proj_type scale_type"


class ProjectionsOnResume(TrainerCallback):
    """Restore the projections in optimizer.pt, which are objects of the method's package.

    torch.load rejects such objects unless they are declared safe, and optimizers leave them on the CPU.
    """

    def __init__(self, module: str) -> None:
        names = vars(importlib.import_module(module))
        torch.serialization.add_safe_globals([names[name] for name in names if name.endswith("Projector")])

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: Any) -> None:
        for weight, kept in kwargs["optimizer"].state.items():
            if projector := kept.get("projector"):
                projector.ortho_matrix = send_to_device(projector.ortho_matrix, weight.device)
