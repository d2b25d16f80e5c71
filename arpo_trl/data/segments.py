"""Conversation -> segments, the texts that are tokenized separately: context and reply in turn.

The chat template is rendered up to each generation prompt and up to each reply's end; the pieces between are the
segments. Joined, "assistant\\n" + "\\nhello" would merge into one "\\n\\n" token, which the model never sees at inference.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple

from ..errors import RowError
from .messages import Conversation, Fields, Message
from .template import Template, has_reasoning

WINDOW = 8  # replies
MAX_REPLIES = 2000


class TurnEndError(RowError):
    """A reply does not end with an end token, or contains one earlier, at which the model would stop."""


class Span(NamedTuple):
    """Characters of a reply that are masked, and the entry of `mask_spans` that matched them."""

    start: int
    end: int
    pattern: str


class Segment(NamedTuple):
    """A piece of a rendered conversation.

    `masked`: never trained, whatever the recipe says. `added`: what the template leaves out here: the end of a context's
    generation prompt, or the end of the empty reasoning that the prompt opens, with which the reply starts. `end`: the end
    token that the model writes after this reply, where the next context has another text (gpt-oss).
    """

    text: str
    masked: bool = False
    spans: tuple[Span, ...] = ()
    added: str = ""
    end: int | None = None


def to_segments(conversation: Conversation, template: Template) -> list[Segment]:
    """Cut the rendered conversation into segments that alternate between context and reply; the last is a reply.

    Messages after the last reply are left out, since nothing trained follows them.

    Raises:
        RowError: the template raises an error, rewrites earlier text, leaves text out, or does not end a trained reply.
    """
    template = template.of_row(conversation)
    segments = _render_long(conversation, template)
    if segments is None:
        segments = _render_turns(conversation, template, len(conversation.replies))
    _check_complete(conversation, segments)
    try:
        "".join(segment.text for segment in segments).encode("utf-8")
    except UnicodeEncodeError:
        raise RowError("not UTF-8: the text contains a lone surrogate or an invalid byte") from None
    return segments


def as_rendered(segments: Sequence[Segment]) -> str:
    """Join the segments as the template renders them, without what was added."""
    parts = (s.text.removeprefix(s.added) if at % 2 else s.text.removesuffix(s.added) for at, s in enumerate(segments))
    return "".join(parts)


def _render_long(conversation: Conversation, template: Template) -> list[Segment] | None:
    """Render a row with many replies in linear time, or return None if the template needs all earlier turns.

    Rendering everything before each reply takes hours for very long rows, so these raise an error.
    """
    messages, replies = conversation.messages[: conversation.replies[-1] + 1], len(conversation.replies)
    if replies <= 2 * WINDOW:
        return None
    with suppress(RowError):
        segments = _render_turns(conversation, template, WINDOW)
        if as_rendered(segments) == template.render(messages, conversation.tools, False):
            return segments
    if replies > MAX_REPLIES:
        raise RowError(
            f"{replies:,} replies in one row, but this chat template rewrites earlier replies and allows {MAX_REPLIES:,}; "
            "split the row"
        )
    return None


def _render_turns(conversation: Conversation, template: Template, window: int) -> list[Segment]:
    """Render each turn after the messages before the first reply and only the last `window` to 2 * `window` replies."""
    messages, tools, replies = conversation.messages, conversation.tools, conversation.replies
    segments: list[Segment] = []
    done, start, first = "", 0, 0
    # Replies before this one are context only: they stay as the template writes them at inference.
    first_trained = conversation.prompt or (replies[-1] if template.last_reasoning_only else 0)
    for number, position in enumerate(replies):
        if number > first + 2 * window:
            first = number - window
            done = template.render(messages[: replies[0]] + messages[replies[first] : start], tools, False)
        before = messages[: replies[0]] + messages[replies[first] : position]
        until_reply = template.render([*before, messages[position]], tools, False)
        until_prompt, rest = _until_prompt([*before, messages[position]], tools, template, until_reply)
        if not until_prompt.startswith(done):
            done = _join_turns(done, until_prompt, template, segments)
        context, reply = until_prompt[len(done) :], until_reply[len(until_prompt) :]
        masked = not messages[position].get("trained", True)
        if not masked and template.find_end(reply) is None:
            raise TurnEndError(
                f"the chat template ends reply {number + 1} without an end-of-turn token; use another template"
            )
        if not masked and (end := template.find_early_end(reply)):
            raise TurnEndError(f"reply {number + 1} contains {end!r}, at which the model would stop")
        rest = rest if position >= first_trained else ""
        closing = template.close_reasoning(context + rest, reply)
        segments += [
            Segment(context + rest, not all(m.get("trained", True) for m in messages[start:position]), added=rest),
            Segment(closing + reply, masked, added=closing),
        ]
        done, start = until_reply, position + 1
    return segments


def _until_prompt(
    messages: list[Message], tools: list[Fields] | None, template: Template, until_reply: str
) -> tuple[str, str]:
    """Return the text before the last message, a reply, and the end of its generation prompt that the template leaves out.

    DeepSeek-R1's prompt opens a `<think>`, which its template writes in no reply. The model is always asked with the
    complete prompt, so the row has it, too.
    """
    *before, message = messages
    if before:
        until_prompt = template.render(before, tools, True)
    else:  # Most templates read the first message, and none precedes this reply.
        until_prompt = until_reply[: until_reply.find(template.generation_prompt)] + template.generation_prompt
    if template.thinking_switch and before and not has_reasoning(message) and not until_reply.startswith(until_prompt):
        until_prompt = replace(template, thinking_switch=None).render(before, tools, True)
    if until_reply.startswith(until_prompt):
        reasoning = "" if template.enable_thinking else template.empty_reasoning
        return until_prompt + (reasoning if until_reply.startswith(until_prompt + reasoning) else ""), ""
    shared = shared_start(until_prompt, until_reply)
    rest, reply = until_prompt[len(shared) :], until_reply[len(shared) :]
    has_header = len(shared) > len(template.render(before, tools, False))
    starts = has_header or (message["content"] and reply.startswith(message["content"]))
    if not starts or (rest.strip() and "".join(reply.split()).startswith("".join(rest.split()))):
        raise RowError(
            "with this chat template, the text before this reply is not the generation prompt of inference; use another template"
        )
    return shared, rest


def shared_start(text: str, other: str) -> str:
    """Return the common prefix of two texts, without an unfinished tag at its end."""
    alike = count_shared(text, other)
    return text[:alike] if alike in (len(text), len(other)) else re.sub(r"<[^<>]*$", "", text[:alike])


def count_shared(items: Sequence[object], other: Sequence[object]) -> int:
    """Return how many items at the start of both sequences are equal: the position of the first difference."""
    pairs = enumerate(zip(items, other))
    return next((at for at, (left, right) in pairs if left != right), min(len(items), len(other)))


def _join_turns(done: str, until_prompt: str, template: Template, segments: list[Segment]) -> str:
    """Return where the next context starts if the template rewrites earlier text once a turn follows.

    The end of a reply may change: gpt-oss ends the last one with <|return|>, which the model writes, and earlier ones with
    <|end|>, which it does not. That position is context, and its label is the token that the model writes. If only the
    last reply is trained, everything before it is context.
    """
    shared = shared_start(done, until_prompt)
    changed = done[len(shared) :]
    if template.after_reply.endswith(changed):
        text = segments[-1].text.removesuffix(changed)
        end = template.find_end(changed) if template.find_end(text) is None else None
        segments[-1] = segments[-1]._replace(text=text, end=end)
        return shared
    if template.last_reasoning_only:
        segments.clear()
        return ""
    raise RowError(
        "the chat template rewrites an earlier turn once later ones follow; set mask_history: true to train only the last reply"
    )


def _check_complete(conversation: Conversation, segments: Sequence[Segment]) -> None:
    """Raise RowError if text is missing: some templates ignore tools and reasoning, and such a row would train nonsense."""
    for tool in conversation.tools or ():
        if tool["function"]["name"] not in segments[0].text:
            raise RowError(f"the chat template leaves out the tool {tool['function']['name']!r}; use another template")
    at, in_context = 0, len(conversation.replies) - len(segments) // 2
    for message in conversation.messages[: conversation.replies[-1] + 1]:
        text = segments[at].text
        if message["role"] == "assistant" and in_context:
            in_context -= 1
        elif message["role"] == "assistant":
            text = segments[at + 1].text
            at += 2
        content = message["content"] + "</think>" + message.get("reasoning_content", "")
        lost = [piece for piece in re.split("</?think>", content) if not is_written(piece.strip(), text)]
        calls = Counter(call["function"]["name"] for call in message.get("tool_calls", ()))
        lost += [name for name, times in calls.items() if text.count(name) < content.count(name) + times]
        _check_reasoning(message, text)
        if lost:
            raise RowError(
                f"the chat template drops this text of the {message['role']} turn: {lost[0].strip()[:40]!r}; use another "
                "template, or remove the text from the row"
            )


def _check_reasoning(message: Message, reply: str) -> None:
    """Raise RowError if the template writes reasoning, or its tags, twice."""
    if message["role"] != "assistant":
        return
    reasoning, content = message.get("reasoning_content", "").strip(), message["content"]
    written, rest = reply.count(reasoning), content + json.dumps(message.get("tool_calls", ()), ensure_ascii=False)
    if reasoning and written > 1 + rest.count(reasoning):
        raise RowError(
            f"the chat template writes the reasoning {written} times: {reasoning[:40]!r}; use another template"
        )
    for tag in ("<think>", "</think>"):
        own = 0 if content.lstrip().startswith("<think>") else 1
        if reply.count(tag) > own + (reasoning + rest).count(tag):
            raise RowError(f"the chat template writes {tag} twice; use another template, or remove it from the row")


def is_written(piece: str, text: str) -> bool:
    """Return whether the text contains the piece, as it is or JSON-encoded (tool results of Llama 3.1 and gpt-oss)."""
    return piece in text or any(
        json.dumps(piece, ensure_ascii=ascii_only)[1:-1] in text for ascii_only in (False, True)
    )
