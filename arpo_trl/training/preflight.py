"""What is tried before step 1, so that a run which would die at hour 3, or train what nobody meant, ends in minute 1.

One step on the longest batches, and two rows laid end to end. Nothing of either stays: no gradient, no optimizer state,
no random number drawn, no count in the log.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator

import numpy as np
import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from transformers import TrainerCallback, TrainerState, TrainingArguments

from ..data.labels import IGNORED
from ..errors import in_one_line
from ..machine import gpu_memory, is_out_of_memory, peak_memory
from ..model.memory import ROOM, Row, longest_batch
from ..recipe.keys import Recipe
from ..report.console import say
from ..report.log_file import format_seconds
from .trainer import ArpoTrainer


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
        spare: Said in place of the trial of the longest training rows, where there is no need of it.
    """

    def __init__(self, trainer: ArpoTrainer, choose_checkpointing: bool = False, spare: str | None = None) -> None:
        self.trainer = trainer
        self.choose_checkpointing = choose_checkpointing
        self.spare = spare

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: object, **_: object) -> None:
        trainer = self.trainer
        if trainer.is_deepspeed_enabled or not isinstance(trainer.train_dataset, Dataset):
            return
        line = self.spare or self._try_training(args, state.max_steps - state.global_step)
        evals = trainer.eval_dataset or {}
        for dataset in evals.values() if isinstance(evals, dict) else [evals]:
            with untouched(trainer):
                inputs = trainer.data_collator(longest_batch(dataset, args.per_device_eval_batch_size)[0])
                trainer.model.eval()
                trainer.prediction_step(trainer.model_wrapped, inputs, prediction_loss_only=True)
        say(line)

    def _try_training(self, args: TrainingArguments, steps: int) -> str:
        """What the longest batch takes, and the time that so many steps take."""
        batch, tokens_a_row = longest_batch(self.trainer.train_dataset, args.per_device_train_batch_size)
        if self.choose_checkpointing:
            self._choose_checkpointing(batch)
        seconds, peak = self._try_step(batch)
        tokens = sum(len(row["input_ids"]) for row in batch)
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        expected = seconds / tokens * tokens_a_row * rows * steps
        return (
            f"checked  the longest batch ({tokens:,} tokens) fits: {peak / 1e9:.2f} GB at its peak; "
            f"{steps:,} steps take about {format_seconds(expected)}"
        )

    def _try_step(self, batch: list[Row]) -> tuple[float, int]:
        """Seconds of a forward and backward, and the memory at its peak in bytes."""
        trainer = self.trainer
        with untouched(trainer), _optimizer_memory(trainer):
            began = time.monotonic()
            inputs = trainer.data_collator(batch)
            # Trainer's loop sets it before each step, and TRL divides a mixture's balancing loss by it.
            trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
            trainer.training_step(trainer.model_wrapped, inputs, (inputs["labels"][:, 1:] != IGNORED).sum())
            return time.monotonic() - began, peak_memory()

    def _choose_checkpointing(self, batch: list[Row]) -> None:
        trainer, args = self.trainer, self.trainer.args
        memory = gpu_memory()
        if memory is None or trainer.is_fsdp_enabled:
            return
        model = trainer.model
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


class PackingCheck(TrainerCallback):
    """Refuses a run that lays rows end to end with a model which lets one of them see another."""

    def __init__(self, recipe: Recipe, trainer: ArpoTrainer) -> None:
        self.recipe = recipe
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: object, **_: object) -> None:
        require_rows_apart(self.recipe, self.trainer)


def require_rows_apart(recipe: Recipe, trainer: ArpoTrainer) -> None:
    """Try the model on two rows laid end to end, where the recipe has them so.

    Of transformers 5.24's models some build their mask without position_ids, and some carry a state from row to row
    (https://github.com/huggingface/transformers/issues/39997; docs/reference/architectures.md lists them).

    Raises:
        RecipeError: the second row is predicted otherwise after another first one, or otherwise than alone.
    """
    if not trainer.padding_free:
        return
    try:
        with untouched(trainer):
            apart = _rows_are_apart(trainer)
        reason = "lets rows that are laid end to end see each other"
    except ValueError as error:  # as Qwen3-Next's linear attention says it
        apart, reason = False, f"can't lay rows end to end: {in_one_line(error)}"
    if not apart:
        config = trainer.model.config
        keys = ("packing", "neat_packing") if recipe.packing else ("padding_free",)
        raise recipe.error(
            next((key for key in keys if key in recipe.source.lines), keys[0]),
            f"{config.model_type} with {config._attn_implementation} attention {reason}; "
            f"write {' and '.join(f'{key}: false' for key in keys)}",
        )


def _rows_are_apart(trainer: ArpoTrainer) -> bool:
    """Whether a second row's log-probabilities are the same after two different first rows, and alone.

    Measured on 45 small random models: a row that is apart moves by 3e-7 of the log-probabilities' spread in float32
    and by exactly nothing when only the first row changes; one that is not, by 2e-4 (a convolution) or more.
    """
    args = trainer.args
    model = trainer.model_wrapped
    short = args.bf16 or args.fp16 or next(model.parameters()).dtype != torch.float32
    generator = torch.Generator().manual_seed(0)
    first, other, row = (
        torch.randint(trainer.model.config.get_text_config().vocab_size, (size,), generator=generator).tolist()
        for size in (11, 11, 13)
    )

    def log_probs(*rows: list[int]) -> torch.Tensor:
        ids = [token for one in rows for token in one]
        batch = trainer.data_collator([{"input_ids": ids, "labels": ids, "seq_lengths": [len(one) for one in rows]}])
        batch = {name: value for name, value in send_to_device(batch, args.device).items() if name != "labels"}
        with torch.no_grad(), trainer.compute_loss_context_manager():
            logits: torch.Tensor = model(**batch, use_cache=False).logits
        return logits[0, -len(row) :].float().log_softmax(-1)

    model.eval()
    alone, after, after_other = log_probs(row), log_probs(first, row), log_probs(other, row)
    spread = alone.std()
    moved, differs = ((after - one).abs().mean() / spread for one in (after_other, alone))
    return bool(moved < (1e-3 if short else 1e-4)) and bool(differs < (5e-2 if short else 1e-3))


@contextlib.contextmanager
def untouched(trainer: ArpoTrainer) -> Iterator[None]:
    """Put back, after the block, all that a step changes: random states, gradients, counts and metrics."""
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
    """Hold on the GPU what AdamW will allocate at the first step: two moments the size of each trained weight."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad and p.device.type == "cuda"]
    held = [torch.empty_like(p) for p in trained for _ in range(2)]
    yield
    held.clear()
