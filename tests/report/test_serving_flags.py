"""The flags of servers follow from how a chat template writes calls and reasoning, and the model card has them."""

from __future__ import annotations

import json
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from arpo_trl.data.template_probe import find_template
from arpo_trl.data.tokenizer import shipped_template
from arpo_trl.report import serving_flags as module
from arpo_trl.report.serving_flags import call_mark, serving_commands, serving_flags

TRL = Path(str(find_spec("trl") and find_spec("trl").origin)).parent / "chat_templates"  # type: ignore[union-attr]
HERMES = "--enable-auto-tool-choice --tool-call-parser hermes"
EXPECTED = {
    "qwen2_5.jinja": (HERMES, "--tool-call-parser qwen25"),
    "qwen3.jinja": (f"{HERMES} --reasoning-parser qwen3", "--tool-call-parser qwen25 --reasoning-parser qwen3"),
    "qwen3_instruct_2507.jinja": (HERMES, "--tool-call-parser qwen25"),
    "qwen3_5_think.jinja": (
        "--enable-auto-tool-choice --tool-call-parser qwen3_coder --reasoning-parser qwen3",
        "--tool-call-parser qwen3_coder --reasoning-parser qwen3",
    ),
    "llama3_1.jinja": ("--enable-auto-tool-choice --tool-call-parser llama3_json", "--tool-call-parser llama3"),
    "llama3_2.jinja": ("--enable-auto-tool-choice --tool-call-parser llama3_json", "--tool-call-parser llama3"),
    "glm4moe.jinja": (
        "--enable-auto-tool-choice --tool-call-parser glm45 --reasoning-parser glm45",
        "--tool-call-parser glm45 --reasoning-parser glm45",
    ),
    "gptoss.jinja": (
        "--enable-auto-tool-choice --tool-call-parser openai --reasoning-parser openai_gptoss",
        "--tool-call-parser gpt-oss --reasoning-parser gpt-oss",
    ),
    "phi3.jinja": ("", ""),
    "gemma.jinja": ("", ""),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_flags_follow_from_what_a_template_writes(
    name: str, tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", (TRL / name).read_text(encoding="utf-8"))
    flags = serving_flags(find_template(tiny_tokenizer))
    assert (flags.vllm, flags.sglang) == EXPECTED[name]


@pytest.mark.parametrize(
    ("name", "mark"), [("qwen2_5.jinja", "<tool_call>"), ("llama3_1.jinja", '{"name": "'), ("gemma.jinja", "")]
)
def test_the_mark_of_a_call_is_what_stands_before_the_functions_name(
    name: str, mark: str, tiny_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", (TRL / name).read_text(encoding="utf-8"))
    assert call_mark(find_template(tiny_tokenizer)) == mark


def test_each_server_has_its_command_and_says_whether_it_was_run(tiny_model: Path) -> None:
    names = {"model": "out-merged", "folder": "out", "base": "base", "name": "out"}
    vllm, sglang, llama, transformers, ollama = serving_commands(tiny_model, names, is_adapter=True)
    assert f"`vllm serve out-merged {HERMES}`, or without merging `vllm serve base --enable-lora" in vllm
    assert all("(tested: " in line for line in (vllm, llama, transformers))
    assert all("(untested)" in line for line in (sglang, ollama))
    assert "--enable-lora" not in serving_commands(tiny_model, names, is_adapter=False)[0]


def test_every_entry_of_the_table_has_a_name_and_what_the_template_writes() -> None:
    table = tomllib.loads(Path(module.__file__).with_name("serving_flags.toml").read_text(encoding="utf-8"))
    for entry in table["calls"] + table["reasoning"]:
        assert entry.keys() <= {"name", "writes", "vllm", "sglang"}
        assert entry["name"] and entry["writes"] and "vllm" in entry


def test_a_folder_without_a_chat_template_has_no_flags(tmp_path: Path, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert module.flags_of_folder(tmp_path) == module.ServingFlags()
    assert shipped_template("qwen")
