"""LLaMA-Factory's vocabulary beyond the keys of keys.py, its template names, and recipes of its other commands.

The tables are in llamafactory.toml.
"""

import difflib
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path

import yaml

from ..errors import program
from ..shell import quote_command

_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
RENAMED: dict[str, str] = _TABLES["renamed"]
IGNORED = {key: reason for reason, keys in _TABLES["ignored"].items() for key in keys.split()}
NOT_SUPPORTED = {key: reason for reason, keys in _TABLES["not_supported"].items() for key in keys.split()}
# values of unsupported keys that request nothing
NO_OP: dict[str, object] = {
    key: yaml.safe_load(value) for key, value in (pair.split("=") for pair in _TABLES["no_op"]["values"].split())
}
# template names: rendered as LLaMA-Factory does; served by the tokenizer's own template; not supported
SHIPPED: frozenset[str] = frozenset(_TABLES["templates"]["shipped"].split())
TOKENIZERS_OWN: frozenset[str] = frozenset(_TABLES["templates"]["tokenizers_own"].split())
MULTIMODAL: frozenset[str] = frozenset(_TABLES["templates"]["multimodal"].split())

# Number of GPUs that share a row in Megatron (mcore_adapter and LLaMA-Factory's bridge) and in sequence parallelism
_SPLITS_ROWS = """
    tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size sequence_parallel_size""".split()
_V1_KEYS = {"model", "train_dataset", "peft_config", "kernel_config", "quant_config", "dist_config", "model_class"}
_INFERENCE_KEYS = {"infer_backend", "infer_dtype", "do_sample", "vllm_maxlen", "vllm_enforce_eager", "sglang_maxlen"}


def check_template_name(template: str) -> str | None:
    """Return the problem with the value of `template`, or None. A .jinja path is not opened here."""
    if template.endswith(".jinja") or template in SHIPPED | TOKENIZERS_OWN:
        return None
    if template in MULTIMODAL:
        return f"{template} is a template for images, video or sound, which are not supported; omit template for text rows"
    near = difflib.get_close_matches(template, sorted(SHIPPED | TOKENIZERS_OWN), n=1)
    return (
        f"unknown template {template!r}{f'; did you mean {near[0]}?' if near else '.'} Use a LLaMA-Factory name "
        "(--help template) or a .jinja file, or omit the key for the tokenizer's own template"
    )


def recognize(settings: Mapping[str, object]) -> str | None:
    """Return what to do instead, if the keys are LLaMA-Factory's v1 format or belong to another of its commands."""
    model, adapter = settings.get("model_name_or_path"), settings.get("adapter_name_or_path")
    if any(key.startswith(("top.", "train.")) for key in settings):
        return "LLaMA Board's saved settings are not supported; pass the flags shown by its Preview command button"
    if _V1_KEYS & settings.keys() and not model:
        v1_keys = ", ".join(f"{key}:" for key in settings if key in _V1_KEYS)
        return f"LLaMA-Factory's v1 format ({v1_keys}) is not supported; use its flat keys (--help all)"
    if {"task", "task_dir", "n_shot"} & settings.keys() and "do_train" not in settings:
        return "LLaMA-Factory's benchmark recipes are not supported; use lm-evaluation-harness"
    if not model or {"output_dir", "do_train", "dataset"} & settings.keys():
        return None
    if "export_dir" in settings:
        if not adapter:
            return "this is a LLaMA-Factory export recipe without an adapter; a trained model needs no export"
        command = f"{program()} {quote_command(['merge', str(adapter), str(settings['export_dir'] or 'OUT')])}"
        return f"this is a LLaMA-Factory export recipe; to merge the adapter, run: {command}"
    if _INFERENCE_KEYS & settings.keys() or ("template" in settings and "stage" not in settings):
        command = f"{program()} {quote_command(['chat', str(adapter or model)])}"
        return f"this is a LLaMA-Factory chat or API recipe; to chat with the model, run: {command}"
    return None


def larger_batch(settings: Mapping[str, object]) -> str | None:
    """Return a notice if several GPUs would share a row: here each GPU has its own rows, so a step has more of them."""
    names = [*_SPLITS_ROWS, *(["expert_model_parallel_size"] if settings.get("use_megatron_bridge") is True else [])]
    sizes = {key: size for key in names if isinstance(size := settings.get(key), int) and 1 < size < 10_000}
    times, steps = math.prod(sizes.values()), settings.get("gradient_accumulation_steps") or 1
    if times == 1 or settings.get("global_batch_size"):
        return None
    fix = f"use 1/{times} of the GPUs"
    if isinstance(steps, int) and steps % times == 0:
        fix = f"set gradient_accumulation_steps: {steps // times}"
    return (
        f"{', '.join(sizes)}: each GPU has its own rows here, {times}x as many per step; {fix} to keep the batch size"
    )
