"""Evaluation and prediction without training (`do_train: false`). The metrics are computed in trainer.py."""

from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from torch import nn
from transformers.integrations.deepspeed import deepspeed_init
from trl.trainer.sft_config import SFTConfig

from ..data.prepare import PreparedData
from ..generate.predict import predict
from ..model.base_files import BaseFiles
from ..model.model import load_model
from ..model.weights import Model
from ..recipe.keys import Recipe
from ..report.console import say
from ..report.log_file import describe_evaluation, describe_predictions
from ..run_folder import save_metrics
from .callbacks import PredictOnEvaluate
from .preflight import require_separate_rows
from .reference import make_preference
from .score_check import check_scores
from .setup import load_rows
from .trainer import ArpoTrainer
from .trainer_log import remove_progress_bar


def eval_datasets(recipe: Recipe, data: PreparedData) -> Dataset | dict[str, Dataset] | None:
    """Return the trainer's eval_dataset: a single one has no name in its metrics, except with eval_on_each_dataset."""
    if len(data.eval) == 1 and not recipe.eval_on_each_dataset:
        return next(iter(data.eval.values()))
    return data.eval or None


def run_without_training(recipe: Recipe, args: SFTConfig) -> None:
    """Evaluate or predict without training. Writes eval_results.json and the files of `predict`; logs to no tracker."""
    args.report_to = []
    data = load_rows(recipe, args)
    data.write_audit(Path(recipe.output_dir) / "row_audit.jsonl")
    model, base = load_model(recipe)
    if recipe.do_eval:
        _evaluate(recipe, args, model, data)
    if recipe.do_predict:
        to_inference(model, base)
        predict(recipe, model, data)


def to_inference(model: nn.Module, base: BaseFiles | None) -> None:
    """Move a model to its device, in the dtypes of its files; on a CPU, which is slow in bfloat16, in float32.

    An adapter's base keeps its dtype.
    """
    if getattr(model, "quantization_method", None) is not None:
        return  # from_pretrained has placed its quantized weights
    device = PartialState().device
    model.to(device)
    if base and device.type == "cpu":
        model.float()
    elif base:
        base.cast(model, computes=True)


def _evaluate(recipe: Recipe, args: SFTConfig, model: Model, data: PreparedData) -> None:
    trainer = ArpoTrainer(
        model=model,
        args=args,
        train_dataset=next(iter(data.eval.values())),  # required by TRL, never trained on
        eval_dataset=eval_datasets(recipe, data),
        processing_class=data.template.tokenizer,
        preference=make_preference(recipe, args, model),
    )
    remove_progress_bar(trainer)
    if trainer.is_deepspeed_enabled:  # as Trainer.evaluate does: without its engine, ZeRO-3's weights are empty
        deepspeed_init(trainer, num_training_steps=0, inference=True)
        trainer.model_wrapped = trainer.deepspeed = trainer.accelerator.prepare(trainer.model)
    say(*check_scores(recipe, trainer))
    require_separate_rows(recipe, trainer)
    if recipe.predict_during_eval:
        trainer.add_callback(PredictOnEvaluate(recipe, trainer, data))
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        save_metrics(Path(recipe.output_dir), "eval", metrics)
    say(*describe_evaluation(metrics), *describe_predictions(metrics))
