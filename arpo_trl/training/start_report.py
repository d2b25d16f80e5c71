"""What the start of a run prints: model, device, data, steps, disk, output.

Before it come the recipe's notices, after it the preflight's line.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import get_model_param_count

from ..data.prepare import PreparedData
from ..machine import free_space
from ..recipe.keys import Recipe
from ..report.console import say

if TYPE_CHECKING:
    from .trainer import ArpoTrainer


class StartReport(TrainerCallback):
    """Prints what is about to happen, so that a user sees what was not meant before it costs hours."""

    def __init__(self, recipe: Recipe, data: PreparedData, trainer: ArpoTrainer, checkpoint: Path | None) -> None:
        self.recipe, self.data, self.trainer, self.checkpoint = recipe, data, trainer, checkpoint

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: object, **kwargs: object) -> None:
        model, data, going_on = self.trainer.accelerator.unwrap_model(self.trainer.model), self.data, self.checkpoint
        for line in [
            *describe_setup(self.recipe, model, args),
            *(f"data     {line}" for line in [*data.audit.lines(), *data.notices]),
            *(f"         {name}: {len(rows):,} rows to evaluate on" for name, rows in data.eval.items()),
            f"steps    {describe_steps(args, state.max_steps, data, self.recipe.packing)}",
            f"disk     {describe_disk(args, self.trainer.save_total_limit, self.trainer.checkpoint_bytes)}",
            f"output   {args.output_dir}{f', going on from {going_on.name}' if going_on else ''}",
        ]:
            say(line)


def describe_setup(recipe: Recipe, model: PreTrainedModel | PeftModel, args: TrainingArguments) -> list[str]:
    """The model and the device, as a run and `--check` show them."""
    part = ", the text part alone" * model.config.model_type.endswith("_text")  # Qwen3.5's, whose file can see, too
    return [
        f"model    {recipe.model_name_or_path}: {describe_model(model)}, {precision(model, args)}{part}",
        f"device   {describe_device(args)}",
        *missing_gpu(recipe),
    ]


def describe_model(model: PreTrainedModel | PeftModel) -> str:
    """How many parameters there are, and how many are trained (an adapter's)."""
    total, trained = model.num_parameters(), model.num_parameters(only_trainable=True)
    if is_deepspeed_zero3_enabled():  # which leaves parameters empty, with their size beside them
        total, trained = get_model_param_count(model), get_model_param_count(model, trainable_only=True)
    if total == trained:
        return f"{total:,} parameters, all trained"
    if getattr(model, "quantization_method", None) in ("gptq", "awq", "aqlm"):  # whose weights are other tensors
        return f"{trained:,} parameters trained beside a quantized base"
    return f"{total:,} parameters, {trained:,} trained ({100 * trained / total:.2g} %)"


def precision(model: PreTrainedModel | PeftModel, args: TrainingArguments) -> str:
    """The dtype of the trained weights, and what is computed in."""
    trained = next((p.dtype for p in model.parameters() if p.requires_grad), model.dtype)
    computed = "bfloat16" if args.bf16 else "float16" if args.fp16 else None
    held = str(trained).removeprefix("torch.")
    return f"{held}, computed in {computed}" if computed and computed != held else held


def describe_device(args: TrainingArguments) -> str:
    """The kind of device, and how many share the work."""
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
    if args.device.type == "cpu":
        name += f", {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    visible = torch.cuda.device_count() if args.device.type == "cuda" else 1
    if args.world_size == 1 and visible > 1:
        return f"{name}, 1 of {visible} (accelerate launch --config_file accelerate_configs/multi_gpu.yaml takes all)"
    return name if args.world_size == 1 else f"{args.world_size} x {name}"


def missing_gpu(recipe: Recipe) -> list[str]:
    """What to say where the recipe or the launcher's config expects a GPU, and torch sees none."""
    keys = [key for key in ("bf16", "fp16", "pure_bf16") if getattr(recipe, key)]
    by_config = os.environ.get("ACCELERATE_USE_CPU", "true").lower() == "false"
    if torch.accelerator.is_available() or not (keys or by_config):
        return []
    expects = f"{keys[0]}: true" if keys else "the accelerate config"
    if torch.version.cuda or torch.version.hip:
        cause = f"torch {torch.__version__} is built for one; does `nvidia-smi` (AMD: `rocm-smi`) list it?"
    else:
        cause = (
            f"torch {torch.__version__} is a CPU build, as pip's own on Windows always is; "
            "https://pytorch.org/get-started/locally has the command that installs yours"
        )
    lines = [f"         trains on the CPU, though {expects} expects a GPU: {cause}"]
    known: dict[str, int] = getattr(torch.cpu, "get_capabilities", dict)()  # nothing before torch 2.13
    if keys and "bf16" in keys[0] and known and not any(known[name] for name in known if name.endswith("bf16")):
        slow = f"{keys[0]}: true is slower than float32 on this CPU, which has no bfloat16 instructions"
        lines.append(f"         {slow}; write {keys[0]}: false")
    return lines


def describe_steps(args: TrainingArguments, total: int, data: PreparedData, packing: bool) -> str:
    """Steps, epochs and the effective batch. Packed rows are not the rows of the audit: their tokens are left out."""
    steps = f"{total:,}"
    if args.max_steps <= 0:
        steps += f": {args.num_train_epochs:g} epoch{'s' * (args.num_train_epochs != 1)}"
    parts = [
        (args.per_device_train_batch_size, "a device"),
        (args.world_size, "devices"),
        (args.gradient_accumulation_steps, "accumulated"),
    ]
    rows = math.prod(n for n, _ in parts)
    batch = f"{rows:,} row{'s' * (rows > 1)} a step"
    if sum(n > 1 for n, _ in parts) > 1:
        batch += f" ({' x '.join(f'{n} {what}' for n, what in parts if n > 1)})"
    counts = [data.audit.datasets[name] for name in dict.fromkeys(data.trained_on)]
    kept = sum(c.rows - c.dropped for c in counts)
    if kept and not packing:
        batch += f", about {rows * sum(c.tokens for c in counts) / kept:,.0f} tokens"
    return f"{steps}, {batch}"


def describe_disk(args: TrainingArguments, save_total_limit: int | None, checkpoint_bytes: int) -> str:
    """The bytes of a checkpoint, how many are kept, and the bytes free."""
    if args.save_strategy == "no":
        saved = "no checkpoints"
    else:
        kept = f"{save_total_limit} kept" if save_total_limit else "all kept"
        saved = f"{checkpoint_bytes / 1e9:.2f} GB a checkpoint, {kept}"
    return f"{saved}; {free_space(Path(str(args.output_dir))) / 1e9:,.1f} GB free"
