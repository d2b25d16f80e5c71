"""Faults planted in the prompts of each template that LLaMA-Factory or TRL has: the cause that is reported first is the fault."""

from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
from check_servers import NO_SYSTEM, WITH_SYSTEM, head
from served_models import TRL
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from arpo_trl.data.saved_folder import PromptCheck, PromptComparison
from arpo_trl.data.serving_rows import built_in_rows, render
from arpo_trl.data.tokenizer import shipped_template
from arpo_trl.errors import RecipeError
from arpo_trl.recipe.llamafactory import SHIPPED

TEMPLATES = {name: shipped_template(name) for name in sorted(SHIPPED)}
TEMPLATES |= {path.name: path.read_text(encoding="utf-8") for path in sorted(TRL.glob("*.jinja"))}
# One BOS, or one default system prompt, may be all in which two templates differ.
OTHER = {"chat template", "BOS added", "BOS missing", "default system prompt"}
FAULTS: dict[str, tuple[Callable[[str], str], set[str]]] = {
    "no system message": (head(NO_SYSTEM), {"chat template"}),
    "a default system message": (head(WITH_SYSTEM), {"default system prompt"}),
    "no tools": (head("{%- set tools = none %}"), {"tools", "chat template"}),
    "no generation prompt": (head("{%- set add_generation_prompt = false %}"), {"chat template"}),
    "one BOS more": (head("{{- bos_token }}"), {"BOS added", "BOS twice"}),
    "two BOS": (head("{{- bos_token }}{{- bos_token }}"), {"BOS twice"}),
    "a new line at the end": (lambda jinja: jinja + "{{- '\\n' }}", {"chat template"}),
    "another date": (head("{%- set date_string = '01 Jan 2020' %}"), {"date"}),
    "no thinking": (
        head("{%- set enable_thinking = false %}"),
        {"thinking switch", "reasoning of earlier turns"},
    ),
    "the template zephyr": (lambda _: TEMPLATES["zephyr"], OTHER),
    "the template lfm2": (lambda _: TEMPLATES["lfm2.jinja"], OTHER),
    "the template phi3": (lambda _: TEMPLATES["phi3.jinja"], OTHER),
}
# Their own default system prompt is replaced, and has no spaces between words.
OTHER_DEFAULT = {("telechat2", "a default system message"), ("xuanyuan", "a default system message")}


def tokenizer_of(jinja: str, base: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer with this template, and with the marks in it as special tokens."""
    tokenizer: Any = deepcopy(base)
    found = re.findall(r"<[|\w/][^<>\s'\"]{1,40}>|\[/?[A-Z_]+\]|<｜[^｜]+｜>", jinja)
    marks = [mark for mark in dict.fromkeys(found) if not re.search("think|tool", mark.lower())]
    tokenizer.add_tokens([AddedToken(mark, normalized=False, special=True) for mark in (*marks, "<BOS>", "</s>")])
    tokenizer.bos_token, tokenizer.chat_template = "<BOS>", jinja
    known = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>", "<|END_OF_TURN_TOKEN|>", "<|end_of_text|>")
    ends = [mark for mark in marks if re.search("end|eot|eos|END|EOS", mark)]
    tokenizer.eos_token = next((mark for mark in (*known, *ends) if mark in jinja), "</s>")
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_fault_in_the_prompts_of_a_template_is_named(name: str, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = tokenizer_of(TEMPLATES[name], tiny_tokenizer)
    try:
        rows = built_in_rows(tokenizer, 10)
    except RecipeError as error:
        pytest.skip(f"can't be rendered: {error}")
    if not rows:
        pytest.skip("renders no built-in conversation")
    compare = PromptComparison(tokenizer)
    planted = 0
    for fault, (change, causes) in FAULTS.items():
        jinja = change(TEMPLATES[name])
        served = [render(compare.ask(row)._replace(chat_template=jinja), tokenizer) for row in rows]
        if None in served or served == [row.text for row in rows]:
            continue
        planted += 1
        check, compare.others = PromptCheck(), []
        for row, text in zip(rows, served):
            compare.add(check, row, text, None)
        compare.unite(check)
        expected = causes | ({"chat template"} if (name, fault) in OTHER_DEFAULT else set())
        assert check.differences[0].cause in expected, (fault, *map(str, check.differences))
    assert planted >= 5
