"""Which settings may change when a run is resumed, and which are rejected with a list of the changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from runs import MakeRecipe, make_link

from arpo_trl.__main__ import main
from arpo_trl.errors import RecipeError
from arpo_trl.recipe import read_recipe
from arpo_trl.recipe.keys import GROUPS, keys
from arpo_trl.recipe.keys_of_trl import SftKeys
from arpo_trl.report.manifest import (
    CANNOT_CHANGE,
    MAY_CHANGE,
    PATHS,
    Manifest,
    list_changes,
    read_manifest,
    require_same_run,
)


def manifest(path: Path, **more: Any) -> Manifest:
    made = {
        "recipe": read_recipe(path).resolved(),
        "data": {"rows": "1f"},
        "template_hash": "2e",
        "day": "2026-11-26",
        "world_size": 1,
        "versions": {"torch": "2.13"},
    }
    return Manifest.model_validate_json(json.dumps(made | more))


CHANGES: dict[str, Any] = {
    "learning_rate": 1e-4,
    "seed": 7,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "max_steps": 8,
    "num_train_epochs": 5,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "weight_decay": 0.1,
    "adam_beta2": 0.95,
    "max_grad_norm": 0.5,
    "optim": "sgd",
    "bf16": True,
    "finetuning_type": "lora",
    "template": None,
    "cutoff_len": 100,
    "max_samples": 4,
    "packing": True,
    "train_on_prompt": True,
    "mask_history": True,
    "disable_shuffling": True,
    "neftune_noise_alpha": 5.0,
    "model_name_or_path": "elsewhere",
    "default_system": "Be short.",
}


def test_another_spelling_of_a_path_is_the_same_setting(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """run.json keeps the recipe's text: the same words in another folder are the same setting too."""
    (tmp_path / "base" / "adapter").mkdir(parents=True)
    link = make_link(tmp_path / "link", tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    adapters = {"finetuning_type": "lora", "adapter_name_or_path": ["base/adapter", "gone"]}
    before = manifest(make_recipe(model_name_or_path="base", **adapters))
    for name in ("./base", "base/", "base/../base", str(tmp_path / "base"), *(["link"] if link else [])):
        others = adapters | {"adapter_name_or_path": [f"{name}/adapter", "./gone"]}
        now = manifest(make_recipe(model_name_or_path=name, **others))
        assert now.recipe["model_name_or_path"] == name and list_changes(before, now) == []
    for name in ("other", str(tmp_path), "base/adapter"):
        now = manifest(make_recipe(model_name_or_path=name, **adapters))
        assert list_changes(before, now) == [f"model_name_or_path: 'base' -> {name!r}"]
    fewer = manifest(make_recipe(model_name_or_path="base", **adapters | {"adapter_name_or_path": ["base/adapter"]}))
    assert len(list_changes(before, fewer)) == 1
    reference: dict[str, Any] = {"path": "base", "adapters": ["base/adapter"], "hash": "1f"}
    before.reference = reference
    for changes, different in (
        ({"path": "./base"}, 0),
        ({"hash": "2e"}, 1),
        ({"adapters": []}, 1),
        ({"path": "b"}, 1),
    ):
        now = before.model_copy(update={"reference": reference | changes})
        assert len(list_changes(before, now)) == different


def test_every_path_that_affects_the_weights_is_compared_as_a_path() -> None:
    fields = {name: field for group in (*GROUPS, SftKeys) for name, field in group.model_fields.items()}
    assert {
        name for name, field in fields.items() if "_location" in f"{field.annotation}{field.metadata}"
    } - MAY_CHANGE == PATHS


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_key_that_affects_the_weights_is_rejected(key: str, make_recipe: MakeRecipe) -> None:
    """The key is listed with both values."""
    before = manifest(make_recipe())
    now = manifest(make_recipe(**{key: CHANGES[key]}))
    with pytest.raises(RecipeError, match=f"\n  {key}: .* -> .*\n") as error:
        require_same_run(before, now, allow_changed_recipe=False)
    assert ("set allow_changed_recipe: true" in str(error.value)) == (key not in CANNOT_CHANGE)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"data": {"rows": "3c"}}, "data of rows: 1f -> 3c"),
        ({"data": {"others": "1f"}}, "data of others: None -> 1f"),
        ({"template_hash": "4d"}, "template_hash: 2e -> 4d"),
        ({"world_size": 2}, "world_size: 1 -> 2"),
    ],
)
def test_changed_data_template_or_processes_are_rejected(
    more: dict[str, Any], expected: str, make_recipe: MakeRecipe
) -> None:
    """It is listed."""
    path = make_recipe()
    with pytest.raises(RecipeError, match=expected):
        require_same_run(manifest(path), manifest(path, **more), allow_changed_recipe=False)


SHARED_ROWS = {
    "per_device_train_batch_size=1": (4, {"per_device_train_batch_size": 1}),
    "accumulated": (1, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}),
    "global_batch_size": (2, {"per_device_train_batch_size": 1, "global_batch_size": 4}),
}


@pytest.mark.parametrize("name", SHARED_ROWS)
def test_the_same_rows_per_step_may_be_shared_differently(name: str, make_recipe: MakeRecipe) -> None:
    """Four rows of one process: a float's last digits, and a line says so. Not where a step depends on who shares it."""
    processes, changes = SHARED_ROWS[name]
    before = manifest(make_recipe(per_device_train_batch_size=4))
    now = manifest(make_recipe(**changes), world_size=processes)
    (line,) = require_same_run(before, now, allow_changed_recipe=False)
    assert line == "resuming with the same rows per step, grouped differently: losses may differ in the last digits"
    for unequal in ({"packing": True}, {"streaming": True}, {"group_by_length": True}, {"neftune_noise_alpha": 5.0}):
        now.recipe |= unequal
        assert list_changes(before, now)[0].split(":")[0] in {*unequal, *changes}
        before.recipe |= unequal
        assert list_changes(before, now) != []
        before.recipe = {key: value for key, value in before.recipe.items() if key not in unequal}
        now.recipe = {key: value for key, value in now.recipe.items() if key not in unequal}


def test_other_processes_with_other_rows_per_step_are_rejected(make_recipe: MakeRecipe) -> None:
    path = make_recipe(per_device_train_batch_size=2)
    expected = r"world_size: 2 -> 3 processes \(launch 2, or keep 4 rows per step, found 6\)"
    with pytest.raises(RecipeError, match=expected):
        require_same_run(manifest(path, world_size=2), manifest(path, world_size=3), allow_changed_recipe=False)


def test_everything_that_changed_is_listed_at_once(make_recipe: MakeRecipe) -> None:
    """Three changes give three lines; if allowed, they are printed."""
    before = manifest(make_recipe())
    now = manifest(make_recipe(learning_rate=0.5, max_grad_norm=0.5), world_size=4)
    assert len(list_changes(before, now)) == 3
    lines = require_same_run(before, now, allow_changed_recipe=True)
    assert lines[0] == "resuming with a changed setting: learning_rate: 0.001 -> 0.5" and len(lines) == 3


def test_keys_that_do_not_affect_the_weights_may_change(make_recipe: MakeRecipe) -> None:
    """How often is logged and saved, where to, how loudly: free."""
    before = manifest(make_recipe())
    changes = {
        "logging_steps": 7,
        "save_steps": 9,
        "save_total_limit": 1,
        "plot_loss": True,
        "output_dir": "elsewhere",
    }
    changes |= {"on_save_error": "continue", "dataset_dir": "moved", "dataloader_num_workers": 3, "run_name": "other"}
    assert list_changes(before, manifest(make_recipe(**changes))) == []


def test_every_key_that_may_change_exists() -> None:
    """A typo in the list would reject a harmless change."""
    assert sorted(key for key in MAY_CHANGE if key not in keys()) == []


def test_a_key_at_its_default_is_no_change(make_recipe: MakeRecipe) -> None:
    """Written or left out."""
    before, now = manifest(make_recipe()), manifest(make_recipe(weight_decay=0.0, seed=42))
    assert list_changes(before, now) == list_changes(now, before) == []
    del before.recipe["truncation_mode"]
    assert list_changes(before, now) == []


def test_an_unknown_key_is_listed(make_recipe: MakeRecipe) -> None:
    """What it did is unknown, so it is not passed over."""
    before = manifest(make_recipe())
    before.recipe["once_a_key"] = 3
    assert list_changes(before, manifest(make_recipe())) == ["once_a_key: 3 -> null"]


def test_changed_versions_are_reported(make_recipe: MakeRecipe) -> None:
    """The last digits may differ."""
    path = make_recipe()
    (line,) = require_same_run(manifest(path), manifest(path, versions={"torch": "3.0"}), False)
    assert "torch 2.13 -> 3.0" in line


@pytest.mark.parametrize("text", [None, "", "{", "[1]", '{"recipe": 3}', '"finished"', "[" * 100_000, "\udcff"])
def test_an_unreadable_manifest_is_reported(text: str | None, tmp_path: Path, make_recipe: MakeRecipe) -> None:
    """The run continues, and one line reports that nothing was compared."""
    if text is not None:
        (tmp_path / "run.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    (line,) = require_same_run(read_manifest(tmp_path), manifest(make_recipe()), False)
    assert "recipe and data are not compared" in line


@pytest.mark.parametrize("field", ["data", "versions", "template_hash", "world_size", "status"])
@pytest.mark.parametrize("value", [None, 3, "text", []])
def test_a_manifest_with_an_invalid_field_never_raises(
    field: str, value: Any, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """A list of changes or none, never another exception."""
    path = make_recipe()
    odd = manifest(path).model_dump(mode="json") | {field: value}
    (tmp_path / "run.json").write_text(json.dumps(odd), encoding="utf-8")
    lines = require_same_run(read_manifest(tmp_path), manifest(path), allow_changed_recipe=True)
    assert len(lines) == (field != "status")


def test_a_run_with_changed_settings_exits_with_code_2(
    make_recipe: MakeRecipe, output_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Edited data and another learning rate: exit code 2, nothing is lost; allowed, the run ends."""
    from arpo_trl.training import trainer as trainer_module

    with pytest.MonkeyPatch.context() as patch:

        def fail(*args: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(trainer_module.ArpoTrainer, "save_final_model", fail)
        assert main([str(make_recipe(output_dir=str(tmp_path / "new")))]) == 130
    first = (tmp_path / "new" / "run.json").read_text(encoding="utf-8")
    (tmp_path / "data" / "rows.json").write_text('[{"instruction": "a", "output": "b c d"}]', encoding="utf-8")
    path = make_recipe(output_dir=str(tmp_path / "new"), learning_rate=0.5)
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert "learning_rate: 0.001 -> 0.5" in error and "data of rows: " in error and "Traceback" not in error
    assert (tmp_path / "new" / "run.json").read_text(encoding="utf-8") == first
    assert main([str(path), "allow_changed_recipe=true"]) == 0
    assert "resuming with a changed setting: learning_rate: 0.001 -> 0.5" in capsys.readouterr().out
