"""Train a small random model of each text family of transformers, for the table of docs/reference/architectures.md.

    python scripts/architectures.py                   print the table
    python scripts/architectures.py --write           and write it into docs/reference/architectures.md
    python scripts/architectures.py llama gpt_oss     some families only

Every cell is a run of two steps, from a recipe to the saved model. About five minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import make_tiny_model
import torch
import transformers
import yaml
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from arpo_trl.data.prepare import prepare_datasets
from arpo_trl.data.tokenizer import load_template
from arpo_trl.errors import RecipeError
from arpo_trl.recipe import read_recipe
from arpo_trl.report.console import silence_libraries
from arpo_trl.run_folder import read_lines
from arpo_trl.training.train import train

DOCS = Path(__file__).parents[1] / "docs" / "reference" / "architectures.md"
COLUMNS = ("family", "model", "full", "LoRA", "padding_free", "packing", "balancing loss")

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
BLOCKS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"num_key_value_heads": 4, "moe_intermediate_size": 64, "q_lora_rank": 32, "kv_lora_rank": 16}
LATENT |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
NARROW = {"head_dim": 16}
SLIDING = {"sliding_window": 16}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16}

FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": BASE | NARROW | SLIDING | EXPERTS | {"moe_intermediate_size": 64, "num_dense_layers": 1},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "cohere2": BASE | SLIDING,
    "deepseek_v2": BASE | ROUTED | LATENT | {"n_shared_experts": 1},
    "deepseek_v3": BASE | ROUTED | LATENT,
    "ernie4_5": BASE | NARROW,
    "ernie4_5_moe": BASE | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64},
    "exaone4": BASE,
    "falcon": BLOCKS | {"alibi": False, "new_decoder_architecture": False},
    "falcon_h1": BASE | MAMBA | {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "gemma2": BASE | NARROW | SLIDING | {"query_pre_attn_scalar": 16},
    "gemma3_text": BASE
    | NARROW
    | SLIDING
    | {"query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "glm4": BASE | NARROW,
    "glm4_moe": BASE | NARROW | ROUTED | {"moe_intermediate_size": 64},
    "gpt2": {
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 512,
    },
    "gpt_neox": BLOCKS | {"intermediate_size": 128},
    "gpt_oss": BASE | NARROW | SLIDING | LOCAL | {"router_aux_loss_coef": 0.9},
    "granite": BASE,
    "granitemoe": BASE | LOCAL,
    "granitemoehybrid": BASE
    | MAMBA
    | LOCAL
    | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 64, "position_embedding_type": "rope"},
    "hunyuan_v1_dense": BASE | NARROW,
    "jamba": BASE
    | {"num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False}
    | {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": BASE | {"layer_types": ["conv", "full_attention"]},
    "llama": BASE,
    "llama4_text": BASE
    | NARROW
    | {"intermediate_size": 64, "intermediate_size_mlp": 128, "num_local_experts": 4, "num_experts_per_tok": 1}
    | {"attention_chunk_size": 16},
    "mamba2": {"hidden_size": 64, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "state_size": 16}
    | {"n_groups": 1, "chunk_size": 16},
    "minimax": BASE | NARROW | LOCAL | {"layer_types": ["full_attention", "linear_attention"], "block_size": 16},
    "mistral": BASE | SLIDING,
    "mixtral": BASE | LOCAL,
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
    "nemotron": BASE,
    "olmo2": BASE,
    "olmoe": BASE | EXPERTS,
    "opt": BLOCKS | {"dropout": 0.0, "ffn_dim": 128, "max_position_embeddings": 512, "word_embed_proj_dim": 64},
    "phi3": BASE,
    "phimoe": BASE | LOCAL | {"router_jitter_noise": 0.0, "input_jitter_noise": 0.0},
    "qwen2": BASE,
    "qwen2_moe": BASE | EXPERTS | {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
    "qwen3": BASE | NARROW,
    "qwen3_moe": BASE | NARROW | EXPERTS | {"moe_intermediate_size": 64},
    "qwen3_next": BASE
    | NARROW
    | EXPERTS
    | {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    | {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    | {"layer_types": ["linear_attention", "full_attention"]},
    "seed_oss": BASE | NARROW | {"residual_dropout": 0.0, "attention_dropout": 0.0},
    "smollm3": BASE,
    "stablelm": BASE,
    "starcoder2": BASE,
}


def measure(family: str, folder: Path) -> dict[str, str]:
    """Return a line of the table. `folder` holds the model and its runs."""
    model = make_model(family, folder / "model")
    line = dict.fromkeys(COLUMNS, "-") | {"family": family, "model": type(model).__name__}
    rows = write_rows(folder / "data")
    expected = plain_loss(folder, rows)
    line["full"] = describe(loss := first_loss(folder, rows), expected)
    if isinstance(loss, float):
        line["full"] += loads_and_generates(folder / "run")
    line["LoRA"] = describe(first_loss(folder, rows, finetuning_type="lora"), expected)
    for key in ("padding_free", "packing"):
        line[key] = describe(first_loss(folder, rows, **{key: True}), expected)
    if hasattr(model.config.get_text_config(), "router_aux_loss_coef"):
        loss = first_loss(folder, rows, moe_aux_loss_coef=10.0)
        line["balancing loss"] = loss if isinstance(loss, str) else "added" if loss > expected + 0.1 else "not added"
    return line


def make_model(family: str, folder: Path) -> Any:
    """Return a float32 model of two layers, saved with the tests' tokenizer."""
    tokenizer = make_tiny_model.train_tokenizer(make_tiny_model.TOY_DATA, rows=200, vocab_size=1024)
    make_tiny_model.save(tokenizer, make_tiny_model.make_model(tokenizer, hidden_size=64, layers=1, seed=0), folder)
    torch.manual_seed(0)
    ends = {name: tokenizer.token_to_id("<|endoftext|>") for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = transformers.AutoConfig.for_model(family, vocab_size=1088, **ends, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).float()
    model.save_pretrained(folder)
    return model


def write_rows(folder: Path) -> Path:
    folder.mkdir()
    rows = [{"instruction": f"count to {n}", "output": " ".join(map(str, range(n)))} for n in (9, 4, 14, 6)]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}), encoding="utf-8")
    return folder


def write_recipe(folder: Path, rows: Path, **keys: Any) -> Path:
    values = {
        "model_name_or_path": str(folder / "model"),
        "dataset_dir": str(rows),
        "dataset": "rows",
        "template": "qwen",
        "output_dir": str(folder / "run"),
        "overwrite_output_dir": True,
        "do_train": True,
        "finetuning_type": "full",
        "cutoff_len": 512,
        "per_device_train_batch_size": 1 if "packing" in keys else 4,
        "disable_shuffling": True,
        "max_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values | keys), encoding="utf-8")
    return path


def plain_loss(folder: Path, rows: Path) -> float:
    """Return the cross-entropy over all labelled tokens, row by row, in plain PyTorch."""
    recipe = read_recipe(write_recipe(folder, rows))
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    total = torch.zeros(2)
    for row in prepare_datasets(recipe, load_template(recipe)).train:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total += torch.stack([functional.cross_entropy(logits, labels, reduction="sum"), (labels != -100).sum()])
    return float(total[0] / total[1])


def first_loss(folder: Path, rows: Path, **keys: Any) -> float | str:
    """Return the logged loss of step 1, or "not supported"."""
    try:
        train(read_recipe(write_recipe(folder, rows, **keys)))
    except RecipeError as error:
        print(error)
        return "not supported"
    except Exception as error:  # reported in the table; the run's training.log has the traceback
        print(f"{type(error).__name__}: {error}")
        return "fails"
    return float(read_lines(folder / "run" / "trainer_log.jsonl")[0]["loss"])


def describe(loss: float | str, expected: float) -> str:
    return loss if isinstance(loss, str) else "exact" if abs(loss - expected) < 1e-4 else f"{loss - expected:+.1e}"


def loads_and_generates(folder: Path) -> str:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids = AutoTokenizer.from_pretrained(folder)("count to 3", return_tensors="pt").input_ids
    found = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return "" if found.shape[1] == ids.shape[1] + 4 else ", does not generate"


def table(lines: list[dict[str, str]]) -> str:
    head = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join([*head, *("| " + " | ".join(line[column] for column in COLUMNS) + " |" for line in lines)])


def read_table(text: str) -> dict[str, dict[str, str]]:
    """Return the table of a document, by family."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in cells[2:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help=f"some of {', '.join(FAMILIES)}")
    parser.add_argument("--write", action="store_true", help="write the table into docs/reference/architectures.md")
    args = parser.parse_args()
    silence_libraries()
    lines = []
    for family in args.families or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(measure(family, Path(folder)))
        print(table(lines[-1:]).splitlines()[-1], flush=True)
    if args.write:
        text = DOCS.read_text(encoding="utf-8")
        known = read_table(text) | {line["family"]: line for line in lines}
        DOCS.write_text(text[: text.index("| family")] + table(list(known.values())) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
