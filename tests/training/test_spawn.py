"""Windows and macOS spawn processes instead of forking them, so their arguments must be picklable."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import small_run

from arpo_trl.run_folder import read_lines

SPAWNED = """
import multiprocessing, sys
import multiprocess  # of datasets
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    multiprocess.set_start_method("spawn")
    from arpo_trl.__main__ import main
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow  # 20 s
def test_rows_are_encoded_and_loaded_by_spawned_processes(tiny_model: Path, tmp_path: Path) -> None:
    keys = {"dataloader_num_workers": 1, "tokenized_path": None}
    recipe = small_run.make_recipe(tmp_path, tiny_model, **keys)
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, script, recipe.path, "overwrite_cache=true"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert [line["current_steps"] for line in read_lines(tmp_path / "run" / "trainer_log.jsonl")] == [1, 2, 3, 4]
