"""Segments and their tokens -> input_ids and labels, which decide the tokens that are trained.

Loss falls on exactly what the model has to generate: each reply from after the generation prompt through its end-of-turn
token and the newline that the template writes after it. Everything else is labelled -100, including the spans that
`mask_spans` matches inside a reply (tool results, if the whole trajectory is one reply). `trained_segments` decides by segment,
`mask_replies` finds the spans.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import NamedTuple, Protocol

from ..errors import DatasetError
from ..recipe.types import compile_span
from .messages import Note
from .segments import Segment, Span
from .template import Template

IGNORED = -100
SPAN_SECONDS = 2.0


@dataclass(frozen=True)
class ExampleConfig:
    """What is trained, and where a row is cut: the recipe's keys of the same names."""

    cutoff_len: int
    mask_history: bool = False
    train_on_prompt: bool = False
    truncation_mode: str = "keep_start"
    mask_spans: Sequence[str] = ()


@dataclass
class Example:
    """A row's tokens and labels.

    Attributes:
        cut: Tokens past the cutoff.
        lost_answer: No token of the last reply is left.
        left_out: Messages after the last reply.
        notes: Counts for the audit: ignored fields, matches of `mask_spans`.
        seq_lengths: Of a pair, the tokens of its chosen and of its rejected side, which follow one another.
    """

    input_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    cut: int = 0
    lost_answer: bool = False
    left_out: int = 0
    notes: Counter[Note] = field(default_factory=Counter)
    seq_lengths: list[int] = field(default_factory=list)


class Tokens(NamedTuple):
    """The token ids of a text and, if requested, the characters of each token as (start, end)."""

    ids: list[int]
    offsets: Sequence[tuple[int, int]] = ()


class Tokenize(Protocol):
    """Texts -> the tokens of each, without added special tokens; `before`: the text that each continues, or ""."""

    def __call__(self, texts: list[str], before: Sequence[str] = ()) -> Iterable[Tokens]: ...


def trained_segments(row: Sequence[Segment], config: ExampleConfig) -> list[bool]:
    """Return which segments of a row are trained.

    Replies are; with `mask_history` only the last; with `train_on_prompt` contexts too. A masked segment never is: a
    context with a masked message is masked completely.
    """
    first = len(row) - 1 if config.mask_history else 1
    chosen = (config.train_on_prompt or (at % 2 == 1 and at >= first) for at in range(len(row)))
    return [is_chosen and not segment.masked for is_chosen, segment in zip(chosen, row)]


def to_examples(rows: Sequence[Sequence[Segment]], tokenize: Tokenize, config: ExampleConfig) -> list[Example]:
    """Tokenize all segments of a batch of rows in one call, then join, label and truncate those of each row."""
    return [_to_example(row, tokens, config) for row, tokens in zip(rows, tokenize_segments(rows, tokenize))]


def tokenize_segments(rows: Sequence[Sequence[Segment]], tokenize: Tokenize) -> list[list[Tokens]]:
    """Tokenize all segments of a batch of rows in one call; `tokenize` must return offsets if segments have spans.

    A text after the same text is tokenized once: both sides of a pair have the prompt.
    """
    texts = [[segment.text for segment in row] for row in rows]
    parts = [list(zip(row, ["", *row[:-1]])) for row in texts]
    distinct = list(dict.fromkeys(part for row in parts for part in row))
    tokens = dict(
        zip(distinct, tokenize([text for text, _ in distinct], [before for _, before in distinct]), strict=True)
    )
    return [[tokens[part] for part in row] for row in parts]


def _to_example(row: Sequence[Segment], tokens: Sequence[Tokens], config: ExampleConfig) -> Example:
    lengths = [len(ids) for ids, _ in tokens]
    if config.truncation_mode == "llamafactory":
        kept = proportional_cut(lengths, config.cutoff_len, from_the_end=config.mask_history)
    else:
        kept = keep_start(lengths, config.cutoff_len)
    return join(row, tokens, kept, config)


def join(row: Sequence[Segment], tokens: Sequence[Tokens], kept: Sequence[int], config: ExampleConfig) -> Example:
    """Join the first tokens of each segment, as many as are `kept`, and label them."""
    example = Example(cut=sum(len(ids) for ids, _ in tokens) - sum(kept), lost_answer=not kept[-1])
    turn_end: int | None = None
    for segment, trained, text, length in zip(row, trained_segments(row, config), tokens, kept, strict=True):
        ids = text.ids[:length]
        labels = ids if trained else [IGNORED] * length
        if trained and segment.spans:
            # Mask tokens that straddle the border of a span: the model does not write all of them.
            outside = _outside(segment.text, segment.spans)
            offsets = zip(ids, text.offsets[:length], strict=True)
            labels = [IGNORED if 0 in outside[start:end] else token for token, (start, end) in offsets]
            example.notes["masked tokens", ""] += labels.count(IGNORED)
        if turn_end is not None and labels[:1] == [IGNORED]:
            labels[0] = turn_end
        turn_end = segment.end if trained else None
        example.input_ids += ids
        example.labels += labels
        example.notes.update(("mask_spans match", span.pattern) for span in segment.spans)
    return example


def mask_replies(row: Sequence[Segment], template: Template, mask_spans: Sequence[str]) -> list[Segment]:
    """Find the spans of each reply, before its end-of-turn token; mask a reply that contains nothing else.

    Raises:
        DatasetError: an entry takes longer than SPAN_SECONDS on one reply.
    """
    segments = list(row)
    for at, reply in enumerate(row):
        if at % 2 == 0 or reply.masked:
            continue
        text = template.without_end(reply.text)
        if spans := find_spans(text, mask_spans):
            left = "".join(compress(text, _outside(text, spans)))
            segments[at] = reply._replace(spans=tuple(spans), masked=not left.strip())
    return segments


def find_spans(text: str, mask_spans: Sequence[str]) -> list[Span]:
    """Find the matches of each entry: a name means `<name>..</name>`, anything else is a regular expression.

    Raises:
        DatasetError: an entry takes longer than SPAN_SECONDS.
    """
    spans = []
    for pattern in mask_spans:
        try:
            matches = compile_span(pattern).finditer(text, timeout=SPAN_SECONDS)
            spans += [Span(match.start(), match.end(), pattern) for match in matches if match.end() > match.start()]
        except TimeoutError:
            raise DatasetError(
                f"mask_spans: {pattern!r} takes longer than {SPAN_SECONDS:g} s on the reply that starts with "
                f"{text[:40]!r}; rewrite it without nested repetition"
            ) from None
    return spans


def _outside(text: str, spans: Iterable[Span]) -> bytearray:
    """Return 0 for each character inside a span, else 1."""
    outside = bytearray(b"\1" * len(text))
    for span in spans:
        outside[span.start : span.end] = bytes(span.end - span.start)
    return outside


def keep_start(lengths: Sequence[int], cutoff_len: int) -> list[int]:
    """Return how many tokens of each segment are kept so that the rest is a prefix of the conversation."""
    kept = []
    for length in lengths:
        kept.append(min(length, cutoff_len))
        cutoff_len -= kept[-1]
    return kept


def proportional_cut(lengths: Sequence[int], cutoff_len: int, from_the_end: bool = False) -> list[int]:
    """Return how many tokens of each segment LLaMA-Factory 0.9.5 keeps, pair by pair (context, reply).

    Each pair gets what the pairs before it left over. A reply shorter than half of that is kept in full; a longer one may
    fill what a context shorter than half leaves; if both are long, they share in proportion. The context gets the rest.
    Both are cut at their ends. Once nothing is left, later pairs are dropped. With mask_history the order of the pairs is
    reversed.
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
            most = int(cutoff_len * (reply / (context + reply)))  # rounds as LLaMA-Factory does
        kept[at + 1] = min(most, reply)
        kept[at] = min(max(cutoff_len - kept[at + 1], 0), context)
        cutoff_len -= kept[at] + kept[at + 1]
    return kept
