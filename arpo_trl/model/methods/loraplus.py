"""LoRA+: a higher learning rate for the adapter's B than for its A. https://arxiv.org/abs/2402.12354"""

from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer
from trl.trainer.sft_config import SFTConfig

from ..weights import Model
from .method import Keywords, Method


class LoraPlus(Method):
    def trainer_kwargs(self, model: Model, args: SFTConfig) -> Keywords:
        optimizer_cls, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        settings |= {
            "optimizer_cls": optimizer_cls,
            "loraplus_lr_ratio": self.recipe.loraplus_lr_ratio,
            "loraplus_lr_embedding": self.recipe.loraplus_lr_embedding,
            "loraplus_weight_decay": args.weight_decay,
        }
        return {"optimizer_cls_and_kwargs": (lambda: create_loraplus_optimizer, settings)}
