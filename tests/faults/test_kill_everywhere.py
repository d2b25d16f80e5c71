"""A kill at any file operation, a disk of any size: the same command ends with the same bits. Slow: `-m slow`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeRecipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, which Windows lacks"),
]

EVALUATED = {"eval_dataset": "rows", "eval_strategy": "steps", "eval_steps": 2}
FORMS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"finetuning_type": "lora", "lora_rank": 4, "lora_dropout": 0.3},
    "one_checkpoint": {"save_total_limit": 1},
    "best": {**EVALUATED, "save_total_limit": 1, "load_best_model_at_end": True, "learning_rate": 0.5},
}


def lines_of(name: str, recipe: Path, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    folder.mkdir()
    script = Path(__file__).with_name(name)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(script.parent), *sys.path]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(recipe), str(folder), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("form", FORMS)
def test_a_kill_at_any_file_operation_loses_nothing(form: str, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Final model, log, results and last checkpoint are those of the run that was not killed."""
    path = make_recipe(**FORMS[form])
    kills = lines_of("kill_everywhere.py", path, tmp_path / "kills", os.environ.get("KILL_EVERY", "1"))
    wrong = [kill for kill in kills if kill["wrong"]]
    print(f"{form}: {len(kills) - len(wrong)} of {len(kills)} end as the run that was not killed")
    assert kills and wrong == [], json.dumps(wrong, indent=1)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounting needs root on Linux")
@pytest.mark.parametrize("checked", ["1", "0"], ids=["seen_before_a_save", "seen_in_a_save"])
def test_a_disk_of_any_size_ends_the_run_in_a_line_and_loses_nothing(
    checked: str, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """With enough space, the same command ends like a run that never had a full disk."""
    step = os.environ.get("DISK_STEP", "120")  # KiB; a checkpoint takes 2.1 MB, all of the run 5.1
    disks = lines_of("small_disks.py", make_recipe(), tmp_path / "disks", "40", "5600", step, checked)
    wrong = [d for d in disks if d["wrong"] or d["broken"] or (d["code"] and not d["told"])]
    print(f"{len(disks) - len(wrong)} of {len(disks)} disks, {sum(bool(d['code']) for d in disks)} of them too small")
    assert len({d["code"] for d in disks}) > 1 and wrong == [], json.dumps(wrong, indent=1)
