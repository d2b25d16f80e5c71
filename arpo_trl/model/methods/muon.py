"""Muon for the matrices inside the blocks, AdamW for the rest."""

import torch
from transformers import PreTrainedConfig, TrainingArguments
from trl.trainer.sft_config import SFTConfig

from ..weights import Model
from .method import Keywords, Method


class Muon(Method):
    def check_config(self, config: PreTrainedConfig, args: SFTConfig) -> None:
        if not hasattr(torch.optim, "Muon"):
            raise self.recipe.error("use_muon", "requires torch 2.9 or later; remove the line")

    def trainer_kwargs(self, model: Model, args: SFTConfig) -> Keywords:
        return {"optimizer_cls_and_kwargs": (lambda: MuonWithAdamW, {"args": args})}


class MuonWithAdamW(torch.optim.Optimizer):
    """Both as one optimizer with one state, as in LLaMA-Factory."""

    def __init__(self, model: torch.nn.Module, args: TrainingArguments) -> None:
        inner: list[torch.nn.Parameter] = []
        outer: list[torch.nn.Parameter] = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                is_inner = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
                (inner if is_inner else outer).append(parameter)
        lr, decay, betas = args.learning_rate, args.weight_decay, (args.adam_beta1, args.adam_beta2)
        self.parts: list[torch.optim.Optimizer] = []
        if inner:
            self.parts.append(torch.optim.Muon(inner, lr, decay, adjust_lr_fn="match_rms_adamw"))
        if outer:
            self.parts.append(torch.optim.AdamW(outer, lr, betas, args.adam_epsilon, decay))
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.state, part.param_groups = self.state, [group]
            part.step()
