"""What a step will take of a device's memory, by part, before any weight is loaded.

The parts of weights are counted, the activations are those that autograd saves in a forward over fake tensors, which
have shapes and no data (as torchtitan estimates its runs). docs/measurements.md compares the sum with measured peaks.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments
from trl.trainer.sft_config import SFTConfig

from ..data.audit import token_lengths
from ..data.labels import IGNORED
from ..errors import in_one_line
from ..recipe.keys import Recipe
from ..recipe.preference import keeps_base, needs_reference
from .adapters import new_adapter
from .base_config import load_config
from .methods.chosen import methods_of
from .sft_config import model_init_kwargs
from .token_scores import TILE_POSITIONS

CARDS = (16, 24, 80)
"""GB of the cards that a user without one in sight may think of."""
ROOM = 0.9
"""Share of a GPU that may be taken: the allocator's gaps and the collectives' buffers need the rest."""
MOMENTS = {"8bit": 2 / 4, "adafactor": 0.0, "sgd": 0.0, "lion": 1.0, "adagrad": 1.0, "rmsprop": 1.0}
"""Copies of the trained weights that an optimizer keeps; AdamW and what is not here keeps two."""
Row = dict[str, list[int]]
"""Of the collator: input_ids, labels, and of packed rows their seq_lengths."""


class Memory(NamedTuple):
    """Bytes on each device; FSDP and ZeRO share out the first three.

    `gradients` has the copy in which that of the embedding arrives, `logits` that of the head.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def peak(self) -> int:
        """The most at once: gradients come as activations go, after the first step, when the optimizer has its state."""
        return self.weights + self.optimizer + max(self.gradients, self.activations + self.logits)


def estimate_memory(
    recipe: Recipe, args: SFTConfig, model: PreTrainedModel | PeftModel, rows: Dataset
) -> Memory | None:
    """The memory of a step on the longest batch, or None for a model whose forward needs data to be followed.

    `model` is what `model_shape` makes, `rows` are those to train on.
    """
    count, length, labelled = _largest_batch(recipe, args, rows)
    autocast = torch.autocast("cpu", torch.bfloat16 if args.bf16 else torch.float16, enabled=args.bf16 or args.fp16)
    trained = [p.nbytes for p in model.parameters() if p.requires_grad]
    base = cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model
    backbone = base.base_model  # without the head
    try:
        with FakeTensorMode(), autocast:
            fakes = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
                for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers())
            }
            saved, stream = _saved_by_autograd(backbone, fakes, count, length)
    except Exception:  # each model has its own way to need data: .item(), nonzero, a kernel
        return None
    blocks = base.config.get_text_config().num_hidden_layers
    activations = blocks * stream + saved // blocks if args.activation_checkpointing else saved
    head = cast(nn.Linear, base.get_output_embeddings()).weight
    embedding = cast(nn.Embedding, base.get_input_embeddings()).weight
    parts = {
        "weights": sum(p.nbytes for p in model.parameters()) + _reference_bytes(recipe, base, args),
        "gradients": sum(trained) + embedding.nbytes * embedding.requires_grad,
        "optimizer": int(moments(args) * sum(trained)),
        "activations": activations,
        "logits": _logits(head, labelled, args.bf16 or args.fp16) + head.nbytes * head.requires_grad,
    }
    for method in methods_of(recipe):
        parts |= method.memory(parts, model, args)
    return Memory(**parts)


def _reference_bytes(recipe: Recipe, base: PreTrainedModel, args: TrainingArguments) -> int:
    """Return the bytes of the frozen second model of `stage: dpo`, if any; `ref_model` counts as large as the base."""
    if not needs_reference(recipe) or keeps_base(recipe) or recipe.precompute_ref_log_probs:
        return 0
    head, itemsize = base.get_output_embeddings(), 2 if args.bf16 or args.fp16 else 4
    linear = {module.weight for module in base.modules() if type(module) is nn.Linear and module is not head}
    return sum(p.numel() * (itemsize if p in linear else 4) for p in base.parameters())


def moments(args: TrainingArguments) -> float:
    """Copies of the trained weights that the optimizer keeps."""
    return next((copies for name, copies in MOMENTS.items() if name in str(args.optim).lower()), 2.0)


def model_shape(recipe: Recipe) -> PreTrainedModel | PeftModel:
    """The model as the recipe trains it, on torch's meta device: shapes without weights.

    Raises:
        RecipeError: there is no such model, or it lacks a module that the recipe names.
    """
    try:
        config = load_config(recipe)
    except (OSError, ValueError) as error:
        what = f"{recipe.model_name_or_path}: no model there ({in_one_line(error)})"
        raise recipe.error("model_name_or_path", what) from None
    kwargs = model_init_kwargs(recipe, config)
    dtype = getattr(config, "dtype", None) if kwargs["dtype"] == "auto" else kwargs["dtype"]
    given = {"trust_remote_code": kwargs["trust_remote_code"], "dtype": dtype or torch.float32}
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **given)
        for method in methods_of(recipe):
            method.prepare_base(model)
        return new_adapter(recipe, model) if recipe.trains_adapter else model


def describe_memory(memory: Memory, gpu: int | None) -> str:
    """The parts and where they fit. `gpu`: bytes of the one that is there."""
    parts = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in memory._asdict().items())
    if gpu is not None:
        fits = f"{'fits' if memory.peak < ROOM * gpu else 'does not fit'} this GPU of {gpu / 1e9:.0f} GB"
    else:
        cards = [size for size in CARDS if memory.peak < ROOM * size * 1e9]
        fits = f"fits a GPU of {cards[0]} GB" if cards else f"does not fit a GPU of {CARDS[-1]} GB"
    return f"about {memory.peak / 1e9:.1f} GB at its peak ({parts}); {fits}"


def _largest_batch(recipe: Recipe, args: SFTConfig, rows: Dataset) -> tuple[int, int, int]:
    """Rows, tokens a row, and labelled tokens in all of a batch filled with the longest rows."""
    pairs = recipe.stage == "dpo"
    batch, _ = longest_batch(rows, args.per_device_train_batch_size, pairs and not recipe.padding_free)
    lengths = [length for row in batch for length in (row["seq_lengths"] if pairs else [len(row["input_ids"])])]
    labelled = sum(label != IGNORED for row in batch for label in row["labels"])
    if recipe.packing:
        return 1, recipe.cutoff_len * args.per_device_train_batch_size, labelled
    if recipe.padding_free:
        return 1, sum(lengths), labelled
    return len(lengths), max(lengths), labelled


def longest_batch(dataset: Dataset, size: int, padded_pairs: bool = False) -> tuple[list[Row], float]:
    """The `size` longest rows, ready for the collator, and the mean length of all rows in tokens."""
    lengths = token_lengths(dataset)
    longest = np.array([max(sides) for sides in dataset["seq_lengths"]]) if padded_pairs else lengths
    rows = dataset.select(np.argsort(longest, kind="stable")[-size:])
    names = [name for name in ("input_ids", "labels", "seq_lengths") if name in rows.column_names]
    return list(rows.select_columns(names)), float(lengths.mean())


def _saved_by_autograd(backbone: nn.Module, tensors: dict[str, Tensor], count: int, length: int) -> tuple[int, int]:
    """Bytes that a forward of `count` rows saves for the backward, and bytes of the stream between two blocks.

    `tensors` stand in for the weights and buffers of the `backbone`.
    """
    weights = {tensor.untyped_storage()._cdata for tensor in tensors.values()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    ids = torch.zeros(count, length, dtype=torch.long)
    mask = torch.ones(count, 1, length, length, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        hidden: Tensor = functional_call(backbone, tensors, kwargs=inputs).last_hidden_state
    kept.pop(mask.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values()), hidden.nbytes


def _logits(head: Tensor, labelled: int, half: bool) -> int:
    """Bytes that one tile of logits takes: as projected, in float32, their log-softmax and its exponential."""
    copies = 2 + 3 * 4 if half else 4 + 2 * 4
    return min(labelled, TILE_POSITIONS) * head.shape[0] * copies + (2 * head.numel() if half else 0)
