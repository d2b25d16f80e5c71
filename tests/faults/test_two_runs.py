"""Two runs in one output folder: the second is rejected, unless the first has died."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import MakeRecipe

from arpo_trl.__main__ import main
from arpo_trl.recipe import read_recipe
from arpo_trl.training.output_dir import LOCK, own_output_dir

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL, which Windows lacks")


def hold(path: Path) -> tuple[int, Callable[[], None]]:
    """A process that owns the folder of a recipe, and what kills it."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with own_output_dir(read_recipe(path)):
            if os.fork() == 0:  # a dataloader's worker lives on for a while
                os.write(write, b"x")
                signal.alarm(20)
                signal.pause()
            signal.pause()
    os.read(read, 1)

    def kill() -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    return pid, kill


@pytest.mark.parametrize("changes", [{}, {"overwrite_output_dir": True}], ids=["same_command", "overwrite"])
def test_a_second_run_is_rejected_in_a_line_that_names_the_first(
    changes: dict[str, bool], make_recipe: MakeRecipe, output_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is changed. Once the first is killed, the same command runs, even if its workers are still alive."""
    path = make_recipe(max_steps=3, save_steps=1, **changes)
    before = sorted(output_dir.rglob("*"))
    pid, kill = hold(path)
    try:
        assert main([str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        owner = json.loads((output_dir / LOCK).read_text())
        assert owner["process"] == pid
        assert f"another run (host {owner['host']}, process {pid}, started {owner['started']})" in line
        assert sorted(output_dir.rglob("*")) == sorted([*before, output_dir / LOCK])
    finally:
        kill()
    assert main([str(path)]) == 0


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_rejects_no_run(
    error: int, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some NFS mounts."""
    import fcntl

    def fail(*args: object) -> None:
        raise OSError(error, os.strerror(error))

    path = make_recipe()
    _, kill = hold(path)
    monkeypatch.setattr(fcntl, "lockf", fail)
    try:
        with own_output_dir(read_recipe(path)):
            pass
    finally:
        kill()


def test_the_process_that_owned_a_folder_can_use_it_again(make_recipe: MakeRecipe) -> None:
    """A program may start one run after the other."""
    recipe = read_recipe(make_recipe())
    for _ in range(2):
        with own_output_dir(recipe):
            pass
    hold(make_recipe())[1]()
