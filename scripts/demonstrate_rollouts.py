"""Measure the loop of docs/rollouts.md with a real model on a CPU: base, SFT, SFT on selected rows, DPO on pairs.

    python scripts/make_smollm2.py checkpoints/smollm2_135m
    python scripts/demonstrate_rollouts.py checkpoints/smollm2_135m checkpoints/rollouts     # 50 minutes on 2 busy cores; resumes

All four models answer the same held-out tasks, each with its tools, greedily. An answer is right if the last number of
the last reply is the right one, because the base model writes no <answer> tags. The table has pass@1 and the paired
difference to the step before, with 95 % intervals over tasks. The questions of the three parts (SFT, selection,
evaluation) are disjoint. `--tasks 4 --train 8 --select 4 --generations 2` tries the script in minutes.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import make_toy_dataset
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from arpo_trl.generate.rollout_scores import paired_difference, pass_at_1
from arpo_trl.run_folder import read_lines

SYSTEM = (
    "Solve the question. You can run Python: write <python>code</python> and you get its output in <result></result>. "
    "End with <answer>\\boxed{value}</answer>."
)
JUDGE = """
import json, re, sys
about = json.load(sys.stdin)
reply = next((m["content"] for m in reversed(about["trajectory"]) if m["role"] == "assistant"), "")
numbers = re.findall(r"-?\\d+", reply.replace(",", ""))
print(int(numbers[-1:] == [about["answer"]]))
"""
TASKS = (
    make_toy_dataset.addition,
    make_toy_dataset.arithmetic,
    make_toy_dataset.power_remainder,
    make_toy_dataset.letters,
    make_toy_dataset.shopping,
)


def draw_rows(seed: int) -> Iterator[dict[str, Any]]:
    """Yield rows with different questions."""
    rng, seen = random.Random(seed), set[str]()
    while True:
        row = rng.choice(TASKS)(rng)
        if row.question not in seen:
            seen.add(row.question)
            yield row.to_dict("turns") | {"system": SYSTEM}


def write_data(folder: Path, parts: dict[str, int]) -> None:
    """Write one dataset per part; no question is in two of them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = draw_rows(seed=0)
    registry = {}
    for name, size in parts.items():
        text = "".join(json.dumps(next(rows), ensure_ascii=False) + "\n" for _ in range(size))
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        columns = {"messages": "conversations", "system": "system"}
        registry[name] = {"file_name": f"{name}.jsonl", "formatting": "sharegpt", "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps(registry, indent=2), encoding="utf-8")
    (folder / "judge.py").write_text(JUDGE, encoding="utf-8")


def run(folder: Path, name: str, command: str | None, **keys: Any) -> Path:
    """Run arpo-trl with a recipe of these keys, unless it has finished; return its output_dir."""
    output = folder / name
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump({"output_dir": str(output), "seed": 42} | keys), encoding="utf-8")
    finished = output / ("rollout_results.json" if command else "train_results.json")
    if not finished.is_file():
        began = time.monotonic()
        words = [sys.executable, "-m", "arpo_trl", *([command] if command else []), str(recipe)]
        subprocess.run(words, check=True)
        (output / "seconds.txt").write_text(f"{time.monotonic() - began:.0f}\n", encoding="utf-8")
    return output


def train(folder: Path, name: str, model: Path, data: Path, dataset: str, **keys: Any) -> Path:
    defaults = {
        "model_name_or_path": str(model),
        "do_train": True,
        "finetuning_type": "full",
        "dataset": dataset,
        "dataset_dir": str(data),
        "cutoff_len": 512,
        "per_device_train_batch_size": 4,
        "bf16": True,
        "use_cpu": True,
        "learning_rate": 1e-4,
        "num_train_epochs": 1.0,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "disable_gradient_checkpointing": True,
        "save_strategy": "no",
        "logging_steps": 5,
    }
    return run(folder, name, None, **defaults | keys)


def roll(folder: Path, name: str, model: Path, data: Path, **keys: Any) -> Path:
    defaults = {
        "model_name_or_path": str(model),
        "dataset_dir": str(data),
        "max_new_tokens": 128,
        "max_tool_calls": 2,
        "tool_timeout": 10,
        "max_tool_output": 120,
        "per_device_eval_batch_size": 64,
        "bf16": True,
        "judge": f"{sys.executable} {data / 'judge.py'}",
    }
    return run(folder, name, "rollout", **defaults | keys)


def results_of(folder: Path) -> dict[str, float]:
    return {
        line["source"]: float(line["right"])
        for line in read_lines(folder / "rollouts.jsonl")
        if line["score"] is not None
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the base model")
    parser.add_argument("folder", type=Path, help="where everything is written")
    for name, size in {"tasks": 300, "train": 40, "select": 150, "generations": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=size, help=f"default: {size}")
    args = parser.parse_args(argv)
    folder, data = args.folder, args.folder / "data"
    write_data(data, {"sft": args.train, "select": args.select, "tasks": args.tasks})
    measure = {"eval_dataset": "tasks", "num_generations": 1}
    measured = {"base": roll(folder, "rollout_base", args.model, data, **measure)}
    sft = train(folder, "sft", args.model, data, "sft")
    measured["SFT"] = roll(folder, "rollout_sft", sft, data, **measure)
    collect = {"dataset": "select", "rollout_on": "train", "num_generations": args.generations}
    limits = {"max_per_question": 2, "max_pairs_per_question": 2}
    collected = roll(folder, "collected", sft, data, **collect, **limits)
    if not read_lines(collected / "selected.jsonl") or not read_lines(collected / "pairs.jsonl"):
        raise SystemExit(
            f"{collected}: nothing was selected, or there are no pairs. Use more questions or generations"
        )
    selected = train(folder, "selected", sft, collected, "selected", learning_rate=2e-5)
    measured["SFT on selected rows"] = roll(folder, "rollout_selected", selected, data, **measure)
    dpo = train(folder, "dpo", selected, collected, "pairs", stage="dpo", pref_beta=0.1, learning_rate=2e-6)
    measured["DPO on pairs"] = roll(folder, "rollout_dpo", dpo, data, **measure)
    report(measured, folder / "rollouts.png")


def report(measured: dict[str, Path], picture: Path) -> None:
    """Print the table and draw pass@1."""
    print("| | pass@1 (95 %) | difference to the step before (paired, 95 %) |\n|---|---|---|")
    before: dict[str, float] = {}
    shares: dict[str, tuple[float, float, float]] = {}
    for name, folder in measured.items():
        results = results_of(folder)
        shares[name] = center, low, high = pass_at_1([[value > 0] for value in results.values()])
        cells = [name, f"{center:.1%} ({low:.1%} to {high:.1%})", ""]
        if before:
            center, low, high = paired_difference(before, results)
            cells[2] = f"{center:+.1%} ({low:+.1%} to {high:+.1%})"
        print(f"| {' | '.join(cells)} |")
        before = results
    draw(shares, f"Held-out tasks solved with Python (pass@1 of {len(before)}, 95 %)", picture)


def draw(shares: dict[str, tuple[float, float, float]], title: str, picture: Path) -> None:
    figure = Figure(figsize=(7, 2.4), dpi=120, layout="constrained")
    axes = figure.add_subplot(title=title, xlim=(0, 1))
    for name, (center, low, high) in shares.items():
        bar = axes.barh(name, center, xerr=[[center - low], [high - center]], capsize=3, color="tab:blue")
        axes.bar_label(bar, [f"{center:.0%}"], padding=6)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture)


if __name__ == "__main__":
    main()
