"""What a kill at each file operation of a run leaves on the disk, and how the same command ends from there.

    python kill_everywhere.py RECIPE FOLDER EVERY      (EVERY: 1 for each operation, n for each n-th)

A killed process leaves its output folder as it is at that moment. So one run is taken, and at each of its operations
below output_dir (opening for writing, renaming, removing, making folders, changing modes) the folder is copied; beside
it, copies in which the file that was written last has half of its bytes, or none. The same is done with the resume of
three of these. From each copy that differs from all others the same command is run to its end. Children are forked of
a process that has imported all and computed nothing. Prints a JSON line for each copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft.peft_model
import torch
import transformers.modeling_utils
from runs import FILE_OPERATIONS, differing, log_without_times

from arpo_trl.__main__ import main
from arpo_trl.report.console import silence_libraries
from arpo_trl.run_folder import list_checkpoints
from arpo_trl.training import train  # noqa: F401  (all that a run imports)

WRITES = os.O_WRONLY | os.O_RDWR
TIMES = ("_runtime", "_per_second", "total_flos")


class Copies:
    """Copies a folder at each operation in it, by an audit hook and by wrapping what writes in C++ or Rust."""

    def __init__(self, folder: Path, into: Path) -> None:
        self.folder, self.into, self.count, self.busy, self.written = folder, into, 0, False, None  # type: ignore[var-annotated]
        sys.addaudithook(self.hook)
        for module, name in (
            (torch, "save"),
            (transformers.modeling_utils, "safe_save_file"),
            (peft.peft_model, "safe_save_file"),
        ):
            setattr(module, name, self.wrap(getattr(module, name)))

    def wrap(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(what: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
            done = write(what, path, *args, **kwargs)
            if isinstance(path, (str, Path)) and self.folder in Path(path).resolve().parents:
                self.written = Path(path).resolve()
                self.copy("after a writer")
            return done

        return wrapped

    def hook(self, event: str, args: Any) -> None:
        if self.busy or event not in FILE_OPERATIONS:
            return
        if event == "open" and (not isinstance(args[0], str) or not isinstance(args[2], int) or not args[2] & WRITES):
            return
        path = Path(os.fsdecode(args[0])).absolute() if isinstance(args[0], (str, bytes, Path)) else None
        if path is None or (self.folder != path and self.folder not in path.parents) or path.name == "training.log":
            return
        self.copy(f"{event} {path.name}")
        self.written = path if event == "open" else self.written

    def copy(self, what: str) -> None:
        self.busy = True
        halves = [None]
        if self.written and self.written.is_file() and self.written.stat().st_size > 1:
            halves += [self.written.stat().st_size // 2, 0]
            if self.written.suffix == ".jsonl":  # appended to
                halves[1:] = [self.written.stat().st_size - 5]
        for size in halves:
            copy = self.into / f"{self.count:04}"
            if self.folder.exists():
                shutil.copytree(self.folder, copy / "run")
            else:
                (copy / "run").mkdir(parents=True)
            if size is not None:
                os.truncate(copy / "run" / self.written.relative_to(self.folder), size)
            (copy / "what").write_text(what if size is None else f"{what}, {self.written.name} has {size} bytes")
            self.count += 1
        self.busy = False


def child(act: Callable[[], int], log: Path) -> int:
    """Return the exit code of `act`, called in a child process."""
    pid = os.fork()
    if pid == 0:
        try:
            with log.open("w") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
                # Replaces the parent's thread pool; transformers' threads would race for that.
                torch.set_num_threads(1)
                code = act()
        except BaseException:
            traceback.print_exc()
            code = 99
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_with_copies(recipe: str, folder: Path, into: Path) -> int:
    into.mkdir()
    Copies(folder.absolute(), into)
    return main([recipe, f"output_dir={folder}"])


def contents(folder: Path) -> str:
    """A hash of all files below a folder, times left out."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.name not in (".lock", "training.log"):
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(path.read_bytes() if path.is_file() else b"/")
    return digest.hexdigest()


def difference(run: Path, whole: Path) -> str | None:
    """What differs between two ended runs, times left out; None when it is nothing."""
    if json.loads((run / "run.json").read_text())["status"] != "finished":
        return "status"
    for name in [*sorted(p.name for p in whole.glob("*.safetensors")), "config.json", "tokenizer_config.json"]:
        if (whole / name).exists() and (run / name).read_bytes() != (whole / name).read_bytes():
            return name
    if log_without_times(run) != log_without_times(whole):
        return "trainer_log.jsonl"
    for name in ("train_results.json", "all_results.json"):
        results = [json.loads((folder / name).read_text()) for folder in (run, whole)]
        found, wanted = ({k: v for k, v in one.items() if not k.endswith(TIMES)} for one in results)
        if found != wanted:
            return name
    ends = [list_checkpoints(folder)[-1] for folder in (run, whole)]
    if ends[0].name != ends[1].name or differing(*ends):
        return ends[0].name
    return next((str(p) for p in run.rglob("*.tmp") if "incomplete-" not in str(p)), None)


def resume_copies(copies: Path, recipe: str, whole: Path, every: int, seen: set[str], told: str) -> list[Path]:
    """Run the command from each copy that is new; returns the copies."""
    found = sorted(path for path in copies.iterdir() if path.is_dir())
    for copy in found[::every]:
        kept = contents(copy / "run")
        if kept in seen:
            continue
        seen.add(kept)
        run = copies.parent / "again"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(copy / "run", run)
        log = copy / "log"
        code = child(lambda run=run: main([recipe, f"output_dir={run}"]), log)  # type: ignore[misc]
        what = (copy / "what").read_text()
        if "contains a finished run" in log.read_text():  # nothing was left to do
            code = 0
        try:
            wrong = difference(run, whole) if code == 0 else log.read_text()[-800:]
        except Exception:
            wrong = traceback.format_exc()[-800:]
        print(json.dumps({"of": told, "copy": copy.name, "what": what, "code": code, "wrong": wrong}), flush=True)
    return found


def enumerate_kills(recipe: str, folder: Path, every: int) -> None:
    whole, seen = folder / "whole", set[str]()
    assert child(lambda: run_with_copies(recipe, whole, folder / "copies"), folder / "log") == 0, (
        folder / "log"
    ).read_text()
    copies = resume_copies(folder / "copies", recipe, whole, every, seen, "run")
    for number, part in enumerate((0.35, 0.6, 0.9)):  # in the first save, in the second, in the end
        start = copies[int(part * len(copies))] / "run"
        run, into = folder / f"resumed{number}", folder / f"copies{number}"
        shutil.copytree(start, run)
        assert child(lambda run=run, into=into: run_with_copies(recipe, run, into), folder / "log") == 0  # type: ignore[misc]
        resume_copies(into, recipe, whole, every, seen, f"resume of {start.parent.name}")


if __name__ == "__main__":
    silence_libraries()
    enumerate_kills(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
