"""Compare chat templates with what LLaMA-Factory's write and train, and write the table of docs/reference/templates.md.

    python scripts/compare_templates.py

Each of LLaMA-Factory's text templates is there with four conversations (tests/golden/templates.json): one turn, two turns
and a system message, thoughts, and a tool call with its result. A template is equal on one if it is cut into the same
contexts and replies, character by character, and the same of them carry loss. The model families' own templates are
those that TRL ships. Exit code 1 if a shipped template differs.
"""

from __future__ import annotations

import json
import re
import sys
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from arpo_trl.data.labels import ExampleConfig, carry_loss
from arpo_trl.data.messages import Conversation, Message
from arpo_trl.data.segments import to_segments
from arpo_trl.data.shipped_templates import shipped_template
from arpo_trl.data.template import find_template
from arpo_trl.errors import RecipeError, RowError
from arpo_trl.recipe.llamafactory import SHIPPED

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs" / "reference" / "templates.md"
GOLDEN = json.loads((ROOT / "tests" / "golden" / "templates.json").read_text(encoding="utf-8"))
DAY = date(2026, 11, 25)  # on which LLaMA-Factory wrote its dated prompt for tools

# The families that have a template of that name, and TRL's file with theirs.
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

WRITTEN_EOS = ("<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>")  # by name, in DeepSeek's templates and in Cohere's


def make_tokenizer(*special: str, chat_template: Any) -> PreTrainedTokenizerBase:
    """Every byte is a token; bos and eos are <s> and </s>."""
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
    """What looks like a special token in a text."""
    return sorted(set(re.findall(r"<[|｜][^<>\s]+?[|｜]?>|<[a-z_]+\|>|<\w+_of_\w+>|<eod>", text)))


def conversation(name: str) -> Conversation:
    """LLaMA-Factory's form of a conversation in ours."""
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
    """Golden pairs of context and reply as segments, with this tokenizer's tokens."""
    return [text.replace("{bos}", "<s>").replace("{eos}", eos) for pair in pairs for text in pair]


def count_equal(name: str, chat_template: str) -> int:
    """Of the four conversations, how many a template writes and trains as LLaMA-Factory's of that name does."""
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
        trained = carry_loss(segments, ExampleConfig(1 << 20))
        same = [segment.text for segment in segments] == golden_texts(expected, eos)
        equal += same and trained == [False, True] * len(expected)
    return equal


def table() -> list[str]:
    """A line for each of LLaMA-Factory 0.9.5's names of text templates."""
    lines = ["| name | here | with `template` left out |", "|---|---|---|"]
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


def main() -> int:
    lines = table()
    text = DOCS.read_text(encoding="utf-8")
    before, _, after = text.partition(lines[0])
    DOCS.write_text("\n".join([before + lines[0], *lines[1:]]) + after[after.index("\n\n") :], encoding="utf-8")
    shipped = [line for line in lines if "shipped: " in line]
    equal = sum(int(line.partition("shipped: ")[2].split()[0]) for line in shipped)
    print(f"{equal} of {4 * len(shipped)} conversations equal, {len(shipped)} shipped templates; wrote {DOCS}")
    return int(equal != 4 * len(shipped))


if __name__ == "__main__":
    sys.exit(main())
