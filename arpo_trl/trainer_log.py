"""trainer_log.jsonl as data: its lines, what can be computed from them, and how figures are written for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


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


def mean_loss(lines: list[dict[str, Any]], steps: int) -> float | None:
    """The mean over all steps of a run; None when the log does not reach the last one. A line's loss is the mean since
    the line before."""
    total, last = 0.0, 0
    for line in lines:
        if "loss" in line:
            total += line["loss"] * (line["current_steps"] - last)
            last = line["current_steps"]
    return total / steps if last == steps else None


def describe_evaluation(metrics: dict[str, Any]) -> list[str]:
    """The loss and perplexity of each dataset, among metrics or in a line of the log."""
    words = []
    for name, value in metrics.items():
        if name.startswith("eval_") and name.endswith(("_loss", "_perplexity")):
            words.append(
                f"{name.replace('_', ' ')} {value:.4f}" if name.endswith("_loss") else f"perplexity {value:.2f}"
            )
    return words


def format_seconds(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"
