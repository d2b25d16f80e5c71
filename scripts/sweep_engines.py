"""Train, kill, resume and predict under every engine on CPUs, and print a table for docs/measurements.md.

    OMP_NUM_THREADS=1 python scripts/sweep_engines.py /tmp/sweep

Each row is a chain: the second process of a run gets SIGTERM in step 2; the run is resumed, and the second process is
killed in step 4; it is resumed to its end, and the final model is evaluated and generates. The losses are compared with
those of one process. Rows that are in FOLDER/rows.json are not run again. A row fails if the trainer used another
engine than the row names. Requires deepspeed.
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
    "DPO, LoRA": {"finetuning_type": "lora", "lora_target": "all", "stage": "dpo", "dataset": "arpo_dpo_toy_inside"},
    "DPO, full": {"finetuning_type": "full", "stage": "dpo", "dataset": "arpo_dpo_toy_inside"},
}
ENGINES = ("ddp", "fsdp2", "zero2", "zero3", "zero3_offload")
FAULT = """
import os
from arpo_trl.training.trainer import ArpoTrainer

training_step = ArpoTrainer.training_step
def step_or_die(self, *args, **kwargs):
    if self.state.global_step + 1 == int(os.environ["STEP"]) and os.environ["RANK"] == "1":
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    return training_step(self, *args, **kwargs)
ArpoTrainer.training_step = step_or_die
"""
HEADER = """| engine | method | trainer | SIGTERM in step 2 | killed in step 4, ended after | loss against one process | final model |
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
    name = method.replace(", ", "_")
    home = folder / f"{engine}_{name}"
    shutil.rmtree(home, ignore_errors=True)
    keys = keys | {"val_size": 0.2, "eval_strategy": "steps", "eval_steps": 2, "ddp_timeout": 60, "plot_loss": False}
    expected = losses_of_one_process(folder / f"one_{name}", model, keys)
    recipe = launches.write_recipe(home, model, **keys)
    log = home / "run" / "trainer_log.jsonl"

    code, printed = launches.attempt(launches.command(engine, recipe, fault=FAULT), 600, STEP="2", SIGNAL="15")
    saved = launches.log_without_times(home / "run")
    stopped = (
        f"exit code {code}, checkpoint-2" if code and (home / "run" / "checkpoint-2").exists() else last_line(printed)
    )
    if not stopped.startswith("exit code") or len(saved) < 2:
        return ["", stopped, "", "", ""]

    code, printed = launches.attempt(launches.command(engine, recipe, fault=FAULT), 600, STEP="4", SIGNAL="9")
    killed = f"{time.time() - log.stat().st_mtime:.0f} s" if code and "SIGKILL" in printed else last_line(printed)

    code, printed = launches.attempt(launches.command(engine, recipe), 600)
    trainer = re.search(r"engine: (.*)", printed)
    if code or not trainer or not re.fullmatch(launches.ENGINES[engine], trainer[0]):
        return [trainer[1] if trainer else "none", stopped, killed, last_line(printed), ""]
    losses = [line["loss"] for line in launches.log_without_times(home / "run") if "loss" in line]
    worst = max(abs(mine - other) / other for mine, other in zip(losses, expected, strict=True))

    final = {"adapter_name_or_path" if "LoRA" in method else "model_name_or_path": str(home / "run")}
    use: dict[str, Any] = {"do_eval": True}
    if "stage" not in keys and not engine.startswith("zero3"):  # which can't generate
        use |= {"do_predict": True, "max_new_tokens": 4}
    reference = {"ref_model": str(model)} if "stage" in keys else {}
    changes = {"do_train": False, "output_dir": str(home / "used"), **final, **use, **reference}
    recipe = launches.write_recipe(home, model, **keys | changes)
    code, printed = launches.attempt(launches.command(engine, recipe), 600)
    metrics = home / "used" / "all_results.json"
    if code or not metrics.exists():
        return [trainer[1], stopped, killed, f"{worst:.0e}", last_line(printed)]
    loss = json.loads(metrics.read_text("utf-8"))["eval_loss"]
    replies = home / "used" / "generated_predictions.jsonl"
    generated = f", {len(replies.read_text('utf-8').splitlines())} replies" if replies.exists() else ""
    return [trainer[1], stopped, killed, f"{worst:.0e}", f"eval loss {loss:.4f}{generated}"]


def last_line(printed: str) -> str:
    """Return the message of a failed launch: the last that names its recipe, without the path."""
    messages = re.findall(r"recipe\.yaml:(?:\d+:)? (.*)", printed)
    return f"FAILED: {messages[-1] if messages else printed.strip()[-200:]}"


def losses_of_one_process(folder: Path, model: Path, keys: dict[str, Any]) -> list[float]:
    if not (folder / "run" / "trainer_state.json").exists():
        recipe = launches.write_recipe(folder, model, **keys | {"per_device_train_batch_size": 4})
        launches.launch([sys.executable, "-m", "arpo_trl", str(recipe)], 600)
    return [line["loss"] for line in launches.log_without_times(folder / "run") if "loss" in line]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
