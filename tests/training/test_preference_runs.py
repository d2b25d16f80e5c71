"""stage: dpo in complete runs: two processes, the toy pairs, and recipes of others."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_run
import torch
import yaml
from safetensors.torch import load_file

from arpo_trl.__main__ import main
from arpo_trl.report.log_file import read_log

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
RECIPES = sorted((ROOT / "tests" / "recipe" / "fixtures" / "preference").glob("*.yaml"))


def write_pairs(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "instruction": f"say {n}",
            "input": "",
            "chosen": "abc " * (1 + n % 4),
            "rejected": f"{n} 9 8 7 " * (1 + n % 3),
        }
        for n in range(count)
    ]
    (folder / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    entry = {"file_name": "pairs.json", "ranking": True}
    registry = dict.fromkeys(("pairs", "dpo_en_demo", "dpo_alpaca"), entry)
    (folder / "dataset_info.json").write_text(json.dumps(registry), encoding="utf-8")
    return folder


def run_recipe(path: Path, *launcher: str) -> None:
    command = [*launcher, "-m", "arpo_trl", str(path)] if launcher else [sys.executable, "-m", "arpo_trl", str(path)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("loss", ["sigmoid", "orpo"])
def test_two_processes_with_an_odd_number_of_pairs_train_as_one(loss: str, tmp_path: Path, tiny_model: Path) -> None:
    """Seven pairs, four an update: the last update of an epoch has three, and one process repeats a pair."""
    data = write_pairs(tmp_path / "data", 7)
    keys = {"stage": "dpo", "dataset": "pairs", "dataset_dir": str(data), "pref_loss": loss, "disable_shuffling": True}
    keys |= {"num_train_epochs": 2, "max_steps": -1, "save_strategy": "no", "eval_dataset": "pairs", "do_eval": True}
    logs = []
    for name, launcher, size in (("one", [], 4), ("two", TORCHRUN, 2)):
        path = small_run.write_recipe(
            tmp_path, tiny_model, **keys, per_device_train_batch_size=size, output_dir=str(tmp_path / name)
        )
        run_recipe(path, *launcher)
        logs.append(read_log(tmp_path / name / "trainer_log.jsonl"))
    names = [
        "loss",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "seen_tokens",
        "eval_loss",
        "eval_rewards/margins",
    ]
    for one, two in zip(*logs, strict=True):
        for name in names:
            assert (name in one) == (name in two)
            if name in one:
                assert two[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
    assert len([line for line in logs[0] if "loss" in line]) == 4
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert all(torch.allclose(weights[0][key].float(), weights[1][key].float(), atol=1e-2) for key in weights[0])


@small_run.QUIET
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_others_trains_two_steps(path: Path, tmp_path: Path, tiny_model: Path) -> None:
    """Only the model, the data and the output folder are replaced, and what needs a GPU is removed."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    for needs_a_gpu in ("deepspeed", "enable_liger_kernel", "dataloader_num_workers"):
        recipe.pop(needs_a_gpu, None)
    recipe |= {"model_name_or_path": str(tiny_model), "dataset_dir": str(write_pairs(tmp_path / "data", 10))}
    recipe |= {"output_dir": str(tmp_path / "out"), "max_steps": 2, "logging_steps": 1, "template": "qwen"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert main([str(tmp_path / "r.yaml")]) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    log = read_log(tmp_path / "out" / "trainer_log.jsonl")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and log[0]["accuracy"] == 0
    assert log[1]["loss"] < log[0]["loss"] or recipe["learning_rate"] < 1e-5


TOY: list[dict[str, Any]] = [
    {"pref_loss": "sigmoid"},
    {"pref_loss": "hinge"},
    {"pref_loss": "ipo"},
    {"pref_loss": "orpo", "pref_beta": 2.0, "num_train_epochs": 2.0},
    {"pref_loss": "simpo", "pref_beta": 2.0},
]


@pytest.mark.slow
@small_run.QUIET
@pytest.mark.parametrize("finetuning_type", ["full", "lora"])
@pytest.mark.parametrize("keys", TOY, ids=lambda keys: keys["pref_loss"])
def test_every_loss_learns_the_toy_pairs(
    keys: dict[str, Any], finetuning_type: str, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = yaml.safe_load((ROOT / "recipes" / "tiny_cpu_dpo.yaml").read_text(encoding="utf-8"))
    recipe |= {
        "model_name_or_path": str(tiny_model),
        "dataset_dir": str(ROOT / "recipes"),
        "output_dir": str(tmp_path / "o"),
    }
    recipe |= {
        "finetuning_type": finetuning_type,
        "logging_steps": 1,
        "save_strategy": "no",
        "plot_loss": False,
        **keys,
    }
    recipe |= {"learning_rate": 5e-3 if finetuning_type == "lora" else 1e-3, "tokenized_path": str(tmp_path / "t")}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        assert main([str(tmp_path / "r.yaml")]) == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    log = read_log(tmp_path / "o" / "trainer_log.jsonl")
    evaluated = next(line for line in reversed(log) if "eval_loss" in line)
    with capsys.disabled():
        print(
            f"\n{finetuning_type} {keys['pref_loss']}: accuracy {log[0]['accuracy']:.2f} at step 1, held out "
            f"{evaluated['eval_rewards/accuracies']:.2f}, margin {evaluated['eval_rewards/margins']:.3f}"
        )
    if keys["pref_loss"] not in ("orpo", "simpo"):
        assert log[0]["accuracy"] == 0  # equal to the reference: a tie is no hit
    assert evaluated["eval_rewards/accuracies"] > 0.9
    assert evaluated["eval_rewards/margins"] > 0
