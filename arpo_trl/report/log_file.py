"""trainer_log.jsonl as data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainerState


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a trainer_log.jsonl; a last line that a kill cut off is left out."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            lines += [line] if isinstance(line, dict) else []
    return lines


def lines_until(lines: list[dict[str, Any]], state: TrainerState) -> list[dict[str, Any]]:
    """The lines up to a checkpoint, whose state tells how many there were at its own step."""
    step = state.global_step
    at_step = sum("loss" in e or any(k.startswith("eval_") for k in e) for e in state.log_history if e["step"] == step)
    earlier = [line for line in lines if line["current_steps"] < step]
    return [*earlier, *[line for line in lines if line["current_steps"] == step][:at_step]]


def run_seconds(lines: list[dict[str, Any]]) -> float:
    """Seconds of a run over all its sessions, as far as its log reaches; LLaMA-Factory's log has none."""
    return max((line.get("elapsed_seconds", 0.0) for line in lines), default=0.0)


def mean_loss(lines: list[dict[str, Any]], steps: int) -> float | None:
    """The mean over all steps of a run; None when the log does not reach the last one. A line's loss is the mean since
    the line before."""
    total, last = 0.0, 0
    for line in lines:
        if "loss" in line:
            total += line["loss"] * (line["current_steps"] - last)
            last = line["current_steps"]
    return total / steps if last == steps else None
