"""Checks that run the model before step 1, so that a run fails in its first minute instead of its third hour.

`run_preflight` runs the longest batches, `require_separate_rows` two rows in one padding-free batch. Neither leaves a
trace: no gradient, no optimizer state, no random number drawn, no count in the log.
"""

import contextlib
import math
import random
import time
from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from torch.nn.parallel import DistributedDataParallel

from ..data.labels import IGNORED
from ..errors import RunFailed, in_one_line
from ..machine import format_bytes, gpu_memory, is_out_of_memory, peak_memory
from ..model.base import compute_dtype
from ..model.memory import USABLE, Row, estimate_memory, longest_batch, model_shape
from ..recipe.keys import Recipe
from ..recipe.preference import is_base, needs_reference
from ..report.console import say
from ..report.log_file import format_seconds
from .failures import describe_not_finite
from .preference import count_pairs, unchanged_loss
from .reference import Preference
from .trainer import ArpoTrainer

LITTLE_MEMORY = 4e9
"""Bytes that any machine has that trains on its CPU."""


def run_preflight(trainer: ArpoTrainer, choose_checkpointing: bool = False, skip_reason: str | None = None) -> None:
    """Run forward and backward on the longest training rows, and forward on the longest eval rows.

    A batch is filled with the longest rows, so it is at least as large as any that the sampler draws. On GPUs, memory
    for the optimizer's state is reserved meanwhile. Skipped under DeepSpeed, whose engine counts each backward as a step.

    Args:
        choose_checkpointing: Keep activations instead of recomputing them if the longest batch fits with them
            (`gradient_checkpointing: auto`). They are recomputed if the memory is unknown, or split by FSDP.
        skip_reason: Printed instead of running the longest training rows.
    """
    if trainer.is_deepspeed_enabled or not isinstance(trainer.train_dataset, Dataset):
        return
    line = skip_reason or _run_training(trainer, choose_checkpointing)
    evals = trainer.eval_dataset or {}
    for dataset in evals.values() if isinstance(evals, dict) else [evals]:
        with preserve_training_state(trainer):
            inputs = trainer.data_collator(
                longest_batch(dataset, trainer.args.per_device_eval_batch_size, _pads_pairs(trainer))[0]
            )
            trainer.model.eval()
            trainer.prediction_step(trainer.model_wrapped, inputs, prediction_loss_only=True)
    say(line)


def warm_up(trainer: ArpoTrainer) -> None:
    """Run a backward under DDP, for runs without preflight, whose steps would otherwise depend on where they resumed.

    After its first backward, DDP groups the gradients again, and more than two processes sum them in another order.
    """
    if not isinstance(trainer.model_wrapped, DistributedDataParallel):
        return
    if isinstance(trainer.train_dataset, Dataset):
        batch, _ = longest_batch(trainer.train_dataset, 1, _pads_pairs(trainer))
    else:  # a stream's first row would have to be read again
        tokens = list(range(64))
        batch = [{"input_ids": tokens, "labels": tokens, "seq_lengths": [len(tokens)]}]
    _run_step(trainer, batch)


def find_skip_reason(recipe: Recipe, trainer: ArpoTrainer) -> str | None:
    """Return why `preflight: auto` does not run the longest batch, or None: on a CPU, if it needs little memory."""
    args, rows = trainer.args, trainer.train_dataset
    if recipe.preflight != "auto" or args.device.type != "cpu" or args.world_size > 1 or not isinstance(rows, Dataset):
        return None
    memory = estimate_memory(recipe, args, model_shape(recipe), rows)
    if memory is None or memory.peak > LITTLE_MEMORY:
        return None
    return f"preflight  skipped: the longest batch needs only about {format_bytes(memory.peak)} (to force it, set preflight: true)"


def _run_training(trainer: ArpoTrainer, choose_checkpointing: bool) -> str:
    """Run the longest batch. Return its peak memory, and the expected time of all steps, as a line."""
    args = trainer.args
    batch, mean_length = longest_batch(trainer.train_dataset, args.per_device_train_batch_size, _pads_pairs(trainer))
    if choose_checkpointing:
        _choose_checkpointing(trainer, batch)
    seconds, peak = _run_step(trainer, batch)
    tokens = sum(len(row["input_ids"]) for row in batch)
    steps = trainer.state.max_steps - trainer.state.global_step
    tokens_per_step = mean_length * args.per_device_train_batch_size * args.gradient_accumulation_steps
    return (
        f"preflight  longest batch ({tokens:,} tokens) ok, peak {format_bytes(peak)}; "
        f"about {format_seconds(seconds / tokens * tokens_per_step * steps)} for {steps:,} step{'s' * (steps != 1)}"
    )


def _pads_pairs(trainer: ArpoTrainer) -> bool:
    return trainer.preference is not None and not trainer.args.padding_free


def _run_step(trainer: ArpoTrainer, batch: list[Row]) -> tuple[float, int]:
    """Return the seconds of a forward and backward, and the peak memory in bytes."""
    with preserve_training_state(trainer), _optimizer_memory(trainer):
        began = time.monotonic()
        inputs = trainer.data_collator(batch)
        # Trainer sets it before each step, and TRL divides the router's auxiliary loss by it.
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        items = count_pairs(inputs) if trainer.preference else (inputs["labels"][:, 1:] != IGNORED).sum()
        trainer.training_step(trainer.model_wrapped, inputs, items)
        return time.monotonic() - began, peak_memory()


def _choose_checkpointing(trainer: ArpoTrainer, batch: list[Row]) -> None:
    args, model, memory = trainer.args, trainer.model, gpu_memory()
    if memory is None or trainer.is_fsdp_enabled:
        return
    model.activation_checkpointing_disable()
    try:
        fits = _run_step(trainer, batch)[1] < USABLE * memory
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    # All processes have run a batch of the same size; the one with the least free memory decides.
    fits = bool(trainer.accelerator.reduce(torch.tensor(int(not fits), device=args.device)) == 0)
    if not fits:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=args.activation_checkpointing_kwargs)
    args.activation_checkpointing = not fits
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    decision = "off, activations fit" if fits else "on, activations would not fit"
    say(f"memory   gradient_checkpointing: auto turns it {decision}")


def check_first_pair(recipe: Recipe, trainer: ArpoTrainer) -> None:
    """Check that the untrained policy equals the reference: the sigmoid loss of the first pair is ln 2.

    Losses without a reference, and a resumed run, have nothing to compare. If the recipe names another reference, or
    starts from a trained adapter, the loss is printed.

    Raises:
        RecipeError: the loss is another one.
        RunFailed: it is not finite.
    """
    preference = trainer.preference
    if not preference or not needs_reference(recipe) or trainer.state.global_step:
        return
    plain = Preference(recipe.model_copy(update={"ld_alpha": None, "pref_ftx": 0.0}), preference.reference)
    with preserve_training_state(trainer), torch.no_grad():
        trainer.model.train()
        pair = cast(Dataset, trainer.train_dataset)[0]
        batch = send_to_device(trainer.data_collator([pair]), trainer.args.device)
        losses = [float(plain.score(trainer.model_wrapped, batch, trainer.accelerator)[0].loss) for _ in range(2)]
    expected, loss = unchanged_loss(recipe), losses[0]
    if not math.isfinite(loss):
        raise RunFailed(f"first pair: {describe_not_finite(trainer.model, 'loss', loss, [pair['source']])}")
    if (recipe.ref_model and not is_base(recipe)) or (recipe.adapter_name_or_path and not recipe.create_new_adapter):
        say(
            f"reference  first pair: loss {loss:.4f}; policy and reference are different models (equal ones: {expected:.4f})"
        )
        return
    if abs(loss - expected) <= _tolerance(recipe) * max(expected, 1):
        say(f"reference  first pair: loss {loss:.4f}, as expected when policy and reference are identical")
        return
    cause = "the model gives different results for the same batch (dropout, or a kernel that is not deterministic)"
    if losses[0] == losses[1]:
        cause = "the reference does not compute what the untrained policy computes (another dtype, file or adapter)"
    raise recipe.error("stage", f"first pair: expected loss {expected:g} before step 1, found {loss:g}: {cause}")


def _tolerance(recipe: Recipe) -> float:
    """Return how far the loss may be from that of an unchanged policy: adapters that rescale weights round."""
    if recipe.use_dora or recipe.finetuning_type == "oft":
        return 0.05 if compute_dtype(recipe) else 1e-3
    return 1e-5


def require_separate_rows(recipe: Recipe, trainer: ArpoTrainer) -> None:
    """Check that the model does not mix the rows of a padding-free batch, if the recipe has such batches.

    In transformers 5.24, some models build their mask without position_ids, and some carry a state from row to row
    (https://github.com/huggingface/transformers/issues/39997; docs/reference/architectures.md lists them).

    Raises:
        RecipeError: the second row's predictions depend on the first row.
    """
    if not trainer.padding_free:
        return
    try:
        with preserve_training_state(trainer):
            separate = _rows_are_separate(trainer)
        reason = "mixes the rows of a padding-free batch"
    except ValueError as error:  # as Qwen3-Next's linear attention says it
        separate, reason = False, f"does not support padding-free batches: {in_one_line(error)}"
    if not separate:
        config = trainer.model.config
        keys = ("packing", "neat_packing") if recipe.packing else ("padding_free",)
        raise recipe.error(
            next((key for key in keys if key in recipe.lines), keys[0]),
            f"{config.model_type} with {config._attn_implementation} attention {reason}; "
            f"set {' and '.join(f'{key}: false' for key in keys)}",
        )


def _rows_are_separate(trainer: ArpoTrainer) -> bool:
    """Return whether a second row's log-probabilities are the same after two different first rows, and alone.

    Measured on 45 small random models in float32: those of separate rows differ from alone by 3e-7 of their standard
    deviation, and don't change with the first row; those of mixed rows by 2e-4 (a convolution) or more.
    """
    args = trainer.args
    model = trainer.model_wrapped
    is_half = computes_in_half(trainer)
    generator = torch.Generator().manual_seed(0)
    first, other, row = (
        torch.randint(trainer.model.config.get_text_config().vocab_size, (size,), generator=generator).tolist()
        for size in (11, 11, 13)
    )

    def log_probs(*rows: list[int]) -> torch.Tensor:
        ids = [token for tokens in rows for token in tokens]
        row_of_all = {"input_ids": ids, "labels": ids, "seq_lengths": [len(tokens) for tokens in rows]}
        batch = trainer.collate_rows([row_of_all])
        batch = {name: value for name, value in send_to_device(batch, args.device).items() if name != "labels"}
        with torch.no_grad(), trainer.compute_loss_context_manager():
            logits: torch.Tensor = model(**batch, use_cache=False).logits
        return logits[0, -len(row) :].float().log_softmax(-1)

    model.eval()
    alone, after, after_other = log_probs(row), log_probs(first, row), log_probs(other, row)
    moved, differs = ((after - other).abs().mean() / alone.std() for other in (after_other, alone))
    return bool(moved < (1e-3 if is_half else 1e-4)) and bool(differs < (5e-2 if is_half else 1e-3))


def computes_in_half(trainer: ArpoTrainer) -> bool:
    """Return whether matrices are multiplied in less than float32."""
    args, weights = trainer.args, next(trainer.model.parameters())
    return bool(args.bf16 or args.fp16 or args.tf32 or weights.dtype != torch.float32)


@contextlib.contextmanager
def preserve_training_state(trainer: ArpoTrainer) -> Iterator[None]:
    """Restore after the block all that a step changes: random states, gradients, counts and metrics."""
    rng = random.getstate(), np.random.get_state()
    sync, training = trainer.accelerator.sync_gradients, trainer.model.training
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        trainer.model_wrapped.zero_grad()
        trainer.model.train(training)
        trainer.forget_batches()
        trainer.accelerator.sync_gradients = sync
        random.setstate(rng[0])
        np.random.set_state(rng[1])


@contextlib.contextmanager
def _optimizer_memory(trainer: ArpoTrainer) -> Iterator[None]:
    """Reserve on the GPU what AdamW allocates at the first step: two moments of the size of each trained weight."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad and p.device.type == "cuda"]
    moments = [torch.empty_like(p) for p in trained for _ in range(2)]
    yield
    moments.clear()
