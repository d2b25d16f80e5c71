"""stage: dpo in complete runs: two processes, the toy pairs, and recipes of others."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import launches
import pytest
import small_run
import torch
import yaml
from safetensors.torch import load_file
from small_pairs import write_pairs

from arpo_trl.__main__ import main
from arpo_trl.report.log_file import LogLine
from arpo_trl.run_folder import read_lines

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
RECIPES = sorted((ROOT / "tests" / "recipe" / "fixtures" / "preference").glob("*.yaml"))


@contextlib.contextmanager
def kept_handlers() -> Iterator[None]:
    """Put back the signal handlers that a run in this process replaces."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


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
        logs.append(read_lines(tmp_path / name / "trainer_log.jsonl"))
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
                rel, least = (1e-5, 0.0) if name.endswith("loss") else (1e-4, 1e-5)
                assert two[name] == pytest.approx(one[name], rel=rel, abs=least), name
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
    with kept_handlers():
        assert main([str(tmp_path / "r.yaml")]) == 0
    log = read_lines(tmp_path / "out" / "trainer_log.jsonl")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and log[0]["accuracy"] == 0
    assert log[1]["loss"] < log[0]["loss"] or recipe["learning_rate"] < 1e-5


@small_run.QUIET
def test_the_result_of_a_run_says_what_it_is_and_works_as_any_model(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = write_pairs(tmp_path / "data"), tmp_path / "run"
    keys = {"stage": "dpo", "dataset": "pairs", "dataset_dir": str(data), "finetuning_type": "lora", "pref_beta": 0.2}
    keys |= {"val_size": 3, "do_eval": True, "plot_loss": True, "save_strategy": "no"}
    path = str(small_run.write_recipe(tmp_path, tiny_model, **keys))
    with kept_handlers():
        assert main([path]) == 0
    card = (run / "README.md").read_text(encoding="utf-8")
    assert "- dpo\n" in card and "- sft\n" not in card
    assert (
        f"with a LoRA adapter fine-tuned on preference pairs (DPO: sigmoid loss, beta 0.2, compared with {tiny_model.name})"
        in card
    )
    assert "Pairs by outcome." in card and "| pairs | 10 | 0 |" in card and "of both sides" in card
    assert "- eval rewards/accuracies: " in card and "](training_rewards_accuracies.png)" in card

    def chat(folder: Path) -> str:
        capsys.readouterr()
        assert main(["chat", str(folder), "--prompt", "say 3", "--max-new-tokens", "6"]) == 0
        return capsys.readouterr().out.splitlines()[-1]

    merged = tmp_path / "merged"
    assert main(["merge", str(run), str(merged), "--dtype", "float32"]) == 0
    assert chat(run) == chat(merged)
    predict = {"dataset": None, "eval_dataset": "rows", "do_train": False, "do_predict": True, "max_new_tokens": 6}
    predict |= {"dataset_dir": str(data), "output_dir": str(tmp_path / "predicted")}
    path = str(small_run.write_recipe(tmp_path, merged, **predict))
    with kept_handlers():
        assert main([path]) == 0
    lines = (tmp_path / "predicted" / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 10 and json.loads(lines[3])["label"].startswith("abc abc")


def test_check_and_preview_show_both_sides_and_the_reference(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pairs(tmp_path / "data")
    path = str(small_run.write_recipe(tmp_path, tiny_model, stage="dpo", dataset="pairs", dataset_dir=str(data)))
    assert main([path, "--check"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line[:1].strip()}
    assert lines["tokens"].startswith("tokens   per pair: mean ") and "(longest side 81); " in lines["tokens"]
    assert lines["reference"] == f"reference  {tiny_model}, a second model in memory"
    assert ", reference 0.7)" in lines["memory"]
    assert main([path, "--check", "finetuning_type=lora"]) == 0
    checked = capsys.readouterr().out
    assert "the model with its adapter switched off" in checked and ", reference" not in checked
    assert main([path, "--preview", "1"]) == 0
    shown = capsys.readouterr().out
    chosen, rejected = shown.index("\nchosen: "), shown.index("\nrejected: ")
    assert chosen < shown.index("\n+ abc <|im_end|>") < rejected < shown.index("\n+ 0 9 8 7 <|im_end|>")


@pytest.mark.engines
@pytest.mark.slow
@pytest.mark.parametrize("finetuning_type", ["full", "lora"])
@pytest.mark.parametrize(
    "engine", ["fsdp2", *(pytest.param(f"zero{stage}", marks=launches.NEEDS_DEEPSPEED) for stage in (2, 3))]
)
def test_a_split_model_trains_as_one_process(
    engine: str, finetuning_type: str, tmp_path: Path, tiny_model: Path
) -> None:
    """The reference is the split model with its adapter switched off; of a full run, its log-probabilities are stored."""
    keys = {"stage": "dpo", "dataset": "pairs", "dataset_dir": str(write_pairs(tmp_path / "data", 8))}
    keys |= {"finetuning_type": finetuning_type, "disable_shuffling": True, "max_steps": 3, "save_strategy": "no"}
    keys |= {"pref_ftx": 0.1, "lr_scheduler_type": "constant"}
    one = small_run.write_recipe(tmp_path, tiny_model, **keys, per_device_train_batch_size=4)
    run_recipe(one)
    expected = read_lines(tmp_path / "run" / "trainer_log.jsonl")
    keys |= {"output_dir": str(tmp_path / "split")}
    path = small_run.write_recipe(tmp_path, tiny_model, **keys, per_device_train_batch_size=2)
    printed = launches.launch(launches.command(engine, path), timeout=900)
    assert "first pair: loss 0.6931, as expected" in printed
    assert (tmp_path / "split" / "reference_log_probs.npz").exists() == (
        finetuning_type == "full" and engine != "zero2"
    )
    log = read_lines(tmp_path / "split" / "trainer_log.jsonl")
    for name in ("loss", "rewards/margins", "logps/chosen"):
        found, wanted = ([line[name] for line in lines if name in line] for lines in (log, expected))
        assert len(found) == 3 and found == pytest.approx(wanted, rel=1e-4, abs=2e-5), name


def train_shipped(name: str, folder: Path, model: Path, **keys: Any) -> list[LogLine]:
    """Train a recipe of recipes/ with another model, and return its log."""
    recipe = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    recipe |= {"model_name_or_path": str(model), "dataset_dir": str(ROOT / "recipes"), "save_strategy": "no"}
    recipe |= {"output_dir": str(folder / "run"), "tokenized_path": str(folder / "tokenized"), **keys}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    with kept_handlers():
        assert main([str(folder / "recipe.yaml")]) == 0
    return read_lines(folder / "run" / "trainer_log.jsonl")


@pytest.mark.slow
@small_run.QUIET
def test_the_recipe_for_a_16_gb_gpu_trains_a_tiny_model(tmp_path: Path, tiny_model: Path) -> None:
    """Both forms of trajectories, in bfloat16. Its learning rate is for 0.5B parameters: this model learns less."""
    log = train_shipped("qwen_toy_dpo", tmp_path, tiny_model)
    losses = [line["loss"] for line in log if "loss" in line]
    assert len(losses) == 36 and losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < losses[0]
    assert log[0]["accuracy"] == 0 and (tmp_path / "run" / "training_rewards_accuracies.png").exists()


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
    learning_rate = 5e-3 if finetuning_type == "lora" else 1e-3
    keys = {**keys, "finetuning_type": finetuning_type, "learning_rate": learning_rate, "logging_steps": 1}
    log = train_shipped("tiny_cpu_dpo", tmp_path, tiny_model, **keys)
    evaluated = next(line for line in reversed(log) if "eval_loss" in line)
    with capsys.disabled():
        print(
            f"\n{finetuning_type} {keys['pref_loss']}: accuracy {log[0]['accuracy']:.2f} at step 1, held out "
            f"{evaluated['eval_rewards/accuracies']:.2f}, margin {evaluated['eval_rewards/margins']:.3f}"
        )
    assert log[0]["accuracy"] == 0  # a tie is no hit; without a reference, both pairs are ranked wrongly at first
    assert evaluated["eval_rewards/accuracies"] > 0.9
    assert evaluated["eval_rewards/margins"] > 0
