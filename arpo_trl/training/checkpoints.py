"""What is saved at a checkpoint, when, and which checkpoint is whole.

A folder `checkpoint-<step>` has model.safetensors or the adapter (in float32, so that a resume is exact), config.json,
the tokenizer, optimizer.pt, scheduler.pt, an rng_state.pth for each process, trainer_state.json (the log, the counts of
the callbacks), training_args.bin and files.json.

`Trainer` writes a checkpoint in place and resumes from the highest number unchecked. Here a checkpoint being written
carries a mark; once it is whole the mark becomes `files.json`, the list of its files and their sizes. A folder that
still has the mark, or whose files differ from the list, is never used and never deleted: it is set aside by name.
"""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from ..errors import RunFailed, in_one_line
from ..machine import free_space, is_full_disk, missing_space
from ..model.memory import moments
from ..report.console import say
from ..run_folder import checkpoint_step, list_checkpoints, match_umask, read_json, write_json

if TYPE_CHECKING:
    from .trainer import ArpoTrainer

IN_PROGRESS = ".in_progress"
FILES = "files.json"

# What a resume reads. FSDP and DeepSpeed keep all but the first in folders of their own.
MODEL_ONLY = "it holds the model only, as save_only_model: true asks for"
NEEDED = {"rng_state.pth": "rng_state*.pth", "optimizer.pt": "optimizer.*", "scheduler.pt": "scheduler.pt"}


def checkpoint_bytes(model: nn.Module, args: TrainingArguments) -> int:
    """Bytes of a checkpoint: the weights, and the optimizer's copies of those that are trained."""
    copies = 0.0 if args.save_only_model else moments(args)
    return saved_bytes(model) + int(copies * sum(size for size, is_trained in _sizes(model) if is_trained))


def saved_bytes(model: nn.Module) -> int:
    """Bytes of the weights as a checkpoint holds them: all of them, or an adapter's."""
    return sum(size for size, is_trained in _sizes(model) if is_trained or not hasattr(model, "peft_config"))


def _sizes(model: nn.Module) -> list[tuple[int, bool]]:
    # ZeRO-3 leaves parameters empty, with their size beside them.
    return [(getattr(p, "ds_numel", p.numel()) * p.element_size(), p.requires_grad) for p in model.parameters()]


def save_checkpoint(trainer: ArpoTrainer, write: Callable[[], None]) -> None:
    """Let `write` fill a checkpoint that is marked until it is whole, and only then rotate older ones away.

    Raises:
        RunFailed: it could not be written, unless the recipe says on_save_error: continue. What was written is removed,
            so that the disk has room for the logs.
    """
    output_dir = Path(str(trainer.args.output_dir))
    folder = output_dir / f"checkpoint-{trainer.state.global_step}"
    is_main, keep = trainer.is_world_process_zero(), trainer.save_total_limit

    def begin() -> None:
        if is_main:
            if full := missing_space(output_dir, trainer.checkpoint_bytes, "a checkpoint"):
                raise RunFailed(full)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / IN_PROGRESS).touch()

    def finish() -> None:
        if is_main:
            trainer.checkpoint_bytes = _list_files(folder, durable=bool(keep))

    for act in (begin, write, finish):  # each once all processes are done with the one before: the list has all files
        if error := _try_on_all(trainer, act):
            if is_main and (folder / IN_PROGRESS).exists():
                shutil.rmtree(folder, ignore_errors=True)
            return _stop_or_go_on(trainer, folder, error)
    if is_main:
        best = trainer.state.best_model_checkpoint
        rotate_checkpoints(output_dir=str(output_dir), save_total_limit=keep, best_model_checkpoint=best)


def _try_on_all(trainer: ArpoTrainer, act: Callable[[], None]) -> Exception | None:
    """Do it; the error of one process is an error for all, so that none waits for another in a collective."""
    error: Exception | None = None
    try:
        act()
    except Exception as failure:  # safetensors, torch and the file system each raise their own for a full disk
        error = failure
    failed = trainer.accelerator.reduce(torch.tensor(int(error is not None), device=trainer.args.device))
    return error or (RunFailed("another process could not write its part") if failed else None)


def _list_files(folder: Path, durable: bool) -> int:
    """Turn the mark into the list of files, and return their bytes.

    Args:
        durable: Wait until the disk has them, as older checkpoints are about to be deleted: a machine that loses
            power may otherwise lose both.
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


def _stop_or_go_on(trainer: ArpoTrainer, folder: Path, error: Exception) -> None:
    reason = in_one_line(error)
    if is_full_disk(error):
        needed, free = trainer.checkpoint_bytes / 1e9, free_space(folder.parent) / 1e9
        reason = f"disk full ({reason}); a checkpoint takes {needed:.3f} GB, {free:.3f} are free"
    message = f"{folder} could not be saved, what was written of it is removed: {reason}"
    if trainer.on_save_error == "stop":
        raise RunFailed(
            f"{message}. Older checkpoints are untouched; resume_from_checkpoint=true goes on from the last"
        )
    say(f"{message}; the run goes on without it (on_save_error: continue)")


class SaveAfterEpochEnd(TrainerCallback):
    """Saves the last step of an epoch after what the epoch's end logs and evaluates: a resume would not do that again.

    Add it after all callbacks that ask for a save.
    """

    def __init__(self) -> None:
        self.wanted = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        at_epoch_end = state.epoch % 1 == 0 or state.global_step >= state.max_steps
        if at_epoch_end and "epoch" in (args.eval_strategy, args.logging_strategy):
            self.wanted, control.should_save = control.should_save, False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        control.should_save, self.wanted = control.should_save or self.wanted, False


def newest_whole_checkpoint(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that can be resumed from, and a line for each newer one that cannot.

    Such a one is renamed to `damaged-checkpoint-<step>`, or `model-only-checkpoint-<step>`, so that neither a resume nor
    the rotation of old checkpoints can meet it again, and nothing is deleted.
    """
    lines: list[str] = []
    for folder in reversed(list_checkpoints(output_dir)):
        reason = find_damage(folder)
        if reason is None:
            return folder, lines
        aside = set_aside(folder, "model-only" if reason == MODEL_ONLY else "damaged")
        lines.append(f"{folder} can't be resumed from ({reason}); skipped and kept as {aside.name}")
    return None, lines


def set_aside(folder: Path, why: str) -> Path:
    """Rename `checkpoint-<step>` to `<why>-checkpoint-<step>`, with a number if that is taken."""
    aside, count = folder.with_name(f"{why}-{folder.name}"), 1
    while aside.exists():
        count += 1
        aside = folder.with_name(f"{why}-{folder.name}-{count}")
    return folder.rename(aside)


def find_damage(folder: Path) -> str | None:
    """Why `folder` cannot be resumed from, or None when it is whole.

    Runs no pickle and reads no weight: it compares sizes, JSON, safetensors headers and zip checksums. So a bit that
    flipped on the disk is seen in the optimizer's state and not in the weights.
    """
    if (folder / IN_PROGRESS).exists():
        return "its save was interrupted"
    state = read_json(folder / "trainer_state.json")
    if not isinstance(state, dict):
        return "trainer_state.json is missing or not JSON"
    if state.get("global_step") != checkpoint_step(folder):
        return f"trainer_state.json names step {state.get('global_step')}"
    sizes = read_json(folder / FILES) if (folder / FILES).exists() else {}
    if not isinstance(sizes, dict):
        return f"{FILES} is not JSON"
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    if not any(path.is_dir() for kind in ("optimizer_*", "global_step*") for path in folder.glob(kind)):
        if not any(folder.glob("*model.*")):
            return "it has no weights"
        missing = [name for name, pattern in NEEDED.items() if not any(folder.glob(pattern))]
        if missing:
            return MODEL_ONLY if len(missing) == len(NEEDED) else f"{missing[0]} is missing"
    for path in sorted(folder.iterdir()):
        reason = _file_damage(path)
        if reason:
            return f"{path.name} {reason}"
    return None


def _file_damage(path: Path) -> str | None:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="numpy"):
                return None
        except (SafetensorError, OSError) as error:
            return f"is cut off or not safetensors ({error})"
    if path.suffix in (".pt", ".pth", ".bin"):  # torch.save writes a zip with a checksum for each part
        try:
            with zipfile.ZipFile(path) as parts:
                return "is corrupt" if parts.testzip() else None
        except Exception:  # zipfile raises a dozen kinds, from struct.error to NotImplementedError
            return "is cut off or not written by torch.save"
    if path.name.endswith(".index.json"):
        index = read_json(path)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shards, dict):
            return "is not JSON with a weight_map"
        missing = sorted({str(name) for name in shards.values() if not (path.parent / str(name)).is_file()})
        return f"names {missing[0]}, which is missing" if missing else None
    return None
