"""What a run says of itself before its first step, and writes beside its weights: run.json and recipe.yaml."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data.prepare import PreparedData
from ..errors import program
from ..machine import free_space
from ..recipe.keys import COMMAND_LINE, Recipe
from .console import say
from .figures import describe_evaluation, describe_model, format_seconds, precision
from .log_file import read_log, run_seconds

if TYPE_CHECKING:
    from ..run.trainer import ArpoTrainer


RECIPE_MARK = "# the recipe of this run with every key, written by arpo_trl\n"


class StartReport(TrainerCallback):
    """Prints what is about to happen, a line for each thing that a user may have meant otherwise."""

    def __init__(self, recipe: Recipe, data: PreparedData, trainer: ArpoTrainer, checkpoint: Path | None) -> None:
        self.recipe, self.data, self.trainer, self.checkpoint = recipe, data, trainer, checkpoint

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, data, going_on = self.trainer.accelerator.unwrap_model(self.trainer.model), self.data, self.checkpoint
        for line in [
            f"model    {self.recipe.model_name_or_path}: {describe_model(model)}, {precision(model, args)}",
            f"device   {describe_device(args)}",
            *missing_gpu(self.recipe),
            *(f"data     {line}" for line in [*data.audit.lines(), *data.notices]),
            *(f"         {name}: {len(rows):,} rows to evaluate on" for name, rows in data.eval.items()),
            f"steps    {describe_steps(args, state.max_steps, data, self.recipe.packing)}",
            f"disk     {describe_disk(args, self.trainer.save_total_limit, self.trainer.checkpoint_bytes)}",
            f"output   {args.output_dir}{f', going on from {going_on.name}' if going_on else ''}",
        ]:
            say(line)


def end_report(
    recipe: Recipe, state: TrainerState, trained: dict[str, float], evaluated: dict[str, float]
) -> list[str]:
    """What came out, and where it lies."""
    lines = []
    if state.global_step < state.max_steps:
        lines.append(f"stopped early at step {state.global_step}: {recipe.early_stopping_steps} evaluations no better")
    if recipe.load_best_model_at_end and state.best_global_step:
        lines.append(f"best     step {state.best_global_step}, whose weights are the final model")
    figures = [f"train loss {trained['train_loss']:.4f}", *describe_evaluation(evaluated)]
    output_dir = Path(recipe.output_dir)
    log = read_log(output_dir / "trainer_log.jsonl")
    seconds = max(trained["train_runtime"], run_seconds(log))
    lines.append(f"done     in {format_seconds(seconds)}: {', '.join(figures)}")
    seen = [name for name in ("README.md", "trainer_log.jsonl", "training_loss.png") if (output_dir / name).exists()]
    return [*lines, f"model    {recipe.output_dir} (see {', '.join(seen)})"]


def describe_device(args: TrainingArguments) -> str:
    """The kind of device, and how many share the work."""
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
    if args.device.type == "cpu":
        name += f", {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    visible = torch.cuda.device_count() if args.device.type == "cuda" else 1
    if args.world_size == 1 and visible > 1:
        return f"{name}, 1 of {visible} (accelerate launch --config_file accelerate_configs/multi_gpu.yaml takes all)"
    return name if args.world_size == 1 else f"{args.world_size} x {name}"


def missing_gpu(recipe: Recipe) -> list[str]:
    """A line where the recipe or the launcher's config expects a GPU, and torch sees none."""
    keys = [key for key in ("bf16", "fp16", "pure_bf16") if getattr(recipe, key)]
    by_config = os.environ.get("ACCELERATE_USE_CPU", "true").lower() == "false"
    if torch.accelerator.is_available() or not (keys or by_config):
        return []
    expects = f"{keys[0]}: true" if keys else "the accelerate config"
    if torch.version.cuda or torch.version.hip:
        cause = f"torch {torch.__version__} is built for one; does `nvidia-smi` (AMD: `rocm-smi`) list it?"
    else:
        cause = (
            f"torch {torch.__version__} is a CPU build, as pip's own on Windows always is; "
            "https://pytorch.org/get-started/locally has the command that installs yours"
        )
    return [f"         trains on the CPU, though {expects} expects a GPU: {cause}"]


def describe_steps(args: TrainingArguments, total: int, data: PreparedData, packing: bool) -> str:
    """Steps, epochs and the effective batch. Packed rows are not the rows of the audit: their tokens are left out."""
    steps = f"{total:,}"
    if args.max_steps <= 0:
        steps += f": {args.num_train_epochs:g} epoch{'s' * (args.num_train_epochs != 1)}"
    parts = [
        (args.per_device_train_batch_size, "a device"),
        (args.world_size, "devices"),
        (args.gradient_accumulation_steps, "accumulated"),
    ]
    rows = math.prod(n for n, _ in parts)
    batch = f"{rows:,} row{'s' * (rows > 1)} a step"
    if sum(n > 1 for n, _ in parts) > 1:
        batch += f" ({' x '.join(f'{n} {what}' for n, what in parts if n > 1)})"
    counts = [data.audit.datasets[name] for name in dict.fromkeys(data.trained_on)]
    kept = sum(c.rows - c.dropped for c in counts)
    if kept and not packing:
        batch += f", about {rows * sum(c.tokens for c in counts) / kept:,.0f} tokens"
    return f"{steps}, {batch}"


def describe_disk(args: TrainingArguments, save_total_limit: int | None, checkpoint_bytes: int) -> str:
    """The bytes of a checkpoint, how many are kept, and the bytes free."""
    if args.save_strategy == "no":
        saved = "no checkpoints"
    else:
        kept = f"{save_total_limit} kept" if save_total_limit else "all kept"
        saved = f"{checkpoint_bytes / 1e9:.2f} GB a checkpoint, {kept}"
    return f"{saved}; {free_space(Path(str(args.output_dir))) / 1e9:,.1f} GB free"


def recipe_text(recipe: Recipe) -> str:
    """The recipe as resolved, in YAML, so that the output folder alone tells how the model was made."""
    return RECIPE_MARK + yaml.safe_dump(json.loads(json.dumps(recipe.resolved())), sort_keys=False, allow_unicode=True)


def resume_command(recipe: Recipe) -> str:
    """The command that goes on with this run. A launcher's own flags are not known here."""
    more = ["resume_from_checkpoint=true"] if recipe.overwrite_output_dir or recipe.resume_from_checkpoint else []
    if "WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:
        return " ".join(["the same command", *(f"with {override}" for override in more)])
    given = [a for a in sys.argv[1:] if not a.startswith(("resume_from_checkpoint=", "--resume_from_checkpoint="))]
    if recipe.path != COMMAND_LINE:
        given = [recipe.path.as_posix(), *(a for a in given if a != str(recipe.path))]
    words = [*program().split(), *given, *more]  # of two values of a key, the last one wins
    # cmd.exe knows no single quotes; in Git Bash a path needs slashes.
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)
