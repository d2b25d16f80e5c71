"""Rows, model and batch that do not fit are rejected before weights are loaded, by --check and by a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import small_run
from transformers import AutoConfig, AutoTokenizer, Gemma2Config

from arpo_trl.__main__ import main


@pytest.mark.parametrize("command", [[], ["--check"]], ids=["train", "check"])
def test_rows_that_do_not_fit_are_rejected_with_the_keys_line(
    command: list[str], tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "model.safetensors").unlink()  # no weight is looked at
    data = small_run.write_data(tmp_path / "data")
    recipe = small_run.write_recipe(tmp_path, model, dataset="counting", dataset_dir=str(data))
    line = recipe.read_text("utf-8").splitlines().index(f"model_name_or_path: {model}") + 1

    def error_of(*overrides: str) -> str:
        assert main([str(recipe), *overrides, *command]) == 2
        return capsys.readouterr().err.strip().split("\n")[-1]

    assert error_of("dataloader_drop_last=true", "per_device_train_batch_size=13") == (
        f"{recipe}: dataloader_drop_last: drops all 12 rows, fewer than a batch of 13; remove the line, "
        "or lower per_device_train_batch_size"
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    size = json.loads((model / "config.json").read_text("utf-8"))["vocab_size"]
    while len(tokenizer) <= size:
        tokenizer.add_tokens([f"<new_{len(tokenizer)}>"])
    new = len(tokenizer) - 1
    tokenizer.save_pretrained(model)
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": f"<new_{new}>"}]
    (data / "counting.json").write_text(json.dumps(rows), encoding="utf-8")
    for overrides in ((), ("do_train=false", "do_eval=true", "dataset=null", "eval_dataset=counting")):
        assert error_of(*overrides).startswith(
            f"{recipe}:{line}: model_name_or_path: {model} has embeddings for {size:,} tokens, but "
            f"{data / 'counting.json'}:1:39 has token {new:,} ('<new_{new}>'); resize the model once"
        )


@pytest.mark.parametrize("key", ["use_eaft_loss", "use_asft_loss"])
def test_a_loss_not_supported_by_launch_or_model_is_rejected(
    key: str, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the fix that it names works: use_dft_loss, or no FSDP."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    data = small_run.write_data(tmp_path / "data")
    recipe = small_run.write_recipe(tmp_path, model, dataset="counting", dataset_dir=str(data))
    with monkeypatch.context() as patched:
        patched.setenv("ACCELERATE_USE_FSDP", "true")
        assert main(["--check", str(recipe), f"{key}=true"]) == (2 if key == "use_asft_loss" else 0)
        error = f"{recipe}: {key}: requires a complete second model on each process; launch with accelerate_configs/multi_gpu"
        assert (error in capsys.readouterr().err) == (key == "use_asft_loss")
    assert main(["--check", str(recipe), f"{key}=true"]) == 0
    config = Gemma2Config(
        vocab_size=AutoConfig.from_pretrained(tiny_model).vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        intermediate_size=16,
        head_dim=16,
    )
    config.save_pretrained(model)
    assert main(["--check", str(recipe), f"{key}=true"]) == 2
    assert (
        f"{recipe}: {key}: not supported: gemma2 scales its logits; use_dft_loss is supported"
        in capsys.readouterr().err
    )
    assert main(["--check", str(recipe), "use_dft_loss=true"]) == 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lr_scheduler_type=cosine_with_min_lr"], "lr_scheduler_type: cosine_with_min_lr: One of min_lr or min_lr_rate"),
        (["lr_scheduler_type=warmup_stable_decay"], "lr_scheduler_type: warmup_stable_decay: get_wsd_schedule() missing"),
        (["lr_scheduler_type=cosine_with_restarts", "lr_scheduler_kwargs={num_cycle: 2}"], "lr_scheduler_kwargs: cosine_"),
    ],
)  # fmt: skip
def test_a_schedule_that_lacks_a_setting_is_rejected(
    overrides: list[str], message: str, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small_run.write_data(tmp_path / "data")
    recipe = small_run.write_recipe(tmp_path, tiny_model, dataset="counting", dataset_dir=str(data))
    assert main([str(recipe), *overrides]) == 2
    err = capsys.readouterr().err
    assert f"{recipe}: {message}" in err and err.endswith("; set its arguments in lr_scheduler_kwargs\n")
