"""What the loss and its companions are computed from: the score of each labelled token.

On GPUs TRL's fused head does this; here is what takes its place on devices without Triton.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from ..data.labels import IGNORED

Batch = dict[str, Tensor]
"""What the collator makes; of rows laid end to end the longest row's length, too, as an int."""

TILE_POSITIONS = 512
"""Labelled positions scored at once: 512 x 151,936 float32 logits are 311 MB."""


def score_labelled_positions_only(model: PreTrainedModel) -> None:
    """Project only the positions that carry a label, in tiles, with a plain log-softmax.

    On devices without Triton, TRL's fused head projects every position and walks the logits in several float32
    passes (trl 1.16, trl/trainer/utils.py: `compact = _use_triton(...)`). The loss is the same to float rounding. To
    be dropped when TRL scores labelled positions everywhere.

    The forward of a model with scaled or soft-capped logits, or with a balancing loss, is left to TRL.
    """
    config = model.config.get_text_config()
    scales = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    if any(getattr(config, name, None) for name in scales) or getattr(config, "output_router_logits", False):
        return
    trl_forward = model.forward

    @functools.wraps(trl_forward)  # `generate` reads its signature, for position_ids among others
    def forward(*args: object, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: object) -> object:
        if not fused_lm_head or labels is None or "shift_labels" in kwargs:
            return trl_forward(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        kwargs["use_cache"] = False
        hidden = model.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        labels = labels[:, 1:]
        mask = labels != IGNORED
        scores = score_tokens(hidden[mask], labels[mask], model.get_output_embeddings())
        log_probs, entropy, is_top1 = (s.new_zeros(mask.shape).masked_scatter(mask, s) for s in scores)
        return FusedCausalLMOutput(log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask)

    model.forward = forward


def score_tokens(hidden: Tensor, labels: Tensor, head: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each label, entropy of its distribution, and whether it is the most likely token.

    Args:
        hidden: Shape (tokens, hidden_size).
        labels: Shape (tokens,).
        head: The output projection, hidden_size -> vocabulary.

    Returns:
        Three float32 tensors of shape (tokens,); only the first carries a gradient.
    """
    tiles = list(zip(hidden.split(TILE_POSITIONS), labels.split(TILE_POSITIONS), strict=True))
    # One tile keeps its logits for the backward pass; of several, each is computed again there.
    again = functools.partial(checkpoint, _score_tile, use_reentrant=False, preserve_rng_state=False)
    score = _score_tile if len(tiles) == 1 else again
    scored = [score(states, targets, head) for states, targets in tiles]
    log_probs, entropy, is_top1 = (torch.cat(parts) for parts in zip(*scored, strict=True))
    return log_probs, entropy, is_top1


def _score_tile(hidden: Tensor, labels: Tensor, head: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    log_softmax = torch.log_softmax(head(hidden).float(), dim=-1)
    log_probs = log_softmax.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        entropy = -(log_softmax.exp().mul_(log_softmax)).sum(-1)
        is_top1 = (log_softmax.argmax(-1) == labels).float()
    return log_probs, entropy, is_top1


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
