"""The files of a run's folder: its checkpoints by name, and JSON that is there whole or not at all."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

MANIFEST = "run.json"
"""What made the run, and its status; see report/manifest.py."""


def checkpoint_step(folder: Path) -> int:
    """The step in the name of a folder `checkpoint-<step>`."""
    return int(folder.name.rsplit("-", 1)[1])


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-<step>` in `output_dir`, by step, whole or not."""
    if not output_dir.is_dir():
        return []
    found = [p for p in output_dir.iterdir() if p.is_dir() and re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(found, key=checkpoint_step)


def match_umask(folder: Path) -> None:
    """Give weights the mode that the umask asks for: safetensors 0.8 writes 0600, which locks a group out."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o666 & ~umask)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, as `write_text` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` so that `path` holds the old text or the new, never half of one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    replace(temporary, path)


def replace(temporary: Path, path: Path) -> None:
    """Rename a file over another; on Windows a virus scanner may hold either for a moment, so it is tried again."""
    for wait in (0.1, 0.3, 1.0):
        try:
            temporary.replace(path)
            return
        except PermissionError:
            if str(sys.platform) != "win32":  # str: mypy would hold what follows for unreachable
                raise
        time.sleep(wait)
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """The value in a JSON file, or None when there is no file, no JSON, or no end to its brackets."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def save_metrics(output_dir: Path, split: str, metrics: dict[str, float]) -> None:
    """Write `<split>_results.json` and put the same figures into `all_results.json`, as Trainer does in place."""
    together = read_json(output_dir / "all_results.json")
    together = (together if isinstance(together, dict) else {}) | metrics
    for name, figures in ((split, metrics), ("all", together)):
        write_json(output_dir / f"{name}_results.json", dict(sorted(figures.items())))


def own_path(path: Path, *marks: str) -> Path:
    """`path`, or a name beside it where it holds a text with none of the marks that ours has: a user's own."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return path
    return path if any(mark in text for mark in marks) else path.with_name(f"{path.stem}-of-the-run{path.suffix}")
