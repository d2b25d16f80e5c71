"""trainer_log.jsonl, the loss plot and the progress lines, written during the run."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils.logging import disable_progress_bar

from ..data.audit import token_lengths
from ..report.console import log_only, say
from ..report.log_file import (
    LogLine,
    describe_evaluation,
    describe_predictions,
    format_seconds,
    lines_until,
    run_seconds,
)
from ..report.loss_plot import plot_run
from ..run_folder import read_lines, write_text
from ..terminal import RUN_BAR, start_bar
from .trainer import ArpoTrainer

RENAMED = {"learning_rate", "num_tokens"}  # lr and seen_tokens


def remove_progress_bar(trainer: Trainer) -> None:
    """Remove transformers' progress bar."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)


def count_tokens_of_run(trainer: ArpoTrainer) -> int:
    """Return the tokens of all steps, about; 0 for a stream."""
    args, rows = trainer.args, trainer.train_dataset
    if not isinstance(rows, Dataset):
        return 0
    epochs = args.num_train_epochs
    if args.max_steps > 0:
        per_step = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
        epochs = args.max_steps * per_step / len(rows)
    return int(token_lengths(rows).sum() * epochs)


class TrainerLog(TrainerCallback):
    """Appends a line to trainer_log.jsonl at each log, with LLaMA-Factory's names, and prints it.

    Elapsed times cover all sessions of the run; `*_per_second` covers the steps since the last line, with saves and
    without evaluations. A line that can't be written is written with the next one.
    """

    def __init__(self, path: Path, plot: bool, trainer: ArpoTrainer) -> None:
        self.path, self.plot, self.trainer = path, plot, trainer
        self.bar: tqdm | None = None
        self._began = self._elapsed_before = 0.0
        self._since: tuple[float, int, int] | None = None
        self._total, self._unwritten = 0, ""

    def on_train_begin(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        earlier = lines_until(read_lines(self.path), state)
        self._elapsed_before = run_seconds(earlier)
        self._began = time.monotonic()
        self._total = count_tokens_of_run(self.trainer)
        if state.is_world_process_zero:
            # Lines after the checkpoint belong to steps that will be repeated.
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in earlier))
            disable_progress_bar()  # transformers' "Writing model shards" would be drawn across ours

    def on_step_begin(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if self.bar is None and state.is_world_process_zero:  # not in on_train_begin, where lines are printed
            self.bar = start_bar(total=state.max_steps, initial=state.global_step)

    def on_step_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        seconds = self._remaining_seconds(state)
        if self.bar:
            remaining = "?" if seconds is None else tqdm.format_interval(seconds)
            self.bar.bar_format = RUN_BAR.replace("{remaining}", remaining)
            self.bar.update(state.global_step - self.bar.n)
        if self._since is None:  # the first step of a session is slower than the others
            self._since = self._now(state)

    def _now(self, state: TrainerState) -> tuple[float, int, int]:
        """Return the time, the step, and the tokens of the run so far."""
        return time.monotonic(), state.global_step, self.trainer.window.seen_tokens

    def _remaining_seconds(self, state: TrainerState) -> float | None:
        """Return the time of the remaining tokens at the session's speed; None in the session's first two steps.

        Tokens, because rows of similar length may come together (`group_by_length`). A stream's are unknown: there it is
        the time of the remaining steps.
        """
        if self._since is None:
            return None
        seconds, steps, tokens = (now - since for now, since in zip(self._now(state), self._since))
        if steps < 2:
            return None
        if self._total:
            return seconds / tokens * max(self._total - self.trainer.window.seen_tokens, 0)
        return seconds / steps * (state.max_steps - state.global_step)

    def on_log(self, args: object, state: TrainerState, control: object, **kwargs: Any) -> None:
        logs: LogLine = kwargs["logs"]
        has_evaluation = any(name.startswith("eval_") for name in logs)
        if not state.is_world_process_zero or not ("loss" in logs or has_evaluation):
            return
        now = time.monotonic()
        elapsed = self._elapsed_before + now - self._began
        remaining = self._remaining_seconds(state)
        line: LogLine = {
            "current_steps": state.global_step,
            "total_steps": state.max_steps,
            "epoch": round(state.epoch or 0, 4),
            "percentage": round(100 * state.global_step / max(state.max_steps, 1), 2),
            "elapsed_time": format_seconds(elapsed),
            "elapsed_seconds": round(elapsed, 3),
        }
        if remaining is not None:
            line["remaining_time"] = format_seconds(remaining)
        if "loss" in logs:
            line |= {"loss": logs["loss"], "lr": logs["learning_rate"]}
            if "rewards/accuracies" in logs:
                line["accuracy"] = logs["rewards/accuracies"]  # LLaMA-Factory's name
        line |= {name: value for name, value in logs.items() if name not in {*line, *RENAMED}}
        self._write(json.dumps(line) + "\n")
        self._show(line)

    def _write(self, text: str) -> None:
        self._unwritten += text
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(self._unwritten)
            self._unwritten = ""
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)  # half a line
            say(
                f"can't write {self.path} ({error}); training continues, and the missing line is written with the next one"
            )

    def _show(self, line: LogLine) -> None:
        if "loss" in line:
            figures = f"loss {line['loss']:.4f}  lr {line['lr']:.2e}  {line['tokens_per_second']:,.0f} tokens/s"
            if "accuracy" in line:
                figures += f"  accuracy {line['accuracy']:.2f}  margin {line['rewards/margins']:.3f}"
            if "mfu" in line:
                figures += f"  MFU {line['mfu']:.0f} %"
        else:
            figures = "  ".join([*describe_evaluation(line), *describe_predictions(line)])
        text = f"step {line['current_steps']}/{line['total_steps']}  {figures}  {line['elapsed_time']}"
        if "remaining_time" in line:
            text += f" < {line['remaining_time']}"
        if self.bar and not self.bar.disable and "loss" in line:
            self.bar.set_postfix_str(figures, refresh=False)
            log_only(text)
        else:
            say(text)

    def on_save(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if self.plot and state.is_world_process_zero:
            with contextlib.suppress(OSError):  # the checkpoint reports a full disk
                plot_run(read_lines(self.path), self.path.parent)

    def on_train_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if self.bar:
            self.bar.close()
