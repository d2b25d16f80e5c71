"""What this machine has: room on the disk, and memory."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from .errors import RecipeError, RunFailed, in_one_line


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def free_space(folder: Path) -> int:
    """Bytes free on the disk of `folder`, which need not be there yet; 0 where there is no such disk."""
    there = nearest_there(folder)
    return shutil.disk_usage(there).free if there else 0


def nearest_there(path: Path) -> Path | None:
    """The path, if it is there, or else the nearest folder above it that is; None on a drive that is not there."""
    return next((place for place in (path, *path.absolute().parents) if place.exists()), None)


def missing_space(folder: Path, needed: int, what: str) -> str | None:
    """What to say when the disk of `folder` has less than `needed` bytes free for `what`, else None."""
    free = free_space(folder)
    if free >= needed:
        return None
    drive = Path(folder.absolute().anchor)
    if not drive.exists():
        return f"there is no drive {drive}; point output_dir elsewhere"
    return (
        f"disk full: {what} needs {needed / 1e9:.3f} GB and {folder} has {free / 1e9:.3f} GB free; free some space, keep "
        "fewer checkpoints (save_total_limit) or point output_dir elsewhere"
    )


def is_full_disk(error: BaseException) -> bool:
    """Whether a writer failed for want of room: safetensors, torch and Python each say it in their own words."""
    # torch.save reports a short write as "unexpected pos 11840 vs 11732"
    signs = ("No space left", "os error 28", "quota exceeded", "PytorchStreamWriter", "unexpected pos")
    return any(sign in str(error) for sign in signs)


@contextlib.contextmanager
def full_disk_in_a_line() -> Iterator[None]:
    """Turn a library's error about a full disk into one line.

    Raises:
        RunFailed: with what to do.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (RecipeError, RunFailed)) or not is_full_disk(error):
            raise
        raise RunFailed(
            f"disk full ({in_one_line(error)}); free some space and give the same command again: it goes on from the last whole "
            "checkpoint (with overwrite_output_dir: true, add resume_from_checkpoint=true)"
        ) from error


def peak_memory() -> int:
    """Bytes at the peak so far: of the GPU's allocator, or of the process where there is no GPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0  # its Python has no `resource`
    else:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that are free on this machine; on Linux at most what a container or a SLURM job may take."""
    import psutil  # not above: a wrong recipe is answered without it

    free = int(psutil.virtual_memory().available)
    groups = root / "proc/self/cgroup"
    for line in groups.read_text(encoding="utf-8").splitlines() if groups.exists() else []:
        _, controllers, name = line.split(":", 2)  # cgroups(7): version 2 has one group, without controllers
        group = root / "sys/fs/cgroup" / controllers / name.lstrip("/")
        for folder in (group, *group.parents):
            limit = folder / ("memory.limit_in_bytes" if controllers else "memory.max")
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                free = min(free, int(limit.read_text(encoding="utf-8")))
    return free


def gpu_memory() -> int | None:
    """Bytes of this process's GPU, or None where there is none."""
    import torch

    return torch.cuda.get_device_properties().total_memory if torch.cuda.is_available() else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is a device's, or the CPU allocator's, refusal of memory."""
    import torch

    signs = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(sign in str(error) for sign in signs)
