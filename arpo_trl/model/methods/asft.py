"""ASFT: DFT plus a KL divergence from the initial model. https://arxiv.org/abs/2509.23753"""

import copy
import functools
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from trl.trainer.sft_config import SFTConfig

from ..split import find_split
from ..token_scores import check_objective
from ..weights import Model, without_adapter
from .method import Keywords, Method, Parts


class Asft(Method):
    def check_config(self, config: PreTrainedConfig, args: SFTConfig) -> None:
        check_objective(self.recipe, "use_asft_loss", config, args)
        if find_split(self.recipe).shards_weights:
            problem = "requires a complete second model on each process; launch with accelerate_configs/multi_gpu.yaml"
            raise self.recipe.error("use_asft_loss", problem)

    def memory(self, parts: Parts, model: Model, args: SFTConfig) -> Parts:
        """Add the initial model's weights and its tile of logits."""
        itemsize = 2 if args.bf16 or args.fp16 else 4
        head = cast(nn.Linear, without_adapter(model).get_output_embeddings()).weight
        return {
            "reference": itemsize * sum(p.numel() for p in model.parameters()),
            "logits": 2 * parts["logits"] - head.nbytes * head.requires_grad,
        }

    def trainer_kwargs(self, model: Model, args: SFTConfig) -> Keywords:
        objective = functools.partial(anchored, alpha=self.recipe.asft_alpha)
        return {"objective": objective, "reference": frozen_copy(model, args)}


def anchored(log_probs: Tensor, log_softmax: Tensor, reference: Tensor, alpha: float) -> Tensor:
    divergence = nn.functional.kl_div(log_softmax, reference, reduction="none", log_target=True).sum(-1)
    return log_probs * log_probs.exp().detach() - alpha * divergence


def frozen_copy(model: Model, args: SFTConfig) -> PreTrainedModel:
    """Return a copy of the current model, adapter included, in the dtype that the run computes in."""
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    copied: nn.Module = copy.deepcopy(without_adapter(model)).requires_grad_(False)
    return cast(PreTrainedModel, copied.to(dtype=dtype).eval())
