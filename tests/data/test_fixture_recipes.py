"""Recipes written for LLaMA-Factory, down to the tokens that their first rows train.

Each is read as it is; only the model (a tokenizer with its template's tokens, made here), the data and the output folder
are others. What each template writes is held against LLaMA-Factory in test_template.py.
"""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

import datasets
import pytest
import yaml
from compare_templates import make_tokenizer, tokens_of

from arpo_trl.data.labels import IGNORED
from arpo_trl.data.prepare import prepare_datasets
from arpo_trl.data.template import shipped_template
from arpo_trl.data.tokenizer import load_tokenizer
from arpo_trl.recipe import read_recipe

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


@pytest.mark.parametrize(("path", "template"), CASES, ids=[f"{path.stem}-{template}" for path, template in CASES])
def test_a_recipe_of_llama_factorys_trains_these_tokens(
    path: Path, template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    jinja = shipped_template(template)
    special = [token for token in tokens_of(jinja) if token not in ("<|eom_id|>",)]
    make_tokenizer(*special, chat_template=jinja).save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    rows, registry = [], {}
    for name in read_recipe(path).dataset:
        own = [{"instruction": f"Say {word}.", "input": "", "output": f"{word}, says {name}."} for word in WORDS]
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(own), encoding="utf-8")
        registry[name] = {"file_name": f"{name}.json"}
        rows += own
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(registry), encoding="utf-8")
    overrides = [
        f"model_name_or_path={tmp_path / 'model'}",
        f"dataset_dir={tmp_path / 'data'}",
        f"template={template}",
    ]
    recipe = read_recipe(path, [*overrides, f"output_dir={tmp_path / 'out'}"])

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
