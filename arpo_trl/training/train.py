"""A training run, from the recipe to the final model: `train` is the table of contents."""

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from trl.trainer.sft_config import SFTConfig

from ..data.prepare import PreparedData
from ..data.saved_folder import check_run
from ..errors import RecipeError, RunFailed, in_one_line, reason
from ..generate.predict import predict
from ..machine import full_disk_as_run_failed
from ..model.adapters import keep_adapter_in_float32
from ..model.base import compute_dtype
from ..model.base_files import BaseFiles
from ..model.methods.chosen import methods_of, trainer_kwargs
from ..model.model import load_model, stop_after_calls
from ..model.split import find_split, requests_fsdp
from ..model.weights import Model
from ..processes import leave_together, on_main_process
from ..recipe.keys import Recipe
from ..recipe.read import read_recipe
from ..report.console import logged_to, say
from ..report.log_file import LogLine, mean_loss
from ..report.loss_plot import plot_run
from ..report.manifest import Manifest, describe_run, read_manifest, require_same_run
from ..report.model_card import write_model_card
from ..report.preview import describe_example
from ..report.trackers import continue_curves, finish_trackers, start_trackers
from ..run_folder import checkpoint_step, match_umask, read_json, read_lines, save_metrics, write_json
from .callbacks import (
    BeforeFirstStep,
    PredictOnEvaluate,
    SaveAfterEpochEnd,
    StopEarly,
    compare_evaluations,
    log_by_step,
)
from .evaluate import eval_datasets, run_without_training, to_inference
from .output_dir import clear_earlier_run, find_resume_point, own_output_dir, write_start_files
from .precompute import use_stored_log_probs
from .preflight import check_first_pair, find_skip_reason, require_separate_rows, run_preflight, warm_up
from .reference import describe_reference, make_preference, precomputes
from .requirements import check_before_torch
from .score_check import check_scores
from .setup import check_after_torch, load_rows
from .signals import StopOnSignal, Stopped
from .start_and_end_report import describe_interrupt, describe_stop, end_report, start_report
from .trainer import ArpoTrainer
from .trainer_log import TrainerLog, remove_progress_bar

ROWS = "rows.parquet"
"""The rows of `train(rows=...)`, in output_dir."""


@dataclass(frozen=True)
class Result:
    """What a run has produced.

    Attributes:
        exit_code: 0 if the run is finished, 128 + the signal's number if a signal stopped it.
        stopped_by: The signal, such as SIGTERM, or None.
        metrics: The final figures, as in all_results.json; empty if the run was stopped.
        history: The rows of trainer_log.jsonl.
        best_checkpoint: That of `load_best_model_at_end` or `metric_for_best_model`, or None.
    """

    exit_code: int
    stopped_by: str | None
    metrics: dict[str, float]
    history: list[LogLine]
    output_dir: Path
    best_checkpoint: Path | None


def train(
    recipe: Recipe | Mapping[str, object] | str | Path, overrides: Sequence[str] = (), rows: Dataset | None = None
) -> Result:
    """Run a recipe: check it, prepare the data, train the model, save it.

    Args:
        recipe: From `read_recipe`, or its file, or its keys and values.
        overrides: `key=value`, as on the command line.
        rows: Train on these rows instead of `dataset`. They are written to output_dir/rows.parquet, and their format is
            recognized by their columns.

    Raises:
        RecipeError: an error in the recipe or its inputs, before the first step.
        RunFailed: the run began and can't continue.
    """
    if not isinstance(recipe, Recipe):
        dataset = [f"dataset={ROWS}"] if rows is not None else []  # replaced below
        recipe = read_recipe(recipe, [*overrides, *dataset])
    elif overrides:
        recipe = read_recipe(recipe.resolved(), overrides)
    if rows is not None:
        path = Path(recipe.output_dir, ROWS)
        path.parent.mkdir(parents=True, exist_ok=True)
        on_main_process(lambda: rows.to_parquet(path))
        recipe = recipe.model_copy(update={"dataset": [str(path)]})
    return run(check_before_torch(recipe))


def run(recipe: Recipe) -> Result:
    """`train` for a recipe that `check_before_torch` has returned."""
    args = check_after_torch(recipe)
    with own_output_dir(recipe):
        checkpoint, lines = on_main_process(lambda: find_resume_point(recipe)) if recipe.do_train else (None, [])
        log = logged_to(Path(recipe.output_dir) / "training.log", PartialState().process_index)
        with log as forget_earlier_sessions, full_disk_as_run_failed():
            say(*recipe.notices, *lines)
            code = 0
            if recipe.do_train:
                code = _train(recipe, args, checkpoint, forget_earlier_sessions)
            else:
                run_without_training(recipe, args)
            leave_together()
            return _result(recipe, code)


def _result(recipe: Recipe, code: int) -> Result:
    output_dir = Path(recipe.output_dir)
    state = read_json(output_dir / "trainer_state.json") if code == 0 and recipe.do_train else None
    best = (state or {}).get("best_model_checkpoint")
    return Result(
        exit_code=code,
        stopped_by=signal.Signals(code - 128).name if code else None,
        metrics=(read_json(output_dir / "all_results.json") or {}) if code == 0 else {},
        history=read_lines(output_dir / "trainer_log.jsonl"),
        output_dir=output_dir,
        best_checkpoint=Path(best) if best else None,
    )


def _train(
    recipe: Recipe, args: SFTConfig, checkpoint: Path | None, forget_earlier_sessions: Callable[[], None]
) -> int:
    output_dir = Path(recipe.output_dir)

    # Data
    data = load_rows(recipe, args)

    # The run's record, and the earlier one's
    manifest = describe_run(recipe, data)
    manifest.reference = describe_reference(recipe)
    manifest.split = str(find_split(recipe))
    manifest.computed_in = str(compute_dtype(recipe) or torch.float32).removeprefix("torch.")
    earlier = read_manifest(checkpoint.parent) if checkpoint else None
    if checkpoint:
        say(*on_main_process(lambda: require_same_run(earlier, manifest, recipe.allow_changed_recipe)))
    data.write_audit(output_dir / "row_audit.jsonl")
    on_main_process(lambda: start_trackers(recipe, args, manifest, earlier))

    # Model and trainer
    model, base = load_model(recipe)
    trainer = make_trainer(recipe, args, model, data)
    stop = StopOnSignal()
    add_callbacks(recipe, trainer, stop, data)
    if checkpoint:
        continue_curves(trainer.callback_handler.callbacks, checkpoint_step(checkpoint))

    # The output folder
    if not checkpoint:
        forget_earlier_sessions()
        say(*on_main_process(lambda: clear_earlier_run(output_dir)))
    say(*on_main_process(lambda: write_start_files(recipe, trainer, manifest)))

    # Train, save, evaluate
    if precomputes(recipe) and not find_split(recipe).shards_weights:
        use_stored_log_probs(recipe, trainer)  # a checkpoint is loaded later
    try:
        trained = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
        evaluated = save_and_evaluate(recipe, trainer, base)
    except Stopped:
        assert stop.signum is not None
        if trainer.is_world_process_zero():
            manifest.write(output_dir, "stopped")
        say(*describe_stop(recipe, trainer.state.global_step, stop.signum))
        return 128 + stop.signum
    except KeyboardInterrupt:  # a second Ctrl-C
        say(*describe_interrupt(recipe))
        raise
    if checkpoint:
        trained["train_loss"] = mean_loss(trainer.state, trainer.window.loss_sum)
    serving = on_main_process(lambda: check_run(recipe, data, output_dir))
    write_results(recipe, trainer, manifest, trained, evaluated)  # last, because it marks the run as finished
    say(*serving)

    # Predict
    if recipe.do_predict:
        stop.restore_default_handlers()
        to_inference(model, base)
        predict(recipe, model, data)

    # Report
    finish_trackers(args, output_dir)
    if args.push_to_hub:
        push(trainer)
    say(*compare_evaluations(trainer.state, recipe.load_best_model_at_end))
    say(*end_report(recipe, trainer.state, trained, evaluated))
    return 0


def make_trainer(recipe: Recipe, args: SFTConfig, model: Model, data: PreparedData) -> ArpoTrainer:
    """Return the trainer of the recipe's model and rows."""
    tokenizer = data.template.tokenizer
    try:
        trainer = ArpoTrainer(
            model=model,
            args=args,
            train_dataset=data.train,
            eval_dataset=eval_datasets(recipe, data),
            processing_class=tokenizer,
            on_save_error=recipe.on_save_error,
            **trainer_kwargs(recipe, model, args),
            preference=make_preference(recipe, args, model),
            split=find_split(recipe),
        )
    except ValueError as error:  # a combination that TRL does not support
        raise RecipeError(f"{recipe.path}: not supported by TRL: {in_one_line(error)}") from error
    keep_adapter_in_float32(model)
    stop_after_calls(model, tokenizer, data.template.call_end)
    if requests_fsdp(recipe) and not trainer.is_fsdp_enabled:
        say("FSDP needs GPUs (accelerate 1.15): each process has the complete model, as with multi_gpu.yaml")
    return trainer


def add_callbacks(recipe: Recipe, trainer: ArpoTrainer, stop: StopOnSignal, data: PreparedData) -> None:
    """Add the run's callbacks. At each event the trainer calls them in this order."""
    remove_progress_bar(trainer)
    log_by_step(trainer)
    for callback in (
        PredictOnEvaluate(recipe, trainer, data) if recipe.predict_during_eval else None,
        StopEarly(recipe.early_stopping_steps) if recipe.early_stopping_steps else None,  # may read predict's scores
        stop,
        TrainerLog(Path(recipe.output_dir) / "trainer_log.jsonl", recipe.plot_loss, trainer),
        SaveAfterEpochEnd(),
        BeforeFirstStep(lambda: before_first_step(recipe, trainer, data)),
    ):
        if callback:
            trainer.add_callback(callback)


def before_first_step(recipe: Recipe, trainer: ArpoTrainer, data: PreparedData) -> None:
    """Report what the run is about to do, try it, and repeat an evaluation that a signal stopped."""
    require_separate_rows(recipe, trainer)
    scores = check_scores(recipe, trainer)
    say(*start_report(recipe, data, trainer), *scores)
    if isinstance(data.train, Dataset):  # a stream's first row would have to be read again
        say(*describe_example(data.train, data.template.tokenizer))
    if precomputes(recipe) and find_split(recipe).shards_weights:
        use_stored_log_probs(recipe, trainer)
    check_first_pair(recipe, trainer)
    if recipe.preflight and isinstance(data.train, Dataset):
        run_preflight(trainer, recipe.gradient_checkpointing == "auto", find_skip_reason(recipe, trainer))
    else:
        warm_up(trainer)
    trainer.evaluate_pending()


def save_and_evaluate(recipe: Recipe, trainer: ArpoTrainer, base: BaseFiles | None) -> dict[str, float]:
    """Save the final model, and return the metrics of its weights (none without do_eval)."""
    args = trainer.args
    # An evaluation in half precision rounds the model in place, so it has to follow the save.
    rounds = args.bf16_full_eval or args.fp16_full_eval
    metrics = trainer.evaluate_final_weights() if args.do_eval and not rounds else {}
    trainer.save_final_model(base)
    if trainer.is_world_process_zero():
        for method in methods_of(recipe):
            method.finish(trainer.model, Path(recipe.output_dir))
    return trainer.evaluate_final_weights() if args.do_eval and rounds else metrics


def write_results(
    recipe: Recipe, trainer: ArpoTrainer, manifest: Manifest, trained: dict[str, float], evaluated: dict[str, float]
) -> None:
    """Write the run's figures, plot and model card next to the final model."""
    output_dir = Path(recipe.output_dir)
    if not trainer.is_world_process_zero():
        return
    save_metrics(output_dir, "train", trained)
    if evaluated:
        save_metrics(output_dir, "eval", evaluated)
    write_json(output_dir / "trainer_state.json", asdict(trainer.state))
    if recipe.plot_loss:
        try:
            plot_run(read_lines(output_dir / "trainer_log.jsonl"), output_dir)
        except OSError as error:  # on Windows, if a viewer has it open
            say(f"training_loss.png could not be written ({reason(error)}); the model is saved")
    write_model_card(output_dir, manifest)
    match_umask(output_dir)
    manifest.write(output_dir, "finished")


def push(trainer: ArpoTrainer) -> None:
    """Upload the final model to the Hub.

    Raises:
        RunFailed: the Hub's error, and the command that uploads the saved model.
    """
    try:
        trainer.push_to_hub()
    except Exception as error:  # the Hub's client raises what its many backends raise
        folder, hub_id = trainer.args.output_dir, trainer.hub_model_id
        raise RunFailed(
            f"push_to_hub failed ({in_one_line(error)}); the model is saved, upload it with: hf upload {hub_id} {folder}"
        ) from error
