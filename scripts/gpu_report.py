"""Measure on a GPU what docs/measurements.md has from CPUs: one command, no download, random weights.

python scripts/gpu_report.py --quick             at most 8 minutes on one card
python scripts/gpu_report.py                     all parts, about half an hour
python scripts/gpu_report.py --device cpu        the parts that need no GPU, with a tiny model: tries the script itself

Each part runs in its own process with a time limit, and report.md and report.json are written after each, so that a failed part
costs a line. Paste report.md into docs/measurements.md or an issue. Runs with other versions of torch and transformers too, without
network: a part that can't says why. Packages that a machine without network lacks are prepared elsewhere with `pip download`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
QUICK_SECONDS = 470
PACKAGES = "torch transformers trl accelerate datasets peft bitsandbytes flash_attn liger_kernel".split()


class Part(NamedTuple):
    """A measurement of gpu_parts.py. `seconds`: its time limit."""

    seconds: int
    quick: bool = False
    needs_cuda: bool = False


PARTS = {
    "device": Part(60, quick=True),
    "full 0.5B, 1,024 tokens": Part(70, quick=True),
    "LoRA 0.5B, 1,024 tokens": Part(60, quick=True),
    "killed and resumed": Part(100, quick=True),
    "compared with TRL": Part(120, quick=True),
    "full 0.5B, 8,192 tokens": Part(90, quick=True),
    "LoRA 0.5B, 8,192 tokens": Part(70, quick=True),
    "LoRA 3B, 1,024 tokens": Part(100, quick=True),
    "kernels": Part(60, quick=True),
    "pytest -m gpu": Part(180, quick=True, needs_cuda=True),
    "padding_free": Part(120),
    "packing": Part(120),
    "QLoRA 0.5B": Part(120),
    "DPO 0.5B": Part(180),
    "LoRA 7B, 1,024 tokens": Part(300),
    "flash attention": Part(120, needs_cuda=True),
    "liger": Part(120, needs_cuda=True),
    "rollouts": Part(180),
}
"""In the order of what is worth most, since --quick ends after 8 minutes."""


class Outcome(NamedTuple):
    """A line of the report. `result`: ok, or why there are no figures."""

    part: str
    seconds: float
    result: str
    figures: dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    if options.part:
        return run_part(options.part, options.device, options.out)
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"writing {options.out / 'report.md'} and report.json", flush=True)
    names = options.only or [name for name, part in PARTS.items() if part.quick or not options.quick]
    deadline = time.monotonic() + (QUICK_SECONDS if options.quick else float("inf"))
    outcomes: list[Outcome] = []
    for name in names:
        left = min(options.limit or PARTS[name].seconds, deadline - time.monotonic())
        outcomes.append(measure(name, options.device, options.out, left))
        write(outcomes, options.device, options.out)
        print(as_line(outcomes[-1]), flush=True)
    return int(any(outcome.result.startswith("failed") for outcome in outcomes))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the most important parts, at most 8 minutes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu_report"), help="folder of the report (gpu_report)")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help="only these parts")
    parser.add_argument("--limit", type=float, help="seconds of each part, instead of the default of each")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    return parser


def measure(name: str, device: str, out: Path, seconds: float) -> Outcome:
    """Run a part in its own process, for at most `seconds`."""
    if PARTS[name].needs_cuda and device == "cpu":
        return Outcome(name, 0.0, "skipped: needs CUDA", {})
    if seconds <= 0:
        return Outcome(name, 0.0, "skipped: no time left", {})
    command = [sys.executable, __file__, "--part", name, "--device", device, "--out", str(out.resolve())]
    began = time.monotonic()
    with tempfile.TemporaryFile() as log, (out / "log.txt").open("ab") as kept:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(device), start_new_session=True)
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
        log.seek(0)
        printed = log.read()
        kept.write(f"\n##### {name}\n".encode() + printed)
    took = time.monotonic() - began
    if code is None:
        return Outcome(name, took, f"stopped after {seconds:.0f} s", {})
    lines = [line for line in printed.decode("utf-8", "replace").splitlines() if line.strip()] or ["no output"]
    with contextlib.suppress(ValueError):
        result = json.loads(lines[-1])
        if isinstance(result, dict) and "result" in result:
            return Outcome(name, took, result["result"], result.get("figures", {}))
    return Outcome(name, took, f"failed (exit code {code}): {lines[-1][:300]}", {})


def environment(device: str) -> dict[str, str]:
    """Return the variables of a part: no network, this checkout's package, and no GPU for --device cpu."""
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "WANDB_DISABLED"), "1")
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | offline | hidden | {"PYTHONPATH": path, "PYTHONUTF8": "1"}


def end(process: subprocess.Popen[bytes]) -> None:
    """End a part with all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_part(name: str, device: str, out: Path) -> int:
    """Run a part in this process, and print its result as one line of JSON."""
    try:
        from gpu_parts import Skipped, run

        try:
            result = {"result": "ok", "figures": run(name, device, out)}
        except Skipped as reason:
            result = {"result": f"skipped: {reason}"}
    except (Exception, SystemExit) as error:  # a torch or transformers that the package can't run with
        import traceback

        traceback.print_exc()
        text = " ".join(str(error).split())[:300]
        result = {"result": f"failed: {type(error).__name__}: {text}"}
    print("\n" + json.dumps(result), flush=True)
    return 0


def write(outcomes: list[Outcome], device: str, out: Path) -> None:
    """Write the report so far."""
    about = {"device": device, "python": platform.python_version(), "platform": platform.platform(), **versions()}
    report = {"about": about, "parts": [outcome._asdict() for outcome in outcomes]}
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    lines = [
        ", ".join(f"{name} {value}" for name, value in about.items()),
        "",
        "| part | s | result |",
        "|---|---|---|",
    ]
    lines += map(as_line, outcomes)
    (out / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def as_line(outcome: Outcome) -> str:
    """Return an outcome as a row of the Markdown table."""
    figures = "; ".join(f"{name} {as_text(value)}" for name, value in outcome.figures.items())
    return f"| {outcome.part} | {outcome.seconds:.0f} | {(figures or outcome.result).replace('|', '/')} |"


def as_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(as_text, value)) if isinstance(value, list) else str(value)


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


if __name__ == "__main__":
    sys.exit(main())
