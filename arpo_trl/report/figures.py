"""Figures in words: a time, a model's size and precision, an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, TrainingArguments


def format_seconds(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}"


def describe_model(model: PreTrainedModel | PeftModel) -> str:
    """How many parameters there are, and how many are trained (an adapter's)."""
    total, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    if any(hasattr(p, "ds_numel") for p in model.parameters()):  # ZeRO-3 leaves parameters empty, their size beside
        sizes = [(int(getattr(p, "ds_numel", 0)), p.requires_grad) for p in model.parameters()]
        total, trained = sum(size for size, _ in sizes), sum(size for size, is_trained in sizes if is_trained)
    if total == trained:
        return f"{total:,} parameters, all trained"
    return f"{total:,} parameters, {trained:,} trained ({100 * trained / total:.2g} %)"


def precision(model: PreTrainedModel | PeftModel, args: TrainingArguments) -> str:
    """The dtype of the trained weights, and what is computed in."""
    trained = next((p.dtype for p in model.parameters() if p.requires_grad), model.dtype)
    computed = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    held = str(trained).removeprefix("torch.")
    return f"{held}, computed in {computed}" if computed and computed != held else held


def describe_evaluation(metrics: Mapping[str, Any]) -> list[str]:
    """The loss and perplexity of each dataset, among metrics or in a line of the log."""
    words = []
    for name, value in metrics.items():
        if name.startswith("eval_") and name.endswith(("_loss", "_perplexity")):
            words.append(
                f"{name.replace('_', ' ')} {value:.4f}" if name.endswith("_loss") else f"perplexity {value:.2f}"
            )
    return words


def describe_predictions(metrics: Mapping[str, Any]) -> list[str]:
    """The scores of replies that an evaluation generated: `right tool 12 of 29`."""
    words = []
    for name, value in metrics.items():
        if name.startswith("eval_predict_") and f"{name}_of" in metrics:
            of = metrics[f"{name}_of"]
            words.append(f"{name.removeprefix('eval_predict_').replace('_', ' ')} {round(value * of)} of {of}")
    return words
