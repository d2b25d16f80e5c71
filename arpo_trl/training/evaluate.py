"""What is evaluated, in a run and without one; the figures are trainer.py's."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_config import SFTConfig

from ..data.prepare import PreparedData, prepare_datasets
from ..data.tokenizer import load_tokenizer
from ..generate.predict import Model, predict, refuse_split_model
from ..model.model import load_model
from ..recipe.keys import Recipe
from ..report.console import say
from ..report.log_file import describe_evaluation, describe_predictions
from ..run_folder import save_metrics
from .predict_on_evaluate import PredictOnEvaluate
from .preflight import require_rows_apart
from .rows_and_model import check_fit
from .trainer import ArpoTrainer
from .trainer_log import remove_progress_bar


def eval_datasets(recipe: Recipe, data: PreparedData) -> Dataset | dict[str, Dataset] | None:
    """What the trainer is told: a single dataset's metrics go without its name, unless the recipe asks for it."""
    if len(data.eval) == 1 and not recipe.eval_on_each_dataset:
        return next(iter(data.eval.values()))
    return data.eval or None


def run_without_training(recipe: Recipe, args: SFTConfig) -> None:
    """Evaluate or predict with a model that is not trained (`do_train: false`). No tracker is told.

    Writes eval_results.json, and what `predict` writes.
    """
    args.report_to = []
    refuse_split_model(recipe, is_fsdp=False)  # without an optimizer, FSDP splits nothing: each process has the model
    tokenizer = load_tokenizer(recipe)
    data = prepare_datasets(recipe, tokenizer)
    check_fit(recipe, args, data, tokenizer)
    data.write_audit(Path(recipe.output_dir) / "row_audit.jsonl")
    model, saved_dtype = load_model(recipe)
    if recipe.do_eval:
        _evaluate(recipe, args, model, tokenizer, data)
    if recipe.do_predict:
        to_inference(model, saved_dtype)
        predict(recipe, model, tokenizer, data.eval)


def to_inference(model: nn.Module, saved_dtype: torch.dtype | None) -> None:
    """Put a model on its device as those who use it load it: in the dtype of its file, and on a CPU in float32.

    A CPU is slow in bfloat16; the weights are the file's either way. An adapter's base stays as it was trained with.
    """
    if getattr(model, "quantization_method", None) is not None:
        return  # it is where bitsandbytes put it
    device = PartialState().device
    model.to(device)
    if saved_dtype:
        model.to(torch.float32 if device.type == "cpu" else saved_dtype)


def _evaluate(
    recipe: Recipe, args: SFTConfig, model: Model, tokenizer: PreTrainedTokenizerBase, data: PreparedData
) -> None:
    trainer = ArpoTrainer(
        model=model,
        args=args,
        train_dataset=next(iter(data.eval.values())),  # TRL asks for one; it is never trained on
        eval_dataset=eval_datasets(recipe, data),
        processing_class=tokenizer,
    )
    remove_progress_bar(trainer)
    require_rows_apart(recipe, trainer)
    if recipe.predict_during_eval:
        trainer.add_callback(PredictOnEvaluate(recipe, trainer, data.eval))
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        save_metrics(Path(recipe.output_dir), "eval", metrics)
    say(*describe_evaluation(metrics), *describe_predictions(metrics))
