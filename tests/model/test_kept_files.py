"""The final model has the tensors of the base's files: their names, dtypes and shapes, and its configs, for each family.

The slow ones train all families of docs/reference/architectures.md: pytest -m slow tests/model/test_kept_files.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import architectures
import pytest
import small_run
import torch
from launches import ENGINES, NEEDS_DEEPSPEED, attempt, command, launch
from safetensors.torch import load_file, save_file

from arpo_trl.model.base_files import CHANGED_CONFIG_KEYS, TOKENS
from arpo_trl.model.merge import merge
from arpo_trl.recipe import read_recipe
from arpo_trl.training.train import train

pytestmark = pytest.mark.filterwarnings("default")  # old models warn of what they are

FAST = ("gemma2", "glm4_moe", "falcon")
FAMILIES = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in architectures.FAMILIES]


@pytest.mark.parametrize("family", FAMILIES)
def test_full_and_merged_models_keep_dtypes_shapes_and_configs(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    architectures.make_model(family, tmp_path / "model")
    in_two_dtypes(tmp_path / "model")
    rows = architectures.write_rows(tmp_path / "data")
    one_step: dict[str, Any] = {"max_steps": 1, "save_strategy": "no", "output_dir": str(tmp_path / "full")}
    train(read_recipe(architectures.write_recipe(tmp_path, rows, **one_step)))
    assert differences(tmp_path / "model", tmp_path / "full") == []
    one_step |= {"finetuning_type": "lora", "output_dir": str(tmp_path / "lora")}
    train(read_recipe(architectures.write_recipe(tmp_path, rows, **one_step)))
    merge(tmp_path / "lora", tmp_path / "merged")
    assert differences(tmp_path / "model", tmp_path / "merged") == []


@pytest.mark.slow
@pytest.mark.engines
@NEEDS_DEEPSPEED
@pytest.mark.parametrize(
    ("engine", "family"),
    [(engine, "gemma2") for engine in ("fsdp2", "zero2", "zero3")]
    + [("fsdp2", "glm4_moe"), ("zero2", "glm4_moe"), ("zero3", "llama"), ("zero3", "glm4_moe")],
)
def test_gathered_weights_keep_dtypes_shapes_and_configs(engine: str, family: str, tmp_path: Path) -> None:
    architectures.make_model(family, tmp_path / "model")
    in_two_dtypes(tmp_path / "model")
    rows = architectures.write_rows(tmp_path / "data")
    recipe = architectures.write_recipe(tmp_path, rows, per_device_train_batch_size=1, save_strategy="no")
    words = command(engine, recipe)
    if family == "glm4_moe" and engine == "fsdp2":
        code, printed = attempt(words)
        expected = (
            "e_score_correction_bias is a buffer, which FSDP2 can't send .*; set fsdp_cpu_ram_efficient_loading: false"
        )
        assert code != 0 and re.search(expected, printed), printed
        config = tmp_path / "accelerate.yaml"
        config.write_text(
            config.read_text("utf-8").replace('efficient_loading": true', 'efficient_loading": false'), "utf-8"
        )
    printed = launch(words)
    assert re.search(ENGINES[engine], printed), printed
    assert differences(tmp_path / "model", tmp_path / "run") == []


def in_two_dtypes(folder: Path) -> None:
    """Save matrices in bfloat16, and vectors (norms, router biases) in float32, with settings that training changes."""
    path = folder / "model.safetensors"
    tensors = {
        name: tensor.bfloat16() if tensor.ndim > 1 else tensor.float()
        for name, tensor in small_run.read_weights(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"dtype": "bfloat16", "use_cache": True, "a_key_of_others": [1, 2]}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generation = {"temperature": 0.6, "do_sample": True, "eos_token_id": config["eos_token_id"]}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")


def differences(base: Path, out: Path) -> list[str]:
    """Return what differs, other than the listed keys and what the weights are."""
    before, after = (_tensors(folder) for folder in (base, out))
    lines = [f"{name}: {before.get(name)} -> {after.get(name)}" for name in sorted(before.keys() | after.keys())]
    lines = [
        line for line, name in zip(lines, sorted(before.keys() | after.keys())) if before.get(name) != after.get(name)
    ]
    for file, changed in (("config.json", CHANGED_CONFIG_KEYS), ("generation_config.json", TOKENS)):
        old, new = (json.loads((folder / file).read_text(encoding="utf-8")) for folder in (base, out))
        keys = sorted(key for key in old | new if old.get(key) != new.get(key) and key not in changed)
        lines += [f"{file}: {key}: {old.get(key)} -> {new.get(key)}" for key in keys]
    return lines


def _tensors(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {
        name: (tensor.dtype, tensor.shape)
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
