"""kill -9 at random points of the save: the newest whole checkpoint is whole, and a run goes on from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import train

from arpo_trl.run_folder import list_checkpoints
from arpo_trl.training.checkpoints import newest_complete_checkpoint

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL, which Windows lacks")


@pytest.mark.parametrize("kills", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_a_save_killed_at_any_point_loses_no_earlier_checkpoint(kills: int, tmp_path: Path, tiny_model: Path) -> None:
    """That many kills under save_total_limit none, 1 and 2: a complete checkpoint is found each time, every tensor in it
    is of its step, the half-written one is reported, and a run resumes from there.
    """
    script = Path(__file__).with_name("killed_saves.py")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(script.parent), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tiny_model), str(tmp_path), str(kills)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60 + 6 * kills, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 3 * kills
    for kill in found:
        assert kill["killed"] and kill["right"] and kill["named"], kill
        assert kill["found"] >= kill["before"], kill
    assert sum(bool(kill["marked"]) for kill in found) >= kills  # most kills land inside a save
    for limit in (1, 2):
        assert len(list_checkpoints(tmp_path / f"limit_{limit}")) <= limit + 1
    folder = tmp_path / "limit_1"
    newest, lines = newest_complete_checkpoint(folder)
    assert newest is not None and not lines
    step = int(newest.name.split("-")[1]) + 1
    assert train(folder, tiny_model, max_steps=step, stop_at=step).state.global_step == step
    assert (folder / f"checkpoint-{step}").is_dir()
