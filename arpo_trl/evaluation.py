"""Evaluation: the loss over all tokens of each dataset, its perplexity, and when evaluating ends the run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import EvalLoopOutput

from .callbacks import say_nothing_of_steps
from .console import say
from .dataset import PreparedData, prepare_datasets
from .model import load_model
from .recipe import Recipe
from .template import load_tokenizer
from .trainer import ArpoTrainer
from .trainer_log import describe_evaluation
from .trl_config import to_sft_config


class EvaluatingTrainer(ArpoTrainer):
    """`ArpoTrainer` whose evaluation means over tokens, and keeps no logits.

    transformers means over batches: a batch of two short replies weighs as much as one of two long ones, and the same
    model has another loss at another batch size. Here `eval_loss` is the mean of -log p over all labelled tokens of a
    dataset, whatever the training loss adds to that (DFT, label smoothing, the routers' loss), and `eval_perplexity`
    is its exponential; `eval_entropy` and `eval_mean_token_accuracy` are over the same tokens.

    Several datasets have a loss each, as `eval_<name>_loss`, and `eval_loss` is that of all of them together.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._sums = torch.zeros(4, dtype=torch.float64)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        datasets = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(datasets, dict):
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        metrics: dict[str, float] = {}
        sums = torch.zeros(4, dtype=torch.float64)
        for name, dataset in datasets.items():
            metrics |= super().evaluate(
                name if eval_dataset is None else dataset, ignore_keys, f"{metric_key_prefix}_{name}"
            )
            sums += self._sums
        overall = token_means(sums, metric_key_prefix)
        self.log(dict(overall))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, overall)
        return metrics | overall

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._sums = torch.zeros(4, dtype=torch.float64)
        kwargs["metric_key_prefix"] = metric_key_prefix
        output: EvalLoopOutput = super().evaluation_loop(*args, **kwargs)
        assert output.metrics is not None
        output.metrics.update(token_means(self._sums, metric_key_prefix))
        return output

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        assert self.model is not None
        if self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
        scores = model(**inputs, use_cache=False, fused_lm_head=True)
        parts = (-scores.log_probs, scores.entropy, scores.is_top1, scores.label_mask)
        # A row per conversation, so that those which fill up the last batch of several processes are dropped again.
        # (Laid end to end a batch is one row: of several processes, the rows that fill up count twice.)
        rows = torch.stack([part.float().sum(-1) for part in parts], dim=-1)
        self._sums += self.accelerator.gather_for_metrics(rows).sum(0).double().cpu()
        nll, _, _, tokens = rows.sum(0)
        return nll / tokens.clamp(min=1)

    def evaluate_final_weights(self) -> dict[str, float]:
        """The metrics of the weights that the run ends with: those in its log, or else of one more evaluation."""
        step = self.state.global_step
        if self.args.load_best_model_at_end and self.state.best_global_step is not None:
            step = self.state.best_global_step
        logged = [entry for entry in self.state.log_history if entry["step"] == step]
        known = {k: v for entry in logged for k, v in entry.items() if k.startswith("eval_")}
        return known if "eval_loss" in known else self.evaluate()


def token_means(sums: Tensor, prefix: str) -> dict[str, float]:
    """Metrics from the sums over labelled tokens of: -log p, entropy, correct guesses, and one."""
    nll, entropy, correct = (sums[:3] / sums[3].clamp(min=1)).tolist()
    return {
        f"{prefix}_loss": nll,
        f"{prefix}_perplexity": math.exp(min(nll, 700)),
        f"{prefix}_entropy": entropy,
        f"{prefix}_mean_token_accuracy": correct,
    }


class StopEarly(EarlyStoppingCallback):
    """transformers' callback, deaf to the parts of an evaluation that do not hold the watched metric."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if f"eval_{args.metric_for_best_model.removeprefix('eval_')}" in metrics:
            super().on_evaluate(args, state, control, metrics, **kwargs)  # type: ignore[no-untyped-call]


def eval_datasets(recipe: Recipe, data: PreparedData) -> Any:
    """What the trainer is told: a single dataset's metrics go without its name, unless the recipe asks for it."""
    if len(data.eval) == 1 and not recipe.eval_on_each_dataset:
        return next(iter(data.eval.values()))
    return data.eval or None


def evaluate_only(recipe: Recipe) -> None:
    """Evaluate a model that is not trained (`do_train: false`), and write eval_results.json. No tracker is told."""
    args = to_sft_config(recipe)
    args.report_to = []
    tokenizer = load_tokenizer(recipe)
    data = prepare_datasets(recipe, tokenizer)
    data.write_audit(Path(recipe.output_dir) / "row_audit.jsonl")
    model, _ = load_model(recipe)
    trainer = EvaluatingTrainer(
        model=model,
        args=args,
        train_dataset=next(iter(data.eval.values())),  # TRL asks for one; it is never trained on
        eval_dataset=eval_datasets(recipe, data),
        processing_class=tokenizer,
    )
    say_nothing_of_steps(trainer)
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    for line in describe_evaluation(metrics):
        say(line)
