"""scripts/gpu_report.py on the CPU, so that it works the first time on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_parts
import gpu_report
import pytest
import small_run
import torch

pytestmark = [
    small_run.QUIET,
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs would use the GPU"),
]
SCRIPT = Path(gpu_report.__file__)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.mark.parametrize("name", ["full 0.5B, 1,024 tokens", "DPO 0.5B", "packing", "kernels"])
def test_a_part_measures_a_tiny_model(name: str, out: Path) -> None:
    figures = gpu_parts.run(name, "cpu", out)
    if name == "kernels":
        assert len(figures) == 10 and all(value.endswith("%") for value in figures.values())
        return
    assert figures["s/step"] > 0 and figures["tokens/s"] > 0 and figures["peak GB"] > 0.1
    assert figures["estimated GB"] is not None
    if name.startswith("full"):
        assert 0 < figures["largest loss difference to float32"] < 0.05
    if name == "DPO 0.5B":
        assert figures["first loss"] == pytest.approx(0.6931, abs=1e-3)


def run_script(*words: object, code: int = 0) -> None:
    done = subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr


def read(out: Path) -> list[dict[str, Any]]:
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    table = (out / "report.md").read_text(encoding="utf-8").splitlines()
    assert report["about"]["device"] == "cpu" and report["about"]["torch"] in table[0]
    assert table[2:4] == ["| part | s | result |", "|---|---|---|"]
    assert [line.split(" | ")[0] for line in table[4:]] == [f"| {part['part']}" for part in report["parts"]]
    return list(report["parts"])


def test_each_part_is_a_line_whatever_happens_to_it(tmp_path: Path) -> None:
    """One needs CUDA, one is too slow. Where a library can't be imported, the part says so."""
    run_script("--device", "cpu", "--out", tmp_path, "--only", "pytest -m gpu", "kernels", "--limit", "0.3")
    tests, kernels = read(tmp_path)
    assert tests["result"] == "skipped: needs CUDA" and kernels["result"].startswith("stopped after 0 s")
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl" / "__init__.py").write_text("raise ImportError('trl needs torch 2.99')", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        patch.setattr(gpu_report, "environment", without_root(gpu_report.environment))
        assert gpu_report.main(["--device", "cpu", "--out", str(tmp_path), "--only", "device"]) == 1
    (device,) = read(tmp_path)
    assert device["result"] == "failed: ImportError: trl needs torch 2.99"


def without_root(environment: Callable[[str], dict[str, str]]) -> Callable[[str], dict[str, str]]:
    """Return `environment` with the path of the test before that of the checkout."""

    def changed(device: str) -> dict[str, str]:
        variables: dict[str, str] = environment(device)
        root, _, own = variables["PYTHONPATH"].partition(os.pathsep)
        return variables | {"PYTHONPATH": f"{own}{os.pathsep}{root}"}

    return changed


@pytest.mark.slow
def test_every_part_runs_or_says_what_it_needs(tmp_path: Path) -> None:
    run_script("--device", "cpu", "--out", tmp_path, "--limit", "600")
    parts = {part["part"]: part for part in read(tmp_path)}
    assert list(parts) == list(gpu_report.PARTS)
    skipped = {name: part["result"] for name, part in parts.items() if part["result"] != "ok"}
    assert {name for name, part in gpu_report.PARTS.items() if part.needs_cuda} == {
        name for name, result in skipped.items() if result == "skipped: needs CUDA"
    }
    assert all(result.startswith("skipped: ") for result in skipped.values()), skipped
    assert parts["killed and resumed"]["figures"]["weights bit for bit"] is True
    assert parts["compared with TRL"]["figures"]["largest loss difference"] < 1e-3
    assert parts["rollouts"]["figures"]["trajectories"] == 8


def test_the_quick_parts_have_no_more_time_than_a_lent_card() -> None:
    assert gpu_report.QUICK_SECONDS <= 480
    assert set(gpu_parts.OTHER_PARTS) < set(gpu_report.PARTS)
    others = set(gpu_report.PARTS) - set(gpu_parts.OTHER_PARTS)
    assert all(name.split(",")[0].split(" ")[1] in gpu_parts.SIZES for name in others)
