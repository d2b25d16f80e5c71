"""The files of a run's folder: checkpoints by name, and text files that are replaced atomically."""

import json
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MANIFEST = "run.json"
"""The run's inputs and status; see report/manifest.py."""


def checkpoint_step(folder: Path) -> int:
    """Return the step of a folder `checkpoint-<step>`."""
    return int(folder.name.rsplit("-", 1)[1])


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the folders `checkpoint-<step>` in `output_dir`, complete or not, by step."""
    if not output_dir.is_dir():
        return []
    folders = [p for p in output_dir.iterdir() if p.is_dir() and re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(folders, key=checkpoint_step)


def match_umask(folder: Path) -> None:
    """Apply the umask to weights: safetensors 0.8 writes 0600, which a group can't read."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o666 & ~umask)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, as `write_text` does."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` atomically: `path` has the old text or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    replace(temporary, path)


def replace(temporary: Path, path: Path) -> None:
    """Rename a file over another; on Windows retry, because a virus scanner may hold either for a moment."""
    for wait in (0.1, 0.3, 1.0):
        try:
            temporary.replace(path)
            return
        except PermissionError:
            if str(sys.platform) != "win32":  # str: else mypy calls what follows unreachable
                raise
        time.sleep(wait)
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """Return the value in a JSON file, or None if it is missing, not JSON, or nested too deep."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a .jsonl file, without a last line that a kill cut; empty if there is no file."""
    objects = []
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() else []:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        objects += [value] if isinstance(value, dict) else []
    return objects


def to_lines(objects: Iterable[Mapping[str, object]]) -> str:
    """Return the text of a .jsonl file."""
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in objects)


def save_metrics(output_dir: Path, split: str, metrics: dict[str, float]) -> None:
    """Write `<split>_results.json` and add its figures to `all_results.json`, as Trainer does, but atomically."""
    all_metrics = read_json(output_dir / "all_results.json")
    all_metrics = (all_metrics if isinstance(all_metrics, dict) else {}) | metrics
    for name, figures in ((split, metrics), ("all", all_metrics)):
        write_json(output_dir / f"{name}_results.json", dict(sorted(figures.items())))


def own_path(path: Path, *marks: str) -> Path:
    """Return `path`, or another name if it is a user's own file, whose text has none of our `marks`."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return path
    return path if any(mark in text for mark in marks) else path.with_name(f"{path.stem}-of-the-run{path.suffix}")
