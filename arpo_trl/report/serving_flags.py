"""The flags that a server needs for a chat template's tool calls and reasoning, from one table: serving_flags.toml."""

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..data.messages import Message
from ..data.template import Template
from ..data.template_probe import ASK, CALLS, TOOL, find_template
from ..errors import RecipeError, RowError

_TABLE: dict[str, Any] = tomllib.loads(
    files("arpo_trl.report").joinpath("serving_flags.toml").read_text(encoding="utf-8")
)
_CALL_NAME = "search"


class ServingFlags(NamedTuple):
    """What servers are started with for one template. `calls`, `reasoning`: the formats' names, "" if it has none."""

    calls: str = ""
    reasoning: str = ""
    vllm: str = ""
    sglang: str = ""


def serving_flags(template: Template) -> ServingFlags:
    """Return the flags of vLLM and SGLang for a template's tool calls and reasoning."""
    calls = _find("calls", written_call(template))
    reasoning = _find("reasoning", template.jinja) if template.supports_thinking else {}
    vllm = [f"--enable-auto-tool-choice --tool-call-parser {calls['vllm']}"] if "vllm" in calls else []
    vllm += [f"--reasoning-parser {reasoning['vllm']}"] if "vllm" in reasoning else []
    sglang = [f"--tool-call-parser {calls['sglang']}"] if "sglang" in calls else []
    sglang += [f"--reasoning-parser {reasoning['sglang']}"] if "sglang" in reasoning else []
    return ServingFlags(calls.get("name", ""), reasoning.get("name", ""), " ".join(vllm), " ".join(sglang))


def serving_commands(folder: Path, names: dict[str, str], is_adapter: bool) -> list[str]:
    """Return a line of Markdown for each server: its start command for a saved folder, and whether it was run.

    `names`: what the commands name (model, folder, base, name). Servers that can also serve an adapter without merging.
    """
    flags = flags_of_folder(folder)
    lines = []
    for kind, server in _TABLE["servers"].items():
        own = getattr(flags, kind, "")
        values = names | {"flags": f" {own}" if own else ""}
        line = f"- {server['title']}: {server['command'].format(**values)}"
        if is_adapter and "adapter" in server:
            line += f", or without merging {server['adapter'].format(**values)}"
        lines.append(f"{line} ({'tested: ' + server['tested'] if 'tested' in server else 'untested'})")
    return lines


def flags_of_folder(folder: Path) -> ServingFlags:
    """Return the flags for a saved folder; none if it has no chat template that can be rendered."""
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        return serving_flags(find_template(tokenizer)) if tokenizer.chat_template else ServingFlags()
    except (OSError, ValueError, RecipeError):
        return ServingFlags()


def _find(kind: str, text: str) -> dict[str, str]:
    entries: list[dict[str, str]] = _TABLE[kind]
    return next((entry for entry in entries if entry["writes"] in text), {}) if text else {}


def written_call(template: Template) -> str:
    """Return how a template writes a reply that is one call, after the generation prompt; "" if it writes none."""
    calls: Message = {**CALLS, "tool_calls": [{"id": "a1B2c3D4e", **CALLS["tool_calls"][0]}]}
    try:
        prompt = template.render([ASK], [TOOL], True)
        text = template.render([ASK, calls], [TOOL], False)
    except RowError:
        return ""
    written = text[len(prompt) :] if text.startswith(prompt) else text.rpartition(ASK["content"])[2]
    return written if _CALL_NAME in written else ""


def call_mark(template: Template) -> str:
    """Return the text that opens a call, before the function's name; "" if the template writes no calls."""
    before, name, _ = written_call(template).partition(_CALL_NAME)
    return before.removesuffix('{"name": "').strip() or before if name else ""
