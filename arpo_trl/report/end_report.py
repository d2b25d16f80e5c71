"""What the end of a run prints, and the command that goes on with a stopped one."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from transformers import TrainerState

from ..errors import program
from ..recipe.keys import COMMAND_LINE, Recipe
from .log_file import describe_evaluation, format_seconds, read_log, run_seconds


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
