"""Estimate peak memory per step, by part, without loading weights.

Weights are counted. Activations are the tensors that autograd saves in a forward pass over fake tensors, which have
shapes but no data (as in torchtitan). docs/measurements.md compares the estimates with measured peaks.
"""

from typing import NamedTuple, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers import PreTrainedModel, TrainingArguments
from trl.trainer.sft_config import SFTConfig

from ..data.audit import token_lengths
from ..data.labels import IGNORED
from ..errors import in_one_line
from ..recipe.keys import Recipe
from ..recipe.preference import keeps_base, needs_reference
from .adapters import new_adapter
from .base import auto_class, load_config
from .methods.chosen import methods_of
from .sft_config import model_init_kwargs
from .split import without_zero3
from .token_scores import TILE_POSITIONS
from .weights import Model, without_adapter

GPU_SIZES = (16, 24, 80)
"""GB of common GPUs, for a user on a machine without one."""
USABLE = 0.9
"""Fraction of a GPU that a step may use: fragmentation and the buffers of collectives take the rest."""
MOMENTS = {"8bit": 2 / 4, "adafactor": 0.0, "sgd": 0.0, "lion": 1.0, "adagrad": 1.0, "rmsprop": 1.0}
"""Copies of the trained weights that an optimizer keeps, by a part of its name. AdamW and all others keep two."""
OWN_LOGIT = 20
"""Bytes of each logit of `own_logits_bytes`: the logit before and after its scaling, in float32, selected, and its gradient."""
Row = dict[str, list[int]]
"""A row of the collator: input_ids, labels, and for packed rows seq_lengths."""


class Memory(NamedTuple):
    """Bytes on each device. FSDP and ZeRO divide the first three among the devices.

    `gradients` includes the copy in which the embedding's gradient arrives, `logits` that of the head's. `reference`: a
    frozen second model.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    reference: int = 0

    @property
    def peak(self) -> int:
        """The maximum after the first step, which allocates the optimizer state. Gradients replace activations."""
        return self.weights + self.reference + self.optimizer + max(self.gradients, self.activations + self.logits)


def estimate_memory(recipe: Recipe, args: SFTConfig, model: Model, rows: Dataset) -> Memory | None:
    """Return the memory of a step on the longest batch of the training rows. `model`: from `model_shape`.

    None if the model's forward pass depends on data.
    """
    count, length, labelled = _largest_batch(recipe, args, rows)
    base = without_adapter(model)
    backbone = base.base_model  # without the head
    half = args.bf16 or args.fp16
    autocast = torch.autocast("cpu", torch.bfloat16 if args.bf16 else torch.float16, enabled=half)
    try:
        with FakeTensorMode(), autocast:
            fakes = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
                for name, tensor in (*backbone.named_parameters(), *backbone.named_buffers())
            }
            saved, hidden = _saved_by_autograd(backbone, fakes, count, length)
    except Exception:  # models depend on data in different ways: .item(), nonzero, a kernel
        return None
    layers = base.config.get_text_config().num_hidden_layers
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    embedding = cast(nn.Embedding, base.get_input_embeddings()).weight
    head = cast(nn.Linear, base.get_output_embeddings()).weight
    # a tile of logits: as projected, in float32, their log-softmax and its exponential
    logits = min(labelled, TILE_POSITIONS) * head.shape[0] * (2 + 3 * 4 if half else 4 + 2 * 4)
    logits += 2 * head.numel() if half else 0
    parts = {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": trained + embedding.nbytes * embedding.requires_grad,
        "optimizer": int(moments(args) * trained),
        "activations": layers * hidden + saved // layers if args.activation_checkpointing else saved,
        "logits": logits + head.nbytes * head.requires_grad,
        "reference": _reference_bytes(recipe, base, args),
    }
    for method in methods_of(recipe):
        parts |= method.memory(parts, model, args)
    return Memory(**parts)


def own_logits_bytes(recipe: Recipe, args: SFTConfig, model: Model, rows: Dataset) -> int:
    """Return the bytes of a model's own logits at all positions at which a row of the longest batch has a label."""
    count, length, labelled = _largest_batch(recipe, args, rows)
    vocabulary: int = model.config.get_text_config().vocab_size
    return count * min(length, labelled) * vocabulary * OWN_LOGIT


def _reference_bytes(recipe: Recipe, base: PreTrainedModel, args: TrainingArguments) -> int:
    """Return the bytes of the frozen second model of `stage: dpo`, if any; `ref_model` counts as large as the base."""
    if not needs_reference(recipe) or keeps_base(recipe) or recipe.precompute_ref_log_probs:
        return 0
    head, itemsize = base.get_output_embeddings(), 2 if args.bf16 or args.fp16 else 4
    linear = {module.weight for module in base.modules() if type(module) is nn.Linear and module is not head}
    return sum(p.numel() * (itemsize if p in linear else 4) for p in base.parameters())


def moments(args: TrainingArguments) -> float:
    """Return how many copies of the trained weights the optimizer keeps."""
    return next((copies for name, copies in MOMENTS.items() if name in str(args.optim).lower()), 2.0)


def model_shape(recipe: Recipe) -> Model:
    """Return the model as the recipe trains it, on torch's meta device: shapes without weights.

    Raises:
        RecipeError: the model can't be found, or it lacks a module that the recipe names.
    """
    try:
        config = load_config(recipe)
    except (OSError, ValueError) as error:
        name = recipe.model_name_or_path
        raise recipe.error("model_name_or_path", f"{name} can't be loaded ({in_one_line(error)})") from None
    kwargs = model_init_kwargs(recipe, config)
    dtype = getattr(config, "dtype", None) if kwargs["dtype"] == "auto" else kwargs["dtype"]
    kwargs = {"trust_remote_code": kwargs["trust_remote_code"], "dtype": dtype or torch.float32}
    try:
        auto = auto_class(config)
    except ValueError as error:
        raise recipe.error("model_name_or_path", str(error)) from None
    with torch.device("meta"):
        with without_zero3():
            model: PreTrainedModel = auto.from_config(config, **kwargs)
        for method in methods_of(recipe):
            method.prepare_base(model)
        return new_adapter(recipe, model) if recipe.trains_adapter else model


def describe_memory(memory: Memory, gpu: int | None) -> str:
    """Return the parts, and the GPU that they fit. `gpu`: bytes of this machine's GPU, if it has one."""
    unit, name_of_unit = (1e9, "GB") if memory.peak > 1e8 else (1e6, "MB")
    shown = [name for name in memory._fields if name != "reference" or memory.reference]
    parts = ", ".join(f"{name} {getattr(memory, name) / unit:.1f}" for name in shown)
    if gpu is not None:
        fits = f"{'fits' if memory.peak < USABLE * gpu else 'does not fit'} this {gpu / 1e9:.0f} GB GPU"
    else:
        sizes = [size for size in GPU_SIZES if memory.peak < USABLE * size * 1e9]
        fits = f"fits a {sizes[0]} GB GPU" if sizes else f"does not fit an {GPU_SIZES[-1]} GB GPU"
    return f"about {memory.peak / unit:.1f} {name_of_unit} peak (parts, not all at once: {parts}); {fits}"


def _largest_batch(recipe: Recipe, args: SFTConfig, rows: Dataset) -> tuple[int, int, int]:
    """Return the rows, tokens per row and labelled tokens of a batch of the longest rows."""
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
    """Return the `size` longest rows, ready for the collator, and the mean length of all rows in tokens."""
    lengths = token_lengths(dataset)
    longest = np.array([max(sides) for sides in dataset["seq_lengths"]]) if padded_pairs else lengths
    rows = dataset.select(np.argsort(longest, kind="stable")[-size:])
    names = [name for name in ("input_ids", "labels", "seq_lengths") if name in rows.column_names]
    return list(rows.select_columns(names)), float(lengths.mean())


def _saved_by_autograd(backbone: nn.Module, tensors: dict[str, Tensor], count: int, length: int) -> tuple[int, int]:
    """Return the bytes that a forward pass of `count` rows saves, and the bytes of the hidden states between layers.

    `tensors` replace the weights and buffers of the `backbone`.
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
