"""A kill at any file operation of a run, or of its resume: the same command ends with the same bits. Slow: `-m slow`."""

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
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, which Windows has not"),
]

EVALUATED = {"eval_dataset": "rows", "eval_strategy": "steps", "eval_steps": 2}
FORMS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"finetuning_type": "lora", "lora_rank": 4, "lora_dropout": 0.3},
    "one_checkpoint": {"save_total_limit": 1},
    "best": {**EVALUATED, "save_total_limit": 1, "load_best_model_at_end": True, "learning_rate": 0.5},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_kill_at_any_file_operation_loses_nothing(form: str, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Final model, log, results and last checkpoint are those of the run that was not killed."""
    path = make_recipe(**FORMS[form])
    (tmp_path / "kills").mkdir()
    script = Path(__file__).with_name("kill_everywhere.py")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(script.parent), *sys.path]), "OMP_NUM_THREADS": "1"}
    every = os.environ.get("KILL_EVERY", "1")
    command = [sys.executable, str(script), str(path), str(tmp_path / "kills"), every]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    kills = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    wrong = [kill for kill in kills if kill["wrong"]]
    print(f"{form}: {len(kills) - len(wrong)} of {len(kills)} end as the run that was not killed")
    assert kills and wrong == [], json.dumps(wrong, indent=1)
