"""The final model has the dtypes, config.json and generation_config.json of the base's files; text trains what it reaches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    GenerationConfig,
    Glm4MoeConfig,
    GlmMoeDsaConfig,
    PreTrainedModel,
)

from arpo_trl.errors import RecipeError
from arpo_trl.model.base import runs_code
from arpo_trl.model.base_files import CHANGED_CONFIG_KEYS, TOKENS, read_base_files
from arpo_trl.model.weights import is_inside, unreached_by_text

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
ROUTED = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
INDEXER = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
BIAS = "e_score_correction_bias"


def save_glm(folder: Path) -> PreTrainedModel:
    """Save a bfloat16 mixture of experts whose router biases are float32."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Glm4MoeConfig(**SMALL, **ROUTED, first_k_dense_replace=1))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(BIAS):
            tensor.data = 6.8 + 0.25 * torch.rand(tensor.shape)
        elif tensor.is_floating_point():
            tensor.data = tensor.data.bfloat16()
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"use_cache": True, "extra": 1, "eos_token_id": 3}
    config["torch_dtype"] = config.pop("dtype")  # as transformers 4 writes it
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"top_p": 0.9, "eos_token_id": 3}), encoding="utf-8")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_a_saved_model_keeps_dtypes_values_and_configs(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    model = save_glm(base)
    files = read_base_files(base, model)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.config.use_cache = False  # as Trainer does
    model.config.eos_token_id = 5
    model.generation_config = GenerationConfig(eos_token_id=[5], use_cache=False)
    files.cast(model)
    model.save_pretrained(out)
    files.restore_configs(out)

    saved = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    assert [name for name in saved if not torch.equal(saved[name], expected[name])] == []
    assert {name.rpartition(".")[2] for name, dtype in files.others.items() if dtype == torch.float32} == {BIAS}
    for file, changed in (("config.json", CHANGED_CONFIG_KEYS), ("generation_config.json", TOKENS)):
        before, after = (json.loads((folder / file).read_text(encoding="utf-8")) for folder in (base, out))
        assert after["eos_token_id"] in (5, [5])
        assert {key for key in before | after if before.get(key) != after.get(key)} <= {*changed}


def test_a_model_that_computes_keeps_router_biases_in_float32_and_casts_norms(tmp_path: Path) -> None:
    model = save_glm(tmp_path / "base")
    files = read_base_files(tmp_path / "base", model)
    norm = "model.layers.0.input_layernorm.weight"
    files = files._replace(others={**files.others, norm: torch.float32})
    files.cast(model, computes=True)
    tensors = model.state_dict()
    assert tensors[norm].dtype == torch.bfloat16
    assert {tensor.dtype for name, tensor in tensors.items() if name.endswith(BIAS)} == {torch.float32}


@pytest.mark.parametrize("family", ["gemma3", "glm_moe_dsa"])
def test_weights_without_a_gradient_from_text_are_those_that_are_frozen(family: str) -> None:
    if family == "gemma3":
        vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
        config = Gemma3Config(text_config=SMALL, vision_config=vision | {"image_size": 28, "patch_size": 14})
        model = AutoModelForImageTextToText.from_config(config)
    else:
        model = AutoModelForCausalLM.from_config(
            GlmMoeDsaConfig(**SMALL, **ROUTED, **LATENT, **INDEXER, first_k_dense_replace=1)
        )
    ids = torch.arange(3, 19)[None]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    unreached = unreached_by_text(model)
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without
    assert {name for name, _ in model.named_parameters() if is_inside(name, unreached)} == without


def test_a_planted_run_json_runs_no_code(tmp_path: Path) -> None:
    """It only lets the error name the run's setting."""
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()", encoding="utf-8")
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    run = {"recipe": {"trust_remote_code": True}, "data": {}, "day": "2026-01-01", "versions": {}}
    (tmp_path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"its training did .*run.json.*add --trust-remote-code"):
        runs_code(tmp_path, str(tmp_path), trust_remote_code=False)
    assert not (tmp_path / "ran").exists()
    assert runs_code(tmp_path, str(tmp_path), trust_remote_code=True)
