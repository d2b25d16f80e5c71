"""Recipes written for LLaMA-Factory, down to the tokens that their first rows train.

Each is read as it is; only the model (a tokenizer with its template's tokens, made here), the data and the output folder
are others. What each template writes is held against LLaMA-Factory in test_template.py.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from compare_templates import make_tokenizer, tokens_of
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

from arpo_trl.__main__ import main
from arpo_trl.data.labels import IGNORED
from arpo_trl.data.prepare import prepare_datasets
from arpo_trl.data.shipped_templates import shipped_template
from arpo_trl.data.tokenizer import load_tokenizer
from arpo_trl.errors import RecipeError
from arpo_trl.recipe import read_recipe
from arpo_trl.run.requirements import check_packages

FIXTURES = sorted((Path(__file__).parents[1] / "recipe" / "fixtures").rglob("*.yaml"))
WORDS = "red green blue grey pink".split()
LLAMA3 = (
    "<s><|start_header_id|>user<|end_header_id|>\n\nSay red.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "<|eot_id|>",
)
QWEN = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nSay red.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|>\n",
)
PLAIN = QWEN[0].partition("<|im_end|>\n")[2]
# What stands before the first row's reply, and what ends a reply
EXPECTED = {
    "llama3": LLAMA3,
    "qwen": QWEN,
    "qwen3": (PLAIN, "<|im_end|>\n"),
    "qwen3_nothink": (PLAIN, "<|im_end|>\n"),
    "chatml": (PLAIN, "<|im_end|>\n"),
    "default": ("Human: Say red.</s>\nAssistant:", "</s>\n"),
    "mistral": ("<s>[INST] Say red.[/INST]", "</s>"),
    "gemma": ("<s><start_of_turn>user\nSay red.<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>\n"),
}
BEFORE_THE_TEXT = {"qwen3": "<think>\n\n</think>\n\n", "mistral": " "}
CASES = [(path, yaml.safe_load(path.read_text(encoding="utf-8")).get("template", "")) for path in FIXTURES]
CASES += [(FIXTURES[0], template) for template in EXPECTED]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in; the signal handlers that a run replaces are put back."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield tmp_path
    for number, handler in before.items():
        signal.signal(number, handler)


def write_inputs(path: Path, template: str, place: Path) -> tuple[list[dict[str, str]], list[str]]:
    """The model's tokenizer and the rows of all of the recipe's datasets; returns these, and what the recipe is given."""
    jinja = shipped_template(template)
    special = [token for token in tokens_of(jinja) if token not in ("<|eom_id|>",)]
    make_tokenizer(*special, chat_template=jinja).save_pretrained(place / "model")
    (place / "data").mkdir()
    rows, registry = [], {}
    for name in read_recipe(path).dataset:
        own = [{"instruction": f"Say {word}.", "input": "", "output": f"{word}, says {name}."} for word in WORDS]
        (place / "data" / f"{name}.json").write_text(json.dumps(own), encoding="utf-8")
        registry[name] = {"file_name": f"{name}.json"}
        rows += own
    (place / "data" / "dataset_info.json").write_text(json.dumps(registry), encoding="utf-8")
    named = {"model_name_or_path": "model", "dataset_dir": "data", "output_dir": "out", "template": template}
    return rows, [f"{key}={value}" for key, value in named.items()]


@pytest.mark.parametrize(("path", "template"), CASES, ids=[f"{path.stem}-{template}" for path, template in CASES])
def test_a_recipe_of_llama_factorys_trains_these_tokens(path: Path, template: str, place: Path) -> None:
    rows, given = write_inputs(path, template, place)
    recipe = read_recipe(path, given)
    tokenizer = load_tokenizer(recipe)
    data = prepare_datasets(recipe, tokenizer)
    found = []
    for row in (*data.train, *(row for held_out in data.eval.values() for row in held_out)):
        pairs = zip(row["input_ids"], row["labels"], strict=True)
        runs = groupby(pairs, lambda pair: pair[1] != IGNORED)
        found.append([(trained, tokenizer.decode([token for token, _ in run])) for trained, run in runs])
    before, end = EXPECTED[template]
    replies = [BEFORE_THE_TEXT.get(template, "") + row["output"] + end for row in rows]
    asked = [before.replace("Say red.", row["instruction"]) for row in rows]
    assert sorted(found) == sorted([[(False, ask), (True, reply)] for ask, reply in zip(asked, replies, strict=True)])


@pytest.mark.slow  # 5 s each
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # its workers, on fewer cores
@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_a_recipe_of_llama_factorys_passes_check_and_trains_two_steps(path: Path, place: Path) -> None:
    """As it is, but for DeepSpeed, which needs GPUs; the model is a tiny one of its family."""
    template = yaml.safe_load(path.read_text(encoding="utf-8"))["template"]
    _, given = write_inputs(path, template, place)
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    kind = Qwen2Config if template == "qwen" else LlamaConfig
    # 512: transformers' Qwen2 tokenizer adds a token for padding.
    config = kind(**sizes, num_key_value_heads=2, vocab_size=512, eos_token_id=tokenizer.eos_token_id)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(place / "model")
    given += ["deepspeed=null", "max_steps=2", "logging_steps=1", "report_to=none"]
    try:
        check_packages(read_recipe(path, given))
    except RecipeError as error:
        pytest.skip(str(error))
    assert main(["--check", str(path), *given]) == 0
    assert main([str(path), *given]) == 0
    assert json.loads((place / "out" / "run.json").read_text(encoding="utf-8"))["status"] == "finished"
    log = [json.loads(line) for line in (place / "out" / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sum("loss" in line for line in log) == 2
