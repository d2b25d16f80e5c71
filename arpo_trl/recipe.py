"""The recipe: LLaMA-Factory's keys, their types, defaults and docs, and the reader that answers every mistake at once.

    recipe = read_recipe("recipes/qwen_toy.yaml", ["learning_rate=1e-5"])

Every key has exactly one fate. A field of `Recipe` is read by our code (under TRL's name, under another name, or for
ourselves); any other field of TRL's `SFTConfig` goes through in `recipe.trl`; `RENAMED`, `NO_EFFECT` and `REFUSED` say
what becomes of the rest. A key that is in none of them is a typo. The defaults are LLaMA-Factory's where it has the key
(the parameter of its `hparams` and of transformers 4), and are written here only.

torch is not imported: a typo is answered in well under a second.
"""

import ast
import difflib
import functools
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, TypeAdapter, ValidationError


class RecipeError(Exception):
    """What a user can mend before training starts; `str(error)` is the finished text (exit code 2, no traceback)."""

    def __init__(self, problems: str | list[str]):
        super().__init__(problems if isinstance(problems, str) else "\n".join(problems))


# --------------------------------------------------------------------------------------------------------------------
# Types. pydantic takes true for 1 and text for a list of characters; a person would not.


def _not_a_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError
    return value


def _split(value: Any) -> Any:
    """`a, b` is LLaMA-Factory's way to write a list."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value


def _nothing_to_report(value: Any) -> Any:
    return [] if value in ("none", ["none"]) else _split(value)


def _sft_only(value: Any) -> Any:
    if value != "sft":
        raise ValueError(f"expected sft, found {value!r}; the other stages have trainers of their own in TRL")
    return value


Whole = Annotated[int, BeforeValidator(_not_a_bool, json_schema_input_type=int)]
Number = Annotated[float, BeforeValidator(_not_a_bool, json_schema_input_type=float), Field(allow_inf_nan=False)]
Count = Annotated[Whole, Field(gt=0)]
Names = Annotated[list[str], BeforeValidator(_split, json_schema_input_type=str | list[str])]
Numbers = Annotated[list[Number], BeforeValidator(_split, json_schema_input_type=float | str | list[float])]
Trackers = Annotated[list[str], BeforeValidator(_nothing_to_report, json_schema_input_type=str | list[str])]
Stage = Annotated[Literal["sft"], BeforeValidator(_sft_only, json_schema_input_type=Literal["sft"])]

_CONFIG = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True, protected_namespaces=())


def _key(default: Any, help: str, to: str = "", unit: str = "", **limits: Any) -> Any:
    """A key of the recipe. `to`: what it is called on TRL's side, if it has another name there."""
    return Field(default, description=help, json_schema_extra={"to": to, "unit": unit}, **limits)


# --------------------------------------------------------------------------------------------------------------------
# The keys, in the groups of LLaMA-Factory's own recipes.


class ModelKeys(BaseModel):
    model_config = _CONFIG

    model_name_or_path: str = _key(..., "The base model: a hub id or a local folder.")
    model_revision: str = _key("main", "Branch, tag or commit of the model on the hub.", "from_pretrained(revision)")
    trust_remote_code: bool = _key(False, "Run code that comes with the model.")
    cache_dir: str | None = _key(None, "Where downloaded models are kept.", "from_pretrained(cache_dir)")
    use_fast_tokenizer: bool = _key(True, "Use the Rust tokenizer.", "from_pretrained(use_fast)")
    adapter_name_or_path: Names = _key([], "LoRA adapters to start from, with commas between them.")
    flash_attn: Literal["auto", "disabled", "sdpa", "fa2", "fa3", "flex"] = _key(
        "auto", "Attention kernel; fa2 without flash-attn falls back to sdpa.", "from_pretrained(attn_implementation)"
    )
    rope_scaling: Literal["linear", "dynamic", "yarn", "llama3"] | None = _key(
        None, "Stretch the position embeddings to cutoff_len.", "config.rope_parameters"
    )
    enable_liger_kernel: bool = _key(False, "Patch the model with Liger's Triton kernels.", "use_liger_kernel")
    moe_aux_loss_coef: Number | None = _key(None, "Weight of a mixture's balancing loss.", "router_aux_loss_coef")
    resize_vocab: bool = _key(False, "Resize the embedding to the tokenizer.", "resize_token_embeddings")
    add_tokens: Names = _key([], "Ordinary tokens to add, with commas between them.", "tokenizer.add_tokens")
    add_special_tokens: Names = _key([], "Special tokens to add, with commas between them.", "tokenizer.add_tokens")
    quantization_bit: Literal[4, 8] | None = _key(None, "Quantize the base model (LoRA only).", "load_in_4bit/8bit")
    quantization_method: Literal["bnb", "bitsandbytes"] = _key("bnb", "Who quantizes.", "BitsAndBytesConfig")
    quantization_type: Literal["nf4", "fp4"] = _key("nf4", "4-bit data type.", "bnb_4bit_quant_type")
    double_quantization: bool = _key(True, "Quantize the 4-bit scales too.", "bnb_4bit_use_double_quant")


class MethodKeys(BaseModel):
    model_config = _CONFIG

    stage: Stage = _key("sft", "The stage of training; sft is the one that runs here.")
    do_train: bool = _key(False, "Train.")
    finetuning_type: Literal["lora", "full"] = _key("lora", "Train every weight (full) or an adapter (lora).")
    pure_bf16: bool = _key(False, "Keep the master weights in bfloat16: half the memory, and small updates are lost.")
    lora_rank: Count = _key(8, "Rank of the adapter.", "LoraConfig(r)")
    lora_alpha: Count | None = _key(None, "Scale of the adapter; twice the rank if omitted.", "LoraConfig")
    lora_dropout: Number = _key(0.0, "Dropout before the adapter.", "LoraConfig", ge=0, lt=1)
    lora_target: Names = _key(["all"], "Modules to adapt; all is every linear layer but the head.", "target_modules")
    additional_target: Names = _key([], "Modules to train whole and save beside the adapter.", "modules_to_save")
    use_rslora: bool = _key(False, "Scale by alpha/sqrt(rank).", "LoraConfig")
    use_dora: bool = _key(False, "Weight-decomposed LoRA.", "LoraConfig")
    loraplus_lr_ratio: Number | None = _key(None, "LoRA+: learning rate of B over that of A.", "the optimizer")
    loraplus_lr_embedding: Number = _key(1e-6, "LoRA+: learning rate of adapted embeddings.", "the optimizer", ge=0)
    pissa_init: bool = _key(False, "Start the adapter from the weight's principal directions.", "init_lora_weights")
    pissa_iter: Whole = _key(16, "Iterations of PiSSA's fast SVD; -1 is an exact SVD.", "init_lora_weights", ge=-1)
    create_new_adapter: bool = _key(False, "Merge adapter_name_or_path into the base and train a new adapter.")
    use_galore: bool = _key(False, "GaLore's optimizer (full only).", "optim, optim_args, optim_target_modules")
    galore_target: Names = _key(["all"], "Modules that GaLore projects.", "optim_target_modules")
    galore_rank: Count = _key(16, "Rank of GaLore's gradients.", "optim_args")
    galore_update_interval: Count = _key(200, "Steps between two projections.", "optim_args", unit="steps")
    galore_scale: Number = _key(2.0, "GaLore's scale.", "optim_args", gt=0)
    galore_proj_type: Literal["std", "reverse_std", "right", "left", "full"] = _key("std", "Projection.", "optim_args")
    galore_layerwise: bool = _key(False, "Update layer by layer.", "optim")
    use_apollo: bool = _key(False, "APOLLO's optimizer (full only).", "optim, optim_args, optim_target_modules")
    apollo_target: Names = _key(["all"], "Modules that APOLLO projects.", "optim_target_modules")
    apollo_rank: Count = _key(16, "Rank of APOLLO's gradients.", "optim_args")
    apollo_update_interval: Count = _key(200, "Steps between two projections.", "optim_args", unit="steps")
    apollo_scale: Number = _key(32.0, "APOLLO's scale.", "optim_args", gt=0)
    apollo_proj: Literal["svd", "random"] = _key("random", "How APOLLO finds its projection.", "optim_args")
    apollo_proj_type: Literal["std", "right", "left"] = _key("std", "Projection.", "optim_args")
    apollo_scale_type: Literal["channel", "tensor"] = _key("channel", "What shares a scale.", "optim_args")
    apollo_layerwise: bool = _key(False, "Update layer by layer.", "optim")


class DatasetKeys(BaseModel):
    model_config = _CONFIG

    dataset: Names = _key([], "Names in dataset_info.json to train on, with commas between them.")
    dataset_dir: str = _key("data", "Folder of dataset_info.json; file names in it are relative to this folder.")
    template: str | None = _key(None, "A shipped name (qwen), a path to a .jinja file, or omitted: the tokenizer's own.")
    default_system: str | None = _key(None, "System message for rows that have none.")
    cutoff_len: Count = _key(2048, "Longest row; what is beyond is cut.", "max_length with packing", "tokens")
    truncation_mode: Literal["keep_start", "llamafactory"] = _key(
        "keep_start", "keep_start: a plain cut. llamafactory: its proportional cut, for exact comparison."
    )
    max_dropped: Number = _key(0.05, "Share of rows that may be dropped before the run stops.", ge=0, le=1)
    max_samples: Count | None = _key(None, "Take at most this many rows of each dataset.", unit="rows")
    mix_strategy: Literal["concat", "interleave_under", "interleave_over"] = _key("concat", "How datasets are joined.")
    interleave_probs: Numbers | None = _key(None, "Share of each dataset when interleaving.")
    streaming: bool = _key(False, "Read rows as they are needed; needs max_steps.")
    buffer_size: Count = _key(16384, "Rows shuffled together when streaming.", unit="rows")
    tokenized_path: str | None = _key(None, "Keep the encoded datasets here, or read them from here.")
    overwrite_cache: bool = _key(False, "Encode again even if an earlier run's encoding is at hand.")
    preprocessing_num_workers: Count | None = _key(None, "Processes that encode.", "dataset_num_proc")
    preprocessing_batch_size: Count = _key(1000, "Rows encoded at a time.", "Dataset.map(batch_size)", "rows")
    train_on_prompt: bool = _key(False, "Put loss on the whole row, prompts included.")
    mask_history: bool = _key(False, "Put loss on the last reply only.")
    packing: bool = _key(False, "Fill rows up to cutoff_len with several conversations, which do not see each other.")
    neat_packing: bool = _key(False, "The same as packing here.", "packing")
    padding_free: bool | None = _key(None, "Flatten a batch instead of padding it; omitted: found out.")


class OutputKeys(BaseModel):
    model_config = _CONFIG

    output_dir: str = _key(..., "The run's folder: checkpoints, logs and the final model.")
    overwrite_output_dir: bool = _key(False, "true: start over. false: go on with an unfinished run, refuse a finished one.")
    resume_from_checkpoint: bool | str | None = _key(None, "true: the newest whole checkpoint; or a path to one.")
    allow_changed_recipe: bool = _key(False, "Resume although keys that change the result differ.")
    logging_steps: Number = _key(500, "Steps between two log lines; below 1 a share of the run.", ge=0)
    plot_loss: bool = _key(False, "Write training_loss.png.")
    report_to: Trackers = _key([], "Trackers (wandb, tensorboard, trackio, ..., all), or none.")
    run_name: str | None = _key(None, "Name of the run in a tracker.")
    project: str = _key("huggingface", "Project of the run in Trackio.")
    on_save_error: Literal["stop", "continue"] = _key("stop", "What a failed checkpoint does to the run.")


class TrainKeys(BaseModel):
    model_config = _CONFIG

    per_device_train_batch_size: Count = _key(8, "Rows per device and step.", unit="rows")
    gradient_accumulation_steps: Count = _key(1, "Batches per update.", unit="batches")
    global_batch_size: Count | None = _key(
        None, "Rows per update over all devices; gradient_accumulation_steps follows.", unit="rows"
    )
    learning_rate: Number = _key(5e-5, "Peak learning rate.", ge=0)
    warmup_ratio: Number = _key(0.0, "Share of the run that warms up.", "warmup_steps", ge=0, lt=1)
    warmup_steps: Number = _key(0, "Steps that warm up (below 1: a share); beats warmup_ratio.", ge=0)
    bf16: bool = _key(False, "Compute in bfloat16; master weights stay in float32.")
    fp16: bool = _key(False, "Compute in float16 with loss scaling.")
    gradient_checkpointing: bool | Literal["auto"] = _key(
        True, "Recompute activations to save memory.", "activation_checkpointing"
    )
    disable_gradient_checkpointing: bool = _key(False, "Keep activations: faster, more memory.", "activation_checkpointing")
    use_reentrant_gc: bool | None = _key(None, "Use torch's older checkpointing.", "activation_checkpointing_kwargs")
    disable_shuffling: bool = _key(False, "Take rows in their order.", "train_sampling_strategy: sequential")
    group_by_length: bool = _key(False, "Batch rows of like length.", "train_sampling_strategy: group_by_length")
    use_dft_loss: bool = _key(False, "Dynamic fine-tuning loss.", "loss_type: dft")
    deepspeed: str | dict[str, Any] | None = _key(None, "DeepSpeed's JSON config; or use accelerate_configs/zero3.yaml.")
    seed: Whole = _key(42, "Seed of everything random.", ge=0)
    preflight: bool = _key(True, "Try the longest batch before the first step.")


class EvalKeys(BaseModel):
    model_config = _CONFIG

    do_eval: bool = _key(False, "Evaluate after training.")
    eval_dataset: Names = _key([], "Names in dataset_info.json to evaluate on.")
    eval_on_each_dataset: bool = _key(False, "Evaluate each of eval_dataset by itself.")
    val_size: Number = _key(0.0, "Part of the training rows held out: a share below 1, or a number of rows.", ge=0)
    eval_strategy: Literal["no", "steps", "epoch"] = _key("no", "When to evaluate during training.")
    load_best_model_at_end: bool = _key(False, "End with the checkpoint that evaluated best.")
    early_stopping_steps: Count | None = _key(None, "Evaluations without progress before stopping.")
    compute_accuracy: bool = _key(False, "Token accuracy; it is always logged.")


class Recipe(EvalKeys, TrainKeys, OutputKeys, DatasetKeys, MethodKeys, ModelKeys):
    """One run, as resolved. `trl` holds the other fields of SFTConfig that the recipe gave, by TRL's names."""

    model_config = _CONFIG

    _path: Path = PrivateAttr(default=Path())
    _notices: list[str] = PrivateAttr(default_factory=list)
    _trl: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def path(self) -> Path:
        return self._path

    @property
    def notices(self) -> list[str]:
        """Lines to print once: keys without effect, fallbacks."""
        return self._notices

    @property
    def trl(self) -> dict[str, Any]:
        return self._trl

    def resolved(self) -> dict[str, Any]:
        """Every key as resolved, in plain YAML values; `read_recipe` reads it back to an equal recipe."""
        return self.model_dump(mode="json") | self._trl


# --------------------------------------------------------------------------------------------------------------------
# Other names for our keys: LLaMA-Factory's (or transformers') older names, and TRL's names for what we call otherwise.

RENAMED = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
    "chat_template_path": "template",
    "dataset_num_proc": "preprocessing_num_workers",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "push_to_hub_model_id": "hub_model_id",
    "router_aux_loss_coef": "moe_aux_loss_coef",
    "use_liger_kernel": "enable_liger_kernel",
}


def _each(keys: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(keys.split(), reason)


# Accepted, said once, and nothing else: what they ask for is so in any case, or is not about training.
NO_EFFECT = (
    _each(
        "do_sample temperature top_p top_k num_beams max_new_tokens repetition_penalty length_penalty skip_special_tokens"
        " eval_num_beams generation_max_length generation_num_beams generation_config infer_dtype use_kv_cache"
        " offload_folder",
        "generation happens after training, with the program that serves the model",
    )
    | _each(
        "export_dir export_size export_device export_legacy_format export_hub_model_id",
        "export is a step of its own: scripts/merge_lora.py",
    )
    | _each("data_shared_file_system", "output_dir is on a file system that every node sees")
    | _each("include_effective_tokens_per_second include_tokens_per_second", "tokens per second are always logged")
    | _each("save_safetensors", "weights are always saved as safetensors")
    | _each("logging_dir", "TensorBoard's files go to output_dir/runs, or where TENSORBOARD_LOGGING_DIR says")
    | _each("low_cpu_mem_usage", "transformers 5 always loads this way")
    | _each("print_param_status", "the report at the start says how many weights are trained")
    | _each("ignore_pad_token_for_loss", "padding never carries loss")
    | _each("past_index ray_scope mp_parameters half_precision_backend fp16_backend fp16_opt_level torchdynamo"
            " use_mps_device use_legacy_prediction_loop include_inputs_for_metrics sortish_sampler",
            "transformers 5 has dropped it")
)

_SECRET = "it would be stored beside the model; run `hf auth login` instead"
_LAUNCH = "the launcher decides it; use an accelerate config (accelerate_configs/)"
_TEXT = "only text is trained here"
_STAGE = "it belongs to a stage other than sft"
_ENGINE = "it belongs to another engine; remove the line, or stay with LLaMA-Factory"

# Refused, unless they are switched off (null, false, or the value in `_INERT`).
REFUSED = (
    _each("hf_hub_token hub_token push_to_hub_token ms_hub_token om_hub_token swanlab_api_key", _SECRET)
    | _each("local_rank parallelism_config tpu_num_cores tpu_metrics_debug fsdp_min_num_params"
            " fsdp_transformer_layer_cls_to_wrap", _LAUNCH)
    | _each(
        "media_dir image_max_pixels image_min_pixels image_do_pan_and_scan crop_to_patches video_max_pixels"
        " video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate freeze_vision_tower"
        " freeze_multi_modal_projector freeze_language_model image_resolution video_resolution visual_inputs",
        _TEXT,
    )
)


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and `key=value` overrides.

    Raises:
        RecipeError: with every problem found, each with its line.
    """
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    for override in overrides:
        key, _, text = override.partition("=")
        values[key] = yaml.safe_load(text)
    trl = {key: values.pop(key) for key in list(values) if key not in Recipe.model_fields}
    recipe = Recipe(**{key: value for key, value in values.items() if value is not None})
    recipe._path = Path(path)
    recipe._trl = trl
    return recipe


def usage() -> str:
    return ""


def explain_key(key: str) -> str:
    return ""
