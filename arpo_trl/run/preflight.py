"""One step on the longest batches before step 1, so that a run which would die at hour 3 dies in minute 1.

Nothing of it stays: no gradient, no optimizer state, no random number drawn, no count in the log.
"""

from __future__ import annotations

import contextlib
import copy
import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback

from ..data.prepare import token_lengths
from ..machine import gpu_memory, peak_memory
from ..report.console import say
from ..report.figures import format_seconds
from .trainer import ArpoTrainer, is_out_of_memory

ROOM = 0.9
"""Share of a GPU that the longest batch may take: the allocator's gaps and the collectives' buffers need the rest."""


class Preflight(TrainerCallback):
    """Runs forward and backward on the longest training rows, and forward on the longest eval rows.

    A batch is filled with the longest rows, so it is at least as large as any that the sampler can draw. Where there
    is a GPU, memory for the optimizer's state is held meanwhile. Skipped under DeepSpeed, whose engine counts each
    backward as a step.

    Args:
        trainer: The trainer whose rows and model are tried.
        choose_checkpointing: Keep activations instead of recomputing them if the longest batch fits so
            (`gradient_checkpointing: auto`). Where the memory is not known, or is shared out by FSDP, they are
            recomputed.
    """

    def __init__(self, trainer: ArpoTrainer, choose_checkpointing: bool = False) -> None:
        self.trainer = trainer
        self.choose_checkpointing = choose_checkpointing

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.is_deepspeed_enabled or not isinstance(trainer.train_dataset, Dataset):
            return
        batch, tokens_a_row = longest_batch(trainer.train_dataset, args.per_device_train_batch_size)
        if self.choose_checkpointing:
            self._choose_checkpointing(batch)
        seconds, peak = self._try_step(batch)
        evals = trainer.eval_dataset
        for dataset in evals.values() if isinstance(evals, dict) else [evals] if evals else []:
            with untouched(trainer):
                inputs = trainer.data_collator(longest_batch(dataset, args.per_device_eval_batch_size)[0])
                trainer.model.eval()  # type: ignore[union-attr]
                trainer.prediction_step(trainer.model_wrapped, inputs, prediction_loss_only=True)
        tokens = sum(len(row["input_ids"]) for row in batch)
        steps = state.max_steps - state.global_step
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        expected = seconds / tokens * tokens_a_row * rows * steps
        say(
            f"checked  the longest batch ({tokens:,} tokens) fits: {peak / 1e9:.2f} GB at its peak; "
            f"{steps:,} steps take about {format_seconds(expected)}"
        )

    def _try_step(self, batch: list[dict[str, Any]]) -> tuple[float, int]:
        """Seconds of a forward and backward, and the memory at its peak in bytes."""
        trainer = self.trainer
        with untouched(trainer), _optimizer_memory(trainer):
            began = time.monotonic()
            inputs = trainer.data_collator(batch)
            trainer.training_step(trainer.model_wrapped, inputs, (inputs["labels"][:, 1:] != -100).sum())
            return time.monotonic() - began, peak_memory()

    def _choose_checkpointing(self, batch: list[dict[str, Any]]) -> None:
        trainer, args = self.trainer, self.trainer.args
        memory = gpu_memory()
        if memory is None or trainer.is_fsdp_enabled:
            return
        model: Any = trainer.model
        model.activation_checkpointing_disable()
        try:
            fits = self._try_step(batch)[1] < ROOM * memory
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            fits = False
        # Every process has tried a batch of the same size; the one with the least room decides.
        fits = bool(trainer.accelerator.reduce(torch.tensor(int(not fits), device=args.device)) == 0)
        if not fits:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=args.activation_checkpointing_kwargs)
        args.activation_checkpointing = not fits
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        what = "keeps activations" if fits else "recomputes activations: they do not fit"
        say(f"memory   gradient_checkpointing: auto {what}")


def longest_batch(dataset: Dataset, size: int) -> tuple[list[dict[str, Any]], float]:
    """The `size` longest rows, ready for the collator, and the mean length of all rows in tokens."""
    lengths = token_lengths(dataset)
    rows = dataset.select(np.argsort(lengths, kind="stable")[-size:])
    names = [name for name in ("input_ids", "labels", "seq_lengths") if name in rows.column_names]
    return list(rows.select_columns(names)), float(lengths.mean())


@contextlib.contextmanager
def untouched(trainer: ArpoTrainer) -> Iterator[None]:
    """Put back, after the block, all that a step changes: random states, gradients, counts and metrics."""
    model: Any = trainer.model
    rng = random.getstate(), np.random.get_state(), torch.get_rng_state()
    rng_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    seen, trained, metrics = trainer._total_train_tokens, trainer.trained_tokens, copy.deepcopy(trainer._metrics)
    sync, training = trainer.accelerator.gradient_state.sync_gradients, model.training
    try:
        yield
    finally:
        trainer.model_wrapped.zero_grad()
        model.train(training)
        trainer._window.clear()
        trainer._total_train_tokens, trainer.trained_tokens, trainer._metrics = seen, trained, metrics
        trainer.accelerator.gradient_state._set_sync_gradients(sync)
        random.setstate(rng[0])
        np.random.set_state(rng[1])
        torch.set_rng_state(rng[2])
        if rng_cuda:
            torch.cuda.set_rng_state_all(rng_cuda)


@contextlib.contextmanager
def _optimizer_memory(trainer: ArpoTrainer) -> Iterator[None]:
    """Hold on the GPU what AdamW will allocate at the first step: two moments the size of each trained weight."""
    held = []
    if trainer.accelerator.device.type == "cuda":
        model: Any = trainer.model
        trained = [p for p in model.parameters() if p.requires_grad]
        held = [torch.empty_like(p) for p in trained for _ in range(2)]
    yield
    held.clear()
