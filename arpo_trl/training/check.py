"""`--check`: what a run would train on and cost, before any weight is loaded."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import yaml
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel
from trl.trainer.sft_config import SFTConfig

from ..data.audit import token_lengths
from ..data.labels import IGNORED
from ..data.prepare import PreparedData, prepare_datasets
from ..data.tokenizer import load_tokenizer
from ..errors import RecipeError
from ..machine import folder_bytes, free_space, gpu_memory, missing_space
from ..model.memory import describe_memory, estimate_memory, model_shape
from ..model.sft_config import to_sft_config
from ..recipe.keys import Recipe
from ..recipe.rules import resolve
from ..report.console import say
from ..report.log_file import format_seconds, read_log
from ..run_folder import list_checkpoints
from .checkpoints import checkpoint_bytes, saved_bytes
from .requirements import check_device
from .rows_and_model import check_fit
from .start_and_end_report import describe_setup, describe_steps

BINS = 10
BAR = 40


def check(recipe: Recipe, verbose: bool = False) -> None:
    """Everything but training; printed to stdout: first what the run would do and cost, then the recipe.

    Args:
        recipe: As `check_environment` returns it.
        verbose: Print every key and a histogram of the rows' lengths, not only what differs from the defaults.

    Raises:
        RecipeError: what would stop the run before its first step: the device, rows, the disk's room. The weights and
            adapters themselves are not looked at.
    """
    check_device(recipe)
    args = to_sft_config(recipe)
    tokenizer = load_tokenizer(recipe)
    data = prepare_datasets(recipe, tokenizer)
    check_fit(recipe, args, data, tokenizer)
    lines, problem = _describe_run(recipe, args, data, verbose)
    untouched = resolve(Recipe(model_name_or_path="", output_dir="")).resolved()
    keys = {key: value for key, value in recipe.resolved().items() if verbose or value != untouched.get(key)}
    shown = yaml.safe_dump(keys, sort_keys=False, allow_unicode=True).splitlines()
    title = "every key" if verbose else "keys that differ from their defaults (all: --check -v)"
    for line in [*lines, "", f"recipe   {title}", *(f"  {line}" for line in shown), *recipe.notices]:
        say(line)
    if problem:
        raise problem


def _describe_run(
    recipe: Recipe, args: SFTConfig, data: PreparedData, verbose: bool
) -> tuple[list[str], RecipeError | None]:
    """A line for each thing that a user may have meant otherwise, and what the disk lacks."""
    rows, listed = describe_rows(data, verbose), [*data.notices, *data.listed()]
    if not recipe.do_train:
        return [*rows, *(f"         {line}" for line in listed)], None
    an_epoch, total = count_steps(args, count_rows(recipe, data))
    model = model_shape(recipe)
    saved = checkpoint_steps(args, an_epoch, total)
    needed, disk = describe_checkpoints(recipe, args, model, saved)
    steps = f"{'about ' * recipe.packing}{describe_steps(args, total, data, recipe.packing)}"
    lines = [
        *describe_setup(recipe, model, args),
        *rows,
        *(f"         {line}" for line in listed),
        f"steps    {steps}{'; the rows are read and counted as the run goes' * recipe.streaming}",
        f"time     {describe_time(recipe, args, data, total)}",
        f"disk     {disk}",
    ]
    rows_known = isinstance(data.train, Dataset) and len(data.train) > 0
    if rows_known and (memory := estimate_memory(recipe, args, model, data.train)):
        lines.insert(-1, f"memory   {describe_memory(memory, gpu_memory())}")
    if recipe.overwrite_output_dir and not recipe.resume_from_checkpoint:
        needed -= sum(folder_bytes(folder) for folder in list_checkpoints(Path(recipe.output_dir)))
    full = missing_space(Path(recipe.output_dir), needed, "the whole run")
    problem = f"{full}, or keep fewer checkpoints (save_total_limit)" if full else None
    return lines, recipe.error("output_dir", problem) if problem else None


def describe_rows(data: PreparedData, verbose: bool) -> list[str]:
    """What became of the rows of each dataset, and the lengths of those that are trained on."""
    lines = [f"data     {line}" for line in data.audit.lines()]
    if not isinstance(data.train, Dataset):
        return lines
    which, held_out = "a row", data.eval.get("validation")
    if held_out is not None:
        which = f"of the {len(data.train):,} rows trained on"
        lines += [f"         {len(held_out):,} of these rows are held out (val_size), {len(data.train):,} trained on"]
    if len(data.train):
        first, *histogram = describe_tokens(data.train)
        lines += [f"tokens   {which}: {first}", *(histogram if verbose else [])]
    return lines


def describe_time(recipe: Recipe, args: SFTConfig, data: PreparedData, steps: int) -> str:
    """How long all steps take at the speed of an earlier run in output_dir, if there was one."""
    log = read_log(Path(recipe.output_dir) / "trainer_log.jsonl")
    speeds = [line["tokens_per_second"] for line in log if line.get("tokens_per_second")]
    if not speeds or not isinstance(data.train, Dataset):
        return "not known yet; the run says it, after its longest batch was tried or with its first line of figures"
    a_step = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    tokens = steps * a_step * (recipe.cutoff_len if recipe.packing else float(token_lengths(data.train).mean()))
    speed = statistics.median(speeds)
    return f"about {format_seconds(tokens / speed)}, at the {speed:,.0f} tokens/s of the earlier run in {recipe.output_dir}"


def count_rows(recipe: Recipe, data: PreparedData) -> int:
    """Rows that the trainer sees in an epoch: as packed, an estimate; as streamed, none that are known."""
    if not isinstance(data.train, Dataset):
        return 0
    if recipe.packing:
        return math.ceil(int(token_lengths(data.train).sum()) / recipe.cutoff_len)
    return len(data.train)


def describe_tokens(rows: Dataset) -> list[str]:
    """Tokens a row: mean, percentiles and the share that carries loss; then a histogram, a line a bar."""
    lengths = token_lengths(rows)
    labels = (batch["labels"] for batch in rows.with_format("arrow").iter(1000))
    trained = sum(int((pc.list_flatten(column).to_numpy() != IGNORED).sum()) for column in labels)
    tokens = int(lengths.sum())
    p50, p95 = np.percentile(lengths, (50, 95))
    lines = [
        f"mean {lengths.mean():,.0f}, p50 {p50:,.0f}, p95 {p95:,.0f}, max {lengths.max():,}; "
        f"{trained:,} of {tokens:,} carry loss ({trained / tokens:.1%})"
    ]
    bars, edges = np.histogram(lengths, bins=min(BINS, int(np.ptp(lengths)) + 1))
    width = len(f"{lengths.max():,}")
    for rows, low, high in zip(bars, edges, edges[1:]):
        bar = "#" * math.ceil(BAR * rows / bars.max())
        last = int(high) if high == edges[-1] else math.ceil(high) - 1
        lines.append(f"         {math.ceil(low):>{width},} to {last:>{width},}  {bar} {rows:,}")
    return lines


def count_steps(args: SFTConfig, rows: int) -> tuple[int, int]:
    """Updates an epoch and in total, as transformers' Trainer counts them."""
    batches = rows / (args.per_device_train_batch_size * args.world_size)
    batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
    an_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return an_epoch, args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * an_epoch)


def checkpoint_steps(args: SFTConfig, an_epoch: int, total: int) -> list[int]:
    """The steps after which a checkpoint is written; with save_strategy: steps the last step is always one."""
    if args.save_strategy == "no":
        return []
    best = args.save_strategy == "best"  # at most after each evaluation
    strategy, steps = (args.eval_strategy, args.eval_steps) if best else (args.save_strategy, args.save_steps)
    every = an_epoch if strategy == "epoch" or not steps else steps
    every = math.ceil(every * total) if every < 1 else int(every)
    return sorted({*range(every, total + 1, every), total})


def describe_checkpoints(
    recipe: Recipe, args: SFTConfig, model: PreTrainedModel | PeftModel, saved: Sequence[int]
) -> tuple[int, str]:
    """Bytes that the run will leave on disk, from the model's shape alone, and the words that say so."""
    checkpoint = checkpoint_bytes(model, args)
    kept = min(len(saved), args.save_total_limit or len(saved))
    at_once = min(len(saved), kept + 1)  # the oldest goes once the newest is whole
    needed = at_once * checkpoint + saved_bytes(model)
    steps = ", ".join(f"{step:,}" for step in (saved if len(saved) < 9 else [*saved[:4], *saved[-1:]]))
    written = f"{len(saved)} checkpoint{'s' * (len(saved) != 1)} of {checkpoint / 1e9:.2f} GB"
    return needed, (
        f"{written}{f' (after step {steps})' if saved else ''}, {kept} kept; "
        f"{needed / 1e9:.2f} GB in all, {free_space(Path(recipe.output_dir)) / 1e9:.2f} GB free"
    )
