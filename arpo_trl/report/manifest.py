"""run.json: what made the run, its status, and what may change when it is resumed."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from accelerate import PartialState

from .. import __version__
from ..data.prepare import PreparedData
from ..errors import RecipeError
from ..recipe.keys import Recipe, keys
from ..run_folder import read_json

MANIFEST = "run.json"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft")

# Keys that leave the sequence of weights as it is: they may change when a run is resumed.
MAY_CHANGE = frozenset(
    """
    logging_steps logging_strategy logging_first_step log_level log_level_replica disable_tqdm report_to run_name
    project plot_loss save_steps save_strategy save_total_limit save_only_model eval_steps eval_strategy eval_on_start
    eval_delay per_device_eval_batch_size load_best_model_at_end metric_for_best_model greater_is_better
    early_stopping_steps do_eval output_dir overwrite_output_dir overwrite_cache resume_from_checkpoint
    allow_changed_recipe on_save_error preflight preprocessing_num_workers preprocessing_batch_size tokenized_path
    dataset_dir max_dropped dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor
    dataloader_persistent_workers ddp_timeout push_to_hub hub_model_id hub_strategy hub_private_repo hub_revision
    cache_dir gradient_checkpointing use_reentrant_gc activation_offloading use_cpu
    trust_remote_code include_num_input_tokens_seen
    """.split()
)


def describe_run(recipe: Recipe, data: PreparedData) -> dict[str, Any]:
    """The manifest run.json: all that decides the weights, and what made them."""
    return {
        "status": "running",
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "recipe": recipe.resolved(),
        "data": data.fingerprints,
        "template_hash": data.template_hash,
        "day": data.day.isoformat(),
        "audit": data.audit.to_dict(),
        "world_size": PartialState().num_processes,
        "versions": installed_versions(),
        "git_commit": git_commit(),
    }


def installed_versions() -> dict[str, str]:
    """The versions that made the run."""
    found = {"arpo_trl": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # a source tree on the path
            continue
    return found


def git_commit() -> str | None:
    """The commit of the working directory, or None outside a repository."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def read_manifest(output_dir: Path) -> dict[str, Any]:
    """`run.json` of the run in `output_dir`; empty when there is none."""
    manifest = read_json(output_dir / MANIFEST)
    parts = ("recipe", "data", "versions")
    is_ours = isinstance(manifest, dict) and all(isinstance(manifest.get(part), dict) for part in parts)
    return manifest if is_ours else {}


def list_changes(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two manifests and would change the course of the run, a line each.

    A key that one of them lacks, because it was left out or came with a later version, has its default there.
    """
    now = json.loads(json.dumps(now))
    changes = []
    for key in sorted(earlier["recipe"].keys() | now["recipe"].keys()):
        default = keys()[key].default if key in keys() else None
        before, after = earlier["recipe"].get(key, default), now["recipe"].get(key, default)
        if before != after and key not in MAY_CHANGE:
            changes.append(f"{key}: {before!r} -> {after!r}")
    for name in sorted(earlier["data"].keys() | now["data"].keys()):
        if earlier["data"].get(name) != now["data"].get(name):
            changes.append(f"data of {name}: {earlier['data'].get(name)} -> {now['data'].get(name)}")
    for name in ("template_hash", "world_size"):
        if earlier.get(name) != now.get(name):
            changes.append(f"{name}: {earlier.get(name)} -> {now.get(name)}")
    return changes


def require_same_run(earlier: dict[str, Any], now: dict[str, Any], allow_changed_recipe: bool) -> list[str]:
    """Refuse to resume a run under another recipe, other data or another number of processes.

    Returns:
        A line for each change when `allow_changed_recipe` lets them pass, and for each library of another version.
    """
    if not earlier:
        return [f"no {MANIFEST} tells how the run was begun: not checked whether recipe and data are the same"]
    changes = list_changes(earlier, now)
    if changes and not allow_changed_recipe:
        raise RecipeError(
            "the run in this folder was begun otherwise:\n  "
            + "\n  ".join(changes)
            + "\n  change these back, or set allow_changed_recipe: true to go on all the same, or "
            "overwrite_output_dir: true to start over"
        )
    versions = [
        f"{name} {before} -> {now['versions'].get(name)}"
        for name, before in earlier["versions"].items()
        if before != now["versions"].get(name)
    ]
    return [
        *(f"resumed although changed: {change}" for change in changes),
        *(f"resumed under another version, last digits may differ: {version}" for version in versions),
    ]
