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
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from . import __version__
from .callbacks import StopOnSignal, TrainerLog, format_seconds, plot_loss
from .checkpoints import (
    clear_earlier_run,
    find_resume_point,
    match_umask,
    read_manifest,
    require_free_space,
    require_same_course,
    write_json,
)
from .console import logged_to
from .dataset import PreparedData, prepare_datasets
from .preflight import Preflight
from .recipe import Recipe, RecipeError
from .template import load_tokenizer
from .trainer import ArpoTrainer
from .trl_config import (
    check_environment,
    model_init_kwargs,
    to_lora_config,
    to_quantization_config,
    to_sft_config,
)


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

    checkpoint, lines = find_resume_point(recipe) if main_process else (None, [])
    checkpoint = _from_main_process(checkpoint)
    if main_process and checkpoint is None:
        lines += clear_earlier_run(output_dir)
    with logged_to(output_dir / "training.log", keep=checkpoint is not None, enabled=main_process):
        stop = StopOnSignal()
        for line in [*recipe.notices, *lines]:
            say(line)
        tokenizer = load_tokenizer(recipe)
        data = prepare_datasets(recipe, tokenizer)
        manifest = describe_run(recipe, data)
        if checkpoint is not None:
            for line in require_same_course(read_manifest(output_dir), manifest, recipe.allow_changed_recipe):
                say(line)
        if main_process:
            write_json(output_dir / "run.json", manifest)
            write_recipe(output_dir / "recipe.yaml", recipe)

        model, saved_dtype = load_model(recipe)
        trainer = ArpoTrainer(
            model=model,
            args=args,
            train_dataset=data.train,
            eval_dataset=data.eval or None,
            processing_class=tokenizer,
            peft_config=to_lora_config(recipe, model),
            rows=data.train,
            on_save_error=recipe.on_save_error,
        )
        show_progress_our_way(trainer, output_dir, recipe.plot_loss, stop)
        if recipe.preflight:
            trainer.add_callback(Preflight(trainer))
        if main_process:
            require_free_space(output_dir, estimate_checkpoint_bytes(trainer.model), "a checkpoint")
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


def _from_main_process(checkpoint: Path | None) -> Path | None:
    """The main process's decision on every process: only one may rename a damaged checkpoint."""
    if PartialState().num_processes == 1:
        return checkpoint
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([checkpoint])[0]  # type: ignore[no-any-return]


# --- the model ---


def load_model(recipe: Recipe) -> tuple[PreTrainedModel, torch.dtype | None]:
    """The model in its training dtype, and the dtype to save it in: that of the base model's own file.

    Code in a model's folder runs only for an architecture that transformers does not have.
    """
    kwargs = model_init_kwargs(recipe)
    name = recipe.model_name_or_path
    config_kwargs = {k: kwargs[k] for k in ("revision", "cache_dir", "token") if k in kwargs}
    try:
        raw = AutoConfig.from_pretrained(
            name, trust_remote_code=kwargs.get("trust_remote_code", False), **config_kwargs
        )
        if raw.model_type in CONFIG_MAPPING and kwargs.get("trust_remote_code"):
            kwargs["trust_remote_code"] = False
        model = AutoModelForCausalLM.from_pretrained(
            name, quantization_config=to_quantization_config(recipe), **kwargs
        )
    except (OSError, ValueError) as error:
        raise RecipeError(f"model_name_or_path: {name} could not be loaded: {str(error).splitlines()[0]}") from error
    return model, None if recipe.finetuning_type == "lora" else getattr(raw, "dtype", None)


def estimate_checkpoint_bytes(model: Any) -> int:
    """Weights, and AdamW's two moments of what is trained, in bytes."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    lora = any(not p.requires_grad for p in model.parameters())
    weights = trained if lora else sum(p.numel() * p.element_size() for p in model.parameters())
    return int(weights + 2 * trained)


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
