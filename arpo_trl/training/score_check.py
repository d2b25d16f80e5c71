"""Check before step 1 that the fused loss scores labels as the model's own logits do.

TRL's fused head and our tiles project hidden states with the output embedding. Some models do more to their logits than
their config names in a known key, such as RecurrentGemma's soft cap, or Inkling's padded vocabulary.
"""

from typing import cast

import psutil
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.labels import IGNORED
from ..machine import gpu_memory
from ..model.memory import USABLE, estimate_memory, model_shape, own_logits_bytes
from ..model.token_scores import score_own_logits
from ..model.weights import without_adapter
from ..recipe.keys import Recipe
from .loss import Batch
from .preference import split_pair
from .preflight import computes_in_half, preserve_training_state
from .trainer import ArpoTrainer

TOKENS = 256
POSITIONS = 64


def check_scores(recipe: Recipe, trainer: ArpoTrainer) -> list[str]:
    """Compare the scores that the loss is made of with the log-softmax of the model's own logits, on one row.

    If they differ, the loss uses the model's own logits where these fit in memory.

    Returns:
        A line for the start report if it does.

    Raises:
        RecipeError: they differ, and the model's own logits can't be used.
    """
    if getattr(trainer.accelerator.parallelism_config, "sp_enabled", False):
        return []  # Ulysses' attention requires rows that are split among the processes
    with preserve_training_state(trainer), torch.no_grad():
        difference = _largest_difference(trainer)
    tolerance = 1e-2 if computes_in_half(trainer) else 1e-4
    differs = torch.tensor(int(not difference <= tolerance), device=trainer.args.device)  # NaN differs, too
    if not trainer.accelerator.reduce(differs):  # all processes decide the same
        return []
    family = trainer.model.config.get_text_config().model_type
    message = f"{family}: the fused loss and the model's own logits differ (relative difference {difference:.1g})"
    if reason := _why_not_own_logits(recipe, trainer):
        raise recipe.error("model_name_or_path", f"not supported: {message}, and {reason}")
    reference = trainer.preference and trainer.preference.reference
    for model in {without_adapter(trainer.accelerator.unwrap_model(trainer.model)), reference} - {None}:
        score_own_logits(cast(PreTrainedModel, model))
    return [f"loss     {message}; the loss is computed from the logits, which takes more memory"]


def _largest_difference(trainer: ArpoTrainer) -> float:
    """Return the largest difference of a label's log-probability, relative to the largest logit.

    Two passes of the model itself may differ, if its kernels are not deterministic. Three times that is no difference.
    """
    model = trainer.model_wrapped
    model.eval()
    batch = _batch(trainer)
    labels = batch["labels"][:, 1:]
    mask = labels != IGNORED
    inputs = {name: value for name, value in batch.items() if name != "labels"}

    def own_scores() -> tuple[Tensor, Tensor]:
        logits = model(**inputs, use_cache=False).logits[:, :-1][mask].float()
        return logits.log_softmax(-1).gather(-1, labels[mask].unsqueeze(-1)).squeeze(-1), logits.abs().max()

    with trainer.accelerator.autocast():
        fused = model(**batch, use_cache=False, fused_lm_head=True).log_probs[mask].float()
        (own, size), (again, _) = own_scores(), own_scores()
    differences = (fused - own).abs() - 3 * (again - own).abs().max()
    return float(differences.max() / size.clamp(min=torch.finfo(size.dtype).tiny))


def _batch(trainer: ArpoTrainer) -> Batch:
    """Return a batch of one training row, cut to TOKENS, with labels on its last POSITIONS tokens."""
    rows = trainer.train_dataset
    if isinstance(rows, Dataset):
        tokens: list[int] = (split_pair(rows[0])[0] if trainer.preference else rows[0])["input_ids"][:TOKENS]
    else:  # a stream's first row would have to be read again
        tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)
        tokens = tokenizer("The quick brown fox jumps over the lazy dog. " * 8).input_ids[:TOKENS]
    labels = [IGNORED] * (len(tokens) - POSITIONS) + tokens[-POSITIONS:]
    row = {"input_ids": tokens, "labels": labels, "seq_lengths": [len(tokens)]}
    batch: Batch = send_to_device(trainer.collate_rows([row]), trainer.args.device)
    return batch


def _why_not_own_logits(recipe: Recipe, trainer: ArpoTrainer) -> str | None:
    """Return why the loss can't be computed from the model's own logits, or None."""
    for key in ("use_eaft_loss", "use_asft_loss", "moe_aux_loss_coef", "precompute_ref_log_probs"):
        if getattr(recipe, key):
            return f"{key} requires the fused loss; remove the line"
    rows, model = trainer.train_dataset, model_shape(recipe)
    if not isinstance(rows, Dataset):
        return "with streaming: true the memory of those is unknown; set streaming: false"
    memory = estimate_memory(recipe, trainer.args, model, rows)
    # Without an estimate the activations are unknown, which the preflight tries: weights, gradients and two moments.
    known = memory.peak if memory else sum(p.nbytes * (4 if p.requires_grad else 1) for p in model.parameters())
    needed = known + own_logits_bytes(recipe, trainer.args, model, rows)
    free = gpu_memory() or psutil.virtual_memory().total // trainer.args.world_size
    if needed > USABLE * free:
        return (
            f"a step with those needs about {needed / 1e9:.0f} GB of {free / 1e9:.0f} GB; lower "
            "per_device_train_batch_size or cutoff_len"
        )
    return None
