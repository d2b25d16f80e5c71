"""What is evaluated, in a run and without one; the figures are trainer.py's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl.trainer.sft_config import SFTConfig

from ..data.prepare import PreparedData, prepare_datasets
from ..data.tokenizer import load_tokenizer
from ..recipe.keys import Recipe
from ..report.console import say
from ..report.figures import describe_evaluation
from ..report.trainer_log import say_nothing_of_steps
from .model import load_model
from .preflight import require_rows_apart
from .trainer import ArpoTrainer


def eval_datasets(recipe: Recipe, data: PreparedData) -> Any:
    """What the trainer is told: a single dataset's metrics go without its name, unless the recipe asks for it."""
    if len(data.eval) == 1 and not recipe.eval_on_each_dataset:
        return next(iter(data.eval.values()))
    return data.eval or None


def evaluate_only(recipe: Recipe, args: SFTConfig) -> None:
    """Evaluate a model that is not trained (`do_train: false`), and write eval_results.json. No tracker is told."""
    args.report_to = []
    tokenizer = load_tokenizer(recipe)
    data = prepare_datasets(recipe, tokenizer)
    data.write_audit(Path(recipe.output_dir) / "row_audit.jsonl")
    model, _ = load_model(recipe)
    trainer = ArpoTrainer(
        model=model,
        args=args,
        train_dataset=next(iter(data.eval.values())),  # TRL asks for one; it is never trained on
        eval_dataset=eval_datasets(recipe, data),
        processing_class=tokenizer,
    )
    say_nothing_of_steps(trainer)
    require_rows_apart(recipe, trainer)
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    for line in describe_evaluation(metrics):
        say(line)
