"""The losses of `stage: dpo`, from the log-probabilities of labelled tokens. Pure functions.

Rows alternate between chosen and rejected sides: shape (2 * pairs, tokens). Formulas are LLaMA-Factory's; docs/dpo.md
lists where it differs from its papers and from TRL.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.utils import FusedCausalLMOutput

from ..data.labels import IGNORED
from ..data.prepare import digest
from ..recipe.keys import Recipe
from ..recipe.preference import METRICS
from .loss import Batch, row_starts

MEANS = ("ipo", "orpo", "simpo")
"""Losses of mean log-probabilities; the others take sums."""
REFERENCE = "reference"
"""A batch's key of the reference's sums over each side, if they were computed before training."""


@dataclass(frozen=True)
class PairScores:
    """The loss and the metrics of each pair, shape (pairs,). `real`: 0 for a repeated pair, whose labels are masked."""

    loss: Tensor
    real: Tensor
    metrics: dict[str, Tensor]

    def sums(self) -> Tensor:
        """Return each metric, the loss and the number of pairs, summed over real pairs: shape (metrics + 2,)."""
        return (self.rows() * self.real.unsqueeze(-1)).sum(0)

    def rows(self) -> Tensor:
        """Return the same for each pair: shape (pairs, metrics + 2)."""
        return torch.stack([*self.metrics.values(), self.loss, self.real], dim=-1).detach()


def metric_names(recipe: Recipe) -> list[str]:
    """Return the names of the metrics, in the order of `PairScores.metrics`."""
    return [*METRICS, *(("sft_loss", "odds_ratio_loss") if recipe.pref_loss == "orpo" else ())]


def score_pairs(log_probs: Tensor, mask: Tensor, reference: Tensor | None, recipe: Recipe) -> PairScores:
    """Compute the recipe's preference loss of each pair.

    Args:
        log_probs: Of each token, in float32.
        mask: Which tokens carry a label, same shape.
        reference: The reference's sums over each side, shape (2 * pairs,); None for losses without a reference.
    """
    lengths = mask.sum(-1)
    counts = lengths.clamp(min=1) if recipe.pref_loss in MEANS else torch.ones_like(lengths)
    chosen, rejected = _sides((log_probs * _ld_weights(mask, recipe.ld_alpha)).sum(-1) / counts)
    reference_sides = None if reference is None else _sides(reference / counts)
    nll = -_sides((log_probs * mask).sum(-1) / lengths.clamp(min=1))[0]
    beta, extra = recipe.pref_beta, {}
    rewards = torch.stack([chosen, rejected]) * beta
    if reference_sides is not None:
        rewards = rewards - torch.stack(reference_sides) * beta
        loss = _reference_loss(rewards[0] - rewards[1], recipe)
    elif recipe.pref_loss == "simpo":
        loss = -logsigmoid(rewards[0] - rewards[1] - recipe.simpo_gamma)
    else:
        odds_ratio_loss = -logsigmoid((chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected)))
        loss = beta * odds_ratio_loss - chosen
        extra = {"sft_loss": nll, "odds_ratio_loss": odds_ratio_loss}
    if recipe.pref_ftx:
        loss = loss + recipe.pref_ftx * nll
    good, bad = rewards
    values = (good, bad, (good > bad).float(), good - bad, chosen, rejected)
    metrics = dict(zip(METRICS, values, strict=True)) | extra
    real = torch.stack(_sides(lengths > 0)).all(0).float()
    return PairScores(loss, real, {name: value.detach() for name, value in metrics.items()})


def _reference_loss(margin: Tensor, recipe: Recipe) -> Tensor:
    """Return the loss of margins of rewards: beta times the difference of the two sides' log-ratios."""
    if recipe.pref_loss == "hinge":
        return torch.relu(1 - margin)
    if recipe.pref_loss == "ipo":
        return ((margin - 0.5) / recipe.pref_beta) ** 2
    swapped = recipe.dpo_label_smoothing
    return -(1 - swapped) * logsigmoid(margin) - swapped * logsigmoid(-margin)


def unchanged_loss(recipe: Recipe) -> float:
    """Return the loss of a pair if the policy equals the reference."""
    return {"hinge": 1.0, "ipo": 1 / (4 * recipe.pref_beta**2)}.get(recipe.pref_loss, math.log(2))


def _log1mexp(log_prob: Tensor) -> Tensor:
    """Return log(1 - e^x) for x <= 0. At 0, a memorized side, log1p(-exp(x)) has a NaN gradient."""
    return torch.log(-torch.expm1(log_prob.clamp(max=-torch.finfo(log_prob.dtype).eps)))


def _ld_weights(mask: Tensor, alpha: float | None) -> Tensor:
    """Return the weight of each token: LD-DPO's alpha past the shorter side's number of labelled tokens."""
    if alpha is None:
        return mask.float()
    shorter = torch.stack(_sides(mask.sum(-1))).amin(0).repeat_interleave(2)
    return torch.where(mask.cumsum(-1) > shorter.unsqueeze(-1), alpha, 1.0) * mask


def _sides(rows: Tensor) -> tuple[Tensor, Tensor]:
    return rows[0::2], rows[1::2]


# --- batches ---


def pair_key(pair: dict[str, Any]) -> bytes:
    """Return a hash of a pair's tokens."""
    return digest([*pair["seq_lengths"], *pair["input_ids"]])


class PairCollator:
    """Collate pairs as twice as many rows, chosen and rejected in turn, with TRL's collator.

    `reference_log_probs`: the reference's sums over both sides of each pair, if they were computed before training.
    """

    def __init__(self, collate_rows: Any) -> None:
        self.collate_rows = collate_rows
        self.reference_log_probs: dict[bytes, tuple[float, float]] = {}

    def __call__(self, pairs: Sequence[dict[str, Any]]) -> Batch:
        rows = [side for pair in pairs for side in split_pair(pair)]
        batch: Batch = self.collate_rows(rows)
        if self.reference_log_probs:
            sums = [self.reference_log_probs[pair_key(pair)] for pair in pairs]
            batch[REFERENCE] = torch.tensor(sums, dtype=torch.float32).flatten()
        return batch


def split_pair(pair: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the chosen and the rejected side of an encoded row as rows."""
    at = pair["seq_lengths"][0]
    return [{name: pair[name][part] for name in ("input_ids", "labels")} for part in (slice(at), slice(at, None))]


def count_pairs(batch: Batch) -> Tensor:
    """Count the pairs of a batch that are not masked as repeated."""
    labels = batch["labels"]
    rows = labels if "attention_mask" in batch else labels[0].tensor_split(row_starts(batch)[1:])
    labelled = torch.stack([(row != IGNORED).any() for row in rows])
    return torch.stack(_sides(labelled)).all(0).sum()


def split_rows(output: FusedCausalLMOutput, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities and the label mask with one row per side, also of a padding-free batch."""
    assert output.log_probs is not None and output.label_mask is not None
    if "attention_mask" in batch:
        return output.log_probs.float(), output.label_mask
    ends = [start - 1 for start in row_starts(batch)[1:]]  # position t holds the label of token t + 1
    parts = (tensor[0].tensor_split(ends) for tensor in (output.log_probs.float(), output.label_mask))
    log_probs, mask = (pad_sequence(list(part), batch_first=True) for part in parts)
    return log_probs, mask
