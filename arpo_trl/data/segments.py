"""A conversation, rendered -> segments: the texts that are tokenised alone, contexts and replies in turn.

The chat template is rendered up to each generation prompt and up to each reply's end; the pieces between are the
segments. As one string, "assistant\\n" + "\\nhello" would merge into a single "\\n\\n" token, which the model never sees
at inference.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

from ..errors import RowError
from .messages import Conversation, Fields, Message

if TYPE_CHECKING:
    from .template import Template

WINDOW = 8  # replies
MOST_REPLIES = 2000


class Span(NamedTuple):
    """Characters of a reply that carry no loss, and the entry of `mask_spans` that found them."""

    start: int
    end: int
    pattern: str


class Segment(NamedTuple):
    """A piece of a rendered conversation. `masked`: none of it may carry loss, whatever the recipe asks."""

    text: str
    masked: bool = False
    spans: tuple[Span, ...] = ()


def to_segments(conversation: Conversation, template: Template) -> list[Segment]:
    """The rendered conversation in pieces that alternate between context and reply, the last being a reply.

    Messages after the last reply are left out: nothing that follows could be learnt from them.

    Raises:
        RowError: if the template refuses the conversation, rewrites what it rendered before, leaves text out, or does
            not end a reply that may be trained.
    """
    segments = _render_long(conversation, template)
    if segments is None:
        segments = _render_turns(conversation, template, len(conversation.replies))
    _check_complete(conversation, segments)
    try:
        "".join(segment.text for segment in segments).encode("utf-8")
    except UnicodeEncodeError:
        raise RowError("not UTF-8: the text holds half a surrogate pair or a byte that is no character") from None
    return segments


def _render_long(conversation: Conversation, template: Template) -> list[Segment] | None:
    """The segments of a row of many replies, at a cost in proportion to them, if that gives what the template writes.

    If it does not, a row is refused that is so long that rendering all that comes before each reply takes hours.
    """
    messages, replies = conversation.messages[: conversation.replies[-1] + 1], len(conversation.replies)
    if replies <= 2 * WINDOW:
        return None
    with suppress(RowError):
        segments = _render_turns(conversation, template, WINDOW)
        if "".join(segment.text for segment in segments) == template.render(messages, conversation.tools, False):
            return segments
    if replies > MOST_REPLIES:
        raise RowError(f"too long: the template writes some of its {replies:,} replies differently once others follow")
    return None


def _render_turns(conversation: Conversation, template: Template, window: int) -> list[Segment]:
    """The segments, each rendered after what comes before the first reply and `window` to 2 * `window` replies alone."""
    messages, tools, replies = conversation.messages, conversation.tools, conversation.replies
    segments: list[Segment] = []
    done, start, first = "", 0, 0
    for number, position in enumerate(replies):
        if number > first + 2 * window:
            first = number - window
            done = template.render(messages[: replies[0]] + messages[replies[first] : start], tools, False)
        before = messages[: replies[0]] + messages[replies[first] : position]
        until_reply = template.render([*before, messages[position]], tools, False)
        until_prompt = _until_prompt(before, tools, template, until_reply)
        if not until_prompt.startswith(done):
            done = _join_turns(done, until_prompt, template, segments)
        context, reply = until_prompt[len(done) :], until_reply[len(until_prompt) :]
        masked = not messages[position].get("trained", True)
        if not masked and not template.ends(reply):
            raise RowError(f"the template ends message {position + 1} without its end-of-turn token")
        segments += [
            Segment(context, not all(message.get("trained", True) for message in messages[start:position])),
            Segment(reply, masked),
        ]
        done, start = until_reply, position + 1
    return segments


def _until_prompt(before: list[Message], tools: list[Fields] | None, template: Template, until_reply: str) -> str:
    """All that is context of a reply, its generation prompt included.

    A reply may begin otherwise than the generation prompt: DeepSeek-R1's opens a thought. A reply without one begins
    before it, since the model has to write otherwise; what both share is context.
    """
    if before:
        until_prompt = template.render(before, tools, True)
    else:  # Most templates look at the first message, and there is none before this reply.
        until_prompt = until_reply[: until_reply.find(template.generation_prompt)] + template.generation_prompt
    if not until_reply.startswith(until_prompt):
        until_prompt = shared_start(until_prompt, until_reply)
        if len(until_prompt) <= len(template.render(before, tools, False)):
            raise RowError("the template writes the reply other than its generation prompt begins it")
    thought = "" if template.enable_thinking else template.empty_thought
    return until_prompt + (thought if until_reply.startswith(until_prompt + thought) else "")


def shared_start(one: str, other: str) -> str:
    """What two texts begin with alike, never with the first half of a tag."""
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))
    return one[:alike] if alike in (len(one), len(other)) else re.sub(r"<[^<>]*$", "", one[:alike])


def _join_turns(done: str, until_prompt: str, template: Template, segments: list[Segment]) -> str:
    """Where the next context begins, if the template writes what is done in another way once a turn follows.

    The end of a reply may change: gpt-oss ends the last one with <|return|>, as the model does, and an earlier one with
    <|end|>, which the model does not write there, so it is context. If only the last reply is trained, all is context.
    """
    shared = shared_start(done, until_prompt)
    changed = done[len(shared) :]
    if template.after_reply.endswith(changed):
        segments[-1] = segments[-1]._replace(text=segments[-1].text.removesuffix(changed))
        return shared
    if template.last_thought_only:
        segments.clear()
        return ""
    raise RowError(
        "the template rewrites an earlier turn once later ones follow; set mask_history: true to train on the last "
        "reply alone"
    )


def _check_complete(conversation: Conversation, segments: Sequence[Segment]) -> None:
    """Templates made for chat alone pass over tools and reasoning without a word; such a row would teach nonsense."""
    for tool in conversation.tools or ():
        if tool["function"]["name"] not in segments[0].text:
            raise RowError(f"the template leaves out the tool {tool['function']['name']!r}")
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
        if lost:
            raise RowError(
                f"the template leaves out part of a message from {message['role']}: {lost[0].strip()[:40]!r}; use a "
                "template that writes it, or take it out of the row"
            )


def is_written(piece: str, text: str) -> bool:
    """Whether the piece is in the text, as it is or (Llama 3.1's results, gpt-oss's) as JSON writes it."""
    return piece in text or any(
        json.dumps(piece, ensure_ascii=ascii_only)[1:-1] in text for ascii_only in (False, True)
    )
