"""The losses that TRL does not have, and the tokens that a batch trains on."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from ..data.labels import IGNORED
from ..model.token_scores import Objective
from ..recipe.keys import Recipe

Batch = dict[str, Tensor]
"""What the collator makes; of rows laid end to end the longest row's length, too, as an int."""


def to_objective(recipe: Recipe) -> Objective | None:
    """The recipe's loss where TRL has none of its name."""
    if recipe.use_eaft_loss:
        return functools.partial(entropy_adaptive, alpha=recipe.eaft_alpha)
    return functools.partial(anchored, alpha=recipe.asft_alpha) if recipe.use_asft_loss else None


def entropy_adaptive(log_probs: Tensor, log_softmax: Tensor, reference: None, alpha: float) -> Tensor:
    """EAFT, https://arxiv.org/abs/2601.02151: a label weighs as much as the model is uncertain there.

    The weight is (the entropy of the 20 likeliest tokens / 3) ** alpha, as in LLaMA-Factory; 3 is about ln 20.
    """
    with torch.no_grad():
        likeliest = log_softmax.topk(min(20, log_softmax.shape[-1])).values.log_softmax(-1)
        entropy = -(likeliest.exp() * likeliest).sum(-1)
    return log_probs * (entropy / 3) ** alpha


def anchored(log_probs: Tensor, log_softmax: Tensor, reference: Tensor, alpha: float) -> Tensor:
    """ASFT, https://arxiv.org/abs/2509.23753: DFT, and alpha times the KL divergence from the reference model."""
    divergence = nn.functional.kl_div(log_softmax, reference, reduction="none", log_target=True).sum(-1)
    return log_probs * log_probs.exp().detach() - alpha * divergence


def mask_repeated_rows(batch: Batch, new: int, packed: bool) -> None:
    """Mask the labels of all rows but the first `new`, so that an epoch trains as on one process.

    Of several processes each gets as many batches, so accelerate 1.15 (BatchSamplerShard) fills up the last ones with
    rows from the epoch's start. Rows laid end to end begin where a position is 0; of packed rows, which hold several
    each, only a batch without any new one is masked.
    """
    labels = batch["labels"]
    if "attention_mask" in batch:
        labels[max(new, 0) :] = IGNORED
    elif new <= 0:
        labels[:] = IGNORED
    elif not packed:
        starts = row_starts(batch)
        labels[:, starts[new] if new < len(starts) else labels.size(1) :] = IGNORED


def row_starts(batch: Batch) -> list[int]:
    """Where each row of a batch that is laid end to end begins: where a position is 0."""
    return [int(start) for start in (batch["position_ids"][0] == 0).nonzero().flatten()]


def count_tokens(batch: Batch) -> Tensor:
    """Tokens of a batch, without padding and repeated rows."""
    if "attention_mask" not in batch:  # laid end to end
        return torch.tensor(batch["input_ids"].numel())
    mask = batch["attention_mask"]
    if "labels" in batch:  # under Ulysses they are shift_labels
        mask = mask[(batch["labels"] != IGNORED).any(-1)]  # repeated rows have none
    return mask.sum()


def token_means(sums: Tensor, prefix: str) -> dict[str, float]:
    """Metrics from the sums over labelled tokens of: -log p, entropy, correct guesses, and one."""
    nll, entropy, correct = (sums[:3] / sums[3].clamp(min=1)).tolist()
    return {
        f"{prefix}_loss": nll,
        f"{prefix}_perplexity": math.exp(min(nll, 700)),
        f"{prefix}_entropy": entropy,
        f"{prefix}_mean_token_accuracy": correct,
    }
