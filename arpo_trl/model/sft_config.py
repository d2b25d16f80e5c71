"""Recipe -> SFTConfig, LoraConfig and the arguments of `from_pretrained`: a recipe's keys in TRL's, PEFT's and transformers' terms."""

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
from .base import compute_dtype, hub_kwargs, uses_bf16_autocast, uses_fp16
from .methods.chosen import methods_of
from .methods.method import Keywords
from .split import fsdp_config, requests_fsdp, uses_deepspeed

_KERNELS = {"disabled": "eager", "sdpa": "sdpa", "flex": "flex_attention"}
_KERNELS |= {"fa2": "flash_attention_2", "fa3": "flash_attention_3"}
_FSDP: dict[str, Keywords] = {"full_shard": {"reshard_after_forward": True}, "offload": {"cpu_offload": True}}
_FSDP |= {"shard_grad_op": {"reshard_after_forward": False}, "auto_wrap": {}}
_SAME = """
    output_dir trust_remote_code do_train do_eval do_predict eval_strategy load_best_model_at_end
    per_device_train_batch_size num_train_epochs learning_rate logging_steps save_strategy save_steps run_name
    seed packing padding_free
""".split()


def to_sft_config(recipe: Recipe) -> SFTConfig:
    """Return the recipe's SFTConfig. Rows are already truncated and encoded: TRL only packs them, if at all.

    Raises:
        RecipeError: transformers or TRL rejects a value or a combination of keys.
    """
    settings, overrides = _settings(recipe), {"deepspeed": recipe.deepspeed, **_trl_keys(recipe)}
    if os.environ.get("ACCELERATE_MIXED_PRECISION") in ("bf16", "fp16"):
        os.environ["ACCELERATE_MIXED_PRECISION"] = "no"  # the recipe sets the precision, not the launcher
    if not uses_deepspeed(recipe):
        overrides["deepspeed"] = None
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    if not requests_fsdp(recipe):
        overrides |= {"fsdp": None, "fsdp_config": None}
        os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        config = SFTConfig(**settings | overrides)
    except Exception as error:  # they raise many types
        raise _rejected(recipe, settings, overrides) from error
    _check_scheduler(recipe, config)
    _check_batches(recipe, config)
    # Without a launcher, use one of several visible GPUs: TRL does not support nn.DataParallel, with which Trainer
    # would use them all (https://github.com/huggingface/trl/blob/v1.16.0/trl/trainer/sft_trainer.py#L1118).
    config._n_gpu = min(config.n_gpu, 1)
    if wandb_is_disabled():
        config.report_to = [tracker for tracker in config.report_to or [] if tracker != "wandb"]  # from `all`
    return config


def _settings(recipe: Recipe) -> Keywords:
    """Return the arguments that LLaMA-Factory's keys set."""
    settings: Keywords = {name: getattr(recipe, name) for name in _SAME} | {
        # evaluation needs less memory than training
        "per_device_eval_batch_size": recipe.per_device_eval_batch_size or recipe.per_device_train_batch_size,
        "report_to": recipe.report_to or "none",
        "bf16": uses_bf16_autocast(recipe),
        "fp16": uses_fp16(recipe),
        "gradient_accumulation_steps": _accumulation(recipe),
        "warmup_steps": recipe.warmup_steps or recipe.warmup_ratio,  # transformers 5 reads a value below 1 as a ratio
        "activation_checkpointing": bool(recipe.gradient_checkpointing),
        "gradient_checkpointing": None,  # the default of TRL, True, causes a FutureWarning
        "use_liger_kernel": recipe.enable_liger_kernel,
        "router_aux_loss_coef": 0.0,  # by default TRL adds the loss of the model's config.json
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


def _trl_keys(recipe: Recipe) -> Keywords:
    """Return the recipe's other keys of SFTConfig, and what they imply."""
    checkpointing = dict(recipe.trl.get("activation_checkpointing_kwargs") or {})
    if recipe.use_reentrant_gc is not None:
        checkpointing["use_reentrant"] = recipe.use_reentrant_gc
    overrides = recipe.trl | _fsdp(recipe) | {"activation_checkpointing_kwargs": checkpointing or None}
    if (metric := overrides.get("metric_for_best_model")) and overrides.get("greater_is_better") is None:
        # transformers assumes that greater is better unless the name ends in "loss".
        overrides["greater_is_better"] = not metric.endswith(("loss", "perplexity", "entropy"))
    if overrides.get("lr_scheduler_type") == "reduce_lr_on_plateau" and overrides.get("greater_is_better"):
        # torch reduces the rate unless the metric falls, whatever transformers takes for better.
        overrides["lr_scheduler_kwargs"] = {"mode": "max", **(overrides.get("lr_scheduler_kwargs") or {})}
    return overrides


def _fsdp(recipe: Recipe) -> Keywords:
    """Return `fsdp: full_shard auto_wrap` as `fsdp: true` and fsdp_config. Leave other words and FSDP 1 to transformers.

    It deprecates the words: https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/training_args.py#L2889
    """
    words, config = (recipe.fsdp or "").split(), recipe.fsdp_config or {}
    if isinstance(config, str):
        config = json.loads(Path(config).read_text(encoding="utf-8"))
    if not words or not _FSDP.keys() >= {*words} or not isinstance(config, dict):
        return {}
    if str(fsdp_config(recipe)["version"]) != "2":
        return {}
    implied = [setting for word in reversed(words) for setting in _FSDP[word].items()]  # the first word wins
    return {"fsdp": True, "fsdp_config": dict(implied) | config}


def _check_scheduler(recipe: Recipe, config: SFTConfig) -> None:
    """Create the learning rate schedule, as transformers does after the model is loaded. Raises RecipeError."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=config.learning_rate)
    name, settings = SchedulerType(config.lr_scheduler_type), recipe.trl.get("lr_scheduler_kwargs")
    try:
        get_scheduler(name, optimizer, 0, 10, scheduler_specific_kwargs=dict(settings or {}))
    except (TypeError, ValueError, ArithmeticError) as error:
        key = "lr_scheduler_kwargs" if settings else "lr_scheduler_type"
        reason = f"{name.value}: {in_one_line(error)}"
        fix = "correct its arguments" if settings else "set its arguments in lr_scheduler_kwargs"
        raise recipe.error(key, f"{reason}; {fix}") from error


def _check_batches(recipe: Recipe, config: SFTConfig) -> None:
    """Raise RecipeError for settings of Accelerate that change which rows a batch has: the trainer counts on the default."""
    settings: Any = config.accelerator_config
    for name, wrong, effect in (
        ("split_batches", True, "makes per_device_train_batch_size the rows of all devices"),
        ("dispatch_batches", True, "reads all rows in one process"),
        ("even_batches", False, "leaves processes with different numbers of batches, which then wait for each other"),
    ):
        if getattr(settings, name, None) is wrong:
            problem = f"{name}: {str(wrong).lower()} is not supported, since it {effect}; remove the line"
            raise recipe.error("accelerator_config", problem)


def _rejected(recipe: Recipe, settings: Keywords, overrides: Keywords) -> RecipeError:
    """Return what transformers and TRL report about each key, by adding one key at a time."""
    if reason := _reason(settings):
        return RecipeError(f"{recipe.path}: rejected by transformers: {reason}")
    problems = []
    for key, value in overrides.items():
        if reason := _reason(settings | {key: value}):
            problems.append(str(recipe.error(key, reason)))
        else:
            settings[key] = value
    return RecipeError(problems)


def _reason(settings: Keywords) -> str | None:
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
    needs_float32 = dtype == "auto" and (recipe.additional_target or not torch.accelerator.is_available())
    if not recipe.pure_bf16 and (recipe.finetuning_type == "full" or needs_float32):
        dtype = torch.float32
    kwargs: Keywords = {"dtype": dtype, **hub_kwargs(recipe)}
    if recipe.flash_attn != "auto":
        kwargs["attn_implementation"] = _KERNELS[recipe.flash_attn]
    kwargs |= _rope(recipe, config)
    for method in methods_of(recipe):
        kwargs = method.from_pretrained(kwargs, config)
    return kwargs


def _accumulation(recipe: Recipe) -> int:
    """Return the batches per update with which all devices together see `global_batch_size` rows."""
    if recipe.global_batch_size is None:
        return recipe.gradient_accumulation_steps
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rows = recipe.per_device_train_batch_size * world
    if recipe.global_batch_size % rows:
        factors = f"per_device_train_batch_size {recipe.per_device_train_batch_size} x {world} processes"
        problem = f"expected a multiple of {rows} ({factors}), found {recipe.global_batch_size}"
        raise recipe.error("global_batch_size", problem)
    return recipe.global_batch_size // rows


def _rope(recipe: Recipe, config: PreTrainedConfig) -> Keywords:
    """Scale the position embeddings by the smallest integer that covers cutoff_len, as LLaMA-Factory does."""
    if recipe.rope_scaling is None:
        return {}
    parameters = getattr(config, "rope_parameters", None)
    length = getattr(config, "max_position_embeddings", None)
    if not parameters or not length or any(isinstance(value, dict) for value in parameters.values()):
        raise rope_error(recipe, config)
    if recipe.cutoff_len <= length:
        return {}
    factor = math.ceil(recipe.cutoff_len / length)
    rope = {**parameters, "rope_type": recipe.rope_scaling, "factor": float(factor)}
    if recipe.rope_scaling != "linear":
        rope["original_max_position_embeddings"] = length
    if recipe.rope_scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_parameters": rope, "max_position_embeddings": length * factor}


def rope_error(recipe: Recipe, config: PreTrainedConfig) -> RecipeError:
    """Return the error for models without rotary embeddings, and with different ones per type of layer (Gemma 3)."""
    limit = getattr(config, "max_position_embeddings", 0)
    shorter = f" and set cutoff_len to at most {limit}" if limit else ""
    what = f"not supported: {config.model_type} has no rope_type that applies to all its layers"
    return recipe.error("rope_scaling", f"{what}; remove the line{shorter}")
