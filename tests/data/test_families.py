"""One recipe for other families: the right text is trained, and the model is saved, read back and generates."""

from __future__ import annotations

import copy
import json
import signal
from collections.abc import Iterator
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerBase,
    Qwen3Config,
)

from arpo_trl.data.prepare import prepare_datasets
from arpo_trl.data.tokenizer import load_template
from arpo_trl.recipe import read_recipe
from arpo_trl.training.train import train

# As mistralai/Mistral-7B-Instruct-v0.2 has it; TRL 1.16 ships none of Mistral's.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
NO_THOUGHT = "<think>\n\n</think>\n\n"


class Family(NamedTuple):
    config: Any
    template: str
    bos: str | None
    eos: str  # what the base model's own config calls its end
    tokens: list[str]
    trained: list[str]  # the text under the labels, reply by reply


SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
GEMMA = SMALL | {"head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16}
GEMMA_TOKENS = ["<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"]
FAMILIES = {
    "llama3": Family(
        LlamaConfig(**SMALL),
        "llama3.jinja",
        "<|begin_of_text|>",
        "<|end_of_text|>",
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        ["Four.<|eot_id|>", "Nine, I think.<|eot_id|>"],
    ),
    "mistral": Family(
        MistralConfig(**SMALL, sliding_window=64),
        MISTRAL,
        "<s>",
        "</s>",
        ["<s>", "</s>"],
        [" Four.</s>", " Nine, I think.</s>"],
    ),
    "qwen3": Family(
        Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
        "qwen3.jinja",
        None,
        "<|im_end|>",
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        [f"{NO_THOUGHT}Four.<|im_end|>\n", f"{NO_THOUGHT}Nine, I think.<|im_end|>\n"],
    ),
    "gemma2": Family(
        Gemma2Config(**GEMMA, final_logit_softcapping=30.0, attn_logit_softcapping=50.0),
        "gemma.jinja",
        "<bos>",
        "<eos>",
        GEMMA_TOKENS,
        ["Four.<end_of_turn>\n", "Nine, I think.<end_of_turn>\n"],
    ),
    "gemma3": Family(
        Gemma3TextConfig(**GEMMA),
        "gemma3.jinja",
        "<bos>",
        "<eos>",
        GEMMA_TOKENS,
        ["Four.<end_of_turn>\n", "Nine, I think.<end_of_turn>\n"],
    ),
    "phi3": Family(
        Phi3Config(**SMALL, pad_token_id=0),
        "phi3.jinja",
        "<s>",
        "<|endoftext|>",
        ["<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        ["Four.<|end|>\n", "Nine, I think.<|end|>\n"],
    ),
}
TURNS = [("human", "What is 2 + 2?"), ("gpt", "Four."), ("human", "And 3 * 3?"), ("gpt", "Nine, I think.")]


def write_base(folder: Path, family: Family, tokenizer: PreTrainedTokenizerBase) -> None:
    """A model folder of the family: random weights in bfloat16, its special tokens, its chat template."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": family.tokens})
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = family.bos, family.eos, None
    jinja = family.template
    if jinja.endswith(".jinja"):
        jinja = files("trl").joinpath("chat_templates", jinja).read_text(encoding="utf-8")
    tokenizer.chat_template = jinja
    config = copy.deepcopy(family.config)
    config.vocab_size = -(-len(tokenizer) // 64) * 64
    config.eos_token_id, config.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Put back the signal handlers that a run replaces."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_on_its_replies_and_generates(
    name: str, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    family = FAMILIES[name]
    write_base(tmp_path / "base", family, tiny_tokenizer)
    rows = [{"conversations": [{"from": who, "value": text} for who, text in TURNS]}] * 4
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    registry = {"rows": {"file_name": "rows.json", "formatting": "sharegpt"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(registry), encoding="utf-8")
    keys = {
        "model_name_or_path": str(tmp_path / "base"),
        "output_dir": str(tmp_path / "run"),
        "do_train": True,
        "finetuning_type": "full",
        "dataset_dir": str(tmp_path),
        "dataset": "rows",
        "cutoff_len": 256,
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-3,
        "max_steps": 80,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    (tmp_path / "given.yaml").write_text(json.dumps(keys), encoding="utf-8")
    recipe = read_recipe(tmp_path / "given.yaml")

    data = prepare_datasets(recipe, load_template(recipe))
    tokenizer, row = data.template.tokenizer, data.train[0]
    runs = groupby(zip(row["input_ids"], row["labels"], strict=True), lambda pair: pair[1] != -100)
    replies = [tokenizer.decode([token for token, _ in run]) for trained, run in runs if trained]
    assert replies == family.trained
    assert tokenizer.decode(row["input_ids"]).count(family.bos or "\0") == (family.bos is not None and name != "phi3")

    assert train(recipe).exit_code == 0
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in ("base", "run"))
    assert after.dtype == torch.bfloat16
    assert any(not torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))

    saved = AutoTokenizer.from_pretrained(tmp_path / "run")
    end = saved.convert_tokens_to_ids(saved.eos_token)
    stops = after.generation_config.eos_token_id
    assert end in (stops if isinstance(stops, list) else [stops])
    asked = saved.apply_chat_template(
        [{"role": "user", "content": "What is 2 + 2?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    (written,) = after.generate(**asked, max_new_tokens=64, do_sample=False, pad_token_id=end)
    answer = saved.decode(written[asked["input_ids"].shape[1] :])
    assert answer == family.trained[0].rstrip()  # as trained, and nothing after its end
