"""A run's folder: whether a run may begin in it, goes on from one of its checkpoints, or starts over."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from ..errors import RecipeError
from ..recipe.keys import Recipe
from ..run_folder import MANIFEST, checkpoint_step, list_checkpoints
from .checkpoints import find_damage, newest_whole_checkpoint, set_aside
from .requirements import refuse_output_dir

# What `overwrite_output_dir: true` removes beside the checkpoints: a run appends to these, or writes them at its end.
RUN_FILES = f"""{MANIFEST} trainer_log.jsonl training_loss.png train_results.json eval_results.json
    all_results.json trainer_state.json""".split()


def find_resume_point(recipe: Recipe) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from (None: from the beginning), and lines that tell the user what was found.

    Checkpoints that cannot be used are set aside by name.

    Raises:
        RecipeError: `refuse_output_dir` says no, the folder cannot be written, or the checkpoint that the recipe names
            is not there or not whole.
    """
    output_dir, wanted = Path(recipe.output_dir), recipe.resume_from_checkpoint
    refuse_output_dir(recipe)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise recipe.error("output_dir", f"nothing can be written in {output_dir} ({error.strerror})") from None
    if isinstance(wanted, str):
        return _named_checkpoint(recipe, Path(wanted), output_dir)
    if not wanted and recipe.overwrite_output_dir:
        return None, []
    checkpoint, lines = newest_whole_checkpoint(output_dir)
    if checkpoint is None and wanted:
        nothing = recipe.error(
            "resume_from_checkpoint", f"no whole checkpoint in {output_dir}; remove it to start over"
        )
        raise RecipeError([*lines, str(nothing)])
    return checkpoint, lines


def _named_checkpoint(recipe: Recipe, folder: Path, output_dir: Path) -> tuple[Path, list[str]]:
    if not re.fullmatch(r"checkpoint-\d+", folder.name) or not folder.is_dir():
        found = ", ".join(str(p) for p in list_checkpoints(folder if folder.is_dir() else output_dir)) or "none"
        raise recipe.error("resume_from_checkpoint", f"no checkpoint-<step> folder at {folder}; found: {found}")
    reason = find_damage(folder)
    if reason:
        raise recipe.error(
            "resume_from_checkpoint", f"{folder} can't be resumed from ({reason}); name another checkpoint"
        )
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
