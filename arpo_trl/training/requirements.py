"""What a recipe needs beside itself: files, models, packages, a device, a tracker's login.

What can be known without torch is asked for first, so that it is answered in under a second.
"""

from __future__ import annotations

import functools
import http.client
import importlib.util
import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

from ..data.files import check_datasets
from ..data.registry import select_datasets
from ..errors import DatasetError, RecipeError
from ..machine import nearest_existing_parent
from ..recipe import methods
from ..recipe.keys import Recipe
from ..report.trackers import missing_trackers
from ..run_folder import MANIFEST, read_json

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
SET_OFFLINE = "HF_HUB_OFFLINE is set"
HUB_TIMEOUT = 5.0  # seconds; huggingface_hub itself tries for more than a minute


def check_environment(recipe: Recipe) -> Recipe:
    """`check_inputs` and `check_packages`: once for a run, by the command line or by `train`. Imports no torch."""
    recipe = check_inputs(recipe)
    check_packages(recipe)
    return recipe


def check_inputs(recipe: Recipe) -> Recipe:
    """Ask for the files, datasets and models that the recipe names, and an output_dir that is free. Imports no torch.

    Returns:
        The recipe, with what the registry says of its datasets among its notices.

    Raises:
        RecipeError: all that is not there, each with the line of its key.
    """
    missing = [*_files(recipe), *_models(recipe)]
    config = {} if missing else _base_config(recipe)
    missing += methods.quantized_conflicts(recipe, config)
    if recipe.do_train and not missing:
        missing += _output_dir(recipe)
    lines = [str(recipe.error(key, what)) for key, what in missing]
    if recipe.dataset_dir.startswith("REMOTE:"):
        why_no_hub()
    try:
        recipe = check_datasets(recipe)
        if any(info.hf_hub_url for info in select_datasets(recipe)):
            why_no_hub()
    except DatasetError as error:
        lines.append(str(error))
    if lines:
        raise RecipeError(lines)
    recipe = methods.keep_quantization(recipe, config)
    if why_no_hub.cache_info().currsize and (why := why_no_hub()) not in (None, SET_OFFLINE):
        return recipe.with_notices(f"{recipe.path}: {why}; what the hub would give is taken from its cache")
    return recipe


def check_packages(recipe: Recipe) -> None:
    """Ask for the packages that the recipe needs, a tracker's login, and DeepSpeed's file. Imports no torch.

    Raises:
        RecipeError: all that is missing, each with the way out.
    """
    trackers = missing_trackers(recipe) if recipe.do_train else []  # an evaluation is not tracked
    _raise(recipe, [*_packages(recipe), *trackers])


def check_device(recipe: Recipe) -> None:
    """Ask for what the recipe needs of this machine's device.

    Raises:
        RecipeError: all that is missing, each with the way out.
    """
    import torch

    from ..model.methods.chosen import methods_of  # it imports torch

    missing = []
    if not torch.accelerator.is_available():
        for key in ("activation_offloading", "tf32"):
            if getattr(recipe, key):
                missing.append((key, "needs a GPU; remove the line"))
        if recipe.flash_attn == "flex" and recipe.do_train:
            missing.append(("flash_attn", "flex attention trains on GPUs only; write sdpa"))
    if recipe.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        missing.append(("bf16", "this GPU has no bfloat16; write bf16: false (fp16: true is faster)"))
    for method in methods_of(recipe):
        missing += method.find_missing()
    _raise(recipe, missing)


def refuse_output_dir(recipe: Recipe) -> None:
    """Raise RecipeError where a run must not begin: beside the model it trains, or over what it did not make."""
    _raise(recipe, list(_output_dir(recipe)))


def _raise(recipe: Recipe, missing: list[tuple[str, str]]) -> None:
    if missing:
        raise RecipeError([str(recipe.error(key, what)) for key, what in missing])


def _files(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.template and recipe.template.endswith(".jinja") and not isfile(recipe.template):
        yield "template", f"there is no file {recipe.template}; paths are relative to {Path.cwd()}"
    for key in ("fsdp_config", "accelerator_config"):
        if isinstance(path := getattr(recipe, key), str) and (wrong := _no_json_file(path)):
            yield key, wrong
    for key in ("output_dir", "tokenized_path", "cache_dir", "resume_from_checkpoint"):
        if isinstance(path := getattr(recipe, key), str) and (wrong := _no_folder(path)):
            yield key, wrong


def _output_dir(recipe: Recipe) -> Iterator[tuple[str, str]]:
    output_dir = Path(recipe.output_dir)
    home = output_dir.resolve()
    for model in (recipe.model_name_or_path, *recipe.adapter_name_or_path):
        path = Path(model).resolve()
        if path == home:
            yield "output_dir", f"{output_dir} is the folder of the model to be trained; name another"
        if path.parent == home and path.name.startswith("checkpoint-"):
            yield "output_dir", f"{output_dir} holds the model to be trained, {path.name}; name another"
    if recipe.resume_from_checkpoint or recipe.overwrite_output_dir:
        return
    run = read_json(output_dir / MANIFEST)
    status = run.get("status") if isinstance(run, dict) else None
    if status == "finished":
        yield (
            "output_dir",
            f"{output_dir} holds a finished run; name another folder, or set overwrite_output_dir: true to start over",
        )
    if status is None and any((output_dir / name).exists() for name in ("config.json", "adapter_config.json")):
        yield (
            "output_dir",
            f"{output_dir} holds a model that this run did not write; name another folder, or set "
            "overwrite_output_dir: true to replace it",
        )


def _no_json_file(path: str) -> str | None:
    if not isfile(path):
        return f"there is no file {path}; paths are relative to {Path.cwd()}"
    try:
        json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"{path}: expected a JSON file ({error})"
    return None


def _no_folder(path: str) -> str | None:
    try:
        there = nearest_existing_parent(Path(path))
    except (OSError, ValueError) as error:
        return f"{path}: no folder can have this name ({getattr(error, 'strerror', None) or error})"
    return f"{path}: expected a folder, and {there} is a file" if there and not there.is_dir() else None


def _models(recipe: Recipe) -> Iterator[tuple[str, str]]:
    adapters = [("adapter_name_or_path", name, "adapter_config.json") for name in recipe.adapter_name_or_path]
    for key, name, config in [("model_name_or_path", recipe.model_name_or_path, "config.json"), *adapters]:
        folder = Path(name)
        if isdir(folder):
            if not isfile(folder / config):
                yield key, f"{name}: the folder has no {config}; expected a folder that save_pretrained wrote"
        elif folder.is_absolute() or name.startswith(".") or "\\" in name or name.count("/") > 1:
            yield key, f"{name}: no such folder; paths are relative to {Path.cwd()}"
        elif _from_hub(name, config, recipe) is None and (why := why_no_hub()):
            yield (
                key,
                f"{name}: no such folder, not in the hub's cache on this machine, and {why}; give a folder's path, or "
                f"run `hf download {name}` where the hub can be reached",
            )


def _base_config(recipe: Recipe) -> dict[str, Any]:
    """Return the base's config.json; empty if it can't be read, which loading the model reports."""
    folder = Path(recipe.model_name_or_path)
    path = folder / "config.json" if isdir(folder) else _from_hub(recipe.model_name_or_path, "config.json", recipe)
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


@functools.cache
def why_no_hub() -> str | None:
    """Why the hub can't be asked, or None if it answers. Then HF_HUB_OFFLINE is set: its cache answers at once."""
    if any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in OFFLINE):
        return SET_OFFLINE
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(hub, method="HEAD"), timeout=HUB_TIMEOUT).close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(error, urllib.error.HTTPError) or isinstance(reason, ssl.SSLError):
            return None  # it answers; whether this client may ask is for huggingface_hub to say
        os.environ["HF_HUB_OFFLINE"] = "1"
        return f"{hub} can't be reached ({reason})"
    return None


def _from_hub(name: str, file: str, recipe: Recipe) -> Path | None:
    """A small file, from the hub's cache where the hub can't be asked. What is wrong with the name, loading it says."""
    from huggingface_hub import hf_hub_download

    offline = why_no_hub() is not None
    try:
        path = hf_hub_download(
            name, file, revision=recipe.model_revision, cache_dir=recipe.cache_dir, local_files_only=offline
        )
    except (OSError, ValueError):
        return None
    return Path(path)


def _packages(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.deepspeed is not None and importlib.util.find_spec("deepspeed") is None:
        yield (
            "deepspeed",
            "not installed; pip install deepspeed, or remove the line and launch with accelerate_configs/fsdp2.yaml "
            "(multi_gpu.yaml where the whole model fits one GPU)",
        )
    elif isinstance(recipe.deepspeed, str) and (wrong := _no_json_file(recipe.deepspeed)):
        yield "deepspeed", f"{wrong}. accelerate_configs/zero3.yaml needs no such file"
    packages = methods.PACKAGES | {"enable_liger_kernel": "liger_kernel"} | methods.optim_package(recipe.optim)
    for key, package in packages.items():
        if getattr(recipe, key) and importlib.util.find_spec(package) is None:
            name = "torch-optimi" if package == "optimi" else package
            yield key, f"needs {package}, which is not installed; pip install {name}, or remove the line"
