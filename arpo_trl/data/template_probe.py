"""Find the template to train with, and probe what it writes around a reply by rendering short conversations.

Some templates can't be trained with as they are: Qwen3's, for one, strips the reasoning of earlier turns once later ones
follow. TRL has a training form of the common ones.
"""

from __future__ import annotations

import json
import re
from copy import copy
from dataclasses import replace
from datetime import date
from typing import TYPE_CHECKING, cast

from ..errors import RecipeError, RowError
from .messages import REASONING_KEYS, Conversation, Fields, Message
from .segments import shared_start, to_segments
from .template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ChatTemplate = str | dict[str, str]  # one, or several by name
ASK: Message = {"role": "user", "content": "a question"}
REPLY: Message = {"role": "assistant", "content": "an answer"}
CALL: Fields = {"type": "function", "function": {"name": "search", "arguments": {"query": "a word"}}}
CALLS: Message = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT: Message = {"role": "tool", "content": "found"}
TOOL = {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}
THINKING: Message = {"role": "assistant", "content": "<think>\nsome reasoning\n</think>\n\nan answer"}
PROBES: tuple[list[Message], ...] = (
    [ASK, REPLY, ASK, REPLY],
    [ASK, THINKING],
    [ASK, THINKING, ASK, REPLY],
    [ASK, {**REPLY, "tool_calls": [CALL]}, RESULT, REPLY, ASK, REPLY],
)
# Precedes the template saved after enable_thinking: false, so that the model is prompted as it was trained.
NO_THINKING = "{%- set enable_thinking = enable_thinking | default(false) %}"


def find_template(
    tokenizer: PreTrainedTokenizerBase,
    day: date | None = None,
    enable_thinking: bool | None = True,
    last_reasoning_only: bool = False,
) -> Template:
    """Find the template to train with: the tokenizer's own, or TRL's training form if the own one rewrites turns.

    The arguments are attributes of `Template`; `day` defaults to today.

    Raises:
        RecipeError: the template can't be rendered.
    """
    named = {name: jinja.removeprefix(NO_THINKING) for name, jinja in _named(tokenizer.chat_template).items()}
    if "default" not in named:
        raise RecipeError(f"template: the tokenizer has templates named {', '.join(named)}, but none named default")
    day = day or date.today()
    tool_jinja = _dated(named["tool_use"], day) if "tool_use" in named else None
    bare = Template(tokenizer, _dated(named["default"], day), day, tool_jinja, enable_thinking, last_reasoning_only)
    own = _probe(bare)
    if not _count_faults(own):
        return own
    from trl.chat_template_utils import get_training_chat_template

    plain = copy(tokenizer)
    plain.chat_template = named["default"]
    try:
        training = get_training_chat_template(plain)
    except ValueError:  # TRL has no training form
        return own
    form = _probe(replace(bare, jinja=_dated(training, day))) if training else own
    return form if _count_faults(form) < _count_faults(own) else own


def set_thinking_default(chat_template: ChatTemplate, thinking: bool) -> ChatTemplate:
    """Make a tokenizer's templates prompt for reasoning by default, or not."""
    first = "" if thinking else NO_THINKING
    named = {name: first + jinja.removeprefix(NO_THINKING) for name, jinja in _named(chat_template).items()}
    return named if isinstance(chat_template, dict) else named["default"]


def _named(chat_template: ChatTemplate) -> dict[str, str]:
    return chat_template if isinstance(chat_template, dict) else {"default": chat_template}


def _dated(jinja: str, day: date) -> str:
    """Write this day into the template. transformers 5 passes a template only data, so its clock can't be replaced."""
    return re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", lambda call: json.dumps(day.strftime(call[2])), jinja)


def _probe(template: Template) -> Template:
    tokenizer = template.tokenizer
    eos = str(tokenizer.eos_token or "\0")
    try:
        with_prompt, without = template.render([ASK], None, True), template.render([ASK], None, False)
        answered = template.render([ASK, REPLY], None, False)
    except RowError as error:
        raise RecipeError(f"template: cannot be rendered: {error}") from None
    # Phi-3 ends any text without a generation prompt with the eos token. No reply ends with it, so it is removed.
    epilogue = eos if not with_prompt.startswith(without) and without.endswith(eos) else ""
    header = shared_start(with_prompt, answered)
    before_reply, _, after_reply = answered[len(header) :].rpartition(REPLY["content"])
    template = replace(
        template,
        generation_prompt=header[len(without.removesuffix(epilogue)) :],
        after_reply=after_reply,
        end_of_turn=next(iter(_special_tokens(tokenizer, after_reply)), None),
        empty_reasoning=before_reply if "think>" in before_reply else "",
        epilogue=epilogue,
    )
    return _probe_call_ids(_probe_reasoning(_probe_ends(template), with_prompt[len(without) :] + before_reply))


def _render(template: Template, *messages: Message, tools: list[Fields] | None = None) -> str:
    """Render the messages, or return "" if the template raises an error."""
    try:
        return template.render(list(messages), tools, False)
    except RowError:
        return ""


def _special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """List the special tokens of a text, or its added tokens if none of them is special."""
    added = tokenizer.added_tokens_decoder
    tokens = [added[token] for token in tokenizer(text, add_special_tokens=False)["input_ids"] if token in added]
    return [token.content for token in tokens if token.special or not any(other.special for other in tokens)]


def _probe_ends(template: Template) -> Template:
    """Set `call_end`, and `begins_next` if the first token of the next turn is what ends a reply."""

    def next_token(reply: Message, follows: Message) -> str | None:
        text = _render(template, ASK, reply, follows).removeprefix(_render(template, ASK, reply))
        first = next(iter(_special_tokens(template.tokenizer, text)), None)
        return first if first and text.startswith(first) else None

    if not template.after_reply.strip() and (end := next_token(REPLY, ASK)):
        after_reply = template.after_reply + end
        call_end = next_token(CALLS, RESULT) if _render(template, ASK, CALLS) else None
        return replace(template, end_of_turn=end, call_end=call_end, after_reply=after_reply, begins_next=True)
    text = _render(template, ASK, CALLS)
    ends = _special_tokens(template.tokenizer, text.rpartition("a word")[2])
    is_other = ends and template.end_of_turn not in ends and text.rstrip().endswith(ends[-1])
    return replace(template, call_end=ends[-1] if is_other else None)


def _probe_reasoning(template: Template, around_reply: str) -> Template:
    """Set the key of reasoning, if any, and whether the template has its own way to write it (gpt-oss, Qwen3.8)."""
    separate = {key: _render(template, ASK, cast(Message, {**REPLY, key: "some reasoning"})) for key in REASONING_KEYS}
    key = next((key for key, text in separate.items() if "some reasoning" in text), None)
    inside = _render(template, ASK, THINKING)
    split = bool(key and inside) and inside.count("</think>") != separate[key or ""].count("</think>")
    prompts = {replace(template, enable_thinking=thinking).render([ASK], None, True) for thinking in (True, False)}
    supports = "think>" in around_reply or len(prompts) > 1 or split
    return replace(template, reasoning_key=key, supports_thinking=supports, split_reasoning=split)


def _probe_call_ids(template: Template) -> Template:
    def write(call_id: str) -> str:
        calls: Message = {**REPLY, "content": "", "tool_calls": [{"id": call_id, **CALL}]}
        return _render(template, ASK, calls, tools=[TOOL] if template.tool_jinja else None)

    nine, long = "a1B2c3D4e", "call_a1B2c3D4e5F6"
    written = write(nine)
    if nine not in written:
        return template
    form = "call{number:05}" if CALL["function"]["name"] in written else "functions.{name}:{number}"  # Kimi's
    return replace(template, call_id=form, any_call_id=long in write(long))


def _count_faults(template: Template) -> int:
    """Count the probes that can't be cut into segments although the template supports their kind, and a missing end."""
    faults = int(template.end_of_turn is None)
    for messages in PROBES:
        row = template.fit(Conversation(messages))
        if not _render(template, *row.messages):  # DeepSeek-V3's own template can't write these calls, TRL's form can.
            faults += messages is PROBES[-1] and "tool_calls" in template.jinja
            continue
        try:
            to_segments(row, template)
        except RowError:
            faults += 1
    return faults
