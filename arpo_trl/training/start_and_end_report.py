"""What a run prints at its start (model, device, data, steps, disk, output) and at its end."""

import math
import os
import signal
import sys
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState, TrainingArguments, get_scheduler
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import get_model_param_count

from ..data.prepare import PreparedData
from ..errors import program
from ..machine import format_bytes, free_space
from ..model.base import lacks_bf16_instructions, uses_bf16_autocast
from ..model.split import find_split
from ..model.weights import Model
from ..recipe.keys import COMMAND_LINE, Recipe
from ..report.log_file import describe_evaluation, format_seconds, run_seconds
from ..run_folder import list_checkpoints, read_lines
from ..shell import quote_command
from .reference import report_reference
from .trainer import ArpoTrainer

MUCH_SPACE = 20e9
"""Bytes of checkpoints that are reported before a run, or fewer if they fill half of the free space."""


def start_report(recipe: Recipe, data: PreparedData, trainer: ArpoTrainer) -> list[str]:
    """Return what the run is about to do, so that a mistake in the recipe is noticed before it costs hours."""
    model, args, writer = trainer.accelerator.unwrap_model(trainer.model), trainer.args, trainer.checkpoints
    saved = f"{format_bytes(writer.expected_bytes)} per checkpoint, {writer.save_total_limit or 'all'} kept"
    if args.save_strategy == "no":
        saved = "no checkpoints"
    step, total = trainer.state.global_step, trainer.state.max_steps
    steps = checkpoint_steps(args, math.ceil(total / max(trainer.state.num_train_epochs, 1)), total)
    return [
        *describe_setup(recipe, model, args),
        *(f"data     {line}" for line in [*data.audit.lines(), *data.notices]),
        *(f"         {name}: {len(rows):,} rows to evaluate on" for name, rows in data.eval.items()),
        f"steps    {describe_steps(args, total, data, recipe.packing)}",
        *warn_of_schedule(args, total),
        f"disk     {saved}; {format_bytes(free_space(Path(recipe.output_dir)))} free",
        *warn_of_disk(Path(recipe.output_dir), writer.save_total_limit, writer.expected_bytes, len(steps)),
        f"output   {args.output_dir}{f', resuming from checkpoint-{step}' if step else ''}",
    ]


def describe_setup(recipe: Recipe, model: Model, args: TrainingArguments) -> list[str]:
    """Return the model, the device and the reference, as a run and `--check` print them."""
    # Qwen3.5's and Llama 4's, of a file with a vision part
    part = ", text part only" * model.config.model_type.endswith("_text")
    return [
        f"model    {recipe.model_name_or_path}: {describe_model(model)}, {precision(model, args)}{part}",
        f"device   {describe_device(args)}{f', {find_split(recipe)}' if args.world_size > 1 else ''}",
        *missing_gpu(recipe),
        *report_reference(recipe),
    ]


def describe_model(model: Model) -> str:
    """Return the number of parameters, and of trained ones."""
    total, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    if is_deepspeed_zero3_enabled():  # which leaves parameters empty, with their size in an attribute
        total, trained = get_model_param_count(model), get_model_param_count(model, trainable_only=True)
    if total == trained:
        return f"{total:,} parameters, all trained"
    if getattr(model, "quantization_method", None) in ("gptq", "awq", "aqlm"):  # whose weights are packed
        return f"{trained:,} parameters trained, on a quantized base"
    return f"{total:,} parameters, {trained:,} trained ({trained / total:.2%})"


def precision(model: Model, args: TrainingArguments) -> str:
    """Return the dtype of the trained weights, that of the frozen ones, and that of the computation."""
    dtypes = {
        p.requires_grad: str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()
    }
    stored = dtypes.get(True) or str(model.dtype).removeprefix("torch.")
    frozen = dtypes.get(False, stored)
    computed = "bfloat16" if args.bf16 else "float16" if args.fp16 else stored
    weights = f"{stored}, frozen weights in {frozen}" if frozen != stored else stored
    return weights if computed == stored else f"{weights}, computed in {computed}"


def describe_device(args: TrainingArguments) -> str:
    """Return the name and number of the devices."""
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
    if args.device.type == "cpu":
        name += f", {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    visible = torch.cuda.device_count() if args.device.type == "cuda" else 1
    if args.world_size == 1 and visible > 1:
        return f"{name}, 1 of {visible} (accelerate launch --config_file accelerate_configs/multi_gpu.yaml uses all)"
    return name if args.world_size == 1 else f"{args.world_size} x {name}"


def missing_gpu(recipe: Recipe) -> list[str]:
    """Return lines that warn if the recipe or the launcher's config expects a GPU, and torch finds none."""
    keys = [key for key in ("bf16", "fp16", "pure_bf16") if getattr(recipe, key)]
    by_config = os.environ.get("ACCELERATE_USE_CPU", "true").lower() == "false"
    if torch.accelerator.is_available() or not (keys or by_config):
        return []
    lines = []
    if not recipe.trl.get("use_cpu"):
        expects = f"{keys[0]}: true" if keys else "the accelerate config"
        if torch.version.cuda or torch.version.hip:
            cause = f"torch {torch.__version__} supports GPUs; does `nvidia-smi` (AMD: `rocm-smi`) list one?"
        else:
            cause = (
                f"torch {torch.__version__} is a CPU build{', as pip always installs on Windows' * (sys.platform == 'win32')}; "
                "https://pytorch.org/get-started/locally shows the right install command"
            )
        lines.append(f"         training on the CPU, although {expects} expects a GPU: {cause}")
    if recipe.bf16 and not recipe.pure_bf16 and not uses_bf16_autocast(recipe):
        reason = "which is faster on this CPU without bfloat16 instructions"
        lines.append(f"         bf16: true is computed in float32, {reason}; force_bf16: true keeps bfloat16")
    elif recipe.fp16:
        lines.append("         fp16: true is computed in float32 on a CPU")
    elif lacks_bf16_instructions() and (recipe.bf16 or recipe.pure_bf16):
        key = "pure_bf16" if recipe.pure_bf16 else "force_bf16"
        slow = f"{key}: true is slower than float32 on this CPU, which has no bfloat16 instructions"
        lines.append(f"         {slow}; set {key}: false")
    return lines


def describe_steps(args: TrainingArguments, total: int, data: PreparedData, packing: bool) -> str:
    """Return steps, epochs and the effective batch; no tokens for packed rows, which are not the audit's rows."""
    epochs = f"{args.num_train_epochs:g} epoch{'s' * (args.num_train_epochs != 1)}, " * (args.max_steps <= 0)
    parts = [
        (args.per_device_train_batch_size, "per device"),
        (args.world_size, "devices"),
        (args.gradient_accumulation_steps, "accumulated"),
    ]
    rows = math.prod(n for n, _ in parts)
    batch = f"{rows:,} row{'s' * (rows > 1)}"
    counts = [data.audit.datasets[name] for name in dict.fromkeys(data.trained_on)]
    kept = sum(c.rows - c.dropped for c in counts)
    if kept and not packing:
        batch += f" and about {rows * sum(c.tokens for c in counts) / kept:,.0f} tokens"
    batch += " per step"
    if sum(n > 1 for n, _ in parts) > 1:
        batch += f" ({' x '.join(f'{n} {name}' for n, name in parts if n > 1)})"
    return f"{total:,}: {epochs}{batch}"


def warn_of_schedule(args: TrainingArguments, total: int) -> list[str]:
    """Return a line if the learning rate of a run of `total` steps never reaches its peak."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    warmup = args.get_warmup_steps(total)
    assert not isinstance(args.lr_scheduler_kwargs, str)  # parsed by TrainingArguments
    settings = dict(args.lr_scheduler_kwargs or {})
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, warmup, total, settings)
    if not isinstance(schedule, LambdaLR) or total <= 0:
        return []
    factor = schedule.lr_lambdas[0]
    peak = max(factor(min(step, total - 1)) for step in (0, max(warmup - 1, 0), warmup))
    if peak > 0.95:
        return []
    cause, fix = f"warmup_steps {warmup:,} of {total:,} steps", "lower warmup_steps"
    if warmup < total:
        cause = str(args.lr_scheduler_type)
        fix = f"fit lr_scheduler_kwargs to the {total - warmup:,} steps after warmup"
    return [f"         {cause}: the learning rate only reaches {peak:.0%} of learning_rate; {fix}"]


def checkpoint_steps(args: TrainingArguments, per_epoch: int, total: int) -> list[int]:
    """Return the steps with a checkpoint; with save_strategy: steps, the last step is always one."""
    if args.save_strategy == "no":
        return []
    best = args.save_strategy == "best"  # at most one per evaluation
    strategy, steps = (args.eval_strategy, args.eval_steps) if best else (args.save_strategy, args.save_steps)
    every = per_epoch if strategy == "epoch" or not steps else steps
    every = math.ceil(every * total) if every < 1 else int(every)
    return sorted({*range(every, total + 1, every), total})


def warn_of_disk(folder: Path, limit: int | None, checkpoint: int, count: int) -> list[str]:
    """Return a line that names save_total_limit if it is not set (`limit`) and `count` checkpoints take much space."""
    needed = count * checkpoint
    if limit or count <= 2 or needed < min(MUCH_SPACE, free_space(folder) / 2):
        return []
    last_two = f"save_total_limit: 2 keeps the last two, {format_bytes(2 * checkpoint)}"
    return [f"         all {count:,} checkpoints take {format_bytes(needed)}; {last_two}"]


def end_report(
    recipe: Recipe, state: TrainerState, trained: dict[str, float], evaluated: dict[str, float]
) -> list[str]:
    """Return the results, and where they are."""
    lines = []
    if state.global_step < state.max_steps:
        lines.append(
            f"stopped early at step {state.global_step}: no improvement in {recipe.early_stopping_steps} evaluations"
        )
    if recipe.load_best_model_at_end and state.best_global_step:
        lines.append(f"best     step {state.best_global_step}; its weights are the final model")
    figures = [f"train loss {trained['train_loss']:.4f}", *describe_evaluation(evaluated)]
    output_dir = Path(recipe.output_dir)
    log = read_lines(output_dir / "trainer_log.jsonl")
    seconds = max(trained["train_runtime"], run_seconds(log))
    lines.append(f"done     in {format_seconds(seconds)}: {', '.join(figures)}")
    files = [name for name in ("README.md", "trainer_log.jsonl", "training_loss.png") if (output_dir / name).exists()]
    return [*lines, f"model    saved in {recipe.output_dir}, with {', '.join(files)}"]


def describe_stop(recipe: Recipe, step: int, signum: int) -> list[str]:
    """Return at which step a signal stopped the run, and how to resume it."""
    stopped = f"stopped by {signal.Signals(signum).name}"
    if not step:
        return [f"{stopped} before the first step, nothing to save; run the same command again"]
    is_saved = (Path(recipe.output_dir) / f"checkpoint-{step}").is_dir()  # else on_save_error: continue
    outcome = "checkpoint saved" if is_saved else "which could not be saved"
    return [f"{stopped} at step {step}, {outcome}", f"to resume: {resume_command(recipe)}"]


def describe_interrupt(recipe: Recipe) -> list[str]:
    """Return what a second Ctrl-C lost, and how to resume the run."""
    saved = list_checkpoints(Path(recipe.output_dir))
    if not saved:
        return ["stopped at once, without a checkpoint; run the same command again to start over"]
    return [
        f"stopped at once, without saving; the last checkpoint is {saved[-1]}",
        f"to resume: {resume_command(recipe)}",
    ]


def resume_command(recipe: Recipe) -> str:
    """Return the command that resumes this run. A launcher's own flags are unknown here."""
    added = ["resume_from_checkpoint=true"] if recipe.overwrite_output_dir or recipe.resume_from_checkpoint else []
    if "WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ:
        return " ".join(["the same command", *(f"with {override}" for override in added)])
    words = [a for a in sys.argv[1:] if not a.startswith(("resume_from_checkpoint=", "--resume_from_checkpoint="))]
    if recipe.path != COMMAND_LINE:
        verb = ["train"] if words[:1] == ["train"] else []
        words = [*verb, recipe.path.as_posix(), *(a for a in words[len(verb) :] if a != str(recipe.path))]
    command = [*program().split(), *words, *added]  # the last value of a key wins
    return quote_command(command)
