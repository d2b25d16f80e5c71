"""EAFT: weigh each label by the model's uncertainty. https://arxiv.org/abs/2601.02151"""

import functools

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from trl.trainer.sft_config import SFTConfig

from ..token_scores import check_objective
from ..weights import Model
from .method import Keywords, Method


class Eaft(Method):
    def check_config(self, config: PreTrainedConfig, args: SFTConfig) -> None:
        check_objective(self.recipe, "use_eaft_loss", config, args)

    def trainer_kwargs(self, model: Model, args: SFTConfig) -> Keywords:
        return {"objective": functools.partial(entropy_adaptive, alpha=self.recipe.eaft_alpha)}


def entropy_adaptive(log_probs: Tensor, log_softmax: Tensor, reference: None, alpha: float) -> Tensor:
    """The weight is (entropy of the 20 most likely tokens / 3) ** alpha, as in LLaMA-Factory; 3 is about ln 20."""
    with torch.no_grad():
        likeliest = log_softmax.topk(min(20, log_softmax.shape[-1])).values.log_softmax(-1)
        entropy = -(likeliest.exp() * likeliest).sum(-1)
    return log_probs * (entropy / 3) ** alpha
