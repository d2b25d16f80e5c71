"""LoRA+: a higher learning rate for the adapter's B than for its A. https://arxiv.org/abs/2402.12354"""

from __future__ import annotations

from peft import PeftModel
from peft.optimizers import create_loraplus_optimizer
from transformers import PreTrainedModel, Trainer
from trl.trainer.sft_config import SFTConfig

from ...recipe.keys import Recipe
from .method import Keywords, Method


class LoraPlus(Method):
    @staticmethod
    def applies(recipe: Recipe) -> bool:
        return recipe.loraplus_lr_ratio is not None

    def trainer_kwargs(self, model: PreTrainedModel | PeftModel, args: SFTConfig) -> Keywords:
        optimizer_cls, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        settings |= {
            "optimizer_cls": optimizer_cls,
            "loraplus_lr_ratio": self.recipe.loraplus_lr_ratio,
            "loraplus_lr_embedding": self.recipe.loraplus_lr_embedding,
            "loraplus_weight_decay": args.weight_decay,
        }
        return {"optimizer_cls_and_kwargs": (lambda: create_loraplus_optimizer, settings)}
