"""Runs of several processes on this machine's CPU, under every engine. DeepSpeed compiles nothing for them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_run
import torch
import yaml
from safetensors.torch import load_file

from arpo_trl.run_folder import read_lines

ROOT = Path(__file__).parents[2]
TIMES = {"elapsed_time", "remaining_time", "elapsed_seconds", "tokens_per_second", "trained_tokens_per_second"}
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
NEEDS_DEEPSPEED = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed (DS_BUILD_OPS=0 pip install deepspeed)"
)

# Accelerate engages FSDP only where it finds GPUs (1.15, accelerate/state.py), so gloo on CPUs is passed off as one.
AS_IF_ON_GPUS = """
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
"""
# Without the first line DeepSpeed 0.19 compiles its shared-memory collectives, for two minutes; gloo has them too.
# transformers 5.24 starts DeepSpeed's communication on GPUs only (training_args.py, _setup_devices).
WITH_DEEPSPEED = """
import deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo")
"""
START = """
import sys
from arpo_trl.__main__ import main
from arpo_trl.training.trainer import ArpoTrainer

original_train = ArpoTrainer.train
def train(self, *args, **kwargs):
    result = original_train(self, *args, **kwargs)
    kinds = type(self.model_wrapped).__name__, type(next(self.model.parameters()).data).__name__
    sys.stdout.write(f"engine: {', '.join(kinds)}\\n")  # in one piece, beside the other process's
    sys.stdout.flush()
    return result
ArpoTrainer.train = train
sys.exit(main(sys.argv[1:]))
"""
ENGINES = {
    "ddp": "engine: DistributedDataParallel, Tensor",
    "fsdp2": "engine: FSDP.*, DTensor",
    "zero0": "engine: DeepSpeedEngine, Tensor",
    "zero2": "engine: DeepSpeedEngine, Tensor",
    "zero3": "engine: DeepSpeedEngine, Tensor",
    "zero3_offload": "engine: DeepSpeedEngine, Tensor",
}
"""Engines and what their trainer shows."""
ZERO_BY_RECIPE: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero3_offload": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
"""Engines by the recipe's `deepspeed` key, as in LLaMA-Factory; the others by an Accelerate config."""
BY_RECIPE: dict[str, Any] = {
    **dict.fromkeys(("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto"),
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own has to be compiled
}


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
    folder.mkdir(parents=True, exist_ok=True)
    return small_run.write_recipe(folder, model, **toy | keys)


def environment(**more: str) -> dict[str, str]:
    mine = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    own = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return mine | own | more


def torchrun(processes: int = 2) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


def command(engine: str, recipe: Path, processes: int = 2, fault: str = "") -> list[str]:
    """Return the command that trains `recipe` under an engine of ENGINES; `fault`: Python to run first."""
    shim = AS_IF_ON_GPUS if engine == "fsdp2" else WITH_DEEPSPEED if engine.startswith("zero") else ""
    script = recipe.parent / f"{engine}.py"
    script.write_text(shim + fault + START, encoding="utf-8")
    if engine == "ddp":
        return [*torchrun(processes), str(script), str(recipe)]
    if engine in ZERO_BY_RECIPE:
        config = recipe.parent / "ds.json"
        config.write_text(json.dumps(BY_RECIPE | {"zero_optimization": ZERO_BY_RECIPE[engine]}))
        return [*torchrun(processes), str(script), str(recipe), f"deepspeed={config}"]
    config = write_config(recipe.parent, **shipped(f"{engine}.yaml") | {"num_processes": processes})
    return [*ACCELERATE, "--config_file", str(config), "--main_process_port", "0", str(script), str(recipe)]


def shipped(name: str) -> dict[str, Any]:
    """Return a config of accelerate_configs, for two processes on CPUs."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "accelerate_configs" / name).read_text(encoding="utf-8"))
    return config | {"use_cpu": True, "num_processes": 2}


def write_config(folder: Path, **keys: Any) -> Path:
    keys = {"compute_environment": "LOCAL_MACHINE", "use_cpu": True, "num_machines": 1, "num_processes": 2} | keys
    path = folder / "accelerate.yaml"
    path.write_text(json.dumps(keys), encoding="utf-8")
    return path


def attempt(words: list[str], timeout: float = 300, **env: str) -> tuple[int, str]:
    """Run a command and return its exit code and all that was printed."""
    done = subprocess.run(
        words,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
        cwd=ROOT,
    )
    return done.returncode, done.stdout


def launch(words: list[str], timeout: float = 240, **env: str) -> str:
    """Run to the end, which has to be a good one, and return all that was printed."""
    code, printed = attempt(words, timeout, **env)
    assert code == 0, printed
    return printed


def log_without_times(run: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in line.items() if k not in TIMES | {"peak_memory_gb"}}
        for line in read_lines(run / "trainer_log.jsonl")
    ]


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
