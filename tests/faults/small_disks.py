"""Runs on disks of all sizes between one that holds nothing and one that holds everything, as root on Linux.

    python small_disks.py RECIPE FOLDER FROM TO STEP CHECKED     (sizes in KiB; CHECKED 0: no check of the space before a save)

After each run the disk is enlarged, and the same command is run to its end. Prints a JSON line for each size.
"""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from pathlib import Path

import torch
from kill_everywhere import child, difference

from arpo_trl.__main__ import main
from arpo_trl.report.console import silence_libraries
from arpo_trl.training import checkpoints, output_dir


def mount(size: int, disk: Path, *flags: str) -> None:
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"{','.join([*flags, ''])}size={size}k", "tmpfs", str(disk)], check=True
    )


def fill_disks(recipe: str, folder: Path, sizes: range, checked: bool) -> None:
    if not checked:
        output_dir.missing_space = checkpoints.missing_space = lambda *args: None  # type: ignore[attr-defined]
    whole, disk = folder / "whole", folder / "disk"
    assert child(lambda: main([recipe, f"output_dir={whole}"]), folder / "log") == 0
    disk.mkdir()
    for size in sizes:
        mount(size, disk)
        try:
            run, log = disk / "run", folder / "log"
            code = child(lambda run=run: main([recipe, f"output_dir={run}"]), log)  # type: ignore[misc]
            told = [line for line in log.read_text().splitlines() if "disk full" in line]
            broken = "Traceback" in log.read_text()
            mount(50_000, disk, "remount")
            if code:
                again = child(lambda run=run: main([recipe, f"output_dir={run}"]), log)  # type: ignore[misc]
                wrong = f"exit code {again}: {log.read_text()[-500:]}" if again else None
            try:
                wrong = wrong if code and wrong else difference(run, whole)
            except Exception:
                wrong = traceback.format_exc()[-500:]
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)
        print(
            json.dumps({"size": size, "code": code, "told": told[-1:], "broken": broken, "wrong": wrong}), flush=True
        )


if __name__ == "__main__":
    silence_libraries()
    torch.set_num_threads(1)
    fill_disks(sys.argv[1], Path(sys.argv[2]), range(*map(int, sys.argv[3:6])), sys.argv[6] == "1")
