"""What a checkpoint contains, and which checkpoints are complete.

A folder `checkpoint-<step>` has model.safetensors or the adapter (in float32, so that a resume is exact), config.json,
the tokenizer, optimizer.pt, scheduler.pt, an rng_state.pth per process, trainer_state.json (the log, the counts of the
callbacks), training_args.bin and files.json.

`Trainer` writes a checkpoint in place and resumes from the highest number unchecked. Here a checkpoint being written
carries a mark. Once it is complete, the mark becomes `files.json`, the list of its files and their sizes. A folder that
still has the mark, or whose files differ from the list, is never resumed from and never deleted: it is renamed.
"""

import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from ..errors import RunFailed
from ..machine import describe_write_error, missing_space
from ..model.memory import moments
from ..model.split import Split
from ..report.console import say
from ..run_folder import checkpoint_step, list_checkpoints, match_umask, read_json, write_json

IN_PROGRESS = ".in_progress"
FILES = "files.json"

MODEL_ONLY = "it contains the model only (save_only_model: true)"
NEEDED = {"rng_state.pth": "rng_state*.pth", "optimizer.pt": "optimizer.*", "scheduler.pt": "scheduler.pt"}
"""What a resume reads besides the model. FSDP and DeepSpeed keep all but the first in folders."""


def checkpoint_bytes(model: nn.Module, args: TrainingArguments, split: Split) -> int:
    """Return a checkpoint's size in bytes: the weights, and the optimizer's copies of the trained ones.

    FSDP and ZeRO also save the weights in their own format, with a tied head as a second tensor. ZeRO also saves the
    trained weights in float32.
    """
    saved = saved_bytes(model)
    if args.save_only_model:
        return saved
    trained, copies = [p for p in model.parameters() if p.requires_grad], moments(args)
    state = (1 + copies) * 4 * sum(map(_numel, trained)) if split.is_zero else copies * sum(map(_nbytes, trained))
    if split.engine in ("DDP", "ZeRO-3"):
        return saved + int(state)
    tied = sum(_nbytes(p) for _, p in model.named_parameters(remove_duplicate=False)) - sum(
        _nbytes(p) for p in model.parameters()
    )
    return 2 * saved + (1 if hasattr(model, "peft_config") else 2) * tied + int(state)


def saved_bytes(model: nn.Module) -> int:
    """Return the bytes of the weights in a checkpoint: all of them, or the adapter's."""
    return sum(_nbytes(p) for p in model.parameters() if p.requires_grad or not hasattr(model, "peft_config"))


def _nbytes(parameter: nn.Parameter) -> int:
    return _numel(parameter) * parameter.element_size()


def _numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # ZeRO-3 leaves parameters empty


@dataclass
class CheckpointWriter:
    """Writes a run's checkpoints.

    Attributes:
        save_total_limit: Number of checkpoints to keep, or None to keep all.
        on_save_error: "stop" ends the run if a checkpoint can't be written, "continue" continues without it.
        expected_bytes: Size of a checkpoint: estimated, then measured.
        together: Whether the processes exchange weights during a save (FSDP, DeepSpeed).
    """

    save_total_limit: int | None
    on_save_error: str
    expected_bytes: int
    together: bool = False

    def save(self, trainer: Trainer, write: Callable[[], None]) -> None:
        """Let `write` fill a checkpoint that is marked until it is complete, and only then delete older ones.

        Raises:
            RunFailed: it could not be written, unless on_save_error is "continue". What was written is deleted, so that
                the disk has space for the logs.
        """
        output_dir = Path(str(trainer.args.output_dir))
        folder = output_dir / f"checkpoint-{trainer.state.global_step}"
        is_main = trainer.is_world_process_zero()

        def begin() -> None:
            if is_main:
                if full := missing_space(output_dir, self.expected_bytes, "a checkpoint"):
                    raise RunFailed(full)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / IN_PROGRESS).touch()

        def finish() -> None:
            if is_main:
                self.expected_bytes = _list_files(folder, durable=bool(self.save_total_limit))

        # each once all processes have finished the one before: the list is complete
        for act in (begin, write, finish):
            # A process that fails while the others exchange weights with it must not wait for them: its end ends them.
            if error := _try_on_all(trainer, act, agree=act is not write or not self.together):
                if (is_main or self.together) and (folder / IN_PROGRESS).exists():
                    shutil.rmtree(folder, ignore_errors=True)
                message = f"{folder} could not be saved, and was deleted: {describe_write_error(error)}"
                if self.on_save_error == "stop":
                    raise RunFailed(
                        f"{message}. Earlier checkpoints are intact; resume_from_checkpoint=true resumes from the latest of them"
                    )
                return say(f"{message}; continuing without this checkpoint (on_save_error: continue)")
        if is_main:
            best = trainer.state.best_model_checkpoint
            rotate_checkpoints(
                output_dir=str(output_dir), save_total_limit=self.save_total_limit, best_model_checkpoint=best
            )


def _try_on_all(trainer: Trainer, act: Callable[[], None], agree: bool) -> Exception | None:
    """Call `act`. With `agree`, an error of one process is an error on all; else the others may be in a collective."""
    error: Exception | None = None
    try:
        act()
    except Exception as failure:  # safetensors, torch and the file system each raise their own for a full disk
        error = failure
        if not agree:
            return error
    failed = trainer.accelerator.reduce(torch.tensor(int(error is not None), device=trainer.args.device))
    return error or (RunFailed("another process could not write its part") if failed else None)


def _list_files(folder: Path, durable: bool) -> int:
    """Replace the mark by the list of files, and return their total size.

    `durable`: wait until the disk has them, as older checkpoints are about to be deleted: a power failure might lose both.
    """
    match_umask(folder)
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (IN_PROGRESS, FILES))
    for path in paths if durable else []:
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    write_json(folder / FILES, sizes)
    (folder / IN_PROGRESS).unlink()
    return sum(sizes.values())


def written_by(folder: Path) -> tuple[str, int]:
    """Return the start of the engine's name in `Split` whose files a checkpoint has, and the number of its processes."""
    zero, fsdp = (any(folder.glob(pattern)) for pattern in ("global_step*", "pytorch_model_fsdp*"))
    return "ZeRO" if zero else "FSDP" if fsdp else "DDP", len(list(folder.glob("rng_state*.pth")))


def newest_complete_checkpoint(output_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that can be resumed from, and a line for each newer one, which is renamed.

    The new name is `incomplete-checkpoint-<step>` or `model-only-checkpoint-<step>`, which neither a resume nor the
    rotation of old checkpoints looks at. Nothing is deleted.
    """
    lines: list[str] = []
    for folder in reversed(list_checkpoints(output_dir)):
        problem = find_problem(folder)
        if problem is None:
            return folder, lines
        renamed = add_prefix(folder, "model-only" if problem == MODEL_ONLY else "incomplete")
        lines.append(f"{folder} can't be resumed from ({problem}); renamed to {renamed.name}")
    return None, lines


def add_prefix(folder: Path, prefix: str) -> Path:
    """Rename `checkpoint-<step>` to `<prefix>-checkpoint-<step>`, with a number if that name is taken."""
    renamed, count = folder.with_name(f"{prefix}-{folder.name}"), 1
    while renamed.exists():
        count += 1
        renamed = folder.with_name(f"{prefix}-{folder.name}-{count}")
    return folder.rename(renamed)


def find_problem(folder: Path) -> str | None:
    """Return why `folder` can't be resumed from, or None if it is complete.

    Compares sizes, JSON, safetensors headers and zip checksums; runs no pickle and reads no weight. So a bit that
    flipped on the disk is detected in the optimizer's state, but not in the weights.
    """
    if (folder / IN_PROGRESS).exists():
        return "its save was interrupted"
    state = read_json(folder / "trainer_state.json")
    if not isinstance(state, dict):
        return "trainer_state.json is missing or not JSON"
    if state.get("global_step") != checkpoint_step(folder):
        return f"trainer_state.json is of step {state.get('global_step')}"
    sizes = read_json(folder / FILES) if (folder / FILES).exists() else {}
    if not isinstance(sizes, dict):
        return f"{FILES} is not JSON"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, expected {size}"
    if not any(path.is_dir() for kind in ("optimizer_*", "global_step*") for path in folder.glob(kind)):
        if not any(folder.glob("*model.*")):
            return "it has no weights"
        missing = [name for name, pattern in NEEDED.items() if not any(folder.glob(pattern))]
        if missing:
            return MODEL_ONLY if len(missing) == len(NEEDED) else f"{missing[0]} is missing"
    for path in sorted(folder.iterdir()):
        if problem := _find_file_problem(path):
            return f"{path.name} {problem}"
    return None


def _find_file_problem(path: Path) -> str | None:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="numpy"):
                return None
        except (SafetensorError, OSError) as error:
            return f"is truncated or not safetensors ({error})"
    if path.suffix in (".pt", ".pth", ".bin"):  # torch.save writes a zip with a checksum per part
        try:
            with zipfile.ZipFile(path) as parts:
                return "is corrupt" if parts.testzip() else None
        except Exception:  # zipfile raises a dozen types, from struct.error to NotImplementedError
            return "is truncated or not written by torch.save"
    if path.name.endswith(".index.json"):
        index = read_json(path)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shards, dict):
            return "is not JSON with a weight_map"
        missing = sorted({str(name) for name in shards.values() if not (path.parent / str(name)).is_file()})
        return f"names {missing[0]}, which is missing" if missing else None
    return None
