"""The whole run, top to bottom."""

from __future__ import annotations

import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from trl.trainer.sft_config import SFTConfig

from ..data.prepare import prepare_datasets
from ..data.tokenizer import load_tokenizer
from ..errors import RecipeError, RunFailed
from ..machine import full_disk_in_a_line, missing_space
from ..processes import leave_together, on_main_process
from ..recipe.keys import Recipe
from ..report.console import logged_to, say
from ..report.end_report import end_report, resume_command
from ..report.log_file import mean_loss, read_log
from ..report.loss_plot import plot_loss
from ..report.manifest import RECIPE_MARK, Manifest, describe_run, read_manifest, recipe_text, require_same_run
from ..report.model_card import CARD_MARKS, NOT_FOR_THE_HUB, write_model_card
from ..report.start_report import StartReport
from ..report.tracker_steps import log_by_step
from ..report.trackers import finish_trackers, start_trackers
from ..report.trainer_log import show_progress
from ..run_folder import match_umask, own_path, save_metrics, write_json, write_text
from .adapters import keep_adapter_in_float32, to_optimizer, turn_pissa_into_lora
from .evaluate import eval_datasets, run_without_training, to_inference
from .folder_lock import own_output_dir
from .model import load_model
from .predict import PredictOnEvaluate, compare_evaluations, predict, refuse_split_model
from .preflight import PackingCheck, Preflight
from .requirements import check_environment
from .resume import clear_earlier_run, find_resume_point, refuse_output_dir
from .rows_and_model import check_fit
from .sft_config import to_sft_config
from .stop import ResumeEvaluation, SaveAfterEpochEnd, StopEarly, StopOnSignal
from .trainer import ArpoTrainer, Stopped


def train(recipe: Recipe) -> int:
    """Run a recipe: data, model, training, final model.

    Returns:
        The exit code: 0 when the run is finished, 128 + the signal's number when a signal stopped it.

    Raises:
        RecipeError: something that the user can mend, before the first step.
        RunFailed: the run began and cannot go on.
    """
    check_environment(recipe)
    args = to_sft_config(recipe)
    if recipe.do_train:
        on_main_process(lambda: refuse_output_dir(recipe))
    with own_output_dir(recipe):
        return _train(recipe, args)


def _train(recipe: Recipe, args: SFTConfig) -> int:
    main_process = PartialState().is_main_process
    output_dir = Path(recipe.output_dir)

    checkpoint, lines = on_main_process(lambda: find_resume_point(recipe)) if recipe.do_train else (None, [])
    log = logged_to(output_dir / "training.log", enabled=main_process)
    with log as forget_earlier_sessions, full_disk_in_a_line():
        for line in [*recipe.notices, *lines]:
            say(line)
        if not recipe.do_train:
            run_without_training(recipe, args)
            leave_together()
            return 0
        tokenizer = load_tokenizer(recipe)
        data = prepare_datasets(recipe, tokenizer)
        check_fit(recipe, args, data, tokenizer)
        manifest = describe_run(recipe, data)
        earlier = read_manifest(checkpoint.parent) if checkpoint else None
        if checkpoint is not None:
            for line in on_main_process(lambda: require_same_run(earlier, manifest, recipe.allow_changed_recipe)):
                say(line)
        data.write_audit(output_dir / "row_audit.jsonl")
        on_main_process(lambda: start_trackers(recipe, args, manifest, earlier))

        args.eval_on_start = args.eval_on_start and checkpoint is None
        model, saved_dtype = load_model(recipe)
        trainer = ArpoTrainer(
            model=model,
            args=args,
            train_dataset=data.train,
            eval_dataset=eval_datasets(recipe, data),
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=to_optimizer(recipe, args),
            rows=data.train if isinstance(data.train, Dataset) else None,  # naming a stream's rows would read it anew
            on_save_error=recipe.on_save_error,
        )
        refuse_split_model(recipe, trainer.is_fsdp_enabled)
        keep_adapter_in_float32(model)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not trainer.is_fsdp_enabled:
            say("FSDP needs GPUs (accelerate 1.15): each process holds the whole model, as with multi_gpu.yaml")
        if recipe.predict_during_eval:
            trainer.add_callback(PredictOnEvaluate(recipe, trainer, tokenizer, data.eval))
        if recipe.early_stopping_steps:
            trainer.add_callback(StopEarly(recipe.early_stopping_steps))
        stop = StopOnSignal()
        trainer.add_callback(stop)
        trainer.add_callback(StartReport(recipe, data, trainer, checkpoint))
        show_progress(trainer, recipe.plot_loss)
        log_by_step(trainer)
        trainer.add_callback(PackingCheck(recipe, trainer))
        if recipe.preflight:
            trainer.add_callback(Preflight(trainer, choose_checkpointing=recipe.gradient_checkpointing == "auto"))
        trainer.add_callback(SaveAfterEpochEnd())
        trainer.add_callback(ResumeEvaluation(trainer))

        def begin() -> list[str]:
            lines = []
            if checkpoint is None:
                forget_earlier_sessions()
                lines = clear_earlier_run(output_dir)
            if full := missing_space(output_dir, trainer.checkpoint_bytes, "a checkpoint"):
                raise RecipeError(full)
            manifest.write(output_dir, "running")
            marks = {"recipe.yaml": (RECIPE_MARK,), "README.md": CARD_MARKS}
            paths = {name: own_path(output_dir / name, *texts) for name, texts in marks.items()}
            write_text(paths["recipe.yaml"], recipe_text(recipe))
            lines += [
                f"{output_dir / name} was not written by a run: it stays, and the run writes {path.name}"
                for name, path in paths.items()
                if path.name != name
            ]
            if args.push_to_hub:
                write_text(output_dir / ".gitignore", NOT_FOR_THE_HUB)
            return lines

        for line in on_main_process(begin):
            say(line)

        try:
            result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            # An evaluation in half precision rounds the model in place; any other is to see it before it is saved.
            rounds = args.bf16_full_eval or args.fp16_full_eval
            metrics = trainer.evaluate_final_weights() if args.do_eval and not rounds else {}
            readme = output_dir / "README.md"
            kept = readme.read_bytes() if main_process and readme.exists() else None
            trainer.save_final_model(saved_dtype)
            if main_process:
                turn_pissa_into_lora(model, output_dir)
            if kept is not None:
                readme.write_bytes(kept)  # PEFT writes its card into a user's own
            metrics = trainer.evaluate_final_weights() if args.do_eval and rounds else metrics
        except Stopped:
            assert stop.signum is not None
            if main_process:
                manifest.write(output_dir, "stopped")
            step = trainer.state.global_step
            saved = f"at step {step}, checkpoint saved" if step else "before the first step, nothing to save"
            if step and not (output_dir / f"checkpoint-{step}").is_dir():  # on_save_error: continue
                saved = f"at step {step}, which could not be saved"
            say(f"stopped by {signal.Signals(stop.signum).name} {saved}")
            say(f"to go on: {resume_command(recipe)}")
            leave_together()
            return 128 + stop.signum
        write_results(recipe, trainer, manifest, result.metrics, metrics)
        if recipe.do_predict:
            stop.restore_default_handlers()
            to_inference(model, saved_dtype)
            predict(recipe, model, tokenizer, data.eval)
        finish_trackers(args, output_dir)
        if args.push_to_hub:
            push(trainer)
        comparison = compare_evaluations(trainer.state, recipe.load_best_model_at_end)
        for line in [*comparison, *end_report(recipe, trainer.state, result.metrics, metrics)]:
            say(line)
        leave_together()
    return 0


def push(trainer: ArpoTrainer) -> None:
    """Upload the final model; what the Hub answers does not undo a run that is saved."""
    try:
        trainer.push_to_hub()
    except Exception as error:  # the Hub's client raises what its many backends raise
        reason = " ".join(str(error).split())[:300]
        folder, hub_id = trainer.args.output_dir, trainer.hub_model_id
        raise RunFailed(
            f"push_to_hub: the model is saved in {folder} and was not uploaded ({reason}); hf upload {hub_id} {folder}"
        ) from error


def write_results(recipe: Recipe, trainer: ArpoTrainer, manifest: Manifest, trained: Any, evaluated: Any) -> None:
    """Leave the run's figures, plot and model card beside the final model."""
    output_dir = Path(recipe.output_dir)
    log = read_log(output_dir / "trainer_log.jsonl")
    trained["train_loss"] = mean_loss(log, trainer.state.global_step) or trained["train_loss"]  # since the resume
    if not trainer.is_world_process_zero():
        return
    save_metrics(output_dir, "train", trained)
    if evaluated:
        save_metrics(output_dir, "eval", evaluated)
    write_json(output_dir / "trainer_state.json", asdict(trainer.state))
    if recipe.plot_loss:
        try:
            plot_loss(log, output_dir / "training_loss.png")
        except OSError as error:  # on Windows, one that a viewer has open
            say(f"training_loss.png could not be written ({error}); the run is saved")
    write_model_card(output_dir, manifest, recipe_text(recipe))
    match_umask(output_dir)
    manifest.write(output_dir, "finished")
