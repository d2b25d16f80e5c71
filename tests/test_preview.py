"""`--check` and `--preview` say what a run would do, and load no weights to say it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest

from arpo_trl import preview as module
from arpo_trl.preview import check, checkpoint_steps, count_steps, preview
from arpo_trl.recipe import Recipe, RecipeError

ROWS = [
    {"messages": [{"role": "user", "content": f"日本 {n}"}, {"role": "assistant", "content": f"👍🏽\nAnswer {n}"}]}
    for n in range(10)
]


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lines = [*map(json.dumps, ROWS), "{"]
    (tmp_path / "d.jsonl").write_text("\n".join(lines), encoding="utf-8")
    registry = {"d": {"file_name": "d.jsonl", "formatting": "openai"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(registry), encoding="utf-8")
    return Recipe(
        model_name_or_path=str(tiny_model),
        finetuning_type="full",
        do_train=True,
        dataset=["d"],
        dataset_dir=str(tmp_path),
        max_dropped=0.1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        save_steps=2,
        num_train_epochs=2,
        output_dir=str(tmp_path / "out"),
    )


def test_check_says_what_the_run_would_do(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_free_space", lambda folder: 10**9)
    check(recipe)
    lines = capsys.readouterr().out.splitlines()
    assert "cutoff_len: 2048" in lines
    assert any(
        line.startswith("d: 11 rows: 10 kept, 0 shortened, 0 lost their final answer, 1 dropped; ") for line in lines
    )
    assert any(line.startswith("tokens a row: mean ") and "p95" in line for line in lines)
    assert any(line.startswith("trained: ") and line.endswith("%)") for line in lines)
    assert "3 steps an epoch, 6 in total" in lines
    assert any(line.endswith("parameters, 197,184 of them trained") or " of them trained" in line for line in lines)
    assert lines[-1].startswith("3 checkpoints at steps 2, 4, 6 of 0.00 GB each, 3 kept; ")
    assert lines[-1].endswith("1.00 GB free")


def test_check_of_a_stream_says_what_is_unknown(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    stream = recipe.model_copy(update={"streaming": True})
    stream.trl["max_steps"] = 4
    check(stream)
    assert "4 steps in total; the rows are read and counted as the run goes" in capsys.readouterr().out.splitlines()


def test_check_counts_an_adapter_alone(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    check(recipe.model_copy(update={"finetuning_type": "lora"}))
    parameters = next(line for line in capsys.readouterr().out.splitlines() if "of them trained" in line)
    whole, trained = (int(part.split()[0].replace(",", "")) for part in parameters.split(" parameters, "))
    assert 0 < trained < whole / 2


def test_check_refuses_a_disk_that_is_too_small(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_free_space", lambda folder: 10)
    with pytest.raises(
        RecipeError, match=r"output_dir: .*: 0.01 GB are needed and 0.00 GB are free; set save_total_limit"
    ):
        check(recipe)


def test_check_needs_a_model_not_only_a_tokenizer(recipe: Recipe, tmp_path: Path, tiny_tokenizer: Any) -> None:
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(RecipeError, match=r"model_name_or_path: .*: no model there") as error:
        check(recipe.model_copy(update={"model_name_or_path": str(tmp_path / "tokenizer")}))
    assert "\n" not in str(error.value)


def test_preview_marks_what_is_trained_without_colour(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    preview(recipe, 2)
    lines = capsys.readouterr().out.splitlines()
    assert "\x1b" not in "".join(lines)
    assert [line for line in lines if line.startswith("+ ") and "^" not in line][1:] == [
        "+ 👍🏽",
        "+ Answer 0<|im_end|>",
        "+ 👍🏽",
        "+ Answer 1<|im_end|>",
    ]
    assert "  日本 0<|im_end|>" in lines
    assert sum("tokens trained" in line for line in lines) == 2


def test_preview_names_rows_that_it_cannot_show(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    preview(recipe, 11)
    assert f"{Path(recipe.dataset_dir) / 'd.jsonl'}:11: dropped (not JSON" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, (3, 6)),
        ({"world_size": 2}, (2, 4)),
        ({"max_steps": 5}, (3, 5)),
        ({"num_train_epochs": 0.5}, (3, 2)),
        ({"per_device_train_batch_size": 100}, (1, 2)),
    ],
)
def test_steps_are_counted_as_the_trainer_does(changes: dict[str, Any], steps: tuple[int, int]) -> None:
    given = {"per_device_train_batch_size": 2, "world_size": 1, "gradient_accumulation_steps": 2}
    args: Any = SimpleNamespace(**(given | {"max_steps": -1, "num_train_epochs": 2} | changes))
    assert count_steps(args, rows=10) == steps


@pytest.mark.parametrize(
    ("strategy", "every", "steps"),
    [("no", 2, []), ("steps", 3, [3, 6, 7]), ("steps", 0.5, [4, 7]), ("epoch", 2, [3, 6, 7]), ("steps", 100, [7])],
)
def test_a_checkpoint_is_written_every_so_often_and_at_the_end(strategy: str, every: float, steps: list[int]) -> None:
    args: Any = SimpleNamespace(save_strategy=strategy, save_steps=every)
    assert checkpoint_steps(args, an_epoch=3, total=7) == steps
