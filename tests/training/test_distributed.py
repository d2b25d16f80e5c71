"""Several processes on this machine's CPU: the same run as one process, and an end with a reason when one dies.

The slow ones (FSDP2, DeepSpeed, two machines, a killed process): OMP_NUM_THREADS=1 pytest -m slow tests/training/test_distributed.py
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import small_run
import torch
from safetensors.torch import load_file

from arpo_trl.errors import RecipeError
from arpo_trl.recipe import read_recipe
from arpo_trl.report.log_file import read_log
from arpo_trl.training.train import train

ROOT = Path(__file__).parents[2]
TIMES = {"elapsed_time", "remaining_time", "elapsed_seconds", "tokens_per_second", "trained_tokens_per_second"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]

# Accelerate engages FSDP only where it finds GPUs (1.15, accelerate/state.py), so gloo on CPUs is passed off as one.
AS_IF_ON_GPUS = """
import sys
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

def prepare_backend(self, *args):
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return "gloo", DistributedType.MULTI_GPU

def set_device(self):
    self.device = torch.device("cpu")

PartialState._prepare_backend, PartialState.set_device = prepare_backend, set_device

from arpo_trl.__main__ import main
from arpo_trl.training.trainer import ArpoTrainer

save = ArpoTrainer.save_final_model
def save_final_model(self, dtype):
    kinds = {type(p.data).__name__ for p in self.model.parameters()}
    print(f"parameters are {kinds}", flush=True)
    save(self, dtype)
ArpoTrainer.save_final_model = save_final_model
sys.exit(main(sys.argv[1:]))
"""


def write_recipe(folder: Path, model: Path, **keys: Any) -> Path:
    """Four steps over the toy data, on whatever launches them."""
    toy = {
        "dataset_dir": str(ROOT / "recipes"),
        "dataset": "arpo_sft_toy",
        "cutoff_len": 512,
        "max_samples": 14,  # the last of four steps has two rows
        "plot_loss": True,
        "disable_gradient_checkpointing": True,
    }
    return small_run.write_recipe(folder, model, **toy | keys)


def environment(**more: str) -> dict[str, str]:
    mine = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    return mine | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])} | more


def launch(command: list[str], timeout: float = 240, **env: str) -> str:
    """Run to the end, which has to be a good one, and return all that was printed."""
    done = subprocess.run(
        command,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def log_without_times(run: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if k not in TIMES | {"peak_memory_gb"}}
        for line in read_log(run / "trainer_log.jsonl")
    ]


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
    printed = launch([*TORCHRUN, "-m", "arpo_trl", str(given)])
    (folder / "run" / "printed").write_text(printed, encoding="utf-8")
    return folder / "run"


def require_same_training(run: Path, expected: Path) -> None:
    """Losses to 1e-5, weights to what AdamW makes of a gradient that was summed in another order."""
    ours, theirs = (
        [(line["loss"], line["grad_norm"], line["lr"], line["trained_tokens"]) for line in log_without_times(folder)]
        for folder in (run, expected)
    )
    assert len(ours) == 4
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    found, wanted = (load_file(folder / "model.safetensors") for folder in (run, expected))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype == torch.bfloat16
        torch.testing.assert_close(found[name].float(), tensor.float(), atol=2e-4, rtol=2**-7, msg=name)


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
    assert "4 rows per step (2 per device x 2 devices)" in printed


def test_a_different_number_of_processes_does_not_resume(two: Path, tmp_path: Path, tiny_model: Path) -> None:
    shutil.copytree(two, tmp_path / "run")
    manifest = json.loads((two / "run.json").read_text(encoding="utf-8")) | {"status": "stopped"}
    (tmp_path / "run" / "run.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(RecipeError, match="world_size: 2 -> 1"):
        train(read_recipe(write_recipe(tmp_path, tiny_model, global_batch_size=4)))

    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    given = write_recipe(tmp_path, tiny_model, global_batch_size=4, allow_changed_recipe=True)
    with own_signals_after():
        assert train(read_recipe(given)).exit_code == 0
    found, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", two))
    for name, tensor in wanted.items():  # no dropout: the random state that is lost decides nothing here
        torch.testing.assert_close(found[name].float(), tensor.float(), atol=2e-4, rtol=2**-7, msg=name)


def start(command: list[str], printed: Path) -> subprocess.Popen[bytes]:
    with printed.open("wb") as file:
        return subprocess.Popen(command, env=environment(), stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)


def wait_for_a_step(run: Path, launcher: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 180
    while not read_log(run / "trainer_log.jsonl"):
        assert launcher.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_is_killed_ends_the_run_with_a_message(rank: str, tmp_path: Path, tiny_model: Path) -> None:
    given = write_recipe(tmp_path, tiny_model, max_steps=2000, save_steps=2000)
    launcher = start([*TORCHRUN, "-m", "arpo_trl", str(given)], tmp_path / "printed")
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
    launcher = start([*TORCHRUN, "-m", "arpo_trl", str(given)], tmp_path / "printed")
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


def write_config(folder: Path, **keys: Any) -> str:
    keys = {
        "compute_environment": "LOCAL_MACHINE",
        "use_cpu": True,
        "mixed_precision": "no",
        "num_machines": 1,
        "num_processes": 2,
    } | keys
    path = folder / "accelerate.yaml"
    path.write_text(json.dumps(keys), encoding="utf-8")
    return str(path)


def shipped(name: str) -> dict[str, Any]:
    import yaml

    config: dict[str, Any] = yaml.safe_load((ROOT / "accelerate_configs" / name).read_text(encoding="utf-8"))
    return config | {"use_cpu": True, "mixed_precision": "no", "num_processes": 2}


def resume_from_step_2(run: Path, command: list[str], **env: str) -> None:
    """Take the last checkpoint away and resume from the one before it."""
    shutil.rmtree(run / "checkpoint-4")
    assert "checkpoint-2" in launch([*command, "resume_from_checkpoint=true"], **env)


@pytest.mark.slow
def test_fsdp2_splits_the_model_and_saves_it_complete(tmp_path: Path, tiny_model: Path, one: Path) -> None:
    config, given = write_config(tmp_path, **shipped("fsdp2.yaml")), write_recipe(tmp_path, tiny_model)
    script = tmp_path / "as_if_on_gpus.py"
    script.write_text(AS_IF_ON_GPUS, encoding="utf-8")
    command = [*ACCELERATE, "--config_file", config, "--main_process_port", "0", str(script), str(given)]
    assert "parameters are {'DTensor'}" in launch(command)
    require_same_training(tmp_path / "run", one)
    resume_from_step_2(tmp_path / "run", command)
    require_same_training(tmp_path / "run", one)

    launch([*command, "bf16=true", "overwrite_output_dir=true"])
    losses, wanted = ([line["loss"] for line in log_without_times(run)] for run in (tmp_path / "run", one))
    assert losses == pytest.approx(wanted, rel=3e-4)  # log-probabilities rounded to bfloat16 would be 4e-4 off


@pytest.mark.slow
def test_fsdp_without_gpus_is_reported_as_ddp(tmp_path: Path, tiny_model: Path) -> None:
    config, given = write_config(tmp_path, **shipped("fsdp2.yaml")), write_recipe(tmp_path, tiny_model)
    printed = launch([*ACCELERATE, "--config_file", config, "--main_process_port", "0", "-m", "arpo_trl", str(given)])
    assert "FSDP needs GPUs" in printed


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed (DS_BUILD_OPS=0 pip install)"
)
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_splits_the_state_and_saves_the_complete_model(
    stage: int, tmp_path: Path, tiny_model: Path, one: Path
) -> None:
    config, given = write_config(tmp_path, **shipped(f"zero{stage}.yaml")), write_recipe(tmp_path, tiny_model)
    command = [*ACCELERATE, "--config_file", config, "--main_process_port", "0", "-m", "arpo_trl", str(given)]
    launch(command, timeout=500, DS_ACCELERATOR="cpu")  # builds its CPU ops the first time
    require_same_training(tmp_path / "run", one)
    resume_from_step_2(tmp_path / "run", command, DS_ACCELERATOR="cpu")
    require_same_training(tmp_path / "run", one)


@pytest.mark.slow
def test_two_machines_are_two_launches(tmp_path: Path, tiny_model: Path, one: Path) -> None:
    config, given = write_config(tmp_path, **shipped("multi_node.yaml")), write_recipe(tmp_path, tiny_model)
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
