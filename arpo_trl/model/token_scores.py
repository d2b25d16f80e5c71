"""Scores of each labelled token: its log-probability, the entropy, and whether it is the model's first guess.

On GPUs, TRL's fused head computes them. This replaces it on devices without Triton, and for losses that TRL lacks.
"""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from trl.trainer.sft_config import SFTConfig
from trl.trainer.utils import FusedCausalLMOutput

from ..data.labels import IGNORED
from ..recipe.keys import Recipe

Scores = tuple[Tensor, Tensor, Tensor]

Objective = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Replaces log p in training. Arguments: log p of each label, shape (tokens,); the log-softmax over the vocabulary,
shape (tokens, vocabulary); and that of the reference model, if there is one."""

Projection = Callable[[Tensor], Tensor]
"""From hidden states, shape (tokens, hidden_size), to logits, shape (tokens, vocabulary)."""

TILE_POSITIONS = 512
"""Labelled positions to score at once: 512 x 151,936 float32 logits are 311 MB."""


def has_scaled_logits(config: PreTrainedConfig) -> bool:
    """Return whether the logits are more than the head's output, or the loss includes the routers'."""
    scales = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    return any(getattr(config, name, None) for name in scales) or getattr(config, "output_router_logits", False)


def check_objective(recipe: Recipe, key: str, config: PreTrainedConfig, args: SFTConfig) -> None:
    """Raise RecipeError where an objective can't be computed: from scaled logits, or parts of rows."""
    if has_scaled_logits(config):
        raise recipe.error(key, f"not supported: {config.model_type} scales its logits; use_dft_loss is supported")
    if getattr(args.parallelism_config, "non_data_parallel_size", 1) > 1:
        what = "not supported where processes split each row"
        raise recipe.error(key, f"{what}; launch with accelerate_configs/multi_gpu.yaml")


def score_labelled_positions_only(
    model: PreTrainedModel, objective: Objective | None = None, reference: PreTrainedModel | None = None
) -> None:
    """Replace the forward pass of TRL's fused head: project only labelled positions, in tiles, with a plain log-softmax.

    On devices without Triton, TRL's fused head projects every position and processes the logits in several float32
    passes (trl 1.16, trl/trainer/utils.py: `compact = _use_triton(...)`). The loss is the same up to float rounding.
    Remove this when TRL scores only labelled positions on all devices.

    In training, an `objective` replaces the log-probabilities from which TRL computes the loss. Models with scaled or
    soft-capped logits, or with a balancing loss, keep TRL's forward pass.
    """
    if has_scaled_logits(model.config.get_text_config()):
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
        training_objective = objective if model.training else None
        other = None
        if training_objective and reference is not None:
            with torch.no_grad():
                states = reference.base_model(*args, **kwargs).last_hidden_state[:, :-1][mask]
            other = states, reference.get_output_embeddings()
        scores = score_tokens(hidden[mask], labels[mask], model.get_output_embeddings(), training_objective, other)
        log_probs, entropy, is_top1 = (s.new_zeros(mask.shape).masked_scatter(mask, s) for s in scores)
        return FusedCausalLMOutput(log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask)

    model.forward = forward


def score_own_logits(model: PreTrainedModel) -> None:
    """Replace the forward pass of the fused head by the model's own, at labelled positions.

    For models whose logits are more than the head's output in a way that no known key of their config names.
    """
    fused_forward = model.forward
    keeps_positions = "logits_to_keep" in inspect.signature(fused_forward).parameters

    @functools.wraps(fused_forward)
    def forward(*args: object, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs: object) -> object:
        if not fused_lm_head or labels is None or "shift_labels" in kwargs:
            return fused_forward(*args, fused_lm_head=fused_lm_head, labels=labels, **kwargs)
        kwargs.pop("num_items_in_batch", None)
        labels = labels[:, 1:]
        mask = labels != IGNORED
        positions = mask.any(0).nonzero().flatten()
        if keeps_positions:
            kwargs["logits_to_keep"] = positions
        logits = fused_forward(*args, **kwargs | {"use_cache": False}).logits
        if not keeps_positions:
            logits = logits[:, positions]
        scores = score_tokens(logits[mask[:, positions]], labels[mask], nn.Identity())
        log_probs, entropy, is_top1 = (s.new_zeros(mask.shape).masked_scatter(mask, s) for s in scores)
        return FusedCausalLMOutput(log_probs=log_probs, entropy=entropy, is_top1=is_top1, label_mask=mask)

    model.forward = forward


def score_tokens(
    hidden: Tensor,
    labels: Tensor,
    head: nn.Module,
    objective: Objective | None = None,
    reference: tuple[Tensor, nn.Module] | None = None,
) -> Scores:
    """Return each label's log-probability, the entropy of its distribution, and whether it is the most likely token.

    Args:
        hidden: Shape (tokens, hidden_size).
        labels: Shape (tokens,).
        head: The output projection, hidden_size -> vocabulary.
        objective: Replaces the log-probability.
        reference: `hidden` and `head` of the reference model, if the objective needs one.

    Returns:
        Three float32 tensors of shape (tokens,); only the first has a gradient.
    """
    projection = _projection(head)
    project, size = projection or head, TILE_POSITIONS if projection else max(len(hidden), 1)
    tensors = (hidden, labels, reference[0]) if reference else (hidden, labels)
    tiles = list(zip(*(tensor.split(size) for tensor in tensors), strict=True))

    def score(hidden: Tensor, labels: Tensor, reference_hidden: Tensor | None = None) -> Scores:
        log_softmax = torch.log_softmax(project(hidden).float(), dim=-1)
        log_probs = log_softmax.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            other = torch.log_softmax(reference[1](reference_hidden).float(), dim=-1) if reference else None
        if objective:
            log_probs = objective(log_probs, log_softmax, other)
        with torch.no_grad():
            entropy = -(log_softmax.exp().mul_(log_softmax)).sum(-1)
            is_top1 = (log_softmax.argmax(-1) == labels).float()
        return log_probs, entropy, is_top1

    # A single tile keeps its logits for the backward pass; several are recomputed there.
    recomputed = functools.partial(checkpoint, score, use_reentrant=False, preserve_rng_state=False)
    scored = [(score if len(tiles) == 1 else recomputed)(*tile) for tile in tiles]
    log_probs, entropy, is_top1 = (torch.cat(parts) for parts in zip(*scored, strict=True))
    return log_probs, entropy, is_top1


def _projection(head: nn.Module) -> Projection | None:
    """Return the head's projection, with weights that are gathered once a step; None if each call would gather them.

    FSDP2 and ZeRO-3 gather a module's weights in each of its calls, also in those of the backward pass, and processes
    differ in their number of tiles. So a linear head is not called if its weights are gathered: FSDP2 has gathered them
    together with the final norm's, ZeRO-3 those that are the input embedding's, too. Another head has to be called once.
    """
    statuses = [p.ds_status.name for p in head.parameters() if hasattr(p, "ds_status")]
    is_split, is_partitioned = isinstance(head, FSDPModule) or bool(statuses), {*statuses} - {"AVAILABLE"}
    if type(head).forward is not nn.Linear.forward or is_partitioned:
        return None if is_split else head
    complete = {name: p.clone() if hasattr(p, "ds_id") else _gather(p) for name, p in head.named_parameters()}
    return lambda hidden: nn.functional.linear(hidden, complete["weight"], complete.get("bias"))


def _gather(parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter
    # of a model without a final norm; as FSDP does, average the gradients of all processes
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
