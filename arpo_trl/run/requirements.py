"""What a recipe needs of this machine: packages, DeepSpeed's file, a tracker's login."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from ..errors import RecipeError
from ..recipe.keys import Recipe
from ..report.trackers import missing_trackers


def check_environment(recipe: Recipe) -> None:
    """Ask for what the recipe needs and this machine lacks, before the model is loaded.

    Raises:
        RecipeError: all that is missing, each with the way out.
    """
    trackers = missing_trackers(recipe) if recipe.do_train else []  # an evaluation tells none
    missing = [line for line in (_deepspeed(recipe), *trackers) if line]
    optim = str(recipe.trl.get("optim", ""))
    needs = [
        (recipe.quantization_bit is not None, "quantization_bit", "bitsandbytes", "remove the line"),
        (recipe.enable_liger_kernel, "enable_liger_kernel", "liger_kernel", "remove the line"),
        (recipe.use_galore, "use_galore", "galore_torch", "use another optimizer"),
        (recipe.use_apollo, "use_apollo", "apollo_torch", "use another optimizer"),
        ("galore" in optim, "optim", "galore_torch", "use another optimizer"),
        ("apollo" in optim, "optim", "apollo_torch", "use another optimizer"),
        ("8bit" in optim or "paged" in optim, "optim", "bitsandbytes", "use another optimizer"),
    ]
    for wanted, key, package, or_else in needs:
        if wanted and importlib.util.find_spec(package) is None:
            missing.append(f"{key}: needs {package}, which is not installed; pip install {package}, or {or_else}")
    if not torch.accelerator.is_available():
        for key in ("activation_offloading", "tf32"):
            if recipe.trl.get(key):
                missing.append(f"{key}: needs a GPU; remove the line")
        if recipe.flash_attn == "flex" and recipe.do_train:
            missing.append("flash_attn: flex attention trains on GPUs only; write sdpa")
    if recipe.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        missing.append("bf16: this GPU has no bfloat16; write bf16: false (fp16: true is faster)")
    if missing:
        header = f"{recipe.path}: {len(missing)} thing{'s' * (len(missing) > 1)} missing on this machine"
        raise RecipeError([header, *(f"  {line}" for line in missing)])


def _deepspeed(recipe: Recipe) -> str | None:
    if recipe.deepspeed is None:
        return None
    if importlib.util.find_spec("deepspeed") is None:
        return (
            "deepspeed: not installed; pip install deepspeed, or remove the line and launch with "
            "accelerate_configs/fsdp2.yaml (multi_gpu.yaml where the whole model fits one GPU)"
        )
    if isinstance(recipe.deepspeed, str) and not Path(recipe.deepspeed).is_file():
        return (
            f"deepspeed: there is no file {recipe.deepspeed}; paths are relative to {Path.cwd()}. "
            "accelerate_configs/zero3.yaml needs no such file"
        )
    return None
