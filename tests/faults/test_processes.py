"""Two processes: what happens to one reaches the other, and nothing waits for ever. Slow: `-m slow`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import MakeRecipe
from runs import differing, log_without_times
from test_full_disk import small_disk  # noqa: F401  (a fixture)
from test_signals import COMMANDS, start

from arpo_trl.run_folder import list_checkpoints
from arpo_trl.training.checkpoints import find_problem

pytestmark = pytest.mark.slow


def run_on_two(path: Path, *overrides: str) -> tuple[int, str]:
    process = start([*COMMANDS["torchrun"], str(path), *overrides])
    try:
        told = process.communicate(timeout=100)[0]
    finally:
        process.kill()
    return process.returncode, told


def test_an_output_dir_error_stops_both_processes(make_recipe: MakeRecipe, output_dir: Path) -> None:
    """Both look at the folder, and one says what it holds."""
    text = '{"status": "finished", "recipe": {}, "data": {}, "versions": {}}'
    (output_dir / "run.json").write_text(text, encoding="utf-8")
    code, told = run_on_two(make_recipe())
    assert code == 1  # torchrun's own
    assert told.count("contains a finished run") == 1, told
    assert "exitcode  : 2" in told, told  # torchrun may stop the other before it has ended by itself


def test_fsdp_is_rejected_for_one_process_and_trains_on_two(make_recipe: MakeRecipe) -> None:
    path, sharded = make_recipe(), "fsdp=full_shard auto_wrap"
    process = start([*COMMANDS["python"], str(path), sharded])
    told = process.communicate(timeout=100)[0]
    assert process.returncode == 2 and "fsdp: splitting a model needs several processes; start them with" in told, told
    code, told = run_on_two(path, sharded)
    assert code == 0 and "FSDP needs GPUs (accelerate 1.15): each process has the complete model" in told, told


def test_a_nan_in_one_process_stops_both(make_recipe: MakeRecipe, tmp_path: Path, tiny_model: Path) -> None:
    """The model is broken for both; each reports it once, and no checkpoint is written."""
    import shutil

    from safetensors.torch import load_file, save_file

    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    code, told = run_on_two(make_recipe(model_name_or_path=str(model)))
    assert code == 1 and "is not finite" in told
    assert list_checkpoints(tmp_path / "run") == []


def test_a_full_disk_of_the_main_process_is_handled_by_both(make_recipe: MakeRecipe, small_disk: Path) -> None:  # noqa: F811
    """on_save_error: continue: the save fails on one, and both take the next step."""
    run = small_disk / "run"
    path = make_recipe(output_dir=str(run), save_steps=1, on_save_error="continue", per_device_train_batch_size=1)
    _, told = run_on_two(path, "save_total_limit=1")
    assert "step 4/4" in told, told
    assert "disk full" in told
    assert [find_problem(p) for p in list_checkpoints(run)] == [None]


def test_one_process_does_not_resume_a_run_of_two(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """world_size affects the batches, so it is listed as a change."""
    from arpo_trl.__main__ import main

    path = make_recipe(per_device_train_batch_size=1)
    code, told = run_on_two(path)
    assert code == 0, told
    run = tmp_path / "run"
    manifest = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps(manifest | {"status": "stopped"}), encoding="utf-8")
    assert main([str(path)]) == 2
    assert main([str(path), "allow_changed_recipe=true"]) == 0


@pytest.mark.parametrize("changes", [{}, {"group_by_length": True}], ids=["random", "by_length"])
def test_two_processes_resume_in_the_second_epoch_with_an_odd_number_of_rows(
    changes: dict[str, bool], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """7 rows, one a process and step: log, weights and moments are those of the run that was not stopped."""
    path = make_recipe(
        max_samples=7, per_device_train_batch_size=1, num_train_epochs=3, max_steps=-1, save_steps=3, **changes
    )
    whole, run = tmp_path / "whole", tmp_path / "run"
    code, told = run_on_two(path, f"output_dir={whole}")
    assert code == 0 and "step 12/12" in told, told
    shutil.copytree(whole, run)
    for name in ("checkpoint-9", "checkpoint-12"):
        shutil.rmtree(run / name)
    manifest = json.loads((run / "run.json").read_text(encoding="utf-8"))
    (run / "run.json").write_text(json.dumps(manifest | {"status": "running"}), encoding="utf-8")
    code, told = run_on_two(path)
    assert code == 0 and "resuming from checkpoint-6" in told, told
    assert log_without_times(run) == log_without_times(whole)
    assert differing(run / "checkpoint-12", whole / "checkpoint-12") == []
