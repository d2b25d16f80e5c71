"""LLaMA-Factory's templates as Jinja, put together from the pieces in templates/names.toml."""

from __future__ import annotations

import json
import tomllib
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path


def shipped_template(name: str) -> str:
    """The Jinja text of a template that is shipped under one of LLaMA-Factory's names: TRL's, or one put together.

    The pieces that templates/names.toml has for the name stand in front, then the file of their tools, then frame.jinja.
    Of TRL's files only Qwen2.5's is LLaMA-Factory's text; others (llama3.jinja, qwen3_instruct_2507.jinja) trim it, or
    write tools in another way.

    Raises:
        KeyError: if nothing is shipped under that name.
    """
    if name == "qwen":
        trl = find_spec("trl")  # not imported: that takes seconds
        return Path(str(trl and trl.origin)).with_name("chat_templates").joinpath("qwen2_5.jinja").read_text("utf-8")
    folder = files("arpo_trl.data").joinpath("templates")
    table = tomllib.loads(folder.joinpath("names.toml").read_text(encoding="utf-8"))
    pieces = table[name]
    pieces = table.get(pieces.get("like"), {}) | pieces
    default = {"begin": "", "default_system": "", "result_join": "", "system_inside": False, "tools": "react"}
    default |= {"thought": ["<think>\n", "\n</think>\n\n"], "reasons": "thought" in pieces}
    pieces = default | {"result": pieces["user"], "call": pieces["reply"]} | pieces
    lines = []
    for key, value in pieces.items():
        if isinstance(value, list):
            lines.append(f"{{%- set {key}_start, {key}_end = {_expression(value[0])}, {_expression(value[1])} %}}\n")
        elif key not in ("like", "tools"):
            lines.append(f"{{%- set {key} = {_expression(value)} %}}\n")
    parts = (f"tools_{pieces['tools']}.jinja", "frame.jinja")
    return "".join([*lines, *(folder.joinpath(part).read_text(encoding="utf-8") for part in parts)])


def _expression(piece: str | bool) -> str:
    """A piece as Jinja writes it."""
    text = json.dumps(piece, ensure_ascii=False)
    return text.replace("{bos}", '" ~ bos_token ~ "').replace("{eos}", '" ~ eos_token ~ "')
