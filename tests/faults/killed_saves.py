"""Saves again and again in a child process and kills it with SIGKILL: run by test_killed_saves.py.

    python killed_saves.py MODEL FOLDER KILLS           (KILLS for each save_total_limit: none, 1, 2)

Half of the kills come after a random time; the others at the n-th file operation, so that none is left out. Checkpoint N
holds weights and moments that are all N. Prints a JSON line for each kill: what the next run would find.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from runs import FILE_OPERATIONS, make_trainer
from safetensors.torch import load_file
from transformers.utils.logging import disable_progress_bar

from arpo_trl.training.checkpoints import IN_PROGRESS, newest_complete_checkpoint


def prepare(folder: Path, model: Path, limit: int | None) -> Any:
    """A trainer between two steps. No backward pass: its threads would not survive a fork."""
    torch.set_num_threads(1)
    disable_progress_bar()  # tqdm's lock is shared by processes: a child killed under it would stop all that follow
    trainer: Any = make_trainer(folder, model, save_strategy="steps", save_steps=1, save_total_limit=limit)
    trainer.create_optimizer_and_scheduler(8)
    trainer.state.train_batch_size = 2
    for p in trainer.model.parameters():
        p.grad = torch.zeros_like(p)
    trainer.optimizer.step()
    trainer.state.stateful_callbacks = {type(c).__name__: {} for c in trainer.callback_handler.callbacks}
    trainer.state.stateful_callbacks["TrainerControl"] = {}
    return trainer


def save(trainer: Any, step: int) -> None:
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.fill_(step)
            trainer.optimizer.state[p]["exp_avg"].fill_(step)
    trainer.state.global_step = step
    trainer._save_checkpoint(trainer.model, None)


def child(trainer: Any, first_step: int, die_at: int | None) -> None:
    """Save 40 times, or until the parent's SIGKILL; with `die_at`, until the n-th file operation."""
    operations = 0

    def count(event: str, args: Any) -> None:
        nonlocal operations
        if event in FILE_OPERATIONS | {"os.scandir", "shutil.rmtree"}:
            operations += 1
            if operations == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    faulthandler.dump_traceback_later(60, exit=True)
    if die_at:
        sys.addaudithook(count)
    for step in range(first_step, first_step + 40):
        save(trainer, step)
    os._exit(0)


def all_are(value: int, folder: Path) -> bool:
    """Whether every weight and first moment in a checkpoint is `value`, and each file loads."""
    weights = load_file(folder / "model.safetensors")
    moments = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    for name in ("scheduler.pt", "training_args.bin"):
        torch.load(folder / name, weights_only=name == "scheduler.pt")
    return all(bool((w == value).all()) for w in weights.values()) and all(
        bool((m["exp_avg"] == value).all()) for m in moments.values()
    )


def main(model: Path, folder: Path, limit: int | None, kills: int) -> None:
    rng = random.Random(kills + (limit or 0))
    trainer = prepare(folder, model, limit)
    began = time.monotonic()
    save(trainer, 1)
    save(trainer, 2)
    one_save = (time.monotonic() - began) / 2
    for kill in range(kills):
        newest, _ = newest_complete_checkpoint(folder)
        assert newest is not None
        before = int(newest.name.split("-")[1])
        by_time = kill % 2 == 0
        pid = os.fork()
        if pid == 0:
            child(trainer, before + 1, None if by_time else rng.randrange(1, 120))
        if by_time:
            time.sleep(rng.uniform(0, 3 * one_save))
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        marked = [p.parent.name for p in folder.glob(f"checkpoint-*/{IN_PROGRESS}")]
        found, lines = newest_complete_checkpoint(folder)
        step = int(found.name.split("-")[1]) if found else 0
        print(
            json.dumps(
                {
                    "limit": limit,
                    "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
                    "by_time": by_time,
                    "before": before,
                    "found": step,
                    "right": found is not None and all_are(step, found),
                    "marked": marked,
                    "lines": lines,
                    "named": all(any(name in line for line in lines) for name in marked),
                }
            ),
            flush=True,
        )
        for aside in folder.glob("incomplete-*"):
            shutil.rmtree(aside)


if __name__ == "__main__":
    for limit in (None, 1, 2):
        main(Path(sys.argv[1]), Path(sys.argv[2]) / f"limit_{limit}", limit, int(sys.argv[3]))
