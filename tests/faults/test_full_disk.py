"""A checkpoint that can't be written: the message, what is left, and whether the run continues."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import MakeRecipe, make_trainer
from safetensors import SafetensorError

from arpo_trl.__main__ import main
from arpo_trl.errors import RunFailed
from arpo_trl.machine import describe_write_error
from arpo_trl.run_folder import list_checkpoints, match_umask
from arpo_trl.training import checkpoints
from arpo_trl.training.checkpoints import find_problem


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3.3 MB: one checkpoint of the tiny model and half of the next."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root on Linux")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3300k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def every_step(folder: Path, model: Path, **changes: Any) -> Any:
    return make_trainer(folder, model, max_steps=3, save_strategy="steps", save_steps=1, **changes)


@pytest.mark.parametrize("checked", [True, False], ids=["seen_before_the_save", "seen_in_the_save"])
def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(
    checked: bool, small_disk: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line reports a full disk; the checkpoint before is complete; nothing is left of the failed one."""
    if not checked:
        monkeypatch.setattr("arpo_trl.training.checkpoints.missing_space", lambda *args: None)
    with pytest.raises(
        RunFailed,
        match=r"checkpoint-2 could not be saved.*disk full.*resume_from_checkpoint=true resumes from the latest",
    ) as error:
        every_step(small_disk / "run", tiny_model).train()
    assert "\n" not in str(error.value)
    assert [find_problem(p) for p in list_checkpoints(small_disk / "run")] == [None]


def test_a_full_disk_lets_the_run_continue_if_asked(
    small_disk: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """on_save_error: continue takes all steps, reports each failed save, and keeps the checkpoint before."""
    trainer = every_step(small_disk / "run", tiny_model, on_save_error="continue")
    trainer.train()
    assert trainer.state.global_step == 3
    assert [p.name for p in list_checkpoints(small_disk / "run")] == ["checkpoint-1"]
    told = [line for line in capsys.readouterr().out.splitlines() if "disk full" in line]
    assert len(told) == 2 and all(
        "continuing without this checkpoint (on_save_error: continue)" in line for line in told
    )


def test_a_disk_too_small_for_a_checkpoint_is_detected_before_training(
    make_recipe: MakeRecipe, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and one line, before the first step."""
    (small_disk / "ballast").write_bytes(bytes(2 << 20))
    assert main([str(make_recipe(output_dir=str(small_disk / "run")))]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("disk full: a checkpoint needs 2.0 MB") and "choose another folder" in error


ERRORS = {
    "no_space": OSError(errno.ENOSPC, "No space left on device"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "windows_rust": SafetensorError("Error while serializing: I/O error: 磁盘空间不足。 (os error 112)"),
    "windows": OSError(
        errno.ENOSPC, "[WinError 112] Es steht nicht genug Speicherplatz zur Verfügung: 'checkpoint-2'"
    ),
    "torch": RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 11840 vs 11732"),
    "read_only": OSError(errno.EROFS, "Read-only file system"),
}


@pytest.mark.parametrize(
    ("failure", "on_save_error"),
    [*((failure, "stop") for failure in ERRORS if "windows" not in failure), ("safetensors", "continue")],
)
def test_any_error_of_a_writer_is_a_failed_save(
    failure: str, on_save_error: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops the run with one line, or the run continues; the half-written folder is deleted."""
    trainer = every_step(tmp_path, tiny_model, on_save_error=on_save_error)
    save = trainer._save_optimizer_and_scheduler

    def fail_at_step_2(output_dir: str) -> None:
        if trainer.state.global_step == 2:
            raise ERRORS[failure]
        save(output_dir)

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", fail_at_step_2)
    if on_save_error == "stop":
        with pytest.raises(RunFailed, match="checkpoint-2 could not be saved") as error:
            trainer.train()
        assert ("disk full" in str(error.value)) == (failure != "read_only")
        assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    else:
        trainer.train()
        assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-3"]
    assert [find_problem(p) for p in list_checkpoints(tmp_path)] == [None] * len(list_checkpoints(tmp_path))


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_full_disk_is_recognized(error: Exception) -> None:
    """Windows translates its messages."""
    assert describe_write_error(error).startswith("disk full (") == (error is not ERRORS["read_only"])
    assert not describe_write_error(OSError("an error (os error 1121)")).startswith("disk full")


def test_a_failed_list_of_files_is_a_failed_save(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mark stays until the list is written, so the folder is deleted as incomplete."""

    def fail(*args: Any) -> None:
        raise ERRORS["no_space"]

    monkeypatch.setattr(checkpoints, "write_json", fail)
    with pytest.raises(RunFailed, match="disk full"):
        every_step(tmp_path, tiny_model).train()
    assert list_checkpoints(tmp_path) == []


def test_older_checkpoints_are_deleted_only_once_the_new_one_is_complete(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With save_total_limit 1, a failed save leaves the one before."""
    trainer = every_step(tmp_path, tiny_model, save_total_limit=1)
    save = trainer._save_rng_state

    def fail_at_step_3(output_dir: str) -> None:
        assert [p.name for p in list_checkpoints(tmp_path)][:-1] == (
            [f"checkpoint-{trainer.state.global_step - 1}"] if trainer.state.global_step > 1 else []
        )
        if trainer.state.global_step == 3:
            raise ERRORS["no_space"]
        save(output_dir)

    monkeypatch.setattr(trainer, "_save_rng_state", fail_at_step_3)
    with pytest.raises(RunFailed, match="disk full"):
        trainer.train()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-2"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no umask to speak of")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_follow_the_umask(umask: int, tmp_path: Path, tiny_model: Path) -> None:
    """safetensors 0.8 writes 0600, whatever the umask."""
    before = os.umask(umask)
    try:
        trainer = make_trainer(tmp_path / "run", tiny_model, max_steps=1, save_strategy="steps", save_steps=1)
        trainer.train()
        trainer.save_final_model(None)
        match_umask(tmp_path / "run")
    finally:
        os.umask(before)
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert len(files) > 10
    assert {p.name: oct(p.stat().st_mode & 0o777) for p in files if p.stat().st_mode & 0o777 != 0o666 & ~umask} == {}
