"""Estimate the peak memory of training Qwen2.5 by size and method, with `--check` on the published shapes.

    python scripts/memory_table.py             # the table of README.md, in about a minute; no weights are downloaded

Each cell is the `memory` line of `arpo-trl RECIPE --check` in GB, for one row of 4,096 and of 15,000 tokens a step: bf16,
AdamW, gradient checkpointing (the default), LoRA of rank 8 on all linear layers. The CUDA context (about 0.5 GB) and
the gaps of the allocator are not included.
"""

import argparse
import contextlib
import io
import json
import re
import tempfile
from pathlib import Path

import make_tiny_model
import yaml
from transformers.utils import logging

from arpo_trl.__main__ import main as arpo_trl_main

# The config.json files of https://huggingface.co/Qwen: Qwen2.5-0.5B, -3B and -7B-Instruct.
SHAPES = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    "3B": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16},
    "7B": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "vocab_size": 152_064, "tie_word_embeddings": False},
}
SHARED_KEYS = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32_768,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "dtype": "bfloat16",
}
METHODS = {
    "full": {"finetuning_type": "full"},
    "LoRA": {"finetuning_type": "lora"},
    "QLoRA": {"finetuning_type": "lora", "quantization_bit": 4},
}
LENGTHS = (4096, 15_000)


def table() -> list[str]:
    """Return the lines of the Markdown table."""
    lines = [f"| | {' | '.join(METHODS)} |", "|---" * (len(METHODS) + 1) + "|"]
    for size in SHAPES:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            write_inputs(size, Path(folder))
            peaks = [[estimate(Path(folder), n, **keys) for n in LENGTHS] for keys in METHODS.values()]
        lines.append(f"| Qwen2.5-{size} | {' | '.join(' / '.join(cell) for cell in peaks)} |")
    return lines


def write_inputs(size: str, folder: Path) -> None:
    """Write a model folder without weights (the published shape, the tests' tokenizer) and a row of any length."""
    tokenizer = make_tiny_model.train_tokenizer(make_tiny_model.TOY_DATA, rows=200, vocab_size=1024)
    make_tiny_model.save(tokenizer, make_tiny_model.make_model(tokenizer, 64, 1, seed=0), folder)
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(SHARED_KEYS | SHAPES[size]), encoding="utf-8")
    row = {"instruction": "Count.", "output": " ".join(map(str, range(4000)))}
    (folder / "rows.json").write_text(json.dumps([row]), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}), encoding="utf-8")


def estimate(folder: Path, cutoff_len: int, **keys: object) -> str:
    """Return the peak in GB that `--check` prints for one row of `cutoff_len` tokens a step."""
    recipe = {
        "model_name_or_path": str(folder),
        "do_train": True,
        "dataset_dir": str(folder),
        "dataset": "rows",
        "template": "qwen",
        "cutoff_len": cutoff_len,
        "output_dir": str(folder / "out"),
        "tokenized_path": str(folder / f"encoded-{cutoff_len}"),
        "per_device_train_batch_size": 1,
        "bf16": True,
        "save_strategy": "no",
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | keys), encoding="utf-8")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        arpo_trl_main([str(path), "--check"])
    memory = re.search(r"^memory +about ([\d.]+) GB", output.getvalue(), re.MULTILINE)
    if not memory:
        raise SystemExit(output.getvalue())
    return f"{float(memory[1]):.0f}" if float(memory[1]) >= 10 else memory[1]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(argv)
    logging.disable_progress_bar()
    print(*table(), sep="\n")


if __name__ == "__main__":
    main()
