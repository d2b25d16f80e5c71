"""Recipe -> SFTConfig, LoraConfig, BitsAndBytesConfig: the only file that knows both vocabularies."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, OFTConfig
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig, SchedulerType, get_scheduler
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config
from trl.trainer.sft_config import SFTConfig

from ..errors import RecipeError, in_one_line
from ..recipe.keys import Recipe
from ..recipe.rules import wandb_is_disabled

Keywords = dict[str, Any]
"""Of a library's constructor."""

# The output layer stays as it is in LLaMA-Factory, whose `all` means the linear layers before it.
_ALL_BUT_THE_HEAD = r"(?!.*(lm_head|output_layer)).*"
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
    return settings | _low_rank_optimizer(recipe)


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


def to_adapter_config(recipe: Recipe, tied: bool) -> LoraConfig | OFTConfig:
    """The adapter. `tied`: whether the model's head is its embeddings."""
    if recipe.finetuning_type == "oft":
        return OFTConfig(
            task_type="CAUSAL_LM",
            r=recipe.oft_rank,
            oft_block_size=recipe.oft_block_size,
            module_dropout=recipe.module_dropout,
            target_modules="all-linear" if "all" in recipe.oft_target else recipe.oft_target,
            modules_to_save=recipe.additional_target or None,
        )
    start: Any = True
    if recipe.pissa_init:
        start = "pissa" if recipe.pissa_iter == -1 else f"pissa_niter_{recipe.pissa_iter}"
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha or 2 * recipe.lora_rank,
        lora_dropout=recipe.lora_dropout,
        target_modules="all-linear" if "all" in recipe.lora_target else recipe.lora_target,
        modules_to_save=recipe.additional_target or None,
        use_rslora=recipe.use_rslora,
        use_dora=recipe.use_dora,
        init_lora_weights=start,
        ensure_weight_tying=tied
        and not {"embed_tokens", "lm_head"}.isdisjoint([*recipe.additional_target, *recipe.lora_target]),
    )


def to_quantization_config(recipe: Recipe) -> BitsAndBytesConfig | None:
    if recipe.quantization_bit is None:
        return None
    if recipe.quantization_bit == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = _compute_dtype(recipe) or torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=recipe.quantization_type,
        bnb_4bit_use_double_quant=recipe.double_quantization,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=dtype,  # FSDP shards only what has one dtype
    )


def splits_model(recipe: Recipe) -> bool:
    """Whether FSDP or ZeRO-3 will split the model: asked before there is an Accelerator, after `to_sft_config`."""
    fsdp = recipe.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true"
    return bool(fsdp or is_deepspeed_zero3_enabled())


def quantization_of(config: PreTrainedConfig) -> Keywords:
    """How a base is quantized already, as its config.json says; empty if it isn't."""
    return getattr(config, "quantization_config", None) or {}


def settle_packed(config: PreTrainedConfig) -> bool:
    """Have a base that GPTQ, AWQ or AQLM quantized unpacked by what has a backward. Returns whether one did."""
    packed = quantization_of(config)
    method = packed.get("quant_method")
    if method in ("gptq", "awq"):
        packed["backend"] = "auto_trainable"  # the fastest kernels of gptqmodel have none
    elif method == "aqlm" and (names := packed.get("linear_weights_not_to_quantize")):
        # Its files name weights. transformers 5.24 looks for modules, and would replace the head that is not quantized:
        # https://github.com/huggingface/transformers/pull/44577
        packed["linear_weights_not_to_quantize"] = [name.removesuffix(".weight") for name in names]
    return method in ("gptq", "awq", "aqlm")


def unpack_whole(config: PreTrainedConfig) -> Keywords:
    """What `from_pretrained` is told of a base in MXFP4 or FP8 (gpt-oss, DeepSeek-V3): as in LLaMA-Factory, unpack it all.

    transformers 5.24 does so by itself only where it finds no kernel for them, and these have no backward.
    """
    made = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}.get(quantization_of(config).get("quant_method", ""))
    return {"quantization_config": made(dequantize=True)} if made else {}


def model_init_kwargs(recipe: Recipe) -> Keywords:
    """What `from_pretrained` is told.

    Weights that are trained are float32, also under bf16 autocast: in bfloat16, steps below 1/256 of a weight round to
    nothing. A frozen base is in the dtype of the computation, or in its file's, unless parts of it are trained whole or
    a CPU, slow in bfloat16, computes.
    """
    dtype: torch.dtype | str = _compute_dtype(recipe) or "auto"
    whole = recipe.additional_target or recipe.finetuning_type == "freeze"
    if recipe.pure_bf16:
        dtype = torch.bfloat16
    elif recipe.use_badam:
        dtype = "auto"  # it keeps the block that it trains in float32
    elif recipe.finetuning_type == "full" or (dtype == "auto" and (whole or not torch.accelerator.is_available())):
        dtype = torch.float32
    kwargs: Keywords = {"dtype": dtype, **hub_kwargs(recipe)}
    if recipe.flash_attn != "auto":
        kwargs["attn_implementation"] = _KERNELS[recipe.flash_attn]
    return kwargs | _rope(recipe)


def load_model_config(recipe: Recipe) -> PreTrainedConfig:
    """The model's own config, as its file has it."""
    config: PreTrainedConfig = AutoConfig.from_pretrained(recipe.model_name_or_path, **hub_kwargs(recipe))
    return config


def hub_kwargs(recipe: Recipe) -> Keywords:
    """Where the model comes from, and whether its own code may run: only if transformers has none for it."""
    return {
        "revision": recipe.model_revision,
        "cache_dir": recipe.cache_dir,
        "trust_remote_code": recipe.trust_remote_code and not _is_built_in(recipe),
    }


def _is_built_in(recipe: Recipe) -> bool:
    """Whether transformers has the architecture, so that no code from the model's folder is needed. Runs none."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(
            recipe.model_name_or_path, revision=recipe.model_revision, cache_dir=recipe.cache_dir
        )
    except (OSError, ValueError):
        return False  # loading the model says what is wrong
    return config.get("model_type") in CONFIG_MAPPING


def _compute_dtype(recipe: Recipe) -> torch.dtype | None:
    if recipe.bf16 or recipe.pure_bf16:
        return torch.bfloat16
    return torch.float16 if recipe.fp16 else None


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


def _low_rank_optimizer(recipe: Recipe) -> Keywords:
    """GaLore and APOLLO, as transformers takes them. (Its GaLore keeps galore_torch's epsilon, 1e-6.)"""
    if not (recipe.use_galore or recipe.use_apollo):
        return {}
    kind, names = "galore", "rank update_interval scale proj_type"
    if recipe.use_apollo:
        kind, names = "apollo", "rank update_interval scale proj proj_type scale_type"
    target, layerwise = getattr(recipe, f"{kind}_target"), getattr(recipe, f"{kind}_layerwise")
    args = {name: getattr(recipe, f"{kind}_{name}") for name in names.split()}
    return {
        "optim": f"{kind}_adamw{'_layerwise' * layerwise}",
        "optim_args": ",".join(f"{key}={value}" for key, value in args.items()).replace(
            "update_interval", "update_proj_gap"
        ),
        "optim_target_modules": _ALL_BUT_THE_HEAD if "all" in target else target,
    }


def _rope(recipe: Recipe) -> Keywords:
    """Stretch the position embeddings by the whole factor that covers cutoff_len, as LLaMA-Factory does."""
    if recipe.rope_scaling is None:
        return {}
    config = load_model_config(recipe)
    given = getattr(config, "rope_parameters", None)
    length = getattr(config, "max_position_embeddings", None)
    if not given or not length or any(isinstance(value, dict) for value in given.values()):
        raise rope_is_ignored(recipe, config)
    if recipe.cutoff_len <= length:
        return {}
    factor = math.ceil(recipe.cutoff_len / length)
    rope = {**given, "rope_type": recipe.rope_scaling, "factor": float(factor)}
    if recipe.rope_scaling != "linear":
        rope["original_max_position_embeddings"] = length
    if recipe.rope_scaling == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_parameters": rope, "max_position_embeddings": length * factor}


def rope_is_ignored(recipe: Recipe, config: PreTrainedConfig) -> RecipeError:
    """For models without rotary positions, and for those with a set of them for each type of layer (Gemma 3)."""
    limit = getattr(config, "max_position_embeddings", 0)
    shorter = f" and write cutoff_len: {limit} or less" if limit else ""
    what = f"{config.model_type} does not read one rope_type for all its layers"
    return recipe.error("rope_scaling", f"{what}; remove the line{shorter}")
