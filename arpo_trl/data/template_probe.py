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
from typing import cast

from transformers import PreTrainedTokenizerBase

from ..errors import RecipeError, RowError
from .messages import REASONING_KEYS, Conversation, Fields, Message
from .segments import count_shared, shared_start, to_segments
from .template import Template

ChatTemplate = str | dict[str, str]  # one, or several by name
ASK: Message = {"role": "user", "content": "a question"}
REPLY: Message = {"role": "assistant", "content": "an answer"}
CALL: Fields = {
    "type": "function",
    "id": "call00000",
    "function": {"name": "search", "arguments": {"query": "a word"}},
}
CALLS: Message = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT: Message = {"role": "tool", "content": "found", "tool_call_id": "call00000"}
TOOL = {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}
REASONING = "some reasoning"
THINKING: Message = {"role": "assistant", "content": f"<think>\n{REASONING}\n</think>\n\nan answer"}
PROBES: tuple[list[Message], ...] = (
    [ASK, REPLY, ASK, REPLY],
    [ASK, THINKING],
    [ASK, THINKING, ASK, REPLY],
    [ASK, {**REPLY, "tool_calls": [CALL]}, RESULT, REPLY, ASK, REPLY],
)
SWITCHES = ("thinking", "enable_thinking", "reasoning")
# Precedes the saved template, so that the model is prompted as it was trained.
THINKING_DEFAULT = "{{%- set {0} = {0} | default({1}) %}}"
STRFTIME_NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
SET_DEFAULT = re.compile(r"^\{%- set (\w+) = \1 \| default\((?:true|false)\) %\}")


def find_template(
    tokenizer: PreTrainedTokenizerBase,
    day: date | None = None,
    enable_thinking: bool | None = True,
    last_reasoning_only: bool = False,
    stops: tuple[str, ...] = (),
) -> Template:
    """Find the template to train with: the tokenizer's own, or TRL's training form if the own one rewrites turns.

    The arguments are attributes of `Template`; `day` defaults to today.

    Raises:
        RecipeError: the template can't be rendered.
    """
    named = {name: SET_DEFAULT.sub("", jinja) for name, jinja in named_templates(tokenizer).items()}
    if "default" not in named:
        raise RecipeError(f"template: the tokenizer has templates named {', '.join(named)}, but none named default")
    day = day or date.today()
    tool_jinja = _dated(named["tool_use"], day) if "tool_use" in named else None
    bare = Template(
        tokenizer, _dated(named["default"], day), day, tool_jinja, enable_thinking, last_reasoning_only, stops=stops
    )
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


def writes_system(template: Template) -> bool:
    """Return whether the template writes a system turn for a row without one."""
    rules = "some rules"
    system: Message = {"role": "system", "content": rules}
    before, _, after = _render(template, system, ASK).partition(rules)
    without = _render(template, ASK)
    if not after or not (without.startswith(before) and without.endswith(after)):
        return False
    return len(without) > len(before + after) or bool(before.removeprefix(str(template.tokenizer.bos_token or "")))


def set_thinking_default(template: Template) -> ChatTemplate:
    """Return the tokenizer's templates so that by default they prompt for reasoning, or not, as in training."""
    first, chat_template = "", cast(ChatTemplate, template.tokenizer.chat_template)
    if template.thinking_switch:
        first = THINKING_DEFAULT.format(template.thinking_switch, "true")
    elif template.supports_thinking and template.enable_thinking is False:
        first = THINKING_DEFAULT.format("enable_thinking", "false")
    elif not template.supports_thinking:
        return chat_template
    named = {name: first + SET_DEFAULT.sub("", jinja) for name, jinja in named_templates(template.tokenizer).items()}
    return named if isinstance(chat_template, dict) else named["default"]


def named_templates(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the tokenizer's chat templates by name; a single one is named default."""
    chat_template: ChatTemplate = tokenizer.chat_template
    return chat_template if isinstance(chat_template, dict) else {"default": chat_template}


def date_formats(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the formats in which the tokenizer's chat templates write the day."""
    return [call[2] for jinja in named_templates(tokenizer).values() for call in STRFTIME_NOW.finditer(jinja)]


def _dated(jinja: str, day: date) -> str:
    """Write this day into the template. transformers 5 passes a template only data, so its clock can't be replaced."""
    return STRFTIME_NOW.sub(lambda call: json.dumps(day.strftime(call[2])), jinja)


def _probe(template: Template) -> Template:
    tokenizer, template = template.tokenizer, _probe_switch(template)
    eos = str(tokenizer.eos_token or "\0")
    try:
        with_prompt, without = template.render([ASK], None, True), template.render([ASK], None, False)
        answered = template.render([ASK, REPLY], None, False)
    except RowError as error:
        raise RecipeError(f"template: cannot be rendered: {error}") from None
    third = _render(template, ASK, REPLY, ASK)
    if with_prompt == without and third and not third.startswith(answered):
        raise RecipeError("template: writes its generation prompt after every reply; use another template")
    # Phi-3 ends any text without a generation prompt with the eos token. No reply ends with it, so it is removed.
    epilogue = eos if not with_prompt.startswith(without) and without.endswith(eos) else ""
    header = shared_start(with_prompt, answered)
    before_reply, _, after_reply = answered[len(header) :].rpartition(REPLY["content"])
    template = replace(
        template,
        generation_prompt=header[len(without.removesuffix(epilogue)) :],
        after_reply=after_reply,
        end_of_turn=_find_end(
            tokenizer, answered[len(header) :].removesuffix(epilogue), after_reply.removesuffix(epilogue)
        ),
        empty_reasoning=before_reply if "think>" in before_reply else "",
        epilogue=epilogue,
    )
    return _probe_call_ids(_probe_reasoning(_probe_ends(template), with_prompt[len(without) :], before_reply))


def _render(template: Template, *messages: Message, tools: list[Fields] | None = None, prompt: bool = False) -> str:
    """Render the messages, or return "" if the template raises an error."""
    try:
        return template.render(list(messages), tools, prompt)
    except RowError:
        return ""


def _special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """List the special tokens of a text, or its added tokens if none of them is special."""
    added = tokenizer.added_tokens_decoder
    tokens = [added[token] for token in tokenizer(text, add_special_tokens=False)["input_ids"] if token in added]
    return [token.content for token in tokens if token.special or not any(other.special for other in tokens)]


def _find_end(tokenizer: PreTrainedTokenizerBase, reply: str, after: str) -> str | None:
    """Return the last special token of `after` that occurs once in the reply, or else the first one, or None.

    Some templates end the parts of a reply with tokens, too (Kimi K3, Command R7B).
    """
    tokens = _special_tokens(tokenizer, after)
    return next((token for token in reversed(tokens) if reply.count(token) == 1), next(iter(tokens), None))


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
    reply = text[len(_render(template, ASK)) :]
    end = _find_end(template.tokenizer, reply, text.rpartition("a word")[2])
    is_other = end and str(template.end_of_turn) not in reply and text.rstrip().endswith(end)
    return replace(template, call_end=end if is_other else None)


def _reasoning_key(template: Template, message: Message) -> str | None:
    """Return the key from which the template writes the reasoning of this message."""
    return next((key for key in REASONING_KEYS if REASONING in _render(template, ASK, _with(message, key))), None)


def _probe_switch(template: Template) -> Template:
    """Set `thinking_switch` if the template writes reasoning, or prompts for it, only with one."""
    if template.enable_thinking is False:
        return template
    key, prompt = _reasoning_key(template, REPLY), _generation_prompt(template)
    for switch in SWITCHES:
        if switch not in template.jinja:
            continue
        switched = replace(template, thinking_switch=switch)
        other = _generation_prompt(switched)
        # By default the prompt has a closed block: it asks for a reply without reasoning.
        closes = prompt.startswith(other) or ("</think>" in prompt and "</think>" not in other)
        if (other and other != prompt and closes) or (not key and _reasoning_key(switched, REPLY)):
            return switched
    return template


def _generation_prompt(template: Template) -> str:
    text = _render(template, ASK, prompt=True)
    return text[len(shared_start(text, _render(template, ASK))) :]


def _probe_reasoning(template: Template, prompt: str, before_reply: str) -> Template:
    """Set how the template writes reasoning, and whether it has its own way to write it (gpt-oss, Qwen3.8)."""
    key = _reasoning_key(template, REPLY)
    inside = _render(template, ASK, THINKING)
    separate = _render(template, ASK, _with(REPLY, key or ""))
    split = bool(key and inside) and inside.count("</think>") != separate.count("</think>")
    prompts = {replace(template, enable_thinking=thinking).render([ASK], None, True) for thinking in (True, False)}
    supports = "think>" in prompt + before_reply or len(prompts) > 1 or split
    template = replace(template, reasoning_key=key, supports_thinking=supports, split_reasoning=split)
    if key:
        return replace(template, reasoning_block=_written_block(template, REPLY, _with(REPLY, key)))
    if block := _find_block(template, prompt, template.generation_prompt + before_reply):
        return replace(template, reasoning_block=block, supports_thinking=True, split_reasoning=True)
    return template


def _find_block(template: Template, prompt: str, before_reply: str) -> tuple[str, str] | None:
    """Return what surrounds reasoning, from a chunk, a reply with calls or the generation prompt, or None.

    Ministral 3 writes reasoning from a chunk of the content. Kimi K2 Thinking writes reasoning only before calls, and an empty block elsewhere. Gemma 4 does, too, but writes no
    block elsewhere. The prompts of DeepSeek R1 and Nemotron Nano v2 open a block, which their templates never write.
    """
    parts = [{"type": "thinking", "thinking": REASONING}, {"type": "text", "text": REPLY["content"]}]
    chunks = cast(Message, {**REPLY, "content": parts})
    text = "" if template.enable_thinking is False else _render(template, ASK, chunks)
    if text.count(REASONING) == 1 and "'type'" not in text and '"type"' not in text:
        return _written_block(template, REPLY, chunks)
    calls: Message = {**REPLY, "tool_calls": [CALL]}
    if key := _reasoning_key(template, calls):
        return _written_block(template, calls, _with(calls, key))
    if re.search(r"<think>\s*$", prompt):
        return prompt[prompt.rindex("<think>") :], "\n</think>\n\n" if prompt.endswith("\n") else "</think>"
    empty = re.search(r"(<think>)(</think>)$", before_reply)
    return (empty[1], empty[2]) if empty and _render(template, ASK, THINKING).count("</think>") > 1 else None


def _with(reply: Message, key: str) -> Message:
    return cast(Message, {**reply, key: REASONING})


def _written_block(template: Template, reply: Message, thinking: Message) -> tuple[str, str] | None:
    """Return what surrounds the reasoning of the second reply, which is the first with reasoning."""
    start = len(_render(template, ASK)) + len(template.generation_prompt)
    without = _render(template, ASK, reply)[start:]
    opening, _, rest = _render(template, ASK, thinking)[start:].partition(REASONING)
    closing = rest[: len(rest) - count_shared(rest[::-1], without[::-1])] or rest.partition(REPLY["content"])[0]
    return (opening, closing) if opening.strip() and closing.strip() else None


def _probe_call_ids(template: Template) -> Template:
    def write(call_id: str) -> str:
        turns = ASK, cast(Message, {**CALLS, "tool_calls": [{**CALL, "id": call_id}]})
        tools, result = [TOOL] if template.tool_jinja else None, cast(Message, {**RESULT, "tool_call_id": call_id})
        return _render(template, *turns, result, tools=tools) or _render(template, *turns, tools=tools)

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
