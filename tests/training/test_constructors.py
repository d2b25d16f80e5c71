"""What a constructor rejects is one line with the key, before rows are encoded."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_run

from arpo_trl.__main__ import main


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["adam_beta1=1000000"], "adam_beta1: not supported: Invalid beta parameter"),
        (["weight_decay=-1"], "weight_decay: not supported: Invalid weight_decay value"),
        (["adam_epsilon=-1"], "adam_epsilon: not supported: Invalid epsilon value"),
        (["optim=sgd", "optim_args=momentum=-1"], "optim: not supported: Invalid momentum value"),
        (
            ["activation_checkpointing_kwargs={selective: true, use_reentrant: true}"],
            "activation_checkpointing_kwargs: ",
        ),
        (["finetuning_type=lora", "lora_target=lm_head,q_proj"], "`lm_head` is not supported"),
        (["accelerator_config={split_batches: true}"], "accelerator_config: split_batches: true is not supported"),
        (
            ["accelerator_config={dispatch_batches: true}"],
            "accelerator_config: dispatch_batches: true is not supported",
        ),
        (["accelerator_config={even_batches: false}"], "accelerator_config: even_batches: false is not supported"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_value_that_a_constructor_rejects_is_an_error_before_the_rows(
    keys: list[str], expected: str, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small_run.write_data(tmp_path / "data")
    (data / "counting.json").write_text("not JSON", encoding="utf-8")  # which would be the first error of the rows
    recipe = small_run.write_recipe(tmp_path, tiny_model, dataset="counting", dataset_dir=str(data))
    assert main(["--check", str(recipe), *keys]) == 2
    error = capsys.readouterr().err
    assert expected in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "row_audit.jsonl").exists()


@pytest.mark.parametrize(
    "keys", [[], ["packing=true"], ["finetuning_type=lora"], ["do_train=false", "do_eval=true", "val_size=2"]]
)
def test_a_sound_recipe_passes_and_leaves_nothing(
    keys: list[str], tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small_run.write_data(tmp_path / "data")
    recipe = small_run.write_recipe(tmp_path, tiny_model, dataset="counting", dataset_dir=str(data))
    assert main(["--check", str(recipe), *keys]) == 0
    assert not (tmp_path / "run").exists()
