"""What is seen of a run while it goes: trainer_log.jsonl, the loss plot, the progress lines; and how it is stopped."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import TrainerCallback

if TYPE_CHECKING:
    from .trainer import ArpoTrainer


class TrainerLog(TrainerCallback):
    """Appends a line to trainer_log.jsonl at each log, under LLaMA-Factory's names, and shows it.

    Times are in seconds of this run over all its sessions; `*_per_second` is of the steps since the last line.
    """

    def __init__(self, trainer: ArpoTrainer, path: Path, plot: bool) -> None:
        self.trainer, self.path, self.plot = trainer, path, plot
        self.bar: tqdm[Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        earlier = [line for line in read_log(self.path) if line["current_steps"] <= state.global_step]
        self._elapsed_before = next((line["elapsed_seconds"] for line in reversed(earlier)), 0.0)
        self._began = self._last_time = time.monotonic()
        self._last_seen, self._last_trained = self.trainer._total_train_tokens, self.trainer.trained_tokens
        self._first_step = state.global_step
        if not state.is_world_process_zero:
            return
        # Lines after the checkpoint belong to steps that are about to be taken again.
        self.path.write_text("".join(json.dumps(line) + "\n" for line in earlier), encoding="utf-8")
        if sys.stdout.isatty():
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or not ("loss" in logs or "eval_loss" in logs):
            return
        now = time.monotonic()
        elapsed = self._elapsed_before + now - self._began
        steps = max(state.global_step - self._first_step, 1)
        remaining = (now - self._began) / steps * (state.max_steps - state.global_step)
        line: dict[str, Any] = {
            "current_steps": state.global_step,
            "total_steps": state.max_steps,
            "epoch": round(state.epoch, 4),
            "percentage": round(100 * state.global_step / max(state.max_steps, 1), 2),
            "elapsed_time": format_seconds(elapsed),
            "remaining_time": format_seconds(remaining),
            "elapsed_seconds": round(elapsed, 3),
        }
        if "loss" in logs:
            seen, trained = self.trainer._total_train_tokens, self.trainer.trained_tokens
            took = max(now - self._last_time, 1e-9)
            line |= {
                "loss": logs["loss"],
                "lr": logs["learning_rate"],
                "grad_norm": logs.get("grad_norm"),
                "mean_token_accuracy": logs.get("mean_token_accuracy"),
                "entropy": logs.get("entropy"),
                "seen_tokens": int(seen),
                "trained_tokens": trained,
                "tokens_per_second": round((seen - self._last_seen) / took, 1),
                "trained_tokens_per_second": round((trained - self._last_trained) / took, 1),
                "peak_memory_gb": round(peak_memory() / 1e9, 3),
            }
            self._last_time, self._last_seen, self._last_trained = now, seen, trained
        line |= {k: v for k, v in logs.items() if k.startswith("eval_")}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._show(line)

    def _show(self, line: dict[str, Any]) -> None:
        if "loss" in line:
            figures = f"loss {line['loss']:.4f}  lr {line['lr']:.2e}  {line['tokens_per_second']:,.0f} tokens/s"
        else:
            figures = "  ".join(f"{k} {v:.4f}" for k, v in line.items() if k.endswith("_loss"))
        if self.bar:
            self.bar.set_postfix_str(figures, refresh=False)
        else:
            of = f"step {line['current_steps']}/{line['total_steps']}"
            print(f"{of}  {figures}  {line['elapsed_time']} < {line['remaining_time']}", flush=True)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.plot and state.is_world_process_zero:
            plot_loss(self.path, self.path.with_name("training_loss.png"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar:
            self.bar.close()


class StopOnSignal(TrainerCallback):
    """SIGTERM and the first Ctrl-C let the step finish, save a checkpoint and stop; the second Ctrl-C stops at once.

    `signum` is the signal that stops the run, or None. With several processes the step at which they stop is agreed
    on, so that no process waits for another's collective.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Not earlier: before the first step there is nothing to save, and a signal may stop the process at once.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signum is None:  # the SIGTERM of a dying launcher may follow the Ctrl-C that killed it
            self.signum = number

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1:
            signum = torch.tensor(self.signum or 0, device=args.device)
            torch.distributed.all_reduce(signum, op=torch.distributed.ReduceOp.MAX)
            self.signum = int(signum) or None
        if self.signum is not None and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True


# --- the log as data ---


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a trainer_log.jsonl; a last line that a kill cut off is left out."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
    return lines


def format_seconds(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"


def peak_memory() -> int:
    """Bytes at the peak so far: of the GPU's allocator, or of the process where there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def plot_loss(log: Path, picture: Path) -> None:
    """Draw the loss of a trainer_log.jsonl, raw and smoothed, with eval points, learning rate and checkpoints."""
    lines = read_log(log)
    train = [(line["current_steps"], line["loss"], line["lr"]) for line in lines if "loss" in line]
    if not train:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only a run that plots needs it
    from matplotlib.figure import Figure

    steps, losses, rates = zip(*train, strict=True)
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="loss", title=log.parent.name)
    rate_axes = axes.twinx()
    rate_axes.plot(steps, rates, color="tab:green", linewidth=1, alpha=0.6, label="learning rate")
    rate_axes.set_ylabel("learning rate", color="tab:green")
    axes.plot(steps, losses, color="tab:blue", linewidth=1, alpha=0.35, label="loss")
    axes.plot(steps, smooth(losses), color="tab:blue", linewidth=2, label="loss, smoothed")
    evals = [(line["current_steps"], line["eval_loss"]) for line in lines if "eval_loss" in line]
    if evals:
        axes.plot(*zip(*evals, strict=True), "o-", color="tab:orange", label="eval loss")
    saved = [int(p.name.rsplit("-", 1)[1]) for p in log.parent.glob("checkpoint-*")]
    for i, step in enumerate(sorted(saved)):
        axes.axvline(step, color="grey", linewidth=0.8, linestyle=":", label="checkpoint" if i == 0 else None)
    handles, labels = axes.get_legend_handles_labels()
    more_handles, more_labels = rate_axes.get_legend_handles_labels()
    axes.legend(handles + more_handles, labels + more_labels, loc="upper right")
    axes.set_zorder(rate_axes.get_zorder() + 1)
    axes.patch.set_visible(False)
    figure.savefig(picture)


def smooth(values: tuple[float, ...]) -> list[float]:
    """Exponential moving average over about a twentieth of the values, corrected for its start as Adam's is."""
    weight = 1 - 1 / max(len(values) / 20, 1)
    average, result = 0.0, []
    for i, value in enumerate(values, 1):
        average = weight * average + (1 - weight) * value
        result.append(average / (1 - weight**i))
    return result
