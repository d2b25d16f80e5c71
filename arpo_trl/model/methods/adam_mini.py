"""Adam-mini: Adam with one second moment per block of a weight. https://arxiv.org/abs/2406.16793"""

import importlib

import torch
from transformers import PreTrainedModel, TrainingArguments
from trl.trainer.sft_config import SFTConfig

from ..weights import Model
from .method import Keywords, Method, Parts


class AdamMini(Method):
    def memory(self, parts: Parts, model: Model, args: SFTConfig) -> Parts:
        return {"optimizer": sum(p.nbytes for p in model.parameters() if p.requires_grad)}  # the first moment

    def trainer_kwargs(self, model: Model, args: SFTConfig) -> Keywords:
        return {"optimizer_cls_and_kwargs": (lambda: create_adam_mini, {"args": args})}


def create_adam_mini(model: PreTrainedModel, args: TrainingArguments) -> torch.optim.Optimizer:
    config = model.config.get_text_config()
    optimizer: torch.optim.Optimizer = importlib.import_module("adam_mini").Adam_mini(
        model.named_parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        weight_decay=args.weight_decay,
        dim=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None),
        verbose=False,
    )
    return optimizer
