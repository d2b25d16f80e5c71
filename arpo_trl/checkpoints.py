"""Which checkpoint is whole, what a run's folder holds, and what may change when a run is resumed.

`Trainer` writes a checkpoint in place and resumes from the highest number unchecked. Here a checkpoint being written
carries a mark; once it is whole the mark becomes `files.json`, the list of its files and their sizes. A folder that
still has the mark, or whose files differ from the list, is never used and never deleted: it is set aside by name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .recipe import RecipeError

if TYPE_CHECKING:
    from .recipe import Recipe

IN_PROGRESS = ".in_progress"
FILES = "files.json"
MANIFEST = "run.json"

# What a run writes beside its checkpoints. `overwrite_output_dir: true` starts these anew; nothing else is touched.
RUN_FILES = (
    MANIFEST,
    "recipe.yaml",
    "row_audit.jsonl",
    "trainer_log.jsonl",
    "training.log",
    "training_loss.png",
    "train_results.json",
    "eval_results.json",
    "all_results.json",
    "trainer_state.json",
)

# Keys that leave the sequence of weights as it is: they may change when a run is resumed.
FREE_KEYS = frozenset(
    """
    logging_steps logging_strategy logging_first_step log_level log_level_replica disable_tqdm report_to run_name
    project plot_loss save_steps save_strategy save_total_limit save_only_model eval_steps eval_strategy eval_on_start
    eval_delay per_device_eval_batch_size load_best_model_at_end metric_for_best_model greater_is_better
    early_stopping_steps do_eval output_dir overwrite_output_dir overwrite_cache resume_from_checkpoint
    allow_changed_recipe on_save_error preflight preprocessing_num_workers preprocessing_batch_size tokenized_path
    dataset_dir max_dropped dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor
    dataloader_persistent_workers ddp_timeout push_to_hub hub_model_id hub_strategy hub_private_repo hub_revision
    cache_dir gradient_checkpointing gradient_checkpointing_kwargs use_reentrant_gc activation_offloading use_cpu
    trust_remote_code include_num_input_tokens_seen include_tokens_per_second include_effective_tokens_per_second
    """.split()
)


class RunFailed(Exception):
    """A run that began and cannot go on (exit code 1). `str()` is the finished message."""


def checkpoint_step(folder: Path) -> int:
    """The step in the name of a folder `checkpoint-<step>`."""
    return int(folder.name.rsplit("-", 1)[1])


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-<step>` in `output_dir`, by step, whole or not."""
    if not output_dir.is_dir():
        return []
    found = [p for p in output_dir.iterdir() if p.is_dir() and re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=checkpoint_step)


def newest_whole_checkpoint(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be resumed from, and a line for each newer one that cannot.

    A damaged checkpoint is renamed to `damaged-checkpoint-<step>`, so that neither a resume nor the rotation of old
    checkpoints can meet it again, and nothing is deleted.
    """
    lines: list[str] = []
    for folder in reversed(list_checkpoints(output_dir)):
        reason = find_damage(folder)
        if reason is None:
            return folder, lines
        aside = folder.with_name(f"damaged-{folder.name}")
        count = 1
        while aside.exists():
            count += 1
            aside = folder.with_name(f"damaged-{folder.name}-{count}")
        folder.rename(aside)
        lines.append(f"{folder} is not whole ({reason}); skipped and kept as {aside.name}")
    return None, lines


def find_damage(folder: Path) -> str | None:
    """Why `folder` cannot be resumed from, or None when it is whole.

    Reads no pickle and no tensor: sizes, JSON, safetensors headers and zip directories only.
    """
    if (folder / IN_PROGRESS).exists():
        return "its save was interrupted"
    state = _read_json(folder / "trainer_state.json")
    if not isinstance(state, dict):
        return "trainer_state.json is missing or not JSON"
    if state.get("global_step") != checkpoint_step(folder):
        return f"trainer_state.json names step {state.get('global_step')}"
    files = _read_json(folder / FILES) if (folder / FILES).exists() else {}
    if not isinstance(files, dict):
        return f"{FILES} is not JSON"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes of {size:,}"
    return _weights_damage(folder) or _state_damage(folder, sharded=any("/" in name for name in files))


def _weights_damage(folder: Path) -> str | None:
    weights = [name for name in ("model", "adapter_model") if (folder / f"{name}.safetensors").exists()]
    names = [f"{name}.safetensors" for name in weights]
    if (folder / "model.safetensors.index.json").exists():
        index = _read_json(folder / "model.safetensors.index.json")
        if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
            return "model.safetensors.index.json is not JSON"
        names += sorted(set(index["weight_map"].values()))
    if not names and not any(p.is_dir() for p in folder.iterdir()):  # FSDP and DeepSpeed keep shards in folders
        return "it has no model.safetensors"
    for name in names:
        reason = _safetensors_damage(folder / name)
        if reason:
            return f"{name} {reason}"
    return None


def _safetensors_damage(path: Path) -> str | None:
    """Compare a safetensors header with the file's size (https://huggingface.co/docs/safetensors: the format)."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 + header_size:
            return "ends inside its header"
        try:
            header = json.loads(file.read(header_size))
            end = max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "has a header that is not safetensors"
    expected = 8 + header_size + int(end)
    return None if size == expected else f"has {size:,} bytes of {expected:,}"


def _state_damage(folder: Path, sharded: bool) -> str | None:
    rng = sorted(folder.glob("rng_state*.pth"))
    if not rng:
        return "rng_state.pth is missing"
    names = [path.name for path in rng]
    if not (sharded or any(p.is_dir() for p in folder.iterdir())):
        names += ["optimizer.pt", "scheduler.pt"]
    for name in names:
        if not (folder / name).is_file():
            return f"{name} is missing"
        if not zipfile.is_zipfile(folder / name):  # torch.save writes a zip, whose directory comes last
            return f"{name} is cut off"
    return None


@contextlib.contextmanager
def marked_in_progress(folder: Path, is_main_process: bool) -> Iterator[None]:
    """Mark `folder` as being written; when the block ends without an exception, list its files instead."""
    if is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / IN_PROGRESS).touch()
    yield
    if is_main_process:
        match_umask(folder)
        paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (IN_PROGRESS, FILES))
        write_json(folder / FILES, {p.relative_to(folder).as_posix(): p.stat().st_size for p in paths})
        (folder / IN_PROGRESS).unlink()


def match_umask(folder: Path) -> None:
    """Give files the mode that the umask asks for: safetensors 0.8 writes 0600, which locks a group out."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~umask)


def require_free_space(folder: Path, needed: int, what: str) -> None:
    """Raise `RunFailed` when the disk of `folder` has less than `needed` bytes free for `what`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunFailed(
            f"disk full: {what} needs {needed / 1e9:.2f} GB and {folder} has {free / 1e9:.2f} GB free. "
            "Free some space, set save_total_limit: 1 or point output_dir elsewhere; the same command then goes on"
        )


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that `path` holds the old text or the new, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


# --- the run in a folder ---


def find_resume_point(recipe: Recipe) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from (None: from the beginning), and lines that tell the user what was found.

    Raises:
        RecipeError: the folder holds a finished run or a model that is not ours, or the checkpoint that the recipe
            names is not there or not whole.
    """
    output_dir = Path(recipe.output_dir)
    if output_dir.exists() and output_dir.resolve() == Path(recipe.model_name_or_path).resolve():
        raise RecipeError(f"output_dir: {output_dir} is the folder of the model to be trained; name another")
    wanted = recipe.resume_from_checkpoint
    if isinstance(wanted, str):
        folder = Path(wanted)
        if not re.fullmatch(r"checkpoint-\d+", folder.name) or not folder.is_dir():
            found = ", ".join(str(p) for p in list_checkpoints(folder if folder.is_dir() else output_dir)) or "none"
            raise RecipeError(f"resume_from_checkpoint: no checkpoint-<step> folder at {wanted}; found: {found}")
        reason = find_damage(folder)
        if reason:
            raise RecipeError(f"resume_from_checkpoint: {folder} is not whole ({reason}); name another checkpoint")
        return folder, []
    if not wanted and recipe.overwrite_output_dir:
        return None, []
    manifest = read_manifest(output_dir)
    if not wanted and manifest.get("status") == "finished":
        raise RecipeError(
            f"output_dir: {output_dir} holds a finished run; name another folder, or set overwrite_output_dir: true "
            "to start over"
        )
    if not wanted and not manifest and (output_dir / "config.json").exists():
        raise RecipeError(
            f"output_dir: {output_dir} holds a model that this run did not write; name another folder, or set "
            "overwrite_output_dir: true to replace it"
        )
    checkpoint, lines = newest_whole_checkpoint(output_dir)
    if checkpoint is None and wanted:
        raise RecipeError(
            f"resume_from_checkpoint: no whole checkpoint in {output_dir}; remove the key to start from the beginning"
        )
    return checkpoint, lines


def clear_earlier_run(output_dir: Path) -> list[str]:
    """Remove an earlier run's checkpoints and logs for a fresh start; one line says what went."""
    folders = list_checkpoints(output_dir)
    for folder in folders:
        shutil.rmtree(folder)
    for name in RUN_FILES:
        (output_dir / name).unlink(missing_ok=True)
    if not folders:
        return []
    return [f"{output_dir}: removed {len(folders)} checkpoints of the earlier run (overwrite_output_dir: true)"]


def read_manifest(output_dir: Path) -> dict[str, Any]:
    """`run.json` of the run in `output_dir`; empty when there is none."""
    manifest = _read_json(output_dir / MANIFEST)
    return manifest if isinstance(manifest, dict) else {}


def list_changes(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two manifests and would change the course of the run, a line each."""

    def flat(manifest: dict[str, Any]) -> dict[str, Any]:
        recipe = {k: v for k, v in manifest.get("recipe", {}).items() if k not in FREE_KEYS}
        data = {f"data of {name}": digest for name, digest in manifest.get("data", {}).items()}
        return recipe | data | {k: manifest.get(k) for k in ("template_hash", "world_size")}

    before, after = flat(earlier), flat(json.loads(json.dumps(now)))
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def require_same_course(earlier: dict[str, Any], now: dict[str, Any], allow_changed_recipe: bool) -> list[str]:
    """Refuse to resume a run under another recipe, other data or another number of processes.

    Returns:
        A line for each change when `allow_changed_recipe` lets them pass.
    """
    changes = list_changes(earlier, now) if earlier else []
    if changes and not allow_changed_recipe:
        raise RecipeError(
            "the run in this folder was begun otherwise:\n  "
            + "\n  ".join(changes)
            + "\n  change these back, or set allow_changed_recipe: true to go on all the same, or "
            "overwrite_output_dir: true to start over"
        )
    return [f"resumed although changed: {change}" for change in changes]
