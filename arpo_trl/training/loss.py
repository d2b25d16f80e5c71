"""The tokens that a batch trains on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..data.labels import IGNORED

Batch = dict[str, Tensor]
"""What the collator makes; of rows laid end to end the longest row's length, too, as an int."""


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
