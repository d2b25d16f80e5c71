"""DDP on this machine's CPU: the same run as one process, and an end with a reason when one dies.

The slow ones (two machines, a killed process): OMP_NUM_THREADS=1 pytest -m slow tests/training/test_distributed.py
test_engines.py has FSDP2 and DeepSpeed.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from launches import (
    ACCELERATE,
    ROOT,
    environment,
    launch,
    require_same_training,
    shipped,
    torchrun,
    write_config,
    write_recipe,
)

from arpo_trl.errors import RecipeError
from arpo_trl.recipe import read_recipe
from arpo_trl.run_folder import read_lines
from arpo_trl.training.train import train


@contextlib.contextmanager
def own_signals_after() -> Iterator[None]:
    """Put back the handlers that a run in this process replaces."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The run that one process makes of batches of four."""
    folder = tmp_path_factory.mktemp("one")
    with own_signals_after():
        assert train(read_recipe(write_recipe(folder, tiny_model, per_device_train_batch_size=4))).exit_code == 0
    return folder / "run"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The run that two processes make of batches of two each, as `global_batch_size: 4` asks for."""
    folder = tmp_path_factory.mktemp("two")
    given = write_recipe(folder, tiny_model, global_batch_size=4)
    printed = launch([*torchrun(), "-m", "arpo_trl", str(given)])
    (folder / "run" / "printed").write_text(printed, encoding="utf-8")
    return folder / "run"


# --- DDP ---


def test_two_processes_train_as_one_with_twice_the_batch(one: Path, two: Path) -> None:
    require_same_training(two, one)


def test_two_processes_leave_the_files_of_one(one: Path, two: Path) -> None:
    def files(run: Path) -> set[str]:
        found = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
        return {name.replace("rng_state_0.pth", "rng_state.pth") for name in found if "rng_state_1" not in name}

    assert files(two) - {"printed"} == files(one)
    assert sorted(path.name for path in (two / "checkpoint-4").glob("rng_state*")) == [
        "rng_state_0.pth",
        "rng_state_1.pth",
    ]
    assert (two / "row_audit.jsonl").read_bytes() == (one / "row_audit.jsonl").read_bytes()


def test_only_one_of_two_processes_prints(two: Path) -> None:
    printed = (two / "printed").read_text(encoding="utf-8").splitlines()
    told = (two / "training.log").read_text(encoding="utf-8").splitlines()[1:]
    assert [line for line in printed if line.startswith("step")] == [line for line in told if line.startswith("step")]
    assert sum(line.startswith("step 4/4") for line in printed) == 1


def test_the_report_has_the_rows_per_step(two: Path) -> None:
    printed = (two / "printed").read_text(encoding="utf-8")
    assert re.search(r"4 rows and about [\d,]+ tokens per step \(2 per device x 2 devices\)", printed)


def test_a_different_number_of_processes_resumes_with_the_same_rows_per_step_only(
    two: Path, tmp_path: Path, tiny_model: Path
) -> None:
    shutil.copytree(two, tmp_path / "run")
    manifest = json.loads((two / "run.json").read_text(encoding="utf-8")) | {"status": "stopped"}
    (tmp_path / "run" / "run.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(
        RecipeError, match=r"world_size: 2 -> 1 processes \(launch 2, or keep 4 rows per step, found 2\)"
    ):
        train(read_recipe(write_recipe(tmp_path, tiny_model)))

    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    with own_signals_after():
        assert train(read_recipe(write_recipe(tmp_path, tiny_model, global_batch_size=4))).exit_code == 0
    assert "with the same rows per step, grouped differently" in (tmp_path / "run" / "training.log").read_text("utf-8")
    require_same_training(tmp_path / "run", two)


def start(command: list[str], printed: Path) -> subprocess.Popen[bytes]:
    with printed.open("wb") as file:
        return subprocess.Popen(command, env=environment(), stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)


def wait_for_a_step(run: Path, launcher: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while not read_lines(run / "trainer_log.jsonl"):
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_is_killed_ends_the_run_with_a_message(rank: str, tmp_path: Path, tiny_model: Path) -> None:
    given = write_recipe(tmp_path, tiny_model, max_steps=2000, save_steps=2000)
    launcher = start([*torchrun(), "-m", "arpo_trl", str(given)], tmp_path / "printed")
    try:
        wait_for_a_step(tmp_path / "run", launcher)
        workers = psutil.Process(launcher.pid).children()
        next(worker for worker in workers if worker.environ().get("RANK") == rank).kill()
        began = time.monotonic()
        assert launcher.wait(timeout=60) != 0
        print(f"ended after {time.monotonic() - began:.1f} s")
    finally:
        launcher.kill()
    printed = (tmp_path / "printed").read_text(encoding="utf-8")
    assert "Signal 9 (SIGKILL)" in printed
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_a_checkpoint_on_all(tmp_path: Path, tiny_model: Path) -> None:
    given = write_recipe(tmp_path, tiny_model, max_steps=2000, save_steps=2000)
    launcher = start([*torchrun(), "-m", "arpo_trl", str(given)], tmp_path / "printed")
    try:
        wait_for_a_step(tmp_path / "run", launcher)
        launcher.send_signal(signal.SIGTERM)
        launcher.wait(timeout=60)
    finally:
        launcher.kill()
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert (checkpoint / "rng_state_1.pth").is_file()
    assert not (checkpoint / ".in_progress").exists()


# --- more than DDP ---


@pytest.mark.slow
def test_fsdp_without_gpus_is_reported_as_ddp(tmp_path: Path, tiny_model: Path) -> None:
    config, given = str(write_config(tmp_path, **shipped("fsdp2.yaml"))), write_recipe(tmp_path, tiny_model)
    printed = launch([*ACCELERATE, "--config_file", config, "--main_process_port", "0", "-m", "arpo_trl", str(given)])
    assert "FSDP needs GPUs" in printed


@pytest.mark.slow
def test_two_machines_are_two_launches(tmp_path: Path, tiny_model: Path, one: Path) -> None:
    config, given = str(write_config(tmp_path, **shipped("multi_node.yaml"))), write_recipe(tmp_path, tiny_model)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = [
        start(
            [
                *[*ACCELERATE, "--config_file", config, "--num_machines", "2", "--machine_rank", str(rank)],
                *["--main_process_ip", "127.0.0.1", "--main_process_port", str(port), "-m", "arpo_trl", str(given)],
            ],
            tmp_path / f"printed_{rank}",
        )
        for rank in (0, 1)
    ]
    for rank, machine in enumerate(machines):
        assert machine.wait(timeout=240) == 0, (tmp_path / f"printed_{rank}").read_text(encoding="utf-8")
    require_same_training(tmp_path / "run", one)
    assert "step" not in (tmp_path / "printed_1").read_text(encoding="utf-8")
