"""The lines of trainer_log.jsonl, and the format of their figures."""

from collections.abc import Mapping
from typing import Any

from transformers import TrainerState

LogLine = dict[str, Any]  # figures by name; evaluations name their datasets, so no type can list them


def lines_until(lines: list[LogLine], state: TrainerState) -> list[LogLine]:
    """Return the lines up to a checkpoint, whose state tells how many there were at its step."""
    step = state.global_step
    at_step = sum("loss" in e or any(k.startswith("eval_") for k in e) for e in state.log_history if e["step"] == step)
    earlier = [line for line in lines if line["current_steps"] < step]
    return [*earlier, *[line for line in lines if line["current_steps"] == step][:at_step]]


def run_seconds(lines: list[LogLine]) -> float:
    """Return the seconds of all sessions of a run, according to its log (LLaMA-Factory's has none)."""
    return max((line.get("elapsed_seconds", 0.0) for line in lines), default=0.0)


def mean_loss(state: TrainerState, unlogged: float) -> float:
    """Return the mean loss of all sessions of a run. `unlogged`: the sum of the losses since its last log line."""
    total, last = unlogged, 0.0
    for entry in state.log_history:
        if "loss" in entry:  # the mean since the entry before
            total += entry["loss"] * (entry["step"] - last)
            last = entry["step"]
    return total / max(state.global_step, 1)


def format_seconds(seconds: float) -> str:
    """Format seconds as h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"


def describe_evaluation(metrics: Mapping[str, float]) -> list[str]:
    """Format the loss and perplexity of each dataset, from metrics or a log line."""
    words = []
    for name, value in metrics.items():
        if name.startswith("eval_") and name.endswith("_loss"):
            words.append(f"{name.replace('_', ' ')} {value:.4f}")
        elif name.startswith("eval_") and name.endswith("_perplexity"):
            words.append(f"perplexity {value:.2f}" if value < 1e6 else f"perplexity {value:.2e}")
        elif name.startswith("eval_") and name.endswith(("rewards/accuracies", "rewards/margins")):
            words.append(
                f"{name.rpartition('/')[2].replace('accuracies', 'accuracy').replace('margins', 'margin')} {value:.3f}"
            )
    return words


def describe_predictions(metrics: Mapping[str, float]) -> list[str]:
    """Format the scores of generated replies: `right tool 12 of 29`."""
    words = []
    for name, value in metrics.items():
        if name.startswith("eval_predict_") and f"{name}_of" in metrics:
            of = metrics[f"{name}_of"]
            words.append(f"{name.removeprefix('eval_predict_').replace('_', ' ')} {round(value * of)} of {of}")
    return words
