"""trainer_log.jsonl, the loss plot and the progress lines, written during the run."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..report.console import log_only, say, start_bar
from ..report.log_file import (
    LogLine,
    describe_evaluation,
    describe_predictions,
    format_seconds,
    lines_until,
    read_log,
    run_seconds,
)
from ..report.loss_plot import plot_run
from ..run_folder import write_text

RENAMED = {"learning_rate", "num_tokens"}  # lr and seen_tokens


def remove_progress_bar(trainer: Trainer) -> None:
    """Remove transformers' progress bar."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)


class TrainerLog(TrainerCallback):
    """Appends a line to trainer_log.jsonl at each log, with LLaMA-Factory's names, and prints it.

    Elapsed times cover all sessions of the run; `*_per_second` covers the steps since the last line, with saves and
    without evaluations. A line that can't be written is written with the next one.
    """

    def __init__(self, path: Path, plot: bool) -> None:
        self.path, self.plot = path, plot
        self.bar: tqdm | None = None
        self._first_step_began: float | None = None
        self._evaluated, self._shown, self._unwritten = 0, "", ""

    def on_train_begin(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        earlier = lines_until(read_log(self.path), state)
        self._elapsed_before = run_seconds(earlier)
        self._began = time.monotonic()
        self._first_step = state.global_step
        if state.is_world_process_zero:
            # Lines after the checkpoint belong to steps that will be repeated.
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in earlier))

    def on_step_begin(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if self._first_step_began is not None:
            return
        self._first_step_began = time.monotonic()
        if state.is_world_process_zero:  # not in on_train_begin, where lines are printed and batches run
            self.bar = start_bar(total=state.max_steps, initial=state.global_step)

    def on_step_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if self.bar:
            self.bar.update(state.global_step - self.bar.n)

    def on_prediction_step(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if self.bar:
            self._evaluated += 1
            self.bar.set_postfix_str(f"evaluating, batch {self._evaluated}", refresh=False)
            self.bar.update(0)

    def on_evaluate(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        self._evaluated = 0
        if self.bar:
            self.bar.set_postfix_str(self._shown, refresh=False)

    def on_log(self, args: object, state: TrainerState, control: object, **kwargs: Any) -> None:
        logs: LogLine = kwargs["logs"]
        has_evaluation = any(name.startswith("eval_") for name in logs)
        if not state.is_world_process_zero or not ("loss" in logs or has_evaluation):
            return
        now = time.monotonic()
        elapsed = self._elapsed_before + now - self._began
        steps = state.global_step - self._first_step
        seconds = now - (self._first_step_began or now)
        remaining = seconds / steps * (state.max_steps - state.global_step) if steps else 0.0
        line: LogLine = {
            "current_steps": state.global_step,
            "total_steps": state.max_steps,
            "epoch": round(state.epoch or 0, 4),
            "percentage": round(100 * state.global_step / max(state.max_steps, 1), 2),
            "elapsed_time": format_seconds(elapsed),
            "remaining_time": format_seconds(remaining),
            "elapsed_seconds": round(elapsed, 3),
        }
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
            say(f"{self.path} could not be written ({error}); the line is written with the next one")

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
        if line["current_steps"] > self._first_step:  # unknown before; LLaMA-Factory logs 0
            text += f" < {line['remaining_time']}"
        if self.bar and not self.bar.disable and "loss" in line:
            self._shown = figures
            self.bar.set_postfix_str(figures, refresh=False)
            log_only(text)
        else:
            say(text)

    def on_save(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if self.plot and state.is_world_process_zero:
            with contextlib.suppress(OSError):  # the checkpoint reports a full disk
                plot_run(read_log(self.path), self.path.parent)

    def on_train_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if self.bar:
            self.bar.close()
