"""The whole run, top to bottom."""

from __future__ import annotations

import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState

from . import __version__
from .callbacks import StopOnSignal, TrainerLog, format_seconds, plot_loss
from .checkpoints import (
    clear_earlier_run,
    find_resume_point,
    match_umask,
    missing_space,
    read_manifest,
    require_same_course,
    write_json,
)
from .console import logged_to
from .dataset import PreparedData, prepare_datasets
from .model import keep_adapter_in_float32, load_model, to_optimizer, turn_pissa_into_lora
from .preflight import Preflight
from .recipe import Recipe, RecipeError
from .template import load_tokenizer
from .trainer import ArpoTrainer
from .trl_config import check_environment, to_sft_config


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
    main_process = PartialState().is_main_process
    output_dir = Path(recipe.output_dir)

    checkpoint, lines = on_main_process(lambda: find_resume_point(recipe))
    with logged_to(output_dir / "training.log", keep=checkpoint is not None, enabled=main_process):
        stop = StopOnSignal()
        for line in [*recipe.notices, *lines]:
            say(line)
        tokenizer = load_tokenizer(recipe)
        data = prepare_datasets(recipe, tokenizer)
        manifest = describe_run(recipe, data)
        if checkpoint is not None:
            earlier, allowed = read_manifest(checkpoint.parent), recipe.allow_changed_recipe
            for line in on_main_process(lambda: require_same_course(earlier, manifest, allowed)):
                say(line)

        model, saved_dtype = load_model(recipe)
        trainer = ArpoTrainer(
            model=model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.eval or None,
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=to_optimizer(recipe, args),
            rows=data.train,
            on_save_error=recipe.on_save_error,
        )
        keep_adapter_in_float32(model)
        show_progress_our_way(trainer, output_dir, recipe.plot_loss, stop)
        if recipe.preflight:
            trainer.add_callback(Preflight(trainer))
        if main_process:
            for line in clear_earlier_run(output_dir) if checkpoint is None else []:
                say(line)
            if full := missing_space(output_dir, trainer.checkpoint_bytes, "a checkpoint"):
                raise RecipeError(full)
            write_json(output_dir / "run.json", manifest)
            write_recipe(output_dir / "recipe.yaml", recipe)
            report(recipe, data, trainer, checkpoint)

        result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)

        if stop.signum is not None and trainer.state.global_step < trainer.state.max_steps:
            if main_process:
                write_json(output_dir / "run.json", manifest | {"status": "stopped"})
            say(f"stopped by {signal.Signals(stop.signum).name} at step {trainer.state.global_step}, checkpoint saved")
            say(f"to go on: {resume_command(recipe)}")
            return 128 + stop.signum
        trainer.save_final_model(saved_dtype)
        trainer.save_metrics("train", result.metrics)
        trainer.save_state()
        if main_process:
            turn_pissa_into_lora(model, output_dir)
            match_umask(output_dir)
            if recipe.plot_loss:
                plot_loss(output_dir / "trainer_log.jsonl", output_dir / "training_loss.png")
            write_json(output_dir / "run.json", manifest | {"status": "finished"})
        say(f"done in {format_seconds(result.metrics['train_runtime'])}: train loss {result.training_loss:.4f}")
        say(f"model {output_dir}  log {output_dir / 'trainer_log.jsonl'}  plot {output_dir / 'training_loss.png'}")
    return 0


def say(line: str) -> None:
    """Print a line on the main process."""
    if PartialState().is_main_process:
        print(line, flush=True)


def on_main_process(decide: Callable[[], Any]) -> Any:
    """The main process's answer on every process, its `RecipeError` too: only one may touch the run's folder."""
    answer: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            answer[0] = decide()
        except RecipeError as error:
            answer[1] = error
    if PartialState().num_processes > 1:
        from accelerate.utils import broadcast_object_list

        answer = broadcast_object_list(answer)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


# --- what is told and written ---


def show_progress_our_way(trainer: ArpoTrainer, output_dir: Path, plot: bool, stop: StopOnSignal) -> None:
    """Replace the progress bar that prints dictionaries by our log, and listen for signals."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(TrainerLog(trainer, output_dir / "trainer_log.jsonl", plot))
    trainer.add_callback(stop)


def report(recipe: Recipe, data: PreparedData, trainer: ArpoTrainer, checkpoint: Path | None) -> None:
    """Print what is about to happen, before the first step."""
    args = trainer.args
    model: Any = trainer.model
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    precision = "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else "no autocast"
    print(
        f"model    {recipe.model_name_or_path}: {trained:,} of {total:,} parameters trained, {model.dtype}, {precision}"
    )
    print(f"device   {args.device} x {args.world_size}")
    for line in data.audit.lines():
        print(f"data     {line}")
    print(
        f"batch    {args.per_device_train_batch_size} rows x {args.gradient_accumulation_steps} accumulated "
        f"x {args.world_size} processes = {batch} rows a step"
    )
    print(f"output   {recipe.output_dir}" + (f", resumed from {checkpoint.name}" if checkpoint else ""), flush=True)


def describe_run(recipe: Recipe, data: PreparedData) -> dict[str, Any]:
    """The manifest run.json: all that decides the weights, and what made them."""
    return {
        "status": "running",
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "recipe": recipe.resolved(),
        "data": data.fingerprints,
        "template_hash": data.template_hash,
        "audit": data.audit.to_dict(),
        "world_size": PartialState().num_processes,
        "versions": {
            name: version(name) for name in ("torch", "transformers", "trl", "accelerate", "datasets", "peft")
        }
        | {"arpo_trl": __version__, "python": platform.python_version()},
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """The commit of the working directory, or None outside a repository."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def write_recipe(path: Path, recipe: Recipe) -> None:
    """Write the recipe as resolved, so that the folder alone tells how the model was made."""
    text = yaml.safe_dump(json.loads(json.dumps(recipe.resolved())), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def resume_command(recipe: Recipe) -> str:
    """The command line that goes on with this run."""
    overrides = [a for a in sys.argv[2:] if not a.startswith("resume_from_checkpoint=")]
    if recipe.overwrite_output_dir:
        overrides.append("resume_from_checkpoint=true")
    launcher = "accelerate launch -m" if "ACCELERATE_MIXED_PRECISION" in os.environ else "python -m"
    return shlex.join([*launcher.split(), "arpo_trl", str(recipe.path), *overrides])
