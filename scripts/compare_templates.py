"""Compare chat templates with LLaMA-Factory's, for the table of docs/reference/templates.md.

    python scripts/compare_templates.py            print the table
    python scripts/compare_templates.py --write    and write it into docs/reference/templates.md

tests/golden/templates.json has four conversations as each of LLaMA-Factory's text templates renders them: one turn, two
turns and a system message, reasoning, and a tool call with its result. A template is equal on a conversation if it gives
the same contexts and replies, character by character, and the same of them are trained on. The templates of the model
families are those that TRL ships. Exit code 1 if a shipped template differs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from arpo_trl.data.labels import ExampleConfig, trained_segments
from arpo_trl.data.messages import Conversation, Message
from arpo_trl.data.segments import to_segments
from arpo_trl.data.template_probe import find_template
from arpo_trl.data.tokenizer import shipped_template
from arpo_trl.errors import RecipeError, RowError
from arpo_trl.recipe.llamafactory import SHIPPED

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "reference" / "templates.md"
GOLDEN = json.loads((ROOT / "tests" / "golden" / "templates.json").read_text(encoding="utf-8"))
DAY = date(2026, 11, 25)  # the date in LLaMA-Factory's prompt for tools

# The model families of a template's name, with TRL's file of their template.
FAMILIES = {
    "chatml": {"Qwen2.5": "qwen2_5"},
    "cohere": {"Aya Expanse": "cohere"},
    "deepseek3": {"DeepSeek-V3": "deepseekv3"},
    "deepseekr1": {"R1 distills": "deepseek_r1_distill"},
    "default": {"Qwen2.5": "qwen2_5"},
    "gemma": {"Gemma 1 and 2": "gemma", "Gemma 3": "gemma3"},
    "gemma2": {"Gemma 2": "gemma"},
    "glm4_moe": {"GLM-4.5": "glm4moe"},
    "gpt_oss": {"gpt-oss": "gptoss"},
    "lfm2": {"LFM2": "lfm2_v2"},
    "llama3": {"Llama 3": "llama3", "Llama 3.1": "llama3_1", "Llama 3.2": "llama3_2"},
    "phi": {"Phi-3": "phi3", "Phi-3.5": "phi3_5"},
    "qwen": {"Qwen2.5": "qwen2_5"},
    "qwen3": {"Qwen3": "qwen3", "Qwen3 2507": "qwen3_instruct_2507"},
    "qwen3_5": {"Qwen3.5": "qwen3_5_think"},
    "qwen3_5_nothink": {"Qwen3.5": "qwen3_5_nothink"},
    "qwen3_6": {"Qwen3.6": "qwen3_6"},
    "qwen3_nothink": {"Qwen3 2507": "qwen3_instruct_2507", "Qwen3": "qwen3"},
}

WRITTEN_EOS = ("<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>")  # literal in DeepSeek's and Cohere's templates


def make_tokenizer(*special: str, chat_template: Any) -> PreTrainedTokenizerBase:
    """Return a tokenizer with a token per byte, bos <s> and eos </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = dict.fromkeys(["<s>", "</s>", *special])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in names])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.chat_template = chat_template
    return made


def trl_template(name: str) -> str:
    return files("trl").joinpath("chat_templates", f"{name}.jinja").read_text(encoding="utf-8")


def tokens_of(text: str) -> list[str]:
    """Return what looks like a special token in a text."""
    return sorted(set(re.findall(r"<[|｜][^<>\s]+?[|｜]?>|<[a-z_]+\|>|<\w+_of_\w+>|<eod>", text)))


def conversation(name: str) -> Conversation:
    """Convert a conversation from LLaMA-Factory's form to ours."""
    given = GOLDEN["conversations"][name]
    messages: list[Message] = [{"role": "system", "content": given["system"]}] if given["system"] else []
    for message in given["messages"]:
        if message["role"] == "function":
            call = {"type": "function", "function": json.loads(message["content"])}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        else:
            messages.append({**message, "role": {"observation": "tool"}.get(message["role"], message["role"])})
    tools = json.loads(given["tools"]) if given["tools"] else None
    return Conversation(messages, tools and [{"type": "function", "function": tool} for tool in tools])


def golden_texts(pairs: list[list[str]], eos: str = "</s>") -> list[str]:
    """Return golden pairs of context and reply as segments, with this tokenizer's tokens."""
    return [text.replace("{bos}", "<s>").replace("{eos}", eos) for pair in pairs for text in pair]


def count_equal(name: str, chat_template: str) -> int:
    """Count the conversations (of four) that a template renders and trains on as LLaMA-Factory's of that name does."""
    golden = GOLDEN["templates"][name]
    tokenizer = make_tokenizer(
        *tokens_of(chat_template + json.dumps(golden, ensure_ascii=False)), chat_template=chat_template
    )
    tokenizer.eos_token = next((token for token in WRITTEN_EOS if token in chat_template), "</s>")
    eos = str(tokenizer.eos_token)
    try:
        template = find_template(tokenizer, DAY)
    except RecipeError:
        return 0
    equal = 0
    for kind, expected in golden["conversations"].items():
        try:
            segments = to_segments(template.fit(conversation(kind)), template)
        except RowError:
            continue
        trained = trained_segments(segments, ExampleConfig(1 << 20))
        same = [segment.text for segment in segments] == golden_texts(expected, eos)
        equal += same and trained == [False, True] * len(expected)
    return equal


def table() -> list[str]:
    """Return the table: a line for each of LLaMA-Factory 0.9.5's text templates."""
    lines = ["| name | here | without `template` |", "|---|---|---|"]
    for name in sorted(GOLDEN["names"]):
        here = (
            f"shipped: {count_equal(name, shipped_template(name))} of 4 equal"
            if name in SHIPPED
            else "the tokenizer's own"
        )
        if name in FAMILIES:
            own = {family: count_equal(name, trl_template(file)) for family, file in FAMILIES[name].items()}
            omitted = "; ".join(f"{family}: {equal} of 4 equal" for family, equal in own.items())
        else:
            omitted = "not measured" if name in SHIPPED else "the same"
        lines.append(f"| `{name}` | {here} | {omitted} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table into docs/reference/templates.md")
    options = parser.parse_args(argv)
    lines = table()
    print(*lines, sep="\n")
    if options.write:
        old = re.compile(rf"^{re.escape(lines[0])}\n(\|.*\n)*", re.MULTILINE)
        text = old.sub(lambda _: "\n".join(lines) + "\n", DOCS.read_text(encoding="utf-8"))
        DOCS.write_text(text, encoding="utf-8", newline="\n")
    shipped = [line for line in lines if "shipped: " in line]
    equal = sum(int(line.partition("shipped: ")[2].split()[0]) for line in shipped)
    print(f"{equal} of {4 * len(shipped)} conversations equal, {len(shipped)} shipped templates")
    return int(equal != 4 * len(shipped))


if __name__ == "__main__":
    sys.exit(main())
