"""Rows, model and batch that do not fit are rejected before weights are loaded, by --check and by a run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma2Config

from arpo_trl.__main__ import main
from arpo_trl.errors import RecipeError
from arpo_trl.model.sft_config import to_sft_config
from arpo_trl.model.split import Split
from arpo_trl.training.setup import check_after_torch, check_split


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
            f"{recipe}:{line}: model_name_or_path: {model} has embeddings for token ids 0 to {size - 1:,}, but "
            f"{data / 'counting.json'}:1:39 has token id {new:,} ('<new_{new}>'); resize the model once"
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
        patched.setattr("arpo_trl.model.methods.asft.find_split", lambda recipe: Split("FSDP2"))
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
    fix = "; correct its arguments\n" if len(overrides) > 1 else "; set its arguments in lr_scheduler_kwargs\n"
    assert f"{recipe}: {message}" in err and err.endswith(fix)


LEARNED_POSITIONS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2},
    "gpt_neo": {"max_position_embeddings": 64, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]},
    "gpt_bigcode": {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2},
    "opt": {"max_position_embeddings": 64, "hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32},
    "biogpt": {"max_position_embeddings": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
}  # fmt: skip
ROTARY = {"qwen2": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 64}}  # fmt: skip


@pytest.mark.parametrize("model_type", [*LEARNED_POSITIONS, *ROTARY])
def test_rows_longer_than_learned_positions_are_rejected_and_the_named_cutoff_trains(
    model_type: str, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    size = json.loads((model / "config.json").read_text("utf-8"))["vocab_size"]
    config = AutoConfig.for_model(model_type, vocab_size=size, **(LEARNED_POSITIONS | ROTARY)[model_type])
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d " * 90}]
    (tmp_path / "long.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text('{"long": {"file_name": "long.json"}}', encoding="utf-8")
    recipe = small_run.write_recipe(tmp_path, model, dataset="long", dataset_dir=str(tmp_path), max_steps=1)
    code = main(["--check", str(recipe)])
    if model_type in ROTARY:
        assert code == 0
        return
    assert code == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert f"cutoff_len: {model_type} has 64 learned positions, but {tmp_path / 'long.json'}:1:" in error
    assert error.endswith("set cutoff_len: 64")
    assert main([str(recipe), "cutoff_len=64", "per_device_train_batch_size=2"]) == 0


@pytest.mark.skipif(os.name == "nt" or os.geteuid() != 0, reason="needs root, to be another user")
def test_a_cache_of_another_user_is_an_error_with_the_fix(tmp_path: Path, tiny_model: Path) -> None:
    data = small_run.write_data(tmp_path / "data")
    recipe = small_run.write_recipe(tmp_path, tiny_model, dataset="counting", dataset_dir=str(data))
    (tmp_path / "file").touch()
    command = [sys.executable, "-m", "arpo_trl", "--check", str(recipe)]
    env = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "file" / "cache")}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().split("\n")[-1] == (
        f"{tmp_path / 'file' / 'cache'}: the cache of datasets can't be written (Not a directory); set HF_DATASETS_CACHE "
        "to a folder that you can write"
    )


FSDP2, ZERO2, ZERO3 = Split("FSDP2"), Split("ZeRO-2"), Split("ZeRO-3")


@pytest.mark.parametrize(
    ("split", "lines", "message"),
    [
        (
            FSDP2,
            "do_predict=true val_size=0.1",
            "do_predict: not supported with FSDP2: .*do_train=false do_predict=true",
        ),
        (ZERO3, "predict_during_eval=4 val_size=0.1 do_eval=true", "predict_during_eval: not supported with ZeRO-3"),
        (ZERO2, "on_save_error=continue", "on_save_error: continue is not supported with ZeRO-2, .*; set stop"),
        (FSDP2, "finetuning_type=full optim=adafactor", "optim: adafactor is not supported with FSDP2"),
        (FSDP2, "optim=adamw_bnb_8bit", "optim: adamw_bnb_8bit is not supported with FSDP2"),
        (FSDP2, "finetuning_type=full use_galore=true", "use_galore: its optimizer is not supported with FSDP2"),
        (FSDP2, "additional_target=embed_tokens", "additional_target: embed_tokens is not supported with FSDP2"),
        (ZERO3, "finetuning_type=full", "deepspeed: stage3_gather_16bit_weights_on_model_save is false"),
    ],
)
def test_what_a_split_does_not_support_is_rejected_before_the_data(
    split: Split, lines: str, message: str, recipe_of: Any
) -> None:
    recipe = recipe_of(*lines.split())
    args = to_sft_config(recipe)
    check_split(recipe, args, Split("DDP"))
    with pytest.raises(RecipeError, match=message) as caught:
        check_split(recipe, args, split)
    assert "\n" not in str(caught.value)


def test_deepspeed_needs_a_launcher(recipe_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(RecipeError, match="deepspeed: needs a launcher, even for one process; start with `torchrun"):
        check_after_torch(recipe_of('deepspeed={"zero_optimization": {"stage": 2}}'))
