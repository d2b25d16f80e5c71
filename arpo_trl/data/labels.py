"""Messages -> input_ids and labels: which tokens carry loss. Pure functions over a template and a `tokenize`.

Loss falls on exactly what the model would have to generate: each assistant turn's text after the generation prompt, up
to and including its end-of-turn token and the newline that the template writes after it. All else carries -100, and so
do the spans inside a reply that `mask_spans` names (what a tool wrote, where a whole trajectory is one reply).

The chat template is rendered up to each generation prompt and up to each reply's end; the pieces between are the
segments. Each segment is tokenised alone: as one string, "assistant\\n" + "\\nhello" would merge into a single "\\n\\n"
token, which the model never sees at inference.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, takewhile
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ..errors import DatasetError, RowError
from ..recipe.types import compile_span
from .messages import Conversation, Message

if TYPE_CHECKING:
    from .template import Template

IGNORED = -100
WINDOW = 8  # replies
MOST_REPLIES = 2000
SPAN_SECONDS = 2.0


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


@dataclass
class Example:
    """`cut`: tokens lost to the cutoff. `lost_answer`: no token of the last reply is left. `left_out`: later messages.

    `also`: what else the audit counts, in words that wait for the number: fields not read, matches of `mask_spans`.
    """

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    cut: int = 0
    lost_answer: bool = False
    left_out: int = 0
    also: Counter[str] = field(default_factory=Counter)


class Tokenize(Protocol):
    """Texts -> the token ids of each, without special tokens added; `before`: the text that each goes on from, or ""."""

    def __call__(self, texts: list[str], before: Sequence[str] = ()) -> Iterable[list[int]]: ...


class FindOffsets(Protocol):
    """A text, and the one that it goes on from -> the characters of each of its tokens, (start, end)."""

    def __call__(self, text: str, before: str = "") -> list[tuple[int, int]]: ...


@dataclass(frozen=True)
class ExampleConfig:
    """What carries loss, and where a row ends: the recipe's keys of the same names."""

    cutoff_len: int
    mask_history: bool = False
    train_on_prompt: bool = False
    truncation_mode: str = "keep_start"
    mask_spans: Sequence[str] = ()


def to_segments(conversation: Conversation, template: Template, mask_spans: Sequence[str] = ()) -> list[Segment]:
    """The rendered conversation in pieces that alternate between context and reply, the last being a reply.

    Messages after the last reply are left out: nothing that follows could be learnt from them.

    Raises:
        DatasetError: if an entry of `mask_spans` takes longer than SPAN_SECONDS on a reply.
        RowError: if the template refuses the conversation, rewrites what it rendered before, leaves text out, or does
            not end a reply that may be trained.
    """
    segments = _render_long(conversation, template, mask_spans)
    if segments is None:
        segments = _render_turns(conversation, template, mask_spans, len(conversation.replies))
    _check_complete(conversation.messages[: conversation.replies[-1] + 1], conversation.tools or [], segments)
    try:
        "".join(segment.text for segment in segments).encode("utf-8")
    except UnicodeEncodeError:
        raise RowError("not UTF-8: the text holds half a surrogate pair or a byte that is no character") from None
    return segments


def _render_long(conversation: Conversation, template: Template, mask_spans: Sequence[str]) -> list[Segment] | None:
    """The segments of a row of many replies, at a cost in proportion to them, if that gives what the template writes.

    Raises:
        RowError: if it does not, and the row is so long that rendering all that comes before each reply takes hours.
    """
    messages, replies = conversation.messages[: conversation.replies[-1] + 1], len(conversation.replies)
    if replies <= 2 * WINDOW:
        return None
    with suppress(RowError):
        segments = _render_turns(conversation, template, mask_spans, WINDOW)
        if "".join(segment.text for segment in segments) == template.render(messages, conversation.tools, False):
            return segments
    if replies > MOST_REPLIES:
        raise RowError(f"too long: the template writes some of its {replies:,} replies differently once others follow")
    return None


def _render_turns(
    conversation: Conversation, template: Template, mask_spans: Sequence[str], window: int
) -> list[Segment]:
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
        if position:
            until_prompt = template.render(before, tools, True)
        else:  # Most templates look at the first message, and there is none before this reply.
            until_prompt = until_reply[: until_reply.find(template.generation_prompt)] + template.generation_prompt
        if not until_reply.startswith(until_prompt):
            until_prompt = _open_reply(before, tools, template, until_prompt, until_reply)
        if not until_prompt.startswith(done):
            done = _join_turns(done, until_prompt, template, segments)
        context, reply = until_prompt[len(done) :], until_reply[len(until_prompt) :]
        if not template.enable_thinking and template.empty_thought and reply.startswith(template.empty_thought):
            context, reply = context + template.empty_thought, reply.removeprefix(template.empty_thought)
        masked = not messages[position].get("trained", True)
        if not masked and not template.ends(reply):
            raise RowError(f"the template ends message {position + 1} without its end-of-turn token")
        between = messages[start:position]
        segments.append(Segment(context, not all(message.get("trained", True) for message in between)))
        segments.append(_mask(Segment(reply, masked), template, mask_spans))
        done, start = until_reply, position + 1
    return segments


def shared_start(one: str, other: str) -> str:
    """What two texts begin with alike, never with the first half of a tag."""
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))
    return one[:alike] if alike in (len(one), len(other)) else re.sub(r"<[^<>]*$", "", one[:alike])


def _open_reply(messages: list[Message], tools: Any, template: Template, prompt: str, until_reply: str) -> str:
    """The context of a reply that does not begin as the generation prompt does: what both share.

    DeepSeek-R1's prompt opens a thought. A reply without one begins before it, since the model has to write otherwise.
    """
    shared = shared_start(prompt, until_reply)
    if len(shared) <= len(template.render(messages, tools, False)):
        raise RowError("the template writes the reply other than its generation prompt begins it")
    return shared


def _join_turns(done: str, until_prompt: str, template: Template, segments: list[Segment]) -> str:
    """Where the next context begins, if the template writes what is done in another way once a turn follows.

    The end of a reply may change: gpt-oss ends the last one with <|return|>, as the model does, and an earlier one with
    <|end|>, which the model does not write there, so it is context. If only the last reply is trained, all is context.

    Raises:
        RowError: if more than that changes.
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


def _mask(reply: Segment, template: Template, mask_spans: Sequence[str]) -> Segment:
    """The reply with the spans found in its text before the end of its turn; where they are all of it, masked whole."""
    if reply.masked or not mask_spans:
        return reply
    text = reply.text[: max(reply.text.rfind(end) for end in (template.end_of_turn, template.call_end) if end)]
    spans = find_spans(text, mask_spans)
    left = list(text)
    for span in spans:
        left[span.start : span.end] = " " * (span.end - span.start)
    return reply._replace(spans=tuple(spans), masked=bool(spans) and not "".join(left).strip())


def find_spans(text: str, mask_spans: Sequence[str]) -> list[Span]:
    """Where the entries match: a name stands for `<name>..</name>`, anything else is a regular expression.

    Raises:
        DatasetError: if an entry takes longer than SPAN_SECONDS.
    """
    spans = []
    for pattern in mask_spans:
        try:
            found = compile_span(pattern).finditer(text, timeout=SPAN_SECONDS)
            spans += [Span(match.start(), match.end(), pattern) for match in found if match.end() > match.start()]
        except TimeoutError:
            raise DatasetError(
                f"mask_spans: {pattern!r} takes longer than {SPAN_SECONDS:g} s on one reply, which begins "
                f"{text[:40]!r}; write it without nested repetition"
            ) from None
    return spans


def _check_complete(messages: Sequence[Message], tools: Sequence[dict[str, Any]], segments: Sequence[Segment]) -> None:
    """Templates made for chat alone pass over tools and reasoning without a word; such a row would teach nonsense."""
    pairs = iter(segments)
    context = next(pairs).text
    for tool in tools:
        if tool["function"]["name"] not in context:
            raise RowError(f"the template leaves out the tool {tool['function']['name']!r}")
    in_context = sum(message["role"] == "assistant" for message in messages) - len(segments) // 2
    for message in messages:
        text = context
        if message["role"] == "assistant" and in_context:
            in_context -= 1
        elif message["role"] == "assistant":
            text = next(pairs).text
            context = next(pairs, Segment("")).text
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


def carry_loss(row: Sequence[Segment], config: ExampleConfig) -> list[bool]:
    """Which of a row's segments carry loss.

    Replies do; with `mask_history` the last alone; with `train_on_prompt` contexts too. A masked one never does: a
    context that holds a masked message is masked whole.
    """
    first = len(row) - 1 if config.mask_history else 1
    asked = [config.train_on_prompt or (at % 2 == 1 and at >= first) for at in range(len(row))]
    return [wanted and not segment.masked for wanted, segment in zip(asked, row)]


def to_examples(
    rows: Sequence[Sequence[Segment]],
    tokenize: Tokenize,
    config: ExampleConfig,
    find_offsets: FindOffsets | None = None,
) -> list[Example]:
    """Tokenise all segments of a batch of rows in one call, join each row's, label them and cut them to the cutoff.

    `find_offsets` is needed where segments have spans.
    """
    before = [["", *(segment.text for segment in row[:-1])] for row in rows]
    tokens = iter(tokenize([segment.text for row in rows for segment in row], [*chain.from_iterable(before)]))
    examples = []
    for row, texts_before in zip(rows, before):
        pieces = [next(tokens) for _ in row]
        lengths = [len(piece) for piece in pieces]
        if config.truncation_mode == "llamafactory":
            kept = proportional_cut(lengths, config.cutoff_len, from_the_end=config.mask_history)
        else:
            kept = keep_start(lengths, config.cutoff_len)
        example = Example(cut=sum(lengths) - sum(kept), lost_answer=not kept[-1])
        carries = carry_loss(row, config)
        for segment, text, trained, piece, length in zip(row, texts_before, carries, pieces, kept, strict=True):
            piece = piece if length == len(piece) else piece[:length]
            example.input_ids += piece
            example.also.update(matches_of(span.pattern) for span in segment.spans)
            if trained and segment.spans and find_offsets:
                at = find_offsets(segment.text, text)[:length]
                labels = [IGNORED if _touches(segment.spans, a) else token for token, a in zip(piece, at, strict=True)]
                example.also["mask_spans: tokens masked: {}"] += labels.count(IGNORED)
                example.labels += labels
            else:
                example.labels += piece if trained else [IGNORED] * length
        examples.append(example)
    return examples


def matches_of(entry: str) -> str:
    """Under what the audit counts the matches of an entry of mask_spans."""
    return f"mask_spans: matches of {entry}: {{}}"


def _touches(spans: Sequence[Span], token: tuple[int, int]) -> bool:
    """A token that reaches over a span's border is masked: part of it is not the model's to write."""
    start, end = token
    return any(start < span.end and span.start < end for span in spans)


def keep_start(lengths: Sequence[int], cutoff_len: int) -> list[int]:
    """A plain cut: what is kept is always a true prefix of the conversation."""
    kept = []
    for length in lengths:
        kept.append(min(length, cutoff_len))
        cutoff_len -= kept[-1]
    return kept


def proportional_cut(lengths: Sequence[int], cutoff_len: int, from_the_end: bool = False) -> list[int]:
    """LLaMA-Factory's cut, pair by pair (context, reply), as version 0.9.5 behaves.

    Each pair is offered what the pairs before it left over. A reply shorter than half of that is kept whole; a longer
    one may fill what a context shorter than half leaves; if both are long they share in proportion. The context has the
    rest. Both are cut at their ends. When nothing is left, later pairs are dropped. With mask_history the pairs are
    taken from the last to the first.
    """
    kept = [0] * len(lengths)
    starts = range(0, len(lengths), 2)
    for at in reversed(starts) if from_the_end else starts:
        if cutoff_len <= 0:
            break
        context, reply = lengths[at], lengths[at + 1]
        if reply * 2 < cutoff_len:
            most = cutoff_len
        elif context * 2 < cutoff_len:
            most = cutoff_len - context
        else:
            most = int(cutoff_len * reply / (context + reply))
        kept[at + 1] = min(most, reply)
        kept[at] = min(max(cutoff_len - kept[at + 1], 0), context)
        cutoff_len -= kept[at] + kept[at + 1]
    return kept
