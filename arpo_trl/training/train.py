"""The whole run, top to bottom."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.sft_config import SFTConfig

from ..data.prepare import PreparedData, prepare_datasets
from ..data.template import template_of
from ..data.tokenizer import load_tokenizer
from ..errors import RecipeError, RunFailed, in_one_line
from ..generate.predict import predict, refuse_split_model
from ..machine import full_disk_in_a_line, missing_space
from ..model.adapters import keep_adapter_in_float32, turn_pissa_into_lora
from ..model.memory import memory_to_spare
from ..model.model import frozen_copy, load_model, stop_after_calls
from ..model.optimizers import ProjectionsOnResume, to_optimizer
from ..model.sft_config import to_sft_config
from ..processes import leave_together, on_main_process
from ..recipe.keys import Recipe
from ..report.console import logged_to, say
from ..report.end_report import end_report, resume_command
from ..report.log_file import mean_loss, read_log
from ..report.loss_plot import plot_loss
from ..report.manifest import RECIPE_MARK, Manifest, describe_run, read_manifest, recipe_text, require_same_run
from ..report.model_card import CARD_MARKS, NOT_FOR_THE_HUB, write_model_card
from ..report.tracker_steps import log_by_step
from ..report.trackers import finish_trackers, start_trackers
from ..run_folder import match_umask, own_path, save_metrics, write_json, write_text
from .checkpoints import SaveAfterEpochEnd
from .early_stopping import StopEarly
from .evaluate import eval_datasets, run_without_training, to_inference
from .folder_lock import own_output_dir
from .loss import to_objective
from .predict_on_evaluate import PredictOnEvaluate, compare_evaluations
from .preflight import PackingCheck, Preflight
from .requirements import check_device, check_environment
from .resume import clear_earlier_run, find_resume_point
from .rows_and_model import check_fit
from .start_report import StartReport
from .stop import StopOnSignal, Stopped
from .trainer import ArpoTrainer, ResumeEvaluation
from .trainer_log import TrainerLog, remove_progress_bar


def train(recipe: Recipe) -> int:
    """Run a recipe: what it needs, data, model, training, final model.

    Returns:
        The exit code: 0 when the run is finished, 128 + the signal's number when a signal stopped it.

    Raises:
        RecipeError: something that the user can mend, before the first step.
        RunFailed: the run began and cannot go on.
    """
    return run(check_environment(recipe))


def run(recipe: Recipe) -> int:
    """`train` for a recipe that `check_environment` has returned."""
    check_device(recipe)
    args = to_sft_config(recipe)
    if recipe.fsdp and args.world_size == 1:
        raise recipe.error(
            "fsdp", "one process can't split a model; start several with accelerate launch, or remove it"
        )
    with own_output_dir(recipe):
        checkpoint, lines = on_main_process(lambda: find_resume_point(recipe)) if recipe.do_train else (None, [])
        log = logged_to(Path(recipe.output_dir) / "training.log", enabled=PartialState().is_main_process)
        with log as forget_earlier_sessions, full_disk_in_a_line():
            say(*recipe.notices, *lines)
            code = 0
            if recipe.do_train:
                code = _train(recipe, args, checkpoint, forget_earlier_sessions)
            else:
                run_without_training(recipe, args)
            leave_together()
            return code


def _train(
    recipe: Recipe, args: SFTConfig, checkpoint: Path | None, forget_earlier_sessions: Callable[[], None]
) -> int:
    output_dir = Path(recipe.output_dir)
    tokenizer = load_tokenizer(recipe)
    data = prepare_datasets(recipe, tokenizer)
    check_fit(recipe, args, data, tokenizer)
    manifest = describe_run(recipe, data)
    earlier = read_manifest(checkpoint.parent) if checkpoint else None
    if checkpoint:
        say(*on_main_process(lambda: require_same_run(earlier, manifest, recipe.allow_changed_recipe)))
    data.write_audit(output_dir / "row_audit.jsonl")
    on_main_process(lambda: start_trackers(recipe, args, manifest, earlier))
    model, saved_dtype = load_model(recipe)
    trainer = make_trainer(recipe, args, model, tokenizer, data)
    stop = StopOnSignal()
    add_callbacks(recipe, trainer, stop, data, checkpoint)
    if not checkpoint:
        forget_earlier_sessions()
        say(*on_main_process(lambda: clear_earlier_run(output_dir)))
    say(*on_main_process(lambda: write_start_files(recipe, trainer, manifest)))
    try:
        trained = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None).metrics
        evaluated = save_and_evaluate(recipe, trainer, saved_dtype)
    except Stopped:
        assert stop.signum is not None
        if trainer.is_world_process_zero():
            manifest.write(output_dir, "stopped")
        say(*describe_stop(recipe, trainer.state.global_step, stop.signum))
        return 128 + stop.signum
    log = read_log(output_dir / "trainer_log.jsonl")
    trained["train_loss"] = mean_loss(log, trainer.state.global_step) or trained["train_loss"]  # since the resume
    write_results(recipe, trainer, manifest, trained, evaluated)
    if recipe.do_predict:
        stop.restore_default_handlers()
        to_inference(model, saved_dtype)
        predict(recipe, model, tokenizer, data.eval)
    finish_trackers(args, output_dir)
    if args.push_to_hub:
        push(trainer)
    say(*compare_evaluations(trainer.state, recipe.load_best_model_at_end))
    say(*end_report(recipe, trainer.state, trained, evaluated))
    return 0


def make_trainer(
    recipe: Recipe,
    args: SFTConfig,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
) -> ArpoTrainer:
    trainer = ArpoTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=eval_datasets(recipe, data),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=to_optimizer(recipe, args),
        rows=data.train if isinstance(data.train, Dataset) else None,  # naming a stream's rows would read it anew
        on_save_error=recipe.on_save_error,
        objective=to_objective(recipe),
        reference=frozen_copy(model, args) if recipe.use_asft_loss else None,
    )
    refuse_split_model(recipe, trainer.is_fsdp_enabled)
    keep_adapter_in_float32(model)
    stop_after_calls(model, tokenizer, template_of(recipe, tokenizer).call_end)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not trainer.is_fsdp_enabled:
        say("FSDP needs GPUs (accelerate 1.15): each process holds the whole model, as with multi_gpu.yaml")
    return trainer


def add_callbacks(
    recipe: Recipe, trainer: ArpoTrainer, stop: StopOnSignal, data: PreparedData, checkpoint: Path | None
) -> None:
    """Add the run's callbacks, which the trainer calls in this order at each event."""
    spare = memory_to_spare(recipe, trainer.args, data.train)
    callbacks = [
        # before the log, which shows its scores and leaves its time out
        PredictOnEvaluate(recipe, trainer, data.eval) if recipe.predict_during_eval else None,
        StopEarly(recipe.early_stopping_steps) if recipe.early_stopping_steps else None,
        ProjectionsOnResume(trainer.args.optim),
        stop,  # before the preflight, in which a signal may come
        StartReport(recipe, data, trainer, checkpoint),
        TrainerLog(trainer, Path(recipe.output_dir) / "trainer_log.jsonl", recipe.plot_loss),
        PackingCheck(recipe, trainer),
        Preflight(trainer, recipe.gradient_checkpointing == "auto", spare) if recipe.preflight else None,
        SaveAfterEpochEnd(),  # after all that ask for a save
        ResumeEvaluation(trainer),  # after the log has begun
    ]
    remove_progress_bar(trainer)
    log_by_step(trainer)
    for callback in filter(None, callbacks):
        trainer.add_callback(callback)


def write_start_files(recipe: Recipe, trainer: ArpoTrainer, manifest: Manifest) -> list[str]:
    """Write what the folder has before the first step; a line for each file that is a user's own.

    Raises:
        RecipeError: the disk has no room for a checkpoint.
    """
    output_dir = Path(recipe.output_dir)
    if full := missing_space(output_dir, trainer.checkpoint_bytes, "a checkpoint"):
        raise RecipeError(full)
    manifest.write(output_dir, "running")
    marks = {"recipe.yaml": (RECIPE_MARK,), "README.md": CARD_MARKS}
    paths = {name: own_path(output_dir / name, *texts) for name, texts in marks.items()}
    write_text(paths["recipe.yaml"], recipe_text(recipe))
    if trainer.args.push_to_hub:
        write_text(output_dir / ".gitignore", NOT_FOR_THE_HUB)
    return [
        f"{output_dir / name} was not written by a run: it stays, and the run writes {path.name}"
        for name, path in paths.items()
        if path.name != name
    ]


def save_and_evaluate(recipe: Recipe, trainer: ArpoTrainer, saved_dtype: torch.dtype | None) -> dict[str, float]:
    """Save the final model; the metrics of its weights, none without do_eval."""
    args = trainer.args
    # An evaluation in half precision rounds the model in place; any other is to see it before it is saved.
    rounds = args.bf16_full_eval or args.fp16_full_eval
    metrics = trainer.evaluate_final_weights() if args.do_eval and not rounds else {}
    trainer.save_final_model(saved_dtype)
    if trainer.is_world_process_zero():
        turn_pissa_into_lora(trainer.model, Path(recipe.output_dir))
    return trainer.evaluate_final_weights() if args.do_eval and rounds else metrics


def describe_stop(recipe: Recipe, step: int, signum: int) -> list[str]:
    """Where a signal stopped the run, and how to go on."""
    saved = f"at step {step}, checkpoint saved" if step else "before the first step, nothing to save"
    if step and not (Path(recipe.output_dir) / f"checkpoint-{step}").is_dir():  # on_save_error: continue
        saved = f"at step {step}, which could not be saved"
    return [f"stopped by {signal.Signals(signum).name} {saved}", f"to go on: {resume_command(recipe)}"]


def push(trainer: ArpoTrainer) -> None:
    """Upload the final model; what the Hub answers does not undo a run that is saved."""
    try:
        trainer.push_to_hub()
    except Exception as error:  # the Hub's client raises what its many backends raise
        folder, hub_id = trainer.args.output_dir, trainer.hub_model_id
        raise RunFailed(
            f"push_to_hub: the model is saved in {folder} and was not uploaded ({in_one_line(error)}); hf upload {hub_id} {folder}"
        ) from error


def write_results(
    recipe: Recipe, trainer: ArpoTrainer, manifest: Manifest, trained: dict[str, float], evaluated: dict[str, float]
) -> None:
    """Leave the run's figures, plot and model card beside the final model."""
    output_dir = Path(recipe.output_dir)
    if not trainer.is_world_process_zero():
        return
    save_metrics(output_dir, "train", trained)
    if evaluated:
        save_metrics(output_dir, "eval", evaluated)
    write_json(output_dir / "trainer_state.json", asdict(trainer.state))
    if recipe.plot_loss:
        try:
            plot_loss(read_log(output_dir / "trainer_log.jsonl"), output_dir / "training_loss.png")
        except OSError as error:  # on Windows, one that a viewer has open
            say(f"training_loss.png could not be written ({error}); the run is saved")
    write_model_card(output_dir, manifest, recipe_text(recipe))
    match_umask(output_dir)
    manifest.write(output_dir, "finished")
