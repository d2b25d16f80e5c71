"""The checks of a recipe that need no torch: files, models, packages, a tracker's login, the output folder."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import re
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from os.path import isdir, isfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..data.sources import check_datasets, uses_hub
from ..errors import DatasetError, RecipeError, in_one_line, reason
from ..machine import find_invalid_name, nearest_existing_parent
from ..recipe import methods
from ..recipe.keys import Recipe
from ..recipe.preference import needs_reference
from ..report.trackers import missing_trackers
from ..run_folder import MANIFEST, read_json

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
HUB_TIMEOUT = 5.0  # seconds; huggingface_hub tries for more than a minute


def check_before_torch(recipe: Recipe, starts_run: bool = True) -> Recipe:
    """Check all that needs no torch, so that a typo is reported in less than a second. See setup.py for the rest."""
    recipe = check_inputs(recipe, starts_run)
    check_packages(recipe)
    return recipe


def check_inputs(recipe: Recipe, starts_run: bool = True) -> Recipe:
    """Check that the files, datasets and models of a recipe exist, and that output_dir is free.

    Without `starts_run`, a finished run in output_dir is only a notice.

    Returns:
        The recipe, with notices about its datasets and the Hub.

    Raises:
        RecipeError: all that is missing, each with the line of its key.
    """
    is_remote = any(not isdir(name) and _is_hub_id(name) for _, name, _ in _model_names(recipe))
    hub = probe_hub() if is_remote or recipe.dataset_dir.startswith("REMOTE:") else None
    missing = [*_files(recipe), *_models(recipe, hub)]
    config = {} if missing else _config(recipe.model_name_or_path, recipe, hub)
    missing += methods.quantized_conflicts(recipe, config)
    missing += _vocabulary(recipe, config, hub) if config else []
    finished = list(_finished_run(recipe)) if recipe.do_train and not missing else []
    if recipe.do_train and not missing:
        missing += [*_output_dir(recipe), *(finished if starts_run else [])]
    lines = [str(recipe.error(key, problem)) for key, problem in missing]
    try:
        if hub is None and uses_hub(recipe):
            hub = probe_hub()  # before rows are read
        recipe = check_datasets(recipe)
    except DatasetError as error:
        lines.append(str(error))
    if lines:
        raise RecipeError(lines)
    recipe = methods.keep_quantization(recipe, config)
    if recipe.trust_remote_code and (not config or _has_own_code(recipe.model_name_or_path, config)):
        recipe = recipe.with_notices(
            f"trust_remote_code: code of {recipe.model_name_or_path} is run if transformers does not support its architecture"
        )
    recipe = recipe.with_notices(*(f"{key}: {problem}" for key, problem in finished))
    if hub and hub.status == "unreachable":
        recipe = recipe.with_notices(f"{recipe.path}: {hub.reason}; files of the Hub are taken from its cache")
    return recipe


def check_packages(recipe: Recipe) -> None:
    """Check that the recipe's packages are installed, its tracker has a login, and DeepSpeed's file exists.

    Raises:
        RecipeError: all that is missing, each with the fix.
    """
    trackers = missing_trackers(recipe) if recipe.do_train else []  # an evaluation is not tracked
    raise_problems(recipe, [*_packages(recipe), *trackers, *_push_to_hub(recipe)])


def _push_to_hub(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield why the final model can't be pushed; Trainer would find out after the model is loaded."""
    if not (recipe.do_train and recipe.trl.get("push_to_hub")):
        return
    hub = probe_hub()
    if hub.status != "reachable":
        yield "push_to_hub", f"{hub.reason}; remove the line, and run `hf upload` after the run"
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        HfApi(token=recipe.trl.get("hub_token")).whoami()
    except LocalTokenNotFoundError:
        yield "push_to_hub", "no Hub token on this machine; run `hf auth login`, set HF_TOKEN, or remove the line"
    except (HfHubHTTPError, OSError) as error:
        problem = f"the Hub rejects the token ({in_one_line(error)})"
        yield "push_to_hub", f"{problem}; run `hf auth login`, or remove the line"


def check_output_dir(recipe: Recipe) -> None:
    """Raise RecipeError if output_dir is the folder of the model to train, or has a model that must not be replaced."""
    raise_problems(recipe, [*_output_dir(recipe), *_finished_run(recipe)])


def raise_problems(recipe: Recipe, problems: list[tuple[str, str]]) -> None:
    """Raise a RecipeError of all problems, pairs of a key and what is wrong with it, if there are any."""
    if problems:
        raise RecipeError([str(recipe.error(key, problem)) for key, problem in problems])


def _files(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.template and recipe.template.endswith(".jinja") and not isfile(recipe.template):
        yield "template", f"{recipe.template}: no such file{_relative(recipe.template)}"
    for key in ("fsdp_config", "accelerator_config"):
        if isinstance(path := getattr(recipe, key), str) and (problem := _no_json_file(path)):
            yield key, problem
    for key in ("output_dir", "tokenized_path", "cache_dir", "resume_from_checkpoint"):
        if not isinstance(path := getattr(recipe, key), str):
            continue
        if sys.platform == "win32" and (problem := find_invalid_name(path)):
            yield key, f"{path}: {problem}"
            continue
        try:
            existing = nearest_existing_parent(Path(path))
            if existing is None:
                yield key, f"there is no drive {Path(path).absolute().anchor}; choose another folder"
            elif not existing.is_dir():
                yield key, f"{path}: expected a folder, but {existing} is a file"
        except (OSError, ValueError) as error:
            yield key, f"{path}: not a valid folder name ({reason(error)})"


def _finished_run(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield that output_dir contains a finished run, which would not be resumed or replaced."""
    keeps = not (recipe.resume_from_checkpoint or recipe.overwrite_output_dir)
    if keeps and _run_status(Path(recipe.output_dir)) == "finished":
        problem = "contains a finished run; choose another folder, or set overwrite_output_dir: true to start over"
        yield "output_dir", f"{recipe.output_dir} {problem}"


def _run_status(output_dir: Path) -> str | None:
    run = read_json(output_dir / MANIFEST)
    return run.get("status") if isinstance(run, dict) else None


def _output_dir(recipe: Recipe) -> Iterator[tuple[str, str]]:
    output_dir = Path(recipe.output_dir)
    home = output_dir.resolve()
    for key, name, _ in _model_names(recipe):
        path, model = Path(name).resolve(), "the reference" if key.startswith("ref_") else "the model to train"
        if path == home:
            yield "output_dir", f"{output_dir} is the folder of {model}; choose another folder"
        if path.parent == home and path.name.startswith("checkpoint-"):
            yield "output_dir", f"{output_dir} contains {model}, {path.name}; choose another folder"
    if recipe.resume_from_checkpoint or recipe.overwrite_output_dir:
        return
    if _run_status(output_dir) is None and any(
        (output_dir / name).exists() for name in ("config.json", "adapter_config.json")
    ):
        yield (
            "output_dir",
            f"{output_dir} contains a model that was not written by a run; choose another folder, or set "
            "overwrite_output_dir: true to replace it",
        )


def _relative(path: str) -> str:
    """Return the folder that a relative path starts from, as the end of a message."""
    return "" if Path(path).is_absolute() else f"; paths are relative to {Path.cwd()}"


def _no_json_file(path: str) -> str | None:
    if not isfile(path):
        return f"{path}: no such file{_relative(path)}"
    try:
        json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"{path}: expected a JSON file ({error})"
    return None


def _models(recipe: Recipe, hub: Hub | None) -> Iterator[tuple[str, str]]:
    for key, name, config in _model_names(recipe):
        folder = Path(name)
        if isdir(folder):
            if not isfile(folder / config):
                yield key, f"{name}: {config} is missing; expected a folder written by save_pretrained"
        elif not _is_hub_id(name):
            yield key, f"{name}: no such folder{_relative(name)}"
        elif _from_hub(name, config, recipe, hub) is None and hub and hub.reason:
            yield (
                key,
                f"{name}: no such folder, not in the Hub's cache on this machine, and {hub.reason}; use a folder's path, "
                f"or run `hf download {name}` with access to the Hub",
            )


def _model_names(recipe: Recipe) -> list[tuple[str, str, str]]:
    """Return the key, the name and the config file of the base, of each adapter, and of the reference."""
    models = {"model_name_or_path": recipe.model_name_or_path}
    adapters = {"adapter_name_or_path": recipe.adapter_name_or_path}
    if needs_reference(recipe) and recipe.ref_model:
        models |= {"ref_model": recipe.ref_model}
        adapters |= {"ref_model_adapters": recipe.ref_model_adapters}
    return [(key, name, "config.json") for key, name in models.items()] + [
        (key, name, "adapter_config.json") for key, names in adapters.items() for name in names
    ]


def _is_hub_id(name: str) -> bool:
    return not (Path(name).anchor or name.startswith(".") or re.search(r"[\\:]", name) or name.count("/") > 1)


def _vocabulary(recipe: Recipe, config: dict[str, Any], hub: Hub | None) -> Iterator[tuple[str, str]]:
    """Check that the reference has a log-probability for each of the model's tokens."""
    if not (needs_reference(recipe) and recipe.ref_model):
        return
    base, reference = map(_vocabulary_size, (config, _config(recipe.ref_model, recipe, hub)))
    if base and reference and base != reference:
        what = (
            f"{recipe.ref_model} has {reference:,} tokens in its vocabulary, {recipe.model_name_or_path} has {base:,}"
        )
        yield "ref_model", f"{what}; use a reference with the same vocabulary"


def _vocabulary_size(config: dict[str, Any]) -> int | None:
    return config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")


def _config(name: str, recipe: Recipe, hub: Hub | None) -> dict[str, Any]:
    """Return a model's config.json; empty if it can't be read, which loading the model reports."""
    path = Path(name, "config.json") if isdir(name) else _from_hub(name, "config.json", recipe, hub)
    config = read_json(path) if path else {}
    return config if isinstance(config, dict) else {}


class Hub(NamedTuple):
    """Whether the Hub can be asked, and if not, why."""

    status: Literal["reachable", "offline", "unreachable"]
    reason: str = ""


def probe_hub() -> Hub:
    """Return whether the Hub answers. If not, set HF_HUB_OFFLINE, so that huggingface_hub uses its cache at once."""
    if any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in OFFLINE):
        return Hub("offline", "HF_HUB_OFFLINE is set")
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HUB_TIMEOUT).close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        if not isinstance(error, urllib.error.HTTPError) and not isinstance(reason, ssl.SSLError):
            os.environ["HF_HUB_OFFLINE"] = "1"
            return Hub("unreachable", f"{url} can't be reached ({reason})")
    return Hub("reachable")  # huggingface_hub reports any other error


def _from_hub(name: str, file: str, recipe: Recipe, hub: Hub | None) -> Path | None:
    """Return a small file from the Hub or its cache, or None; loading the model reports what is wrong."""
    from huggingface_hub import hf_hub_download

    offline = hub is not None and hub.status != "reachable"
    # as to_reference_recipe: model_revision is not that of another model
    is_other = recipe.ref_model != recipe.model_name_or_path and name in (recipe.ref_model, *recipe.ref_model_adapters)
    revision = "main" if is_other else recipe.model_revision
    try:
        path = hf_hub_download(name, file, revision=revision, cache_dir=recipe.cache_dir, local_files_only=offline)
    except (OSError, ValueError):
        return None
    return Path(path)


def _packages(recipe: Recipe) -> Iterator[tuple[str, str]]:
    if recipe.deepspeed is not None and importlib.util.find_spec("deepspeed") is None:
        yield (
            "deepspeed",
            "not installed; pip install deepspeed, or remove the line and launch with accelerate_configs/fsdp2.yaml "
            "(multi_gpu.yaml if the model fits one GPU)",
        )
    elif isinstance(recipe.deepspeed, str) and (problem := _no_json_file(recipe.deepspeed)):
        yield "deepspeed", f"{problem}. Or launch with accelerate_configs/zero3.yaml and remove the line"
    packages = methods.PACKAGES | {"enable_liger_kernel": "liger_kernel"} | methods.optim_package(recipe.optim)
    for key, package in packages.items():
        if getattr(recipe, key) and importlib.util.find_spec(package) is None:
            name = "torch-optimi" if package == "optimi" else package
            yield key, f"needs {package}, which is not installed; pip install {name}, or remove the line"


def _has_own_code(model: str, config: dict[str, Any]) -> bool:
    """Return whether a model's config.json, or a model folder's tokenizer_config.json, names code of the model."""
    tokenizer = read_json(Path(model) / "tokenizer_config.json")
    return "auto_map" in config or (isinstance(tokenizer, dict) and "auto_map" in tokenizer)
