"""Recipe -> SFTConfig, LoraConfig, BitsAndBytesConfig: the only file that knows both vocabularies."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import PreTrainedConfig, SchedulerType, get_scheduler
from trl.trainer.sft_config import SFTConfig

from ..errors import RecipeError, in_one_line
from ..recipe.keys import Recipe
from ..recipe.rules import wandb_is_disabled
from .base_config import compute_dtype, hub_kwargs
from .methods.chosen import methods_of

Keywords = dict[str, Any]
"""Of a library's constructor."""

_KERNELS = {"disabled": "eager", "sdpa": "sdpa", "flex": "flex_attention"}
_KERNELS |= {"fa2": "flash_attention_2", "fa3": "flash_attention_3"}
_FSDP: dict[str, Keywords] = {"full_shard": {"reshard_after_forward": True}, "offload": {"cpu_offload": True}}
_FSDP |= {"shard_grad_op": {"reshard_after_forward": False}, "auto_wrap": {}}
_SAME = """
    output_dir trust_remote_code do_train do_eval do_predict eval_strategy load_best_model_at_end
    per_device_train_batch_size num_train_epochs learning_rate logging_steps save_strategy save_steps run_name
    seed fp16 packing padding_free deepspeed
""".split()


def to_sft_config(recipe: Recipe) -> SFTConfig:
    """What SFTTrainer is told. Rows arrive cut and encoded: TRL prepares nothing, unless it packs.

    Raises:
        RecipeError: what transformers says against a combination of keys.
    """
    settings, given = _settings(recipe), _given(recipe)
    try:
        config = SFTConfig(**settings | given)
    except Exception as error:  # what transformers says against a value has many types
        raise _refused(recipe, settings, given) from error
    _try_scheduler(recipe, config)
    # Of several visible GPUs a process without a launcher takes one: TRL refuses nn.DataParallel, Trainer's way to use
    # them all (https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/sft_trainer.py#L1118).
    config._n_gpu = min(config.n_gpu, 1)
    if wandb_is_disabled():
        config.report_to = [tracker for tracker in config.report_to or [] if tracker != "wandb"]  # left by `all`
    if config.mixed_precision in ("bf16", "fp16") and not (config.bf16 or config.fp16):
        config.mixed_precision = "no"  # the recipe decides what is computed, the launcher only where
    return config


def _settings(recipe: Recipe) -> Keywords:
    """What LLaMA-Factory's keys mean."""
    settings: Keywords = {name: getattr(recipe, name) for name in _SAME} | {
        # evaluation needs no more memory than training did
        "per_device_eval_batch_size": recipe.per_device_eval_batch_size or recipe.per_device_train_batch_size,
        "report_to": recipe.report_to or "none",
        "bf16": recipe.bf16 and not recipe.pure_bf16,
        "gradient_accumulation_steps": _accumulation(recipe),
        "warmup_steps": recipe.warmup_steps or recipe.warmup_ratio,  # below 1 it is a share, since transformers 5
        "activation_checkpointing": bool(recipe.gradient_checkpointing),
        "gradient_checkpointing": None,  # TRL's default, True, would be answered with a FutureWarning
        "use_liger_kernel": recipe.enable_liger_kernel,
        # without the key TRL would add the loss of the model's own config
        "router_aux_loss_coef": recipe.moe_aux_loss_coef or 0.0,
        "dataset_num_proc": recipe.preprocessing_num_workers,
        "loss_type": "dft" if recipe.use_dft_loss else "nll",
        "train_sampling_strategy": (
            "sequential" if recipe.disable_shuffling else "group_by_length" if recipe.group_by_length else "random"
        ),
        "max_length": recipe.cutoff_len if recipe.packing else None,
        "dataset_kwargs": None if recipe.packing else {"skip_prepare_dataset": True},
        "use_cpu": not torch.accelerator.is_available(),
    }
    if recipe.project:
        settings["project"] = recipe.project
    for method in methods_of(recipe):
        settings |= method.sft_config()
    return settings


def _given(recipe: Recipe) -> Keywords:
    """The keys that are SFTConfig's own, and what follows from them."""
    checkpointing = dict(recipe.trl.get("activation_checkpointing_kwargs") or {})
    if recipe.use_reentrant_gc is not None:
        checkpointing["use_reentrant"] = recipe.use_reentrant_gc
    given = recipe.trl | _fsdp(recipe) | {"activation_checkpointing_kwargs": checkpointing or None}
    if (metric := given.get("metric_for_best_model")) and given.get("greater_is_better") is None:
        # transformers takes whatever does not end in "loss" for better when greater.
        given["greater_is_better"] = not metric.endswith(("loss", "perplexity", "entropy"))
    return given


def _fsdp(recipe: Recipe) -> Keywords:
    """`fsdp: full_shard auto_wrap` as true and settings of fsdp_config. Other words, and FSDP 1's, transformers reads.

    It warns of the words, and will drop them: https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/training_args.py#L2889
    """
    words, config = (recipe.fsdp or "").split(), recipe.fsdp_config or {}
    if isinstance(config, str):
        config = json.loads(Path(config).read_text(encoding="utf-8"))
    versions = {str(config.get(name, 2)) for name in ("version", "fsdp_version")} if isinstance(config, dict) else ()
    if not words or not _FSDP.keys() >= {*words} or versions != {"2"}:
        return {}
    meant = [setting for word in reversed(words) for setting in _FSDP[word].items()]  # of two, the first counts
    return {"fsdp": True, "fsdp_config": dict(meant) | config}


def _try_scheduler(recipe: Recipe, config: SFTConfig) -> None:
    """Ask for the learning rate's schedule, which transformers would make after the model is loaded."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    name, settings = SchedulerType(config.lr_scheduler_type), recipe.trl.get("lr_scheduler_kwargs")
    try:
        get_scheduler(name, optimizer, 0, 10, scheduler_specific_kwargs=dict(settings or {}))
    except (TypeError, ValueError) as error:
        key = "lr_scheduler_kwargs" if settings else "lr_scheduler_type"
        reason = f"{name.value}: {in_one_line(error)}"
        raise recipe.error(key, f"{reason}; lr_scheduler_kwargs holds what a schedule needs") from error


def _refused(recipe: Recipe, settings: Keywords, given: Keywords) -> RecipeError:
    """What transformers and TRL say against each key, found by giving them one more key at a time."""
    if reason := _objection(settings):
        return RecipeError(f"{recipe.path}: transformers refuses: {reason}")
    problems = []
    for key, value in given.items():
        if reason := _objection(settings | {key: value}):
            problems.append(str(recipe.error(key, reason)))
        else:
            settings[key] = value
    return RecipeError(problems)


def _objection(settings: Keywords) -> str | None:
    try:
        SFTConfig(**settings)
    except Exception as error:
        return in_one_line(error)
    return None


def to_lora_config(recipe: Recipe, tied: bool) -> LoraConfig:
    """Return the adapter's config. `tied`: whether the model's head is its embedding."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha or 2 * recipe.lora_rank,
        lora_dropout=recipe.lora_dropout,
        target_modules="all-linear" if "all" in recipe.lora_target else recipe.lora_target,
        modules_to_save=recipe.additional_target or None,
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
        ensure_weight_tying=tied
        and not {"embed_tokens", "lm_head"}.isdisjoint([*recipe.additional_target, *recipe.lora_target]),
    )


def model_init_kwargs(recipe: Recipe, config: PreTrainedConfig) -> Keywords:
    """Return the arguments of `from_pretrained`. `config` is the base's; a quantized base's is changed.

    Trained weights are float32, also under bf16 autocast: in bfloat16, steps below 1/256 of a weight round to zero. A
    frozen base is in the dtype of the computation or of its file, but in float32 if it has trained modules or on a CPU,
    which is slow in bfloat16.
    """
    dtype: torch.dtype | str = compute_dtype(recipe) or "auto"
    if recipe.pure_bf16:
        dtype = torch.bfloat16
    elif recipe.finetuning_type == "full" or (
        dtype == "auto" and (recipe.additional_target or not torch.accelerator.is_available())
    ):
        dtype = torch.float32
    kwargs: Keywords = {"dtype": dtype, **hub_kwargs(recipe)}
    if recipe.flash_attn != "auto":
        kwargs["attn_implementation"] = _KERNELS[recipe.flash_attn]
    kwargs |= _rope(recipe, config)
    for method in methods_of(recipe):
        kwargs = method.from_pretrained(kwargs, config)
    return kwargs


def _accumulation(recipe: Recipe) -> int:
    """Batches per update, so that all devices together see `global_batch_size` rows."""
    if recipe.global_batch_size is None:
        return recipe.gradient_accumulation_steps
    world = int(os.environ.get("WORLD_SIZE", "1"))
    at_once = recipe.per_device_train_batch_size * world
    if recipe.global_batch_size % at_once:
        raise recipe.error(
            "global_batch_size",
            f"expected a multiple of {at_once} (per_device_train_batch_size "
            f"{recipe.per_device_train_batch_size} x {world} processes), found {recipe.global_batch_size}",
        )
    return recipe.global_batch_size // at_once


def _rope(recipe: Recipe, config: PreTrainedConfig) -> Keywords:
    """Stretch the position embeddings by the whole factor that covers cutoff_len, as LLaMA-Factory does."""
    if recipe.rope_scaling is None:
        return {}
    given = getattr(config, "rope_parameters", None)
    length = getattr(config, "max_position_embeddings", None)
    if not given or not length or any(isinstance(value, dict) for value in given.values()):
        raise rope_error(recipe, config)
    if recipe.cutoff_len <= length:
        return {}
    factor = math.ceil(recipe.cutoff_len / length)
    rope = {**given, "rope_type": recipe.rope_scaling, "factor": float(factor)}
    if recipe.rope_scaling != "linear":
        rope["original_max_position_embeddings"] = length
    if recipe.rope_scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_parameters": rope, "max_position_embeddings": length * factor}


def rope_error(recipe: Recipe, config: PreTrainedConfig) -> RecipeError:
    """For models without rotary positions, and for those with a set of them for each type of layer (Gemma 3)."""
    limit = getattr(config, "max_position_embeddings", 0)
    shorter = f" and write cutoff_len: {limit} or less" if limit else ""
    what = f"{config.model_type} does not read one rope_type for all its layers"
    return recipe.error("rope_scaling", f"{what}; remove the line{shorter}")
