"""`--check`: the data, memory, disk space and time of a run, without loading weights."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import yaml
from datasets import Dataset
from trl.trainer.sft_config import SFTConfig

from ..data.audit import token_lengths
from ..data.labels import IGNORED
from ..data.prepare import PreparedData
from ..machine import folder_bytes, format_bytes, free_space, gpu_memory, missing_space
from ..model.memory import describe_memory, estimate_memory, model_shape
from ..model.split import find_split
from ..model.weights import Model
from ..recipe.keys import Recipe
from ..recipe.rules import changed_keys
from ..report.console import say
from ..report.log_file import format_seconds
from ..report.manifest import DECIDE_SPEED, read_manifest
from ..run_folder import list_checkpoints, read_lines
from .checkpoints import checkpoint_bytes, saved_bytes
from .setup import check_after_torch, load_rows
from .start_and_end_report import (
    checkpoint_steps,
    describe_setup,
    describe_steps,
    warn_of_disk,
    warn_of_schedule,
)

BINS = 10
BAR = 40


def check(recipe: Recipe, verbose: bool = False) -> None:
    """Print what the run would do and cost, then the recipe.

    With `verbose`, all keys, not only those that differ from their defaults, and a histogram of the rows' lengths.

    Raises:
        RecipeError: an error that would stop the run before its first step, in the device, the rows or the disk space.
            Weights are not checked.
    """
    args = check_after_torch(recipe)
    data = load_rows(recipe, args)
    lines, needed = _describe_run(recipe, args, data, verbose)
    keys = recipe.resolved() if verbose else changed_keys(recipe.resolved())
    shown = yaml.safe_dump(keys, sort_keys=False, allow_unicode=True).splitlines()
    title = "every key" if verbose else "keys that differ from their defaults (all keys: --check -v)"
    say(*lines, "", f"recipe   {title}", *(f"  {line}" for line in shown), *recipe.notices)
    if full := missing_space(Path(recipe.output_dir), needed, "the whole run"):
        problem = f"{full}, or keep fewer checkpoints (save_total_limit, save_steps, max_steps)"
        raise recipe.error("output_dir", problem)


def _describe_run(recipe: Recipe, args: SFTConfig, data: PreparedData, verbose: bool) -> tuple[list[str], int]:
    """Return the lines of the run, and the bytes that it needs on the disk."""
    rows = describe_rows(data, verbose)
    rows += [f"         {line}" for line in [*data.notices, *data.list_changed_rows()]]
    if not recipe.do_train:
        return rows, 0
    per_epoch, total = count_steps(args, count_rows(recipe, data))
    model = model_shape(recipe)
    saved = checkpoint_steps(args, per_epoch, total)
    needed, disk = describe_checkpoints(recipe, args, model, saved)
    steps = f"{'about ' * recipe.packing}{describe_steps(args, total, data, recipe.packing)}"
    rows_known = isinstance(data.train, Dataset) and len(data.train) > 0
    memory = estimate_memory(recipe, args, model, data.train) if rows_known else None
    lines = [
        *describe_setup(recipe, model, args),
        *rows,
        f"steps    {steps}{'; the rows are read and counted during the run' * recipe.streaming}",
        *warn_of_schedule(args, total),
        f"time     {describe_time(recipe, args, data, total)}",
        *([f"memory   {describe_memory(memory, gpu_memory())}"] if memory else []),
        *disk,
    ]
    if recipe.overwrite_output_dir and not recipe.resume_from_checkpoint:
        needed -= sum(folder_bytes(folder) for folder in list_checkpoints(Path(recipe.output_dir)))
    return lines, needed


def describe_rows(data: PreparedData, verbose: bool) -> list[str]:
    """Return the outcome of the rows of each dataset, and the lengths of the training rows."""
    lines = [f"data     {line}" for line in data.audit.lines()]
    if not isinstance(data.train, Dataset):
        return lines
    unit = "pair" if "seq_lengths" in data.train.column_names else "row"
    prefix, held_out = f"per {unit}", data.eval.get("validation")
    if held_out is not None:
        prefix += f" of {len(data.train):,} training {unit}{'s' * (len(data.train) != 1)}"
        lines += [
            f"         {len(held_out):,} of these rows are held out (val_size), {len(data.train):,} are trained on"
        ]
    if len(data.train):
        first, *histogram = describe_tokens(data.train)
        lines += [f"tokens   {prefix}: {first}", *(histogram if verbose else [])]
    return lines


def describe_time(recipe: Recipe, args: SFTConfig, data: PreparedData, steps: int) -> str:
    """Return the time of all steps at the speed of an earlier run in output_dir, if it computed the same."""
    log = read_lines(Path(recipe.output_dir) / "trainer_log.jsonl")
    speeds = [line["tokens_per_second"] for line in log if line.get("tokens_per_second")]
    earlier, now = read_manifest(Path(recipe.output_dir)), recipe.resolved()
    is_same = earlier is not None and all(earlier.recipe.get(key) == now.get(key) for key in DECIDE_SPEED)
    if not speeds or not is_same or not isinstance(data.train, Dataset):
        return "unknown; shown after the first steps"
    rows_per_step = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    tokens = steps * rows_per_step * (recipe.cutoff_len if recipe.packing else float(token_lengths(data.train).mean()))
    speed = statistics.median(speeds)
    return f"about {format_seconds(tokens / speed)}, at the {speed:,.0f} tokens/s of the earlier run in {recipe.output_dir}"


def count_rows(recipe: Recipe, data: PreparedData) -> int:
    """Return the trainer's rows per epoch: an estimate if packed, 0 if streamed."""
    if not isinstance(data.train, Dataset):
        return 0
    if recipe.packing:
        return math.ceil(int(token_lengths(data.train).sum()) / recipe.cutoff_len)
    return len(data.train)


def describe_tokens(rows: Dataset) -> list[str]:
    """Return tokens per row (mean, percentiles, share of trained ones), then a histogram, a line per bar."""
    lengths = token_lengths(rows)
    labels = (batch["labels"] for batch in rows.with_format("arrow").iter(1000))
    trained = sum(int((pc.list_flatten(column).to_numpy() != IGNORED).sum()) for column in labels)
    tokens = int(lengths.sum())
    p50, p95 = np.percentile(lengths, (50, 95))
    side = f" (longest side {max(map(max, rows['seq_lengths'])):,})" if "seq_lengths" in rows.column_names else ""
    lines = [
        f"mean {lengths.mean():,.0f}, p50 {p50:,.0f}, p95 {p95:,.0f}, max {lengths.max():,}{side}; "
        f"{trained:,} of {tokens:,} trained ({trained / tokens:.1%})"
    ]
    bars, edges = np.histogram(lengths, bins=min(BINS, int(np.ptp(lengths)) + 1))
    width = len(f"{lengths.max():,}")
    for rows, low, high in zip(bars, edges, edges[1:]):
        bar = "#" * math.ceil(BAR * rows / bars.max())
        last = int(high) if high == edges[-1] else math.ceil(high) - 1
        lines.append(f"         {math.ceil(low):>{width},} to {last:>{width},}  {bar} {rows:,}")
    return lines


def count_steps(args: SFTConfig, rows: int) -> tuple[int, int]:
    """Return the steps per epoch and in total, as transformers' Trainer counts them."""
    batches = rows / (args.per_device_train_batch_size * args.world_size)
    batches = int(batches) if args.dataloader_drop_last else math.ceil(batches)
    per_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return per_epoch, args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * per_epoch)


def describe_checkpoints(recipe: Recipe, args: SFTConfig, model: Model, saved: Sequence[int]) -> tuple[int, list[str]]:
    """Return the bytes that the run writes, computed from the model's shape, and lines that describe them."""
    folder = Path(recipe.output_dir)
    checkpoint = checkpoint_bytes(model, args, find_split(recipe))
    kept = min(len(saved), args.save_total_limit or len(saved))
    at_once = min(len(saved), kept + 1)  # the oldest is deleted once the newest is complete
    needed = at_once * checkpoint + saved_bytes(model)
    steps = ", ".join(f"{step:,}" for step in (saved if len(saved) < 9 else [*saved[:4], *saved[-1:]]))
    plural = "s" * (len(saved) != 1)
    count = f"{len(saved)} checkpoint{plural} of {format_bytes(checkpoint)}"
    written = f"{count}{f' (after step{plural} {steps})' if saved else ''}, {kept} kept; {format_bytes(needed)} in all"
    line = f"disk     {written}, {format_bytes(free_space(folder))} free"
    return needed, [line, *warn_of_disk(folder, args.save_total_limit, checkpoint, len(saved))]
