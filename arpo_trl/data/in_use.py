"""Marks on folders that running processes read, so that no other process removes them."""

import functools
import os
import sys
from contextlib import suppress
from pathlib import Path

MARK = "in_use"


@functools.cache
def mark_in_use(folder: Path) -> int:
    """Mark a folder until this process and its dataloader workers end, in whatever way. Return the mark's descriptor."""
    mark = os.open(folder / MARK, os.O_RDONLY | os.O_CREAT)
    if sys.platform != "win32":
        import fcntl

        with suppress(OSError):  # a file system without locks
            fcntl.flock(mark, fcntl.LOCK_SH)
    return mark


def is_in_use(folder: Path) -> bool:
    """Return whether a process has marked the folder, or may have: on a file system without locks, nobody knows."""
    try:
        if sys.platform == "win32":
            (folder / MARK).unlink(missing_ok=True)  # Windows deletes no file that Python has open
            return False
        else:
            import fcntl

            mark = os.open(folder / MARK, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            finally:
                os.close(mark)
            return False
    except OSError:
        return True
