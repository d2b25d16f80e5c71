"""Make the small models that `check_servers.py` serves, each with another chat template, and those of SmolLM2-135M."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import make_tiny_model
import torch
import yaml
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, Qwen2Config, Qwen3Config

from arpo_trl.__main__ import main as arpo_trl
from arpo_trl.data.tokenizer import shipped_template

TRL = Path(str(find_spec("trl").origin)).with_name("chat_templates")  # type: ignore[union-attr]
LLAMA_TOKENS = "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|python_tag|>".split()
BASES: dict[str, tuple[type[Any], str, str, str | None]] = {
    "qwen": (Qwen2Config, shipped_template("qwen"), "<|im_end|>", None),
    "qwen3": (Qwen3Config, (TRL / "qwen3.jinja").read_text("utf-8"), "<|im_end|>", None),
    "llama": (LlamaConfig, (TRL / "llama3_2.jinja").read_text("utf-8"), "<|eot_id|>", "<|begin_of_text|>"),
}


def make_base(folder: Path) -> None:
    """Save a model with random weights, named by its chat template."""
    config, template, eos, bos = BASES[folder.name]
    tokenizer = make_tiny_model.train_tokenizer(make_tiny_model.TOY_DATA, rows=200, vocab_size=1024)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in LLAMA_TOKENS])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    values = {"eos_token": eos, "pad_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(values | ({"bos_token": bos} if bos else {})), "utf-8")
    saved = AutoTokenizer.from_pretrained(folder)
    ids = {"eos_token_id": saved.eos_token_id, "bos_token_id": saved.bos_token_id, "pad_token_id": saved.pad_token_id}
    size: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 32}
    size |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8192, "rms_norm_eps": 1e-6}
    size |= {"vocab_size": -(-len(saved) // 64) * 64, "tie_word_embeddings": True}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**size, **ids))
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)


def write_rows(folder: Path) -> None:
    """Write 40 rows: half have tools, of which half end with a call; half have a system message."""
    number = {"type": "number"}
    parameters = {"type": "object", "properties": {"a": number, "b": number}}
    tools = [{"name": "add", "description": "Add two numbers.", "parameters": parameters}]
    rows: list[dict[str, Any]] = []
    for n in range(40):
        call = {"type": "function", "function": {"name": "add", "arguments": {"a": n, "b": n + 1}}}
        system = [{"role": "system", "content": f"You are clerk {n}."}] if n % 2 else []
        ask, reply = f"Add {n} and {n + 1}.", {"role": "assistant", "content": f"It is {2 * n + 1}."}
        with_call = [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": f"{2 * n + 1}"},
        ]
        more = [{"role": "user", "content": "And twice?"}, {"role": "assistant", "content": f"Then {4 * n + 2}."}]
        turns = {0: with_call[:1], 1: [*with_call, reply]}.get(n % 4, [reply, *more])
        row = {"messages": [*system, {"role": "user", "content": ask}, *turns]}
        rows.append(row | ({"tools": tools} if n % 4 < 2 else {}))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    info = {"file_name": "d.jsonl", "formatting": "openai", "columns": {"messages": "messages", "tools": "tools"}}
    (folder / "dataset_info.json").write_text(json.dumps({"d": info}), encoding="utf-8")


def train(base: Path, folder: Path, **keys: Any) -> None:
    """Train a model until it knows the rows by heart, so that its replies hold calls and end."""
    recipe = {"model_name_or_path": str(base), "output_dir": str(folder), "do_train": True, "finetuning_type": "full"}
    recipe |= {"dataset": "d", "dataset_dir": str(folder.parent / "data"), "report_to": "none", "save_strategy": "no"}
    recipe |= {"per_device_train_batch_size": 20, "max_steps": 200, "learning_rate": 5e-3, "preflight": False}
    recipe |= {"use_cpu": True, "lr_scheduler_type": "cosine", "logging_steps": 50, **keys}
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    run([str(path)])


def run(arguments: list[str]) -> None:
    if arpo_trl(arguments):
        raise SystemExit(f"failed: arpo-trl {' '.join(arguments)}")


def make_adapter(folder: Path, trained: Path) -> None:
    """Save an adapter that is as large as its base of 16 layers."""
    tokenizer, base = AutoTokenizer.from_pretrained(trained), folder.with_name("adapter_base")
    make_tiny_model.make_model(tokenizer.backend_tokenizer, 128, 16, 0).float().save_pretrained(base)
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(str(folder))
    tokenizer.save_pretrained(folder)
    for name in ("serving_check.jsonl", "generation_config.json"):
        shutil.copy(trained / name, folder)


def prepare(folder: Path, smollm2: Path) -> Path:
    """Make a model, and what it is made from, unless it exists."""
    home, name, toy = folder.parent, folder.name, str(make_tiny_model.TOY_DATA.parents[1])
    if (folder / "config.json").exists() or (folder / "adapter_config.json").exists():
        return folder
    few = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 2e-4, "cutoff_len": 384}
    few |= {"disable_gradient_checkpointing": True}
    if name in BASES:
        make_base(folder)
    elif name == "adapter":
        make_adapter(folder, prepare(home / "t_qwen", smollm2))
    elif name in ("adapter_float16", "merged"):
        source = prepare(home / {"merged": "lora"}.get(name, "adapter"), smollm2)
        run(["merge", str(source), str(folder), "--dtype", "float32" if name == "merged" else "float16"])
    elif name == "full":  # of the toy rows, with the template of SmolLM2
        train(smollm2, folder, **few, dataset="arpo_sft_toy", dataset_dir=toy, max_samples=188, max_dropped=1.0)
    elif name == "lora":  # with tools in the template, and rows that have them
        train(smollm2, folder, **few | {"learning_rate": 1e-3}, finetuning_type="lora", lora_rank=16, template="qwen")
    else:
        base = prepare(home / name.removeprefix("t_").replace("system", "qwen").replace("nothink", "qwen3"), smollm2)
        own: dict[str, Any] = {"t_system": {"default_system": "You are a clerk who counts."}}.get(name, {})
        # Qwen3's template drops the reasoning of earlier turns, which is a difference otherwise.
        own |= {"mask_history": True} if base.name == "qwen3" else {}
        train(base, folder, **own, **({"enable_thinking": False} if name == "t_nothink" else {}))
    return folder
