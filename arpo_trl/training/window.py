"""The figures of a log line: sums over its steps and over all processes, and the speed of these steps."""

import time
from dataclasses import dataclass, field

import numpy as np
import torch
from datasets import Dataset
from transformers import Trainer
from trl.trainer.utils import compute_flops_per_token, compute_mfu, get_peak_flops

from ..data.audit import token_lengths
from ..machine import peak_memory


@dataclass
class Window:
    """Sums since the last log line, and token counts since the start of the run. Checkpoints contain them.

    Attributes:
        loss_sum: Sum of the losses of the updates since the last line.
        last_logged: Step of the last line.
        metrics: One value per micro-batch since the last line.
        seen_tokens: All tokens of the run so far, without padding.
        trained_tokens: The labelled ones among them.
        pairs: Number of pairs since the last line, with `stage: dpo`.
        pair_sums: Sums over these pairs.
    """

    loss_sum: float = 0.0
    last_logged: int = 0
    metrics: dict[str, list[float]] = field(default_factory=dict)
    seen_tokens: int = 0
    trained_tokens: int = 0
    pairs: int = 0
    pair_sums: dict[str, float] = field(default_factory=dict)

    def add_pairs(self, names: list[str], sums: list[float]) -> None:
        """Add the sums of a micro-batch: of each metric, of the loss, and the number of pairs."""
        *values, _, pairs = sums
        self.pairs += int(pairs)
        for name, value in zip(names, values, strict=True):
            self.pair_sums[name] = self.pair_sums.get(name, 0.0) + value

    def take(self, step: int) -> dict[str, float]:
        """Return the figures of the line at `step`, and start the next line."""
        figures = {"loss": self.loss_sum / max(step - self.last_logged, 1), "num_tokens": self.seen_tokens}
        figures |= {name: sum(values) / len(values) for name, values in self.metrics.items()}
        figures |= {name: value / max(self.pairs, 1) for name, value in self.pair_sums.items()}
        self.loss_sum, self.last_logged, self.metrics, self.pairs, self.pair_sums = 0.0, step, {}, 0, {}
        return figures


@dataclass
class Speed:
    """Tokens per second between two log lines. Saving counts, evaluation does not."""

    started: bool = False
    since: float = 0.0
    seen: int = 0
    trained: int = 0
    mfu_per_token: float | None = None

    def start(self, window: Window, mfu_per_token: float | None) -> None:
        """Start the clock, at the first step of the session."""
        self.started, self.since, self.mfu_per_token = True, time.monotonic(), mfu_per_token
        self.seen, self.trained = window.seen_tokens, window.trained_tokens

    def leave_out(self, seconds: float) -> None:
        """Don't count `seconds` of the current line, which were spent on an evaluation."""
        self.since += seconds

    def take(self, window: Window) -> dict[str, float]:
        """Return the figures of a line in trainer_log.jsonl, and start the next line."""
        now, seen, trained = time.monotonic(), window.seen_tokens, window.trained_tokens
        seconds = max(now - self.since, 1e-9)
        speed = (seen - self.seen) / seconds
        figures = {
            "seen_tokens": seen,
            "trained_tokens": trained,
            "tokens_per_second": round(speed, 1),
            "trained_tokens_per_second": round((trained - self.trained) / seconds, 1),
            "peak_memory_gb": round(peak_memory() / 1e9, 3),
        }
        if self.mfu_per_token:
            figures["mfu"] = round(speed * self.mfu_per_token, 2)
        self.since, self.seen, self.trained = now, seen, trained
        return figures


def mfu_per_token(trainer: Trainer) -> float | None:
    """Return the model FLOPs utilization, in percent, of one token per second; None if the device's peak is unknown.

    As in PaLM (https://arxiv.org/abs/2204.02311, appendix B): recomputed activations don't count, attention counts in
    full. Frozen weights have no weight gradient, which is a third of the work.
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
    """Return the length of the row that an average token is in, which sets attention's cost: sum(n * n) / sum(n)."""
    if "seq_lengths" in dataset.column_names:  # packed: several conversations per row
        n = np.concatenate([np.empty(0, np.int64), *(np.asarray(row, np.int64) for row in dataset["seq_lengths"])])
    else:
        n = token_lengths(dataset)
    return max(round(int((n * n).sum()) / max(int(n.sum()), 1)), 1)
