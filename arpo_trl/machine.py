"""What this machine has: disk space, memory, devices and installed packages."""

import contextlib
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PureWindowsPath

from .errors import RecipeError, RunFailed, in_one_line
from .version import __version__

PACKAGES = """torch transformers trl accelerate datasets peft tokenizers safetensors huggingface_hub numpy pyarrow pydantic
    bitsandbytes deepspeed flash_attn liger_kernel""".split()

# --- disk ---


def format_bytes(size: float) -> str:
    """Format bytes as `12.7 MB`, `5.93 GB` or `120 GB`."""
    if size < 1e8:
        return f"{size / 1e6:.1f} MB"
    return f"{size / 1e9:.2f} GB" if size < 1e11 else f"{size / 1e9:,.0f} GB"


def folder_bytes(folder: Path) -> int:
    """Return the total size of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def free_space(folder: Path) -> int:
    """Return the bytes free on the disk of `folder`, which need not exist yet; 0 if there is no such disk."""
    parent = nearest_existing_parent(folder)
    return shutil.disk_usage(parent).free if parent else 0


def nearest_existing_parent(path: Path) -> Path | None:
    """Return the path if it exists, else its nearest parent that does; None on a drive that does not exist."""
    return next((place for place in (path, *path.absolute().parents) if place.exists()), None)


def find_invalid_name(path: str) -> str | None:
    """Return why Windows can't create a folder with this path, or None."""
    for name in PureWindowsPath(path).parts[bool(PureWindowsPath(path).anchor) :]:
        if invalid := re.search('[<>:"|?*\x00-\x1f]', name):
            return f"Windows allows no {invalid[0]!r} in a name; choose another one"
        if re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name.rstrip(". "), re.IGNORECASE):
            return f"Windows reserves the name {name}; choose another one"
        if name != ".." and name != name.rstrip(". "):
            return f"Windows ignores the end of the name {name!r}; choose another one"
        if len(name) > 255:
            return "Windows allows at most 255 characters in a name; choose a shorter one"
    return None


def missing_space(folder: Path, needed: int, what: str) -> str | None:
    """Return a message if the disk of `folder` has less than `needed` bytes free for `what`, else None."""
    free = free_space(folder)
    if free >= needed:
        return None
    drive = Path(folder.absolute().anchor)
    if not drive.exists():
        return f"there is no drive {drive}; choose another folder"
    sizes = f"{what} needs {format_bytes(needed)}, and {folder} has {format_bytes(free)} free"
    return f"disk full: {sizes}; free some space or choose another folder"


def describe_write_error(error: Exception) -> str:
    """Return the error in one line, recognizing a full disk: safetensors, torch and Python each word it differently."""
    # torch.save reports a short write as "unexpected pos 11840 vs 11732". Windows translates its messages, not its codes:
    # 112 disk full, 1295 quota exceeded.
    signs = r"No space left|quota exceeded|PytorchStreamWriter|unexpected pos|os error 28\b|(os error|WinError) (112|1295)\b"
    return f"disk full ({in_one_line(error)})" if re.search(signs, str(error)) else in_one_line(error)


@contextlib.contextmanager
def full_disk_as_run_failed() -> Iterator[None]:
    """Replace a library's error about a full disk by RunFailed, with how to resume."""
    try:
        yield
    except (RecipeError, RunFailed):
        raise
    except Exception as error:
        message = describe_write_error(error)
        if not message.startswith("disk full"):
            raise
        raise RunFailed(
            f"{message}; free some space and run the same command again: it resumes from the last complete checkpoint "
            "(with overwrite_output_dir: true, add resume_from_checkpoint=true)"
        ) from error


# --- memory ---


def peak_memory() -> int:
    """Return the peak so far in bytes: of the GPU's allocator, or of the process without a GPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":  # Python has no `resource` there
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    else:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def gpu_memory() -> int | None:
    """Return the bytes of this process's GPU, or None without one."""
    import torch

    return torch.cuda.get_device_properties().total_memory if torch.cuda.is_available() else None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that a device, or the CPU's allocator, is out of memory."""
    import torch

    # On Windows: torch's "not enough memory: you tried to allocate", and 1455, a paging file that is too small.
    signs = (
        "out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED|(os error|WinError) 1455\\b"
    )
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or re.search(signs, str(error)) is not None


# --- versions ---


def environment() -> str:
    """Return what a bug report needs (`--env`): versions, devices, system. No paths, host names or variables."""
    facts = {"arpo_trl": __version__, "python": platform.python_version()}
    facts |= {"system": f"{platform.platform()}, {os.cpu_count()} CPU cores", "device": _devices()}
    facts |= dict.fromkeys(PACKAGES, "not installed") | installed_versions(PACKAGES)
    facts["text"] = f"{sys.stdout.encoding}, UTF-8 mode {'on' if sys.flags.utf8_mode else 'off'}"
    return "\n".join(f"{name:<16} {value}" for name, value in facts.items())


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of those that are installed; a source tree on the path has none."""
    versions = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions


def _devices() -> str:
    import torch

    if not torch.cuda.is_available():
        kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return str(kind or "CPU only")
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus)
    return f"{names}; CUDA {torch.version.cuda or torch.version.hip}"
