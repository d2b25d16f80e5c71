"""`--check` says what a run would do and cost, and loads no weights to say it."""

import json
import re
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from arpo_trl.errors import RecipeError
from arpo_trl.recipe import Recipe
from arpo_trl.report.manifest import Manifest
from arpo_trl.training.check import check, count_steps
from arpo_trl.training.requirements import check_before_torch
from arpo_trl.training.start_and_end_report import checkpoint_steps, warn_of_disk


def test_check_prints_what_the_run_would_do(
    chat_recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10**9))
    check(chat_recipe)
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith(
            "data     d: 11 rows: 10 intact, 0 shortened, 0 truncated before the final answer, 1 dropped; "
        )
        for line in lines
    )
    said = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if line and not line.startswith(" ")}
    assert list(said) == "model device data tokens steps time memory disk recipe".split()
    assert re.search(r": [\d,]+ parameters, all trained, float32$", said["model"])
    assert re.fullmatch(r"per row: mean .*p95.*; .* trained \(.*%\)", said["tokens"])
    assert said["steps"].startswith("6: 2 epochs, 4 rows and about ")
    assert said["steps"].endswith(" tokens per step (2 per device x 2 accumulated)")
    assert said["time"].startswith("unknown; ")
    assert said["disk"].startswith("3 checkpoints of 2.0 MB (after steps 2, 4, 6), 3 kept; ")
    assert said["disk"].endswith("1.00 GB free")
    assert not any("save_total_limit" in line for line in lines)
    assert "  save_steps: 2" in lines and not any("cutoff_len" in line for line in lines)


def test_check_prints_every_key_if_verbose(chat_recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    check(chat_recipe, verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert "  cutoff_len: 2048" in lines and any("##" in line for line in lines)


@pytest.mark.parametrize("model", ["the same model", "another model"])
def test_check_estimates_the_time_from_an_earlier_run_of_the_model(
    model: str, chat_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    output_dir = Path(chat_recipe.output_dir)
    output_dir.mkdir()
    log = "".join(json.dumps({"tokens_per_second": speed}) + "\n" for speed in (1, 2, 500))
    (output_dir / "trainer_log.jsonl").write_text(log, encoding="utf-8")
    keys = chat_recipe.resolved() | ({} if model == "the same model" else {"model_name_or_path": "Qwen/Qwen3-8B"})
    manifest = Manifest(recipe=json.loads(json.dumps(keys, default=str)), data={}, day=date(2026, 1, 1), versions={})
    manifest.write(output_dir, "stopped")
    check(chat_recipe)
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("time"))
    if model == "the same model":
        assert re.match(r"time     about 0:\d\d:\d\d, at the 2 tokens/s of the earlier run in ", said)
    else:
        assert said == "time     unknown; shown after the first steps"


def test_check_of_a_finished_run_reports_it_and_still_checks(
    chat_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(chat_recipe.output_dir).mkdir()
    Manifest(recipe={}, data={}, day=date(2026, 1, 1), versions={}).write(Path(chat_recipe.output_dir), "finished")
    finished = r"output_dir: \S+ contains a finished run; choose another folder, or set overwrite_output_dir: true"
    with pytest.raises(RecipeError, match=finished):
        check_before_torch(chat_recipe)
    check(check_before_torch(chat_recipe, starts_run=False))
    said = capsys.readouterr().out
    assert re.search(finished, said.splitlines()[-1]) and "\nsteps    6: 2 epochs" in said


@pytest.mark.parametrize(
    ("limit", "checkpoints", "free", "warns"),
    [
        (None, 5, 10**13, True),  # 30 GB
        (None, 3, 10**13, False),  # 18 GB
        (None, 3, 30 * 10**9, True),  # of 30 GB free
        (2, 5, 10**13, False),
        (None, 2, 13 * 10**9, False),  # two are needed
    ],
)
def test_checkpoints_that_fill_the_disk_are_reported_with_the_key_that_limits_them(
    limit: int | None, checkpoints: int, free: int, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free))
    size = 6 * 10**9
    expected = (
        f"         all {checkpoints} checkpoints take {checkpoints * 6}.00 GB; save_total_limit: 2 keeps the last two, "
        "12.00 GB"
    )
    assert warn_of_disk(Path(), limit, size, checkpoints) == [expected] * warns


def test_check_of_a_stream_names_what_is_unknown(chat_recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    check(chat_recipe.model_copy(update={"streaming": True, "max_steps": 4}))
    assert "; the rows are read and counted during the run\n" in capsys.readouterr().out


def test_check_of_an_evaluation_prints_its_data(chat_recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    check(chat_recipe.model_copy(update={"do_train": False, "do_eval": True, "dataset": [], "eval_dataset": ["d"]}))
    assert capsys.readouterr().out.startswith("data     d: 11 rows: 10 intact, ")


def test_check_counts_training_rows_without_held_out_ones(
    chat_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    check(chat_recipe.model_copy(update={"val_size": 0.4}))
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("steps    4: 2 epochs") for line in lines)
    assert "         4 of these rows are held out (val_size), 6 are trained on" in lines
    whole = int(
        next(line for line in lines if line.startswith("data     d: ")).split("; ")[1].split()[0].replace(",", "")
    )
    tokens = next(line for line in lines if line.startswith("tokens   per row of 6 training rows: "))
    seen = int(tokens.split(" trained (")[0].split(" of ")[-1].replace(",", ""))
    assert 0 < seen < whole


def test_check_counts_only_the_adapter_as_trained(chat_recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    check(chat_recipe.model_copy(update={"finetuning_type": "lora"}))
    parameters = next(line for line in capsys.readouterr().out.splitlines() if " trained (" in line).split(": ", 1)[1]
    whole, trained = (int(part.split()[0].replace(",", "")) for part in parameters.split(" parameters, "))
    assert 0 < trained < whole / 2


def test_check_rejects_a_disk_that_is_too_small(chat_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10))
    reason = r"output_dir: disk full: the whole run needs 6.7 MB, and .*out has 0.0 MB free; free some space or choose another folder, or keep fewer checkpoints"
    with pytest.raises(RecipeError, match=reason):
        check(chat_recipe)


def test_check_needs_a_model_not_only_a_tokenizer(chat_recipe: Recipe, tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(RecipeError, match=r"model_name_or_path: .*: config.json is missing") as error:
        check_before_torch(chat_recipe.model_copy(update={"model_name_or_path": str(tmp_path / "tokenizer")}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, (3, 6)),
        ({"world_size": 2}, (2, 4)),
        ({"max_steps": 5}, (3, 5)),
        ({"num_train_epochs": 0.5}, (3, 2)),
        ({"per_device_train_batch_size": 100}, (1, 2)),
        ({"per_device_train_batch_size": 4, "dataloader_drop_last": True}, (1, 2)),
    ],
)
def test_steps_are_counted_as_the_trainer_does(changes: dict[str, Any], steps: tuple[int, int]) -> None:
    given = {"per_device_train_batch_size": 2, "world_size": 1, "gradient_accumulation_steps": 2}
    given |= {"dataloader_drop_last": False}
    args: Any = SimpleNamespace(**(given | {"max_steps": -1, "num_train_epochs": 2} | changes))
    assert count_steps(args, rows=10) == steps


@pytest.mark.parametrize(
    ("strategy", "every", "steps"),
    [("no", 2, []), ("steps", 3, [3, 6, 7]), ("steps", 0.5, [4, 7]), ("epoch", 2, [3, 6, 7]), ("steps", 100, [7])],
)
def test_checkpoints_are_written_periodically_and_at_the_end(strategy: str, every: float, steps: list[int]) -> None:
    args: Any = SimpleNamespace(save_strategy=strategy, save_steps=every)
    assert checkpoint_steps(args, per_epoch=3, total=7) == steps


def test_save_strategy_best_has_at_most_one_checkpoint_per_evaluation() -> None:
    args: Any = SimpleNamespace(save_strategy="best", save_steps=100, eval_strategy="steps", eval_steps=3)
    assert checkpoint_steps(args, per_epoch=3, total=7) == [3, 6, 7]
    args.eval_strategy = "epoch"
    assert checkpoint_steps(args, per_epoch=2, total=7) == [2, 4, 6, 7]
