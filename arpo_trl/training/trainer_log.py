"""trainer_log.jsonl, the loss plot and the progress lines: what is seen of a run while it goes, and read after it."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl.trainer.utils import compute_flops_per_token, compute_mfu, get_peak_flops

from ..data.audit import token_lengths
from ..machine import peak_memory
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
from ..report.loss_plot import plot_loss
from ..run_folder import write_text

if TYPE_CHECKING:
    from .trainer import ArpoTrainer


def remove_progress_bar(trainer: ArpoTrainer) -> None:
    """Remove transformers' progress bar."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)


class TrainerLog(TrainerCallback):
    """Appends a line to trainer_log.jsonl at each log, under LLaMA-Factory's names, and shows it.

    Times are in seconds of this run over all its sessions; `*_per_second` is of the steps since the last line, saving
    included, evaluation not. A line that cannot be written now is written with the next.
    """

    def __init__(self, trainer: ArpoTrainer, path: Path, plot: bool) -> None:
        self.trainer, self.path, self.plot = trainer, path, plot
        self.bar: tqdm | None = None
        self._evaluated, self._shown, self._unwritten = 0, "", ""
        self._eval_began = 0.0
        self._figures: dict[str, float] = {}
        trainer.take_figures = self.take_figures  # in the line before a callback sees it: trackers send them, too

    def on_train_begin(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        earlier = lines_until(read_log(self.path), state)
        self._elapsed_before = run_seconds(earlier)
        self._began = self._stepping_since = time.monotonic()
        self._first_step = state.global_step
        self._last_time = 0.0
        self._mfu_per_token = mfu_per_token(self.trainer)
        if state.is_world_process_zero:
            # Lines after the checkpoint belong to steps that are about to be taken again.
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in earlier))

    def on_step_begin(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if self._last_time:
            return
        # Not in on_train_begin: the other callbacks restore the counts there, and print lines.
        self._last_time = self._stepping_since = time.monotonic()
        self._last_seen, self._last_trained = self.trainer.window.seen_tokens, self.trainer.window.trained_tokens
        if state.is_world_process_zero:
            self.bar = start_bar(total=state.max_steps, initial=state.global_step)

    def on_step_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if self.bar:
            self.bar.update(state.global_step - self.bar.n)

    def on_prediction_step(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        self._eval_began = self._eval_began or time.monotonic()
        if self.bar:
            self._evaluated += 1
            self.bar.set_postfix_str(f"evaluating, batch {self._evaluated}", refresh=False)
            self.bar.update(0)

    def on_evaluate(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if self._eval_began and self._last_time:
            self._last_time += time.monotonic() - self._eval_began
        self._evaluated, self._eval_began = 0, 0.0
        if self.bar:
            self.bar.set_postfix_str(self._shown, refresh=False)

    def on_log(self, args: object, state: TrainerState, control: object, **kwargs: Any) -> None:
        logs: LogLine = kwargs["logs"]
        evaluated = {name: value for name, value in logs.items() if name.startswith("eval_")}
        if not state.is_world_process_zero or not ("loss" in logs or evaluated):
            return
        now = time.monotonic()
        elapsed = self._elapsed_before + now - self._began
        steps = state.global_step - self._first_step
        remaining = (now - self._stepping_since) / steps * (state.max_steps - state.global_step) if steps else 0.0
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
            line |= {key: logs.get(key) for key in ("grad_norm", "mean_token_accuracy", "entropy")}
            line |= self._figures
        line |= evaluated
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
            say(f"{self.path} could not be written ({error}); the run goes on, and writes the line with the next")

    def take_figures(self) -> dict[str, float]:
        """What a line has beside loss and learning rate, of the steps since the last line: once for each line."""
        now, seen, trained = time.monotonic(), self.trainer.window.seen_tokens, self.trainer.window.trained_tokens
        took = max(now - self._last_time, 1e-9)
        speed = (seen - self._last_seen) / took
        figures = {
            "seen_tokens": seen,
            "trained_tokens": trained,
            "tokens_per_second": round(speed, 1),
            "trained_tokens_per_second": round((trained - self._last_trained) / took, 1),
            "peak_memory_gb": round(peak_memory() / 1e9, 3),
        }
        if self._mfu_per_token:
            figures["mfu"] = round(speed * self._mfu_per_token, 2)
        self._last_time, self._last_seen, self._last_trained = now, seen, trained
        self._figures = figures
        return figures

    def _show(self, line: LogLine) -> None:
        if "loss" in line:
            figures = f"loss {line['loss']:.4f}  lr {line['lr']:.2e}  {line['tokens_per_second']:,.0f} tokens/s"
            if "mfu" in line:
                figures += f"  MFU {line['mfu']:.0f} %"
        else:
            figures = "  ".join([*describe_evaluation(line), *describe_predictions(line)])
        text = f"step {line['current_steps']}/{line['total_steps']}  {figures}  "
        text += str(line["elapsed_time"])
        if line["current_steps"] > self._first_step:  # before its first step nobody knows, and LLaMA-Factory logs 0
            text += f" < {line['remaining_time']}"
        if self.bar and not self.bar.disable and "loss" in line:
            self._shown = figures
            self.bar.set_postfix_str(figures, refresh=False)
            log_only(text)
        else:
            say(text)

    def on_save(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if self.plot and state.is_world_process_zero:
            with contextlib.suppress(OSError):  # a full disk is the checkpoint's to report
                plot_loss(read_log(self.path), self.path.with_name("training_loss.png"))

    def on_train_end(self, args: object, state: TrainerState, control: object, **kwargs: object) -> None:
        if self.bar:
            self.bar.close()


# --- figures ---


def mfu_per_token(trainer: ArpoTrainer) -> float | None:
    """Model FLOPs utilisation, in percent, of one token per second; None where the device's peak is not known.

    As in PaLM (https://arxiv.org/abs/2204.02311, appendix B): recomputed activations do not count, attention counts in
    full. Frozen weights under an adapter have no gradient of their own, a third of the work.
    """
    dtype = "bfloat16" if trainer.args.bf16 else "float16" if trainer.args.fp16 else None
    if trainer.args.device.type != "cuda" or dtype is None or not isinstance(trainer.train_dataset, Dataset):
        return None
    peak = get_peak_flops(torch.cuda.get_device_name(trainer.args.device), dtype)
    if peak is None:
        return None
    model = trainer.accelerator.unwrap_model(trainer.model)
    flops = compute_flops_per_token(model.config.get_text_config(), mean_context(trainer.train_dataset))
    if any(not p.requires_grad for p in model.parameters()):
        flops = flops * 2 // 3
    return float(compute_mfu(flops, 1.0, trainer.args.world_size, peak))


def mean_context(dataset: Dataset) -> int:
    """Tokens in the row of the average token, which is what attention costs: sum(n * n) / sum(n)."""
    if "seq_lengths" in dataset.column_names:  # packed: several conversations a row
        n = np.concatenate([np.empty(0, np.int64), *(np.asarray(row, np.int64) for row in dataset["seq_lengths"])])
    else:
        n = token_lengths(dataset)
    return max(round(int((n * n).sum()) / max(int(n.sum()), 1)), 1)
