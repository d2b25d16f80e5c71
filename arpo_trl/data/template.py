"""The chat template in training: which one renders, and what it writes around a reply.

A tokenizer's own template can't always be trained with: one that writes earlier turns differently once later ones
follow (Qwen3 strips its thinking) can't be learnt from as it stands; TRL has a training form of the common ones.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from ..errors import RecipeError, RowError
from .labels import to_segments
from .messages import Conversation, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASK: Message = {"role": "user", "content": "a question"}
REPLY: Message = {"role": "assistant", "content": "an answer"}
CALL = {"type": "function", "function": {"name": "search", "arguments": {"query": "a word"}}}
PROBES = (
    [ASK, REPLY, ASK, REPLY],
    [ASK, {**REPLY, "content": "<think>\na thought\n</think>\n\nan answer"}, ASK, REPLY],
    [ASK, {**REPLY, "tool_calls": [CALL]}, {"role": "tool", "content": "found"}, REPLY, ASK, REPLY],
)


@dataclass(frozen=True)
class Template:
    """How rows are rendered for training; `find_template` finds it. `jinja` may be TRL's training form.

    `tool_jinja` renders rows with tools where the tokenizer has a template for them (`tool_use`), as transformers does.

    `generation_prompt` opens a reply; `after_reply` is what follows its text, and `end_of_turn` the first special token there.
    `epilogue` is what the template writes after whatever does not go on, and no row needs.
    """

    tokenizer: PreTrainedTokenizerBase
    jinja: str
    tool_jinja: str | None = None
    generation_prompt: str = ""
    after_reply: str = ""
    end_of_turn: str | None = None
    epilogue: str = ""

    @property
    def hash(self) -> str:
        return hashlib.sha256((self.jinja + (self.tool_jinja or "")).encode()).hexdigest()

    def render(self, messages: list[Message], tools: Any, prompt: bool) -> str:
        """The template's text for these messages, with the generation prompt after it or not.

        Raises:
            RowError: if the template refuses them.
        """
        jinja = self.tool_jinja if tools and self.tool_jinja else self.jinja
        try:
            text = str(
                self.tokenizer.apply_chat_template(
                    messages, tools=tools, chat_template=jinja, add_generation_prompt=prompt, tokenize=False
                )
            )
        except (TemplateError, TypeError, ValueError, RecursionError) as error:
            raise RowError(f"the template refuses it: {error}") from None
        return text if prompt else text.removesuffix(self.epilogue)


def find_template(tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template to render with in training: the tokenizer's own, or TRL's training form if that one rewrites turns.

    Raises:
        RecipeError: if it can't be rendered at all.
    """
    given: str | dict[str, str] = tokenizer.chat_template
    named = given if isinstance(given, dict) else {"default": given}
    if "default" not in named:
        raise RecipeError(f"template: the tokenizer has templates named {', '.join(named)} and none named default")
    own = _describe(Template(tokenizer, named["default"], named.get("tool_use")))
    if not _faults(own):
        return own
    from trl.chat_template_utils import get_training_chat_template

    try:
        jinja = get_training_chat_template(tokenizer)
    except ValueError:  # TRL knows no training form of it
        return own
    form = _describe(replace(own, jinja=jinja or own.jinja, epilogue=""))
    return form if _faults(form) < _faults(own) else own


def _describe(template: Template) -> Template:
    """What it writes around a reply, found by rendering."""
    tokenizer = template.tokenizer
    eos = str(tokenizer.eos_token or "\0")
    try:
        with_prompt, without = template.render([ASK], None, True), template.render([ASK], None, False)
        answered = template.render([ASK, REPLY], None, False)
    except RowError as error:
        raise RecipeError(f"template: cannot be rendered ({error})") from None
    # Phi-3 ends whatever does not go on with the eos token. No reply ends in it, so no row needs it.
    epilogue = eos if not with_prompt.startswith(without) and without.endswith(eos) else ""
    special = {token: added.content for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    after_reply = answered.rpartition(REPLY["content"])[2]
    after: list[int] = tokenizer(after_reply, add_special_tokens=False)["input_ids"]
    return replace(
        template,
        generation_prompt=with_prompt[len(without.removesuffix(epilogue)) :],
        after_reply=after_reply,
        end_of_turn=next((special[token] for token in after if token in special), None),
        epilogue=epilogue,
    )


def _faults(template: Template) -> int:
    """How many probes can be rendered but not cut into segments."""
    faults = 0
    for messages in PROBES:
        try:
            template.render(messages, None, False)
        except RowError:
            continue
        try:
            to_segments(Conversation(messages), template)
        except RowError:
            faults += 1
    return faults


def shipped_template(name: str) -> str:
    """The Jinja text of a template that is shipped under one of LLaMA-Factory's names: qwen.jinja, or one put together.

    The pieces that templates/names.toml has for the name stand in front, then the file of their tools, then frame.jinja.
    TRL's own files (qwen3_instruct_2507.jinja, llama3.jinja) differ from LLaMA-Factory's text for rows with tools.

    Raises:
        KeyError: if nothing is shipped under that name.
    """
    folder = files("arpo_trl.data").joinpath("templates")
    if name == "qwen":
        return folder.joinpath("qwen.jinja").read_text(encoding="utf-8")
    table = tomllib.loads(folder.joinpath("names.toml").read_text(encoding="utf-8"))
    pieces = table[name]
    pieces = table.get(pieces.get("like"), {}) | pieces
    default = {"begin": "", "default_system": "", "result_join": "", "system_inside": False}
    default |= {"thought": ["<think>\n", "\n</think>\n\n"], "reasons": "thought" in pieces}
    default |= {"result": pieces["user"], "call": pieces["reply"]}
    lines = []
    for key, value in (default | pieces).items():
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
