"""Train, kill, resume and predict under every engine on CPUs, and print a table for docs/measurements.md.

    OMP_NUM_THREADS=1 python scripts/sweep_engines.py /tmp/sweep

Each row is a chain: a run whose second process is killed at step 3, its resume, and predictions of the final model. The
losses are compared with those of one process. Rows that are in FOLDER/rows.json are not run again. A row fails if the
trainer used another engine than the row names. Requires deepspeed.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "training"), str(ROOT / "scripts")]

import launches  # noqa: E402
import make_tiny_model  # noqa: E402

METHODS: dict[str, dict[str, Any]] = {
    "full": {"finetuning_type": "full"},
    "LoRA": {"finetuning_type": "lora", "lora_target": "all"},
}
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
KILL = """
import os, signal
from arpo_trl.training.trainer import ArpoTrainer

training_step = ArpoTrainer.training_step
def step_or_die(self, *args, **kwargs):
    if self.state.global_step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return training_step(self, *args, **kwargs)
ArpoTrainer.training_step = step_or_die
"""
HEADER = """| engine | method | trainer | ended after the kill | loss of one process | resumed | predictions |
| --- | --- | --- | --- | --- | --- | --- |"""


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model, results = folder / "model", folder / "rows.json"
    if not model.exists():
        tokenizer = make_tiny_model.train_tokenizer(make_tiny_model.TOY_DATA, rows=200, vocab_size=1024)
        made = make_tiny_model.make_model(tokenizer, hidden_size=64, layers=2, seed=0)
        make_tiny_model.save(tokenizer, made, model)
    rows: dict[str, list[str]] = json.loads(results.read_text("utf-8")) if results.exists() else {}
    for method, keys in METHODS.items():
        for engine in ENGINES:
            name = f"{engine} {method}"
            if name not in rows:
                rows[name] = [engine, method, *run_chain(folder, model, engine, method, keys)]
                results.write_text(json.dumps(rows, indent=1), encoding="utf-8")
                print(name, rows[name], flush=True)
    print(HEADER, *("| " + " | ".join(row) + " |" for row in rows.values()), sep="\n")


def run_chain(folder: Path, model: Path, engine: str, method: str, keys: dict[str, Any]) -> list[str]:
    """Return the cells of a row."""
    home = folder / f"{engine}_{method}"
    shutil.rmtree(home, ignore_errors=True)
    keys = keys | {"val_size": 0.2, "eval_strategy": "steps", "eval_steps": 2, "ddp_timeout": 60, "plot_loss": False}
    expected = losses_of_one_process(folder / f"one_{method}", model, keys)
    recipe = launches.write_recipe(home, model, **keys)
    code, printed = launches.attempt(launches.command(engine, recipe, fault=KILL), 600)
    began = (home / "run" / "trainer_log.jsonl").stat().st_mtime
    killed = f"{time.time() - began:.0f} s" if code and "SIGKILL" in printed else f"exit code {code}"
    code, printed = launches.attempt(launches.command(engine, recipe), 600)
    trainer = re.search(r"engine: (.*)", printed)
    if code or not trainer or not re.fullmatch(launches.ENGINES[engine], trainer[0]):
        return [trainer[1] if trainer else "none", killed, f"FAILED: {printed.strip().splitlines()[-1]}", "", ""]
    losses = [line["loss"] for line in launches.log_without_times(home / "run") if "loss" in line]
    worst = max(abs(mine - other) / other for mine, other in zip(losses, expected, strict=True))
    resumed = "from step 2" if "resuming from checkpoint-2" in printed else "FAILED: not from step 2"
    final = "adapter_name_or_path" if method == "LoRA" else "model_name_or_path"
    changes = {"do_train": False, "do_predict": True, "max_new_tokens": 4, "output_dir": str(home / "predictions")}
    recipe = launches.write_recipe(home, model, **keys | changes | {final: str(home / "run")})
    code, printed = launches.attempt(launches.command(engine, recipe), 600)
    lines = home / "predictions" / "generated_predictions.jsonl"
    predicted = f"{len(lines.read_text('utf-8').splitlines())} replies" if code == 0 else f"FAILED: {printed[-200:]}"
    return [trainer[1], killed, f"to {worst:.0e}", resumed, predicted]


def losses_of_one_process(folder: Path, model: Path, keys: dict[str, Any]) -> list[float]:
    if not (folder / "run" / "trainer_state.json").exists():
        recipe = launches.write_recipe(folder, model, **keys | {"per_device_train_batch_size": 4})
        launches.launch([sys.executable, "-m", "arpo_trl", str(recipe)], 600)
    return [line["loss"] for line in launches.log_without_times(folder / "run") if "loss" in line]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
