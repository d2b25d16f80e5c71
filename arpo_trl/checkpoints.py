"""Which checkpoint is whole, what a run's folder holds, and what may change when a run is resumed.

`Trainer` writes a checkpoint in place and resumes from the highest number unchecked. Here a checkpoint being written
carries a mark; once it is whole the mark becomes `files.json`, the list of its files and their sizes. A folder that
still has the mark, or whose files differ from the list, is never used and never deleted: it is set aside by name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from .errors import RecipeError
from .recipe import keys

if TYPE_CHECKING:
    from .recipe import Recipe

IN_PROGRESS = ".in_progress"
FILES = "files.json"
MANIFEST = "run.json"

# What `overwrite_output_dir: true` removes beside the checkpoints: a run appends to these, or writes them at its end.
RUN_FILES = (
    MANIFEST,
    "trainer_log.jsonl",
    "training_loss.png",
    "train_results.json",
    "eval_results.json",
    "all_results.json",
    "trainer_state.json",
)

# What a resume reads. FSDP and DeepSpeed keep all but the first in folders of their own.
NEEDED = {"rng_state.pth": "rng_state*.pth", "optimizer.pt": "optimizer.*", "scheduler.pt": "scheduler.pt"}

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
    cache_dir gradient_checkpointing use_reentrant_gc activation_offloading use_cpu
    trust_remote_code include_num_input_tokens_seen
    """.split()
)


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
        aside = set_aside(folder, "damaged")
        lines.append(f"{folder} is not whole ({reason}); skipped and kept as {aside.name}")
    return None, lines


def set_aside(folder: Path, why: str) -> Path:
    """Rename `checkpoint-<step>` to `<why>-checkpoint-<step>`, with a number if that is taken."""
    aside, count = folder.with_name(f"{why}-{folder.name}"), 1
    while aside.exists():
        count += 1
        aside = folder.with_name(f"{why}-{folder.name}-{count}")
    return folder.rename(aside)


def find_damage(folder: Path) -> str | None:
    """Why `folder` cannot be resumed from, or None when it is whole.

    Runs no pickle and reads no weight: it compares sizes, JSON, safetensors headers and zip checksums. So a bit that
    flipped on the disk is seen in the optimizer's state and not in the weights.
    """
    if (folder / IN_PROGRESS).exists():
        return "its save was interrupted"
    state = read_json(folder / "trainer_state.json")
    if not isinstance(state, dict):
        return "trainer_state.json is missing or not JSON"
    if state.get("global_step") != checkpoint_step(folder):
        return f"trainer_state.json names step {state.get('global_step')}"
    sizes = read_json(folder / FILES) if (folder / FILES).exists() else {}
    if not isinstance(sizes, dict):
        return f"{FILES} is not JSON"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    if not any(path.is_dir() for kind in ("optimizer_*", "global_step*") for path in folder.glob(kind)):
        if not any(folder.glob("*model.*")):
            return "it has no weights"
        for name, pattern in NEEDED.items():
            if not any(folder.glob(pattern)):
                return f"{name} is missing"
    for path in sorted(folder.iterdir()):
        reason = _file_damage(path)
        if reason:
            return f"{path.name} {reason}"
    return None


def _file_damage(path: Path) -> str | None:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="numpy"):
                return None
        except (SafetensorError, OSError) as error:
            return f"is cut off or not safetensors ({error})"
    if path.suffix in (".pt", ".pth", ".bin"):  # torch.save writes a zip with a checksum for each part
        try:
            with zipfile.ZipFile(path) as parts:
                return "is corrupt" if parts.testzip() else None
        except Exception:  # zipfile raises a dozen kinds, from struct.error to NotImplementedError
            return "is cut off or not written by torch.save"
    if path.name.endswith(".index.json"):
        index = read_json(path)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shards, dict):
            return "is not JSON with a weight_map"
        missing = sorted({str(name) for name in shards.values() if not (path.parent / str(name)).is_file()})
        return f"names {missing[0]}, which is missing" if missing else None
    return None


def begin_checkpoint(folder: Path) -> None:
    """Mark `folder` as being written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / IN_PROGRESS).touch()


def finish_checkpoint(folder: Path, durable: bool) -> int:
    """Turn the mark into the list of files, and return their bytes.

    Args:
        durable: Wait until the disk has them, as older checkpoints are about to be deleted: a machine that loses
            power may otherwise lose both.
    """
    match_umask(folder)
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (IN_PROGRESS, FILES))
    for path in paths if durable else []:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    write_json(folder / FILES, sizes)
    (folder / IN_PROGRESS).unlink()
    return sum(sizes.values())


def match_umask(folder: Path) -> None:
    """Give weights the mode that the umask asks for: safetensors 0.8 writes 0600, which locks a group out."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o666 & ~umask)


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that `path` holds the old text or the new, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """The value in a JSON file, or None when there is no file, no JSON, or no end to its brackets."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


# --- the run in a folder ---


def find_resume_point(recipe: Recipe) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from (None: from the beginning), and lines that tell the user what was found.

    Raises:
        RecipeError: the folder cannot be written, holds a finished run or a model that is not ours, or the checkpoint
            that the recipe names is not there or not whole.
    """
    output_dir = Path(recipe.output_dir)
    for model in (recipe.model_name_or_path, *recipe.adapter_name_or_path):
        path, home = Path(model).resolve(), output_dir.resolve()
        if path == home:
            raise RecipeError(f"output_dir: {output_dir} is the folder of the model to be trained; name another")
        if path.parent == home and path.name.startswith("checkpoint-"):
            raise RecipeError(f"output_dir: {output_dir} holds the model to be trained, {path.name}; name another")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise RecipeError(f"output_dir: nothing can be written in {output_dir} ({error.strerror})") from None
    wanted = recipe.resume_from_checkpoint
    if isinstance(wanted, str):
        return _named_checkpoint(Path(wanted), output_dir)
    if not wanted and recipe.overwrite_output_dir:
        return None, []
    manifest = read_manifest(output_dir)
    if not wanted and manifest.get("status") == "finished":
        raise RecipeError(
            f"output_dir: {output_dir} holds a finished run; name another folder, or set overwrite_output_dir: true "
            "to start over"
        )
    if not wanted and not manifest and any((output_dir / f).exists() for f in ("config.json", "adapter_config.json")):
        raise RecipeError(
            f"output_dir: {output_dir} holds a model that this run did not write; name another folder, or set "
            "overwrite_output_dir: true to replace it"
        )
    checkpoint, lines = newest_whole_checkpoint(output_dir)
    if checkpoint is None and wanted:
        nothing = f"resume_from_checkpoint: no whole checkpoint in {output_dir}; remove the key to start over"
        raise RecipeError([*lines, nothing])
    return checkpoint, lines


def _named_checkpoint(folder: Path, output_dir: Path) -> tuple[Path, list[str]]:
    if not re.fullmatch(r"checkpoint-\d+", folder.name) or not folder.is_dir():
        found = ", ".join(str(p) for p in list_checkpoints(folder if folder.is_dir() else output_dir)) or "none"
        raise RecipeError(f"resume_from_checkpoint: no checkpoint-<step> folder at {folder}; found: {found}")
    reason = find_damage(folder)
    if reason:
        raise RecipeError(f"resume_from_checkpoint: {folder} is not whole ({reason}); name another checkpoint")
    others = [p for p in list_checkpoints(output_dir) if p.resolve() != folder.resolve()]
    newer = [p for p in others if checkpoint_step(p) >= checkpoint_step(folder)]
    # The run would meet them again: the next resume takes the newest checkpoint, and these are of another course.
    return folder, [f"{p} is not older than {folder}; kept as {set_aside(p, 'superseded').name}" for p in newer]


def clear_earlier_run(output_dir: Path) -> list[str]:
    """Remove an earlier run's checkpoints and logs for a fresh start; one line says what went."""
    folders = list_checkpoints(output_dir)
    for folder in folders:
        if folder.is_symlink():
            folder.unlink()
        else:
            shutil.rmtree(folder)
    for name in RUN_FILES:
        (output_dir / name).unlink(missing_ok=True)
    if not folders:
        return []
    names = ", ".join(folder.name for folder in folders)
    return [f"{output_dir}: removed {names} of the earlier run (overwrite_output_dir: true)"]


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
        if before != after and key not in FREE_KEYS:
            changes.append(f"{key}: {before!r} -> {after!r}")
    for name in sorted(earlier["data"].keys() | now["data"].keys()):
        if earlier["data"].get(name) != now["data"].get(name):
            changes.append(f"data of {name}: {earlier['data'].get(name)} -> {now['data'].get(name)}")
    for name in ("template_hash", "world_size"):
        if earlier.get(name) != now.get(name):
            changes.append(f"{name}: {earlier.get(name)} -> {now.get(name)}")
    return changes


def require_same_course(earlier: dict[str, Any], now: dict[str, Any], allow_changed_recipe: bool) -> list[str]:
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
