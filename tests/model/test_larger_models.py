"""Models that have more than a dense text model: a vision part, an indexer, projections that PEFT can't adapt."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import make_tiny_model
import pytest
import small_run
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from arpo_trl.__main__ import main
from arpo_trl.run_folder import read_lines

pytestmark = [small_run.QUIET, pytest.mark.filterwarnings("default")]

TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 1088, "max_position_embeddings": 512, "pad_token_id": 0}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION |= {"image_size": 28, "patch_size": 14}
LATENT = {"q_lora_rank": 32, "qk_rope_head_dim": 8, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 64}
EXPERTS = {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1}


def mistral3() -> Any:
    text = TEXT | {"model_type": "ministral3", "head_dim": 16}
    vision = VISION | {"model_type": "pixtral", "head_dim": 16}
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, spatial_merge_size=1)
    return transformers.Mistral3ForConditionalGeneration(config)


def llama4() -> Any:
    text = TEXT | {"intermediate_size_mlp": 128, "num_local_experts": 2, "head_dim": 16, "attention_chunk_size": 64}
    vision = VISION | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    return transformers.Llama4ForConditionalGeneration(
        transformers.Llama4Config(text_config=text, vision_config=vision)
    )


def deepseek_v4() -> Any:
    sizes = TEXT | {"num_hidden_layers": 4, "num_key_value_heads": 1, "head_dim": 64, "sliding_window": 64}
    return AutoModelForCausalLM.from_config(transformers.DeepseekV4Config(**sizes, **LATENT, **EXPERTS))


def gemma3() -> Any:
    text = TEXT | {"head_dim": 16, "sliding_window": 64}
    config = transformers.Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)


def glm_moe_dsa() -> Any:
    sizes = TEXT | {"num_key_value_heads": 4, "first_k_dense_replace": 1}
    others = LATENT | {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 16}
    return AutoModelForCausalLM.from_config(transformers.GlmMoeDsaConfig(**sizes, **others, **EXPERTS))


def save(make: Any, folder: Path) -> Path:
    """Save the model in bfloat16, with the tests' tokenizer."""
    tokenizer = make_tiny_model.train_tokenizer(make_tiny_model.TOY_DATA, rows=200, vocab_size=1024)
    make_tiny_model.save(tokenizer, make_tiny_model.make_model(tokenizer, hidden_size=64, layers=1, seed=0), folder)
    torch.manual_seed(0)
    model = make().bfloat16()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("make", "keys"),
    [(mistral3, []), (llama4, []), (deepseek_v4, ["finetuning_type=lora"])],
    ids=["mistral3", "llama4", "deepseek_v4"],
)
def test_text_trains_on_it_after_a_check(
    make: Any, keys: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The check names what is trained, and the vision part keeps its bits."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    model = save(make, tmp_path / "model")
    data = small_run.write_data(tmp_path / "data")
    recipe = small_run.write_recipe(tmp_path, model, dataset="counting", dataset_dir=str(data), save_strategy="no")
    assert main(["--check", str(recipe), *keys]) == 0
    checked = capsys.readouterr()
    assert "Traceback" not in checked.out + checked.err
    assert main([str(recipe), *keys, "max_steps=2"]) == 0
    assert len([line for line in read_lines(tmp_path / "run" / "trainer_log.jsonl") if "loss" in line]) == 2
    if make is not mistral3:
        return
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "run"))
    vision = [name for name in before if re.search("vision|projector", name)]
    assert vision and all(torch.equal(before[name], after[name]) for name in vision)


@pytest.mark.slow
@pytest.mark.parametrize("make", [gemma3, glm_moe_dsa], ids=["gemma3", "glm_moe_dsa"])
def test_two_processes_train_a_model_with_weights_that_text_never_reaches(make: Any, tmp_path: Path) -> None:
    """DDP stops at trained weights without a gradient; here they are frozen."""
    model = save(make, tmp_path / "model")
    data = small_run.write_data(tmp_path / "data")
    recipe = small_run.write_recipe(tmp_path, model, dataset="counting", dataset_dir=str(data), save_strategy="no")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "arpo_trl"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([*launch, str(recipe)], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len([line for line in read_lines(tmp_path / "run" / "trainer_log.jsonl") if "loss" in line]) == 4
    total, trained = re.search(r"([\d,]+) parameters, ([\d,]+) trained", done.stdout).groups()  # type: ignore[union-attr]
    assert int(trained.replace(",", "")) < int(total.replace(",", ""))
