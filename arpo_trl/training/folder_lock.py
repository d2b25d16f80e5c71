"""One run at a time in an output folder."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from ..processes import on_main_process
from ..recipe.keys import Recipe

LOCK = ".lock"


@contextlib.contextmanager
def own_output_dir(recipe: Recipe) -> Iterator[None]:
    """Hold the folder's lock in the main process; it is free again when that process ends, however it ends.

    The file stays and names the last owner. A folder that cannot be written is left to `find_resume_point`.

    Raises:
        RecipeError: another run holds the lock.
    """
    with contextlib.ExitStack() as files:

        def take() -> None:
            path = Path(recipe.output_dir) / LOCK
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                file = files.enter_context(path.open("a+", encoding="utf-8"))
            except OSError:
                return
            if not _lock(file):
                raise recipe.error(
                    "output_dir", f"{recipe.output_dir} belongs to {_owner(path)}; stop it, or name another folder"
                )
            now = time.strftime("%Y-%m-%d %H:%M:%S%z")
            with contextlib.suppress(OSError):  # a full disk
                file.truncate(0)
                file.write(json.dumps({"host": platform.node(), "pid": os.getpid(), "started": now}) + "\n")
                file.flush()

        on_main_process(take)
        yield


def _lock(file: IO[str]) -> bool:
    """Whether the file could be locked. Where the file system has no locks it counts as locked."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(1 << 30)  # Windows lets nobody read the byte that is locked
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            # Not flock: a dataloader's worker inherits that, and outlives a run that is killed by some seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"a run that is not over (host {owner['host']}, process {owner['pid']}, started {owner['started']})"
    except (OSError, ValueError, KeyError, TypeError):  # it has just taken the lock
        return "a run that is not over"
