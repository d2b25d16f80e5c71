"""`--check`: what a run would train on and cost, before any weight is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
import yaml
from accelerate import PartialState
from datasets import Dataset
from rich.console import Console
from transformers import AutoModelForCausalLM
from trl.trainer.sft_config import SFTConfig

from ..data.labels import IGNORED
from ..data.prepare import PreparedData, prepare_datasets, token_lengths
from ..data.tokenizer import load_tokenizer
from ..machine import checkpoint_bytes, folder_bytes, free_space, missing_space, saved_bytes
from ..recipe.keys import Recipe
from ..report.figures import describe_model
from ..run_folder import list_checkpoints
from .model import freeze, new_adapter
from .requirements import check_environment
from .resume import refuse_output_dir
from .sft_config import load_model_config, model_init_kwargs, to_sft_config

BINS = 10
BAR = 40


def check(recipe: Recipe) -> None:
    """Everything but training; printed to stdout.

    Raises:
        RecipeError: what would stop the run before its first step: keys, packages, the output folder, rows, the
            disk's room. The weights and adapters themselves are not looked at.
    """
    check_environment(recipe)
    args = to_sft_config(recipe)
    if recipe.do_train:
        refuse_output_dir(recipe)
    console = Console(highlight=False, soft_wrap=True, quiet=not PartialState().is_main_process)
    console.rule("recipe")
    console.print(yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True).rstrip(), markup=False)
    for notice in recipe.notices:
        console.print(notice, markup=False)
    data = prepare_datasets(recipe, load_tokenizer(recipe))
    console.rule("rows")
    for line in data.listed():
        console.print(line, markup=False)
    for line in [*data.audit.lines(), *(describe_tokens(data.train) if isinstance(data.train, Dataset) else [])]:
        console.print(line, markup=False)
    if not recipe.do_train:
        return
    console.rule("run")
    an_epoch, total = count_steps(args, count_rows(recipe, data))
    if recipe.streaming:
        console.print(f"{total:,} steps in total; the rows are read and counted as the run goes")
    else:
        console.print(f"{'about ' * recipe.packing}{an_epoch:,} steps an epoch, {total:,} in total")
    needed, lines = describe_checkpoints(recipe, args, checkpoint_steps(args, an_epoch, total))
    for line in lines:
        console.print(line, markup=False)
    if recipe.overwrite_output_dir and not recipe.resume_from_checkpoint:
        needed -= sum(folder_bytes(folder) for folder in list_checkpoints(Path(recipe.output_dir)))
    if full := missing_space(Path(recipe.output_dir), needed, "the whole run"):
        raise recipe.error("output_dir", full)


def count_rows(recipe: Recipe, data: PreparedData) -> int:
    """Rows that the trainer sees in an epoch: as packed, an estimate; as streamed, none that are known."""
    if not isinstance(data.train, Dataset):
        return 0
    if recipe.packing:
        return math.ceil(int(token_lengths(data.train).sum()) / recipe.cutoff_len)
    return len(data.train)


def describe_tokens(rows: Dataset) -> list[str]:
    """Tokens a row: mean, percentiles and a histogram; and the share that carries loss."""
    lengths = token_lengths(rows)
    if not len(lengths):
        return []
    labels = (batch["labels"] for batch in rows.with_format("arrow").iter(1000))
    trained = sum(int((pc.list_flatten(column).to_numpy() != IGNORED).sum()) for column in labels)
    tokens = int(lengths.sum())
    p50, p95 = np.percentile(lengths, (50, 95))
    lines = [
        f"tokens a row: mean {lengths.mean():,.0f}, p50 {p50:,.0f}, p95 {p95:,.0f}, max {lengths.max():,}",
        f"trained: {trained:,} of {tokens:,} tokens ({trained / tokens:.1%})",
    ]
    bars, edges = np.histogram(lengths, bins=min(BINS, int(np.ptp(lengths)) + 1))
    width = len(f"{lengths.max():,}")
    for rows, low, high in zip(bars, edges, edges[1:]):
        bar = "#" * math.ceil(BAR * rows / bars.max())
        last = int(high) if high == edges[-1] else math.ceil(high) - 1
        lines.append(f"  {math.ceil(low):>{width},} to {last:>{width},}  {bar} {rows:,}")
    return lines


def count_steps(args: SFTConfig, rows: int) -> tuple[int, int]:
    """Updates an epoch and in total, as transformers' Trainer counts them."""
    batches = math.ceil(rows / (args.per_device_train_batch_size * args.world_size))
    an_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return an_epoch, args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * an_epoch)


def checkpoint_steps(args: SFTConfig, an_epoch: int, total: int) -> list[int]:
    """The steps after which a checkpoint is written; with save_strategy: steps the last step is always one."""
    if args.save_strategy == "no":
        return []
    every = an_epoch if args.save_strategy == "epoch" else args.save_steps
    every = math.ceil(every * total) if every < 1 else int(every)
    return sorted({*range(every, total + 1, every), total})


def describe_checkpoints(recipe: Recipe, args: SFTConfig, saved: Sequence[int]) -> tuple[int, list[str]]:
    """Bytes that the run will leave on disk, from the model's shape alone, and the lines that say so."""
    model = _shape(recipe)
    checkpoint = checkpoint_bytes(model, args.save_only_model)
    kept = min(len(saved), args.save_total_limit or len(saved))
    at_once = min(len(saved), kept + 1)  # the oldest goes once the newest is whole
    needed = at_once * checkpoint + saved_bytes(model)
    steps = ", ".join(f"{step:,}" for step in (saved if len(saved) < 9 else [*saved[:4], *saved[-1:]]))
    return needed, [
        describe_model(model),
        f"{len(saved)} checkpoints at steps {steps or 'none'} of {checkpoint / 1e9:.2f} GB each, {kept} kept; "
        f"{needed / 1e9:.2f} GB in all, {free_space(Path(recipe.output_dir)) / 1e9:.2f} GB free",
    ]


def _shape(recipe: Recipe) -> Any:
    """The model on torch's meta device: shapes without weights."""
    kwargs = model_init_kwargs(recipe)
    try:
        config = load_model_config(recipe)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise recipe.error("model_name_or_path", f"{recipe.model_name_or_path}: no model there ({reason})") from None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=kwargs["trust_remote_code"])
        if recipe.finetuning_type == "full":
            return model.to(kwargs["dtype"])
        if recipe.finetuning_type == "lora":
            return new_adapter(recipe, model)
        freeze(recipe, model)
        return model
