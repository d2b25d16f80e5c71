"""`--env`: what a bug report needs: versions, the device, the system. No paths, names of hosts or variables."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from ..version import __version__

PACKAGES = """torch transformers trl accelerate datasets peft tokenizers safetensors huggingface_hub numpy pyarrow pydantic
    bitsandbytes deepspeed flash_attn liger_kernel""".split()


def environment() -> str:
    """One line each: arpo_trl, Python, the system, the devices, the packages."""
    lines = [("arpo_trl", __version__), ("python", platform.python_version())]
    lines += [("system", f"{platform.platform()}, {os.cpu_count()} CPU cores"), ("device", _devices())]
    lines += list((dict.fromkeys(PACKAGES, "not installed") | installed_versions(PACKAGES)).items())
    lines.append(("text", f"{sys.stdout.encoding}, UTF-8 mode {'on' if sys.flags.utf8_mode else 'off'}"))
    return "\n".join(f"{name:<16} {found}" for name, found in lines)


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those that are installed; a source tree on the path has none."""
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _devices() -> str:
    import torch

    if not torch.cuda.is_available():
        kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return str(kind or "CPU only")
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in gpus)
    return f"{names}; CUDA {torch.version.cuda or torch.version.hip}"
