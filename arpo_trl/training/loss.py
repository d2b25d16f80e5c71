"""The tokens that a batch trains on."""

import math

import torch
from torch import Tensor

from ..data.labels import IGNORED

Batch = dict[str, Tensor]
"""The collator's output; a padding-free batch also has the longest row's length, as an int."""


def mask_repeated_rows(batch: Batch, new: int, packed: bool) -> None:
    """Mask the labels of all rows but the first `new`, so that an epoch trains as on one process.

    Each of several processes gets the same number of batches, so accelerate 1.15 (BatchSamplerShard) fills the last ones
    with rows from the epoch's start. Padding-free rows start where a position is 0. Packed batches, whose rows contain
    several conversations, are masked only if they have no new row.
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
    """Return where each row of a padding-free batch starts: where a position is 0."""
    return [int(start) for start in (batch["position_ids"][0] == 0).nonzero().flatten()]


def count_tokens(batch: Batch) -> Tensor:
    """Return the number of tokens in a batch, without padding and repeated rows."""
    if "attention_mask" not in batch:  # padding-free
        return torch.tensor(batch["input_ids"].numel())
    mask = batch["attention_mask"]
    if "labels" in batch:  # with Ulysses they are shift_labels
        mask = mask[(batch["labels"] != IGNORED).any(-1)]  # repeated rows have none
    return mask.sum()


def token_means(sums: Tensor, prefix: str) -> dict[str, float]:
    """Return metrics from the sums over labelled tokens of -log p, entropy, correct guesses, and 1."""
    nll, entropy, correct = (sums[:3] / sums[3].clamp(min=1)).tolist()
    return {
        f"{prefix}_loss": nll,
        f"{prefix}_perplexity": math.exp(min(nll, 700)),
        f"{prefix}_entropy": entropy,
        f"{prefix}_mean_token_accuracy": correct,
    }
