"""SIGTERM and Ctrl-C finish the step, save and stop; what they meet in a run decides nothing else.

Most of these run in this process, with real signals. The slow ones start launchers: `pytest tests/faults -m slow`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeRecipe
from runs import differing, log_without_times

from arpo_trl.__main__ import main
from arpo_trl.run_folder import list_checkpoints
from arpo_trl.training.callbacks import BeforeFirstStep
from arpo_trl.training.checkpoints import find_problem
from arpo_trl.training.trainer import ArpoTrainer

posix = pytest.mark.skipif(sys.platform == "win32", reason="a process of Windows can't send another one these signals")


def at_call(
    monkeypatch: pytest.MonkeyPatch, name: str, call: int, act: Callable[[], None], cls: Any = ArpoTrainer
) -> None:
    """Call `act` inside the n-th call of a method."""
    real, calls = getattr(cls, name), 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            act()
        return real(*args, **kwargs)

    monkeypatch.setattr(cls, name, wrapped)


def send(*numbers: int) -> Callable[[], None]:
    def act() -> None:
        for number in numbers:
            signal.raise_signal(number)
            time.sleep(0.001)

    return act


def status(run: Path) -> str:
    return str(json.loads((run / "run.json").read_text(encoding="utf-8"))["status"])


@pytest.mark.parametrize(
    ("number", "method", "call", "step"),
    [
        pytest.param(signal.SIGTERM, "training_step", 3, 3, id="sigterm_in_a_step"),
        pytest.param(signal.SIGINT, "training_step", 1, 1, id="ctrl_c_in_the_first_step", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "_save_checkpoint", 1, 2, id="ctrl_c_in_a_save"),
        pytest.param(signal.SIGTERM, "evaluate", 1, 2, id="sigterm_in_an_evaluation", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_and_the_printed_command_resumes_bit_for_bit(
    number: int,
    method: str,
    call: int,
    step: int,
    make_recipe: MakeRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 128 + the signal, no final model, one checkpoint; the resumed run is the uninterrupted one."""
    path = str(make_recipe(eval_dataset="rows", eval_strategy="steps", eval_steps=2))
    with monkeypatch.context() as patch:
        at_call(patch, method, call, send(number))
        assert main([path]) == 128 + number
    run = tmp_path / "run"
    out = capsys.readouterr().out
    assert f"stopped by {signal.Signals(number).name} at step {step}, checkpoint saved" in out
    command = shlex.split(re.search("to resume: (.*)", out)[1])  # type: ignore[index]
    assert command[:3] == ["python", "-m", "arpo_trl"] and Path(command[3]) == Path(path)
    assert not (run / "model.safetensors").exists() and status(run) == "stopped"
    assert list_checkpoints(run)[-1].name == f"checkpoint-{step}" and find_problem(list_checkpoints(run)[-1]) is None
    assert main(command[3:4]) == 0
    assert main([path, f"output_dir={tmp_path / 'whole'}"]) == 0
    assert differing(run / "checkpoint-4", tmp_path / "whole" / "checkpoint-4") == []
    assert log_without_times(run) == log_without_times(tmp_path / "whole")
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_the_second_ctrl_c_stops_at_once(
    make_recipe: MakeRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 130 and nothing of the step saved; the run resumes from the checkpoint before."""
    at_call(monkeypatch, "training_step", 3, send(signal.SIGINT, signal.SIGINT))
    assert main([str(make_recipe())]) == 130
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == "interrupted by Ctrl-C"
    (saved,) = list_checkpoints(tmp_path / "run")
    assert saved.name == "checkpoint-2"
    assert f"stopped at once, without saving; the last checkpoint is {saved}\nto resume: " in printed.out


@pytest.mark.parametrize(
    ("numbers", "code"), [((signal.SIGINT, signal.SIGTERM), 130), ((signal.SIGTERM, signal.SIGINT), 143)]
)
def test_a_second_different_signal_changes_nothing(
    numbers: tuple[int, ...], code: int, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher that dies of Ctrl-C sends its own SIGTERM: the first signal decides."""
    at_call(monkeypatch, "training_step", 3, send(*numbers))
    assert main([str(make_recipe())]) == code


def test_a_ctrl_c_before_the_first_step_stops_at_once(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to save; the same command starts from the beginning."""
    with monkeypatch.context() as patch:
        at_call(patch, "__init__", 1, send(signal.SIGINT))
        assert main([str(make_recipe())]) == 130
    assert list_checkpoints(tmp_path / "run") == []
    assert main([str(make_recipe())]) == 0


def test_a_signal_in_the_preflight_stops_after_the_first_step(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint exists."""
    at_call(monkeypatch, "on_train_begin", 1, send(signal.SIGTERM), BeforeFirstStep)
    assert main([str(make_recipe(preflight=True))]) == 143
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("method", "call"), [("training_step", 4), ("save_final_model", 1)], ids=["in_the_last_step", "in_the_final_save"]
)
def test_a_signal_at_the_end_lets_the_run_finish(
    method: str, call: int, make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is saved, exit code 0: nothing is left to resume."""
    at_call(monkeypatch, method, call, send(signal.SIGTERM))
    assert main([str(make_recipe())]) == 0
    assert status(tmp_path / "run") == "finished" and (tmp_path / "run" / "model.safetensors").exists()


def test_a_stop_keeps_its_checkpoint_even_if_another_was_better(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At its end, Trainer deletes all but the best under save_total_limit 1; not when a signal stopped it."""
    changes = {"eval_dataset": "rows", "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    at_call(monkeypatch, "training_step", 3, send(signal.SIGTERM))
    assert main([str(make_recipe(save_total_limit=1, **changes))]) == 143
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["checkpoint-2", "checkpoint-3"]


def test_a_stop_in_an_epoch_does_not_end_the_epoch(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No evaluation or second save that an uninterrupted run would not have; only the log tells where it stopped."""
    changes = {"eval_dataset": "rows", "eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": -1}
    path = str(make_recipe(num_train_epochs=2, **changes))
    saves: list[int] = []
    real = ArpoTrainer._save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(ArpoTrainer, "_save_checkpoint", lambda self, *a: (saves.append(1), real(self, *a))[1])
        at_call(patch, "training_step", 6, send(signal.SIGTERM))
        assert main([path]) == 143
    assert len(saves) == 2
    assert main([path]) == 0
    assert main([path, f"output_dir={tmp_path / 'whole'}"]) == 0
    assert log_without_times(tmp_path / "run") == log_without_times(tmp_path / "whole")
    assert differing(*(tmp_path / name / "checkpoint-8" for name in ("run", "whole"))) == []


# --- real processes ---


def start(command: list[str], **more: Any) -> subprocess.Popen[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True, **more)


def read_until(process: subprocess.Popen[str], mark: str) -> str:
    """What the process prints up to a line with `mark`."""
    told = ""
    assert process.stdout is not None
    for line in process.stdout:
        told += line
        if mark in line:
            return told
    raise AssertionError(f"it ended ({process.wait()}) before {mark!r}: {told}")


LONG = {"max_steps": 150, "save_steps": 1000}
COMMANDS = {
    "python": [sys.executable, "-m", "arpo_trl"],
    "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", "-m", "arpo_trl"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "arpo_trl"],
}


def resume_and_compare(path: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three steps more are those of the run that never stopped."""
    (stopped,) = list_checkpoints(run)
    step = int(stopped.name.split("-")[1])
    for folder, steps in ((run, 3), (run.with_name("whole"), step + 3)):
        with pytest.MonkeyPatch.context() as patch:
            at_call(patch, "training_step", steps, send(signal.SIGTERM))
            assert main([str(path), f"output_dir={folder}"]) == 143
        assert (f"resuming from {stopped.name}" in capsys.readouterr().out) == (folder == run)
    assert differing(*(run.with_name(name) / f"checkpoint-{step + 3}" for name in ("run", "whole"))) == []
    assert log_without_times(run) == log_without_times(run.with_name("whole"))


@posix
@pytest.mark.parametrize(
    ("number", "code", "compare"),
    [
        pytest.param(signal.SIGTERM, 143, False, id="sigterm"),
        pytest.param(signal.SIGTERM, 143, True, id="sigterm_and_on", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, True, id="ctrl_c_and_on", marks=pytest.mark.slow),
    ],
)
def test_a_process_saves_on_a_signal_and_prints_how_to_resume(
    number: int, code: int, compare: bool, make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The exit code is the shell's for the signal; the resumed run equals the uninterrupted one."""
    path = make_recipe(**LONG)
    process = start([*COMMANDS["python"], str(path)])
    read_until(process, "step 3/")
    process.send_signal(number)
    told = process.communicate(timeout=60)[0]
    assert process.returncode == code, told
    assert (
        f"stopped by {signal.Signals(number).name} at step" in told and f"to resume: python -m arpo_trl {path}" in told
    )
    assert "Traceback" not in told and not (tmp_path / "run" / "model.safetensors").exists()
    if compare:
        resume_and_compare(path, tmp_path / "run", capsys)


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


@posix
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, getattr(signal, "SIGKILL", 9), signal.SIGINT])
def test_a_run_stops_when_its_launcher_dies(
    number: int, make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`accelerate launch` passes no signal on; the kernel sends SIGTERM when it is gone, also with stdout closed."""
    path = make_recipe(**LONG)
    process = start([*COMMANDS["accelerate"], str(path)])
    read_until(process, "step 3/")
    process.send_signal(number)
    process.wait(timeout=60)
    assert process.stdout is not None
    process.stdout.close()  # and the reader of its lines goes, too
    run = tmp_path / "run"
    assert wait_for(lambda: status(run) == "stopped", 60)
    assert "stopped by SIGTERM at step" in (run / "training.log").read_text(encoding="utf-8")
    assert not (run / "model.safetensors").exists()
    resume_and_compare(path, run, capsys)


@posix
@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["python", "accelerate"])
def test_a_ctrl_c_for_the_process_group_saves(
    launcher: str, make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As from a terminal: launcher, run and two dataloader workers get it at once."""
    path = make_recipe(dataloader_num_workers=2, **LONG)
    process = start([*COMMANDS[launcher], str(path)], start_new_session=True)
    read_until(process, "step 3/")
    os.killpg(process.pid, signal.SIGINT)
    told = process.communicate(timeout=60)[0]
    run = tmp_path / "run"
    assert wait_for(lambda: status(run) == "stopped", 30), told
    assert "stopped by SIGINT at step" in (run / "training.log").read_text(encoding="utf-8")
    resume_and_compare(path, run, capsys)


@posix
@pytest.mark.slow
def test_a_closed_stdout_does_not_stop_a_run(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """`python -m arpo_trl recipe | head -3`: the run ends as it should, and training.log has every line."""
    process = start([*COMMANDS["python"], str(make_recipe(max_steps=30))])
    read_until(process, "step 3/")
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert "step 30/30" in (tmp_path / "run" / "training.log").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_with_sigkill_resumes_bit_for_bit(
    seed: int, make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """kill -9 anywhere in a run that saves every second step: the same command ends as if nothing had been."""
    import random

    path = make_recipe(max_steps=60, save_steps=2, save_total_limit=2)
    process = start([*COMMANDS["python"], str(path)])
    read_until(process, f"step {5 + 10 * seed}/")
    time.sleep(random.Random(seed).uniform(0, 0.5))
    process.kill()
    process.communicate()
    assert main([str(path)]) == 0
    assert main([str(path), f"output_dir={tmp_path / 'whole'}"]) == 0
    assert differing(*(tmp_path / name / "checkpoint-60" for name in ("run", "whole"))) == []
    assert log_without_times(tmp_path / "run") == log_without_times(tmp_path / "whole")


@posix
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_two_processes_stop_together_and_resume(number: int, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """torchrun forwards the signal; both processes stop at the same step, and two processes resume from it."""
    path = make_recipe(per_device_train_batch_size=1, **LONG)
    process = start([*COMMANDS["torchrun"], str(path)])
    read_until(process, "step 3/")
    process.send_signal(number)
    told = process.communicate(timeout=120)[0]
    run = tmp_path / "run"
    assert status(run) == "stopped", told
    (stopped,) = list_checkpoints(run)
    assert find_problem(stopped) is None and (stopped / "rng_state_1.pth").exists()
    end = int(stopped.name.split("-")[1]) + 3
    for folder in (run, tmp_path / "whole"):
        again = start([*COMMANDS["torchrun"], str(path), f"output_dir={folder}", f"save_steps={end}"])
        told = again.communicate(timeout=200)[0]
        assert again.returncode == 0, told
    assert differing(*(tmp_path / name / f"checkpoint-{end}" for name in ("run", "whole"))) == []
    assert log_without_times(run) == log_without_times(tmp_path / "whole")
