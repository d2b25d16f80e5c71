"""Measure the figures of docs/measurements.md on this machine's device: a table on the terminal, JSON with --json.

python scripts/benchmark.py steps             seconds per training step, arpo_trl and TRL (--shape tiny or 0.5b)
python scripts/benchmark.py startup           seconds from launch to the end of a one-step run, arpo_trl and a TRL script
python scripts/benchmark.py preparation       seconds to prepare rows, arpo_trl and TRL, with 1 and 2 processes
python scripts/benchmark.py memory            peak memory of the preparation by number of rows
python scripts/benchmark.py llamafactory      runs of one recipe file, arpo_trl and LLaMA-Factory (--llamafactory PYTHON)
python scripts/benchmark.py scaling           seconds per step by length and batch size, with the exponents

The variants take turns, round by round. `seconds` is the median, with the minimum and the maximum; `times_trl` is TRL's
median divided by ours: 2 is twice as fast as TRL.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import benchmark_llamafactory
import benchmark_preparation
import benchmark_steps

from arpo_trl.errors import RecipeError

MODES = ("steps", "startup", "llamafactory", "preparation", "memory", "scaling")


def main() -> None:
    parser = make_parser()
    options = parser.parse_args()
    for path in (options.json, options.plot):
        if path:  # fail now, not after an hour of measuring
            path.parent.mkdir(parents=True, exist_ok=True)
    load = f", load {os.getloadavg()[0]:.1f} before the start" if hasattr(os, "getloadavg") else ""  # not on Windows
    print(f"{os.cpu_count()} cores{load}", flush=True)
    try:
        table = measure(options)
    except RecipeError as error:
        parser.error(str(error))
    show(table)
    if options.json:
        options.json.write_text(json.dumps({options.mode: table}, indent=1), encoding="utf-8")
    if options.plot:
        benchmark_steps.draw(table, options.plot)


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.mode == "startup":
        return benchmark_steps.startup(options.repeats)
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or str(benchmark_steps.make_tiny_model(folder))
        if options.mode == "preparation":
            return benchmark_preparation.preparation(model, options.rows, options.repeats)
        if options.mode == "memory":
            return benchmark_preparation.memory(model, options.rows)
        if options.mode == "llamafactory":
            settings = {"stage": options.stage, "finetuning_type": options.finetuning_type, "batch": options.batch}
            settings |= {"cutoff": options.cutoff, "bf16": str(not options.float32).lower()}
            measured = (options.llamafactory, model, options.repeats, options.shape, options.count)
            return benchmark_llamafactory.compare(*measured, **settings)
        step = {"model": model, "shape": options.shape, "count": options.count, "bf16": not options.float32}
        if options.mode == "scaling":
            return benchmark_steps.scaling(options.lengths, options.batches, options.repeats, **step)
        step |= {"batch": options.batch, "cutoff": options.cutoff, "full": options.full, "dataset": options.dataset}
        return benchmark_steps.steps(options.variants, options.repeats, **step)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser: one positional mode, each with its own options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(
        dest="mode", required=True, metavar=" | ".join(MODES), help="what to measure; MODE --help lists its options"
    )
    parsers = {mode: modes.add_parser(mode) for mode in MODES}
    for mode, options in parsers.items():
        options.set_defaults(plot=None)
        options.add_argument("--json", type=Path, metavar="FILE", help="also write the table to this file")
        if mode != "startup":
            options.add_argument("--model", help="folder or hub name of a tokenizer (default: a tiny one is made)")
        if mode != "memory":
            options.add_argument("--repeats", type=positive, default=3, help="number of rounds (3)")
        if mode in ("steps", "scaling", "llamafactory"):
            default = None if mode == "llamafactory" else "tiny"  # None: the weights of --model
            options.add_argument("--shape", choices=sorted(benchmark_steps.SHAPES), default=default)
            options.add_argument(
                "--count", type=positive, default=4, help="steps per process, after one warm-up step (4)"
            )
            options.add_argument("--float32", action="store_true", help="no bf16 autocast")
    parsers["steps"].add_argument(
        "--variants",
        nargs="+",
        choices=list(benchmark_steps.VARIANTS),
        default=["trl", "ours", "ours, padding-free", "ours, no checkpointing"],
        metavar="VARIANT",
        help=f"some of: {'; '.join(benchmark_steps.VARIANTS)}",
    )
    for mode in ("steps", "llamafactory"):
        parsers[mode].add_argument("--batch", type=positive, default=2, help="rows per step (2)")
        parsers[mode].add_argument("--cutoff", type=positive, default=4096, help="maximum tokens of a row (4096)")
    parsers["llamafactory"].add_argument(
        "--llamafactory", type=Path, required=True, metavar="PYTHON", help="the Python of LLaMA-Factory's venv"
    )
    parsers["llamafactory"].add_argument("--stage", choices=["sft", "dpo"], default="sft", help="(sft)")
    parsers["llamafactory"].add_argument("--finetuning-type", choices=["full", "lora"], default="full", help="(full)")
    parsers["steps"].add_argument(
        "--full", action="store_true", help="make every row --cutoff tokens long, from the concatenated toy rows"
    )
    toy_sets = ["arpo_sft_toy", benchmark_steps.INSIDE]
    parsers["steps"].add_argument("--dataset", choices=toy_sets, default=toy_sets[0], help="(arpo_sft_toy)")
    parsers["preparation"].add_argument("--rows", type=positive, default=4000, help="number of rows (4000)")
    parsers["memory"].add_argument("--rows", type=positive, nargs="+", default=[5000, 50000], help="(5000 50000)")
    scaling = parsers["scaling"]
    scaling.add_argument("--lengths", type=positive, nargs="+", default=[512, 1024, 2048, 4096, 8192, 15000])
    scaling.add_argument("--batches", type=positive, nargs="+", default=[1, 2, 4, 8])
    scaling.add_argument("--plot", type=Path, metavar="FILE.png", help="also plot it")
    return parser


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected an integer of 1 or more, found {text!r}")
    return int(text)


def show(table: list[dict[str, Any]]) -> None:
    lines = [list(table[0]), *([as_cell(value) for value in row.values()] for row in table)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


def as_cell(value: Any) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
