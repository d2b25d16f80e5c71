"""The run's output folder: one run at a time, which checkpoint to resume from, and the files written before step 1."""

import contextlib
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import yaml
from accelerate import PartialState
from accelerate.utils import gather_object

from ..errors import RecipeError
from ..machine import missing_space
from ..model.split import find_split
from ..processes import on_main_process
from ..recipe.keys import Recipe
from ..report.manifest import Manifest, read_manifest
from ..report.model_card import CARD_MARKS, NOT_FOR_THE_HUB
from ..run_folder import MANIFEST, checkpoint_step, list_checkpoints, own_path, read_json, write_text
from .checkpoints import add_prefix, find_problem, newest_complete_checkpoint, written_by
from .requirements import check_output_dir
from .trainer import ArpoTrainer

LOCK = ".lock"
ASIDE = ".earlier-run"
"""The folder of an earlier run's files while they are deleted."""
CACHED_SECONDS = 30
RECIPE_MARK = "# the recipe of this run with every key, written by arpo_trl\n"
RUN_FILES = f"""{MANIFEST} trainer_log.jsonl training_loss.png
    training_rewards_accuracies.png train_results.json eval_results.json
    all_results.json trainer_state.json""".split()
"""Files that `overwrite_output_dir: true` deletes besides checkpoints: a run appends to them or writes them at its end."""


# --- one run at a time ---


@contextlib.contextmanager
def own_output_dir(recipe: Recipe) -> Iterator[None]:
    """Hold the folder's lock in the main process, until that process ends in whatever way.

    The file stays and names its last owner. A folder that can't be written is left to `find_resume_point`.

    Raises:
        RecipeError: another run holds the lock.
    """
    with contextlib.ExitStack() as files:

        def take() -> str | None:
            path = Path(recipe.output_dir) / LOCK
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = files.enter_context(path.open("a+", encoding="utf-8"))
            except OSError:
                return None
            if not _lock(file):
                owner, text = read_json(path), ""
                if isinstance(owner, dict):  # else it has just taken the lock
                    text = " (" + ", ".join(f"{name} {value}" for name, value in owner.items()) + ")"
                problem = f"{recipe.output_dir} is in use by another run{text}; stop it, or choose another folder"
                raise recipe.error("output_dir", problem)
            now = time.strftime("%Y-%m-%d %H:%M:%S%z")
            text = json.dumps({"host": platform.node(), "process": os.getpid(), "started": now}) + "\n"
            try:
                file.truncate(0)
                file.write(text)
                file.flush()
            except OSError:  # a full disk
                return None
            return text

        written = on_main_process(take)
        if recipe.do_train and written:
            _require_shared_folder(recipe, written)
        yield


def _require_shared_folder(recipe: Recipe, expected: str) -> None:
    """Raise RecipeError if a process does not see the main process's lock file, on another machine's disk.

    Network file systems may cache for some seconds that a file is missing. The main process must not open the file
    again: on POSIX, closing it would release the lock.
    """
    path = Path(recipe.output_dir) / LOCK

    def read() -> str | None:
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            return None

    deadline = time.monotonic() + CACHED_SECONDS
    text: str | None = expected if PartialState().is_main_process else read()
    while text != expected and time.monotonic() < deadline:
        time.sleep(0.5)
        text = read()
    blind = [host for host in gather_object([None if text == expected else platform.node()]) if host]
    if blind:
        problem = f"{path.parent} is not the same folder on {blind[0]}; choose one on a disk that all machines share"
        raise recipe.error("output_dir", problem)


def _lock(file: IO[str]) -> bool:
    """Return whether the file could be locked; True on a file system without locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(1 << 30)  # on Windows nobody can read the locked byte
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            # Not flock: dataloader workers inherit that, and outlive a killed run by some seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, (BlockingIOError, PermissionError))
    return True


# --- resume or start over ---


def find_resume_point(recipe: Recipe) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to resume from (None: start from the beginning), and lines to print.

    Checkpoints that can't be used are renamed.

    Raises:
        RecipeError: the folder is taken or can't be written, or the checkpoint that the recipe names is missing or
            incomplete.
    """
    output_dir, requested = Path(recipe.output_dir), recipe.resume_from_checkpoint
    check_output_dir(recipe)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise recipe.error("output_dir", f"{output_dir} is not writable ({error.strerror})") from None
    if isinstance(requested, str):
        return _named_checkpoint(recipe, Path(requested), output_dir)
    if not requested and recipe.overwrite_output_dir:
        return None, []
    checkpoint, lines = newest_complete_checkpoint(output_dir)
    if checkpoint is None and requested:
        what = f"{output_dir} has no complete checkpoint; remove the line to start over"
        raise RecipeError([*lines, str(recipe.error("resume_from_checkpoint", what))])
    if checkpoint:
        _require_same_split(recipe, checkpoint)
    return checkpoint, lines


def _require_same_split(recipe: Recipe, checkpoint: Path) -> None:
    """Raise RecipeError if a checkpoint has the state of another engine, or of another number of ZeRO's processes."""
    split, processes = find_split(recipe), PartialState().num_processes
    manifest = read_manifest(checkpoint.parent)
    earlier, count = written_by(checkpoint)
    if manifest and manifest.split and manifest.split.startswith(earlier):
        earlier = manifest.split
    same = str(split) == earlier or (earlier in ("ZeRO", "FSDP") and split.engine.startswith(earlier))
    if same and (not split.is_zero or count == processes):
        return
    raise recipe.error(
        "resume_from_checkpoint" if recipe.resume_from_checkpoint else "output_dir",
        f"{checkpoint} was written under {earlier} by {count} process{'es' * (count != 1)}, and its optimizer state can't "
        f"be converted (found {split}, {processes}). Launch as before, or set overwrite_output_dir: true to start over",
    )


def _named_checkpoint(recipe: Recipe, folder: Path, output_dir: Path) -> tuple[Path, list[str]]:
    key = "resume_from_checkpoint"
    if not re.fullmatch(r"checkpoint-\d+", folder.name) or not folder.is_dir():
        existing = ", ".join(str(p) for p in list_checkpoints(folder if folder.is_dir() else output_dir)) or "none"
        raise recipe.error(key, f"expected a checkpoint-<step> folder, found {folder}; there are: {existing}")
    if problem := find_problem(folder):
        raise recipe.error(key, f"{folder} can't be resumed from ({problem}); choose another checkpoint")
    _require_same_split(recipe, folder)
    others = [p for p in list_checkpoints(output_dir) if p.resolve() != folder.resolve()]
    newer = [p for p in others if checkpoint_step(p) >= checkpoint_step(folder)]
    # The next resume would take the newest checkpoint, which is not of this run.
    return folder, [f"{p} is not older than {folder}; renamed to {add_prefix(p, 'superseded').name}" for p in newer]


def clear_earlier_run(output_dir: Path) -> list[str]:
    """Delete an earlier run's checkpoints and logs for a fresh start. Return a line that names the checkpoints.

    They are renamed first: Windows neither renames nor deletes a file that a program has open, and half a run is worth
    less than a complete one.

    Raises:
        RecipeError: a program has one of them open; nothing has changed.
    """
    folders = list_checkpoints(output_dir)
    aside = output_dir / ASIDE
    shutil.rmtree(aside, ignore_errors=True)  # of a killed run
    aside.mkdir(exist_ok=True)
    moved: list[Path] = []
    for path in [*folders, *(output_dir / name for name in RUN_FILES)]:
        try:
            path.rename(aside / path.name)
        except FileNotFoundError:
            continue
        except OSError as error:
            for earlier in reversed(moved):
                (aside / earlier.name).rename(earlier)
            aside.rmdir()
            raise RecipeError(
                f"{path} can't be replaced ({error.strerror}); close the program that has it open, or choose another "
                "output_dir"
            ) from None
        moved.append(path)
    shutil.rmtree(aside, ignore_errors=True)
    names = ", ".join(folder.name for folder in folders)
    return [f"{output_dir}: deleted {names} of the earlier run (overwrite_output_dir: true)"] if folders else []


def write_start_files(recipe: Recipe, trainer: ArpoTrainer, manifest: Manifest) -> list[str]:
    """Write the files that precede the first step. Return a line for each name that a user's own file has.

    Raises:
        RecipeError: the disk has no space for a checkpoint.
    """
    output_dir = Path(recipe.output_dir)
    if full := missing_space(output_dir, trainer.checkpoints.expected_bytes, "a checkpoint"):
        raise RecipeError(full)
    manifest.write(output_dir, "running")
    marks = {"recipe.yaml": (RECIPE_MARK,), "README.md": CARD_MARKS}
    paths = {name: own_path(output_dir / name, *texts) for name, texts in marks.items()}
    keys = yaml.safe_dump(recipe.resolved(), sort_keys=False, allow_unicode=True)
    write_text(paths["recipe.yaml"], f"{RECIPE_MARK}{keys}")
    if trainer.args.push_to_hub:
        write_text(output_dir / ".gitignore", NOT_FOR_THE_HUB)
    return [
        f"{output_dir / name} was not written by a run, and is kept; this run writes {path.name} instead"
        for name, path in paths.items()
        if path.name != name
    ]
