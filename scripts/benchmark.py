"""Measure what the README claims, on whatever device is there: a table on the terminal, JSON with --json.

python scripts/benchmark.py --steps             seconds a training step, ours beside TRL's (--shape tiny or 0.5b)
python scripts/benchmark.py --startup           seconds from launch to a finished one-step run, beside a TRL script's
python scripts/benchmark.py --preparation       rows/s of preparation beside TRL's, with 1 and 2 processes
python scripts/benchmark.py --memory            peak memory of preparation as rows grow
python scripts/benchmark.py --scaling           seconds a step as length and batch grow, with the exponents

--model FOLDER names the tokenizer (a tiny one is made if omitted). Ratios are of medians; the variants take turns.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import benchmark_preparation
import benchmark_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for mode in ("steps", "startup", "preparation", "memory", "scaling"):
        parser.add_argument(f"--{mode}", action="store_true")
    parser.add_argument("--model", help="folder with a tokenizer")
    parser.add_argument("--shape", choices=sorted(benchmark_steps.SHAPES), default="tiny")
    parser.add_argument("--variants", nargs="+", choices=list(benchmark_steps.VARIANTS))
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--cutoff", type=int, default=4096)
    parser.add_argument("--count", type=int, default=4, help="steps measured in each process, after one that warms up")
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 15000])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--float32", action="store_true", help="no bf16 autocast")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="picture of --scaling")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures: dict[str, list[dict[str, Any]]] = {}
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start")
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or str(benchmark_steps.make_tiny_model(folder))
        measured = {"model": model, "shape": options.shape, "count": options.count, "bf16": not options.float32}
        if options.steps:
            variants = options.variants or ["trl", "ours", "ours, padding-free", "ours, no checkpointing"]
            rows = {"batch": options.batch, "cutoff": options.cutoff}
            figures["steps"] = benchmark_steps.steps(variants, options.repeats, **measured, **rows)
        if options.startup:
            figures["startup"] = benchmark_steps.startup(options.repeats)
        if options.preparation:
            rows = (options.rows or [4000])[0]
            figures["preparation"] = benchmark_preparation.preparation(model, rows, options.repeats, [1, 2])
        if options.memory:
            figures["memory"] = benchmark_preparation.memory(model, options.rows or [5000, 50000])
        if options.scaling:
            axes = options.lengths, options.batches
            figures["scaling"] = benchmark_steps.scaling(*axes, options.plot, **measured)
    for name, table in figures.items():
        print(f"\n{name}")
        show(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def show(table: list[dict[str, Any]]) -> None:
    lines = [list(table[0]), *([f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()] for row in table)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


if __name__ == "__main__":
    main()
