"""Which tokens carry loss: segments and their tokens -> input_ids and labels.

Loss falls on exactly what the model would have to generate: each assistant turn's text after the generation prompt, up
to and including its end-of-turn token and the newline that the template writes after it. All else carries -100, and so
do the spans inside a reply that `mask_spans` names (what a tool wrote, where a whole trajectory is one reply).
`carry_loss` decides segment by segment, `mask_replies` finds the spans.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ..errors import DatasetError
from ..recipe.types import compile_span
from .segments import Segment, Span

if TYPE_CHECKING:
    from .template import Template

IGNORED = -100
SPAN_SECONDS = 2.0


@dataclass(frozen=True)
class ExampleConfig:
    """What carries loss, and where a row ends: the recipe's keys of the same names."""

    cutoff_len: int
    mask_history: bool = False
    train_on_prompt: bool = False
    truncation_mode: str = "keep_start"
    mask_spans: Sequence[str] = ()


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


class Tokens(NamedTuple):
    """A text's tokens: their ids, and the characters of each, (start, end), where these were asked for."""

    ids: list[int]
    offsets: Sequence[tuple[int, int]] = ()


class Tokenize(Protocol):
    """Texts -> the tokens of each, without special tokens added; `before`: the text that each goes on from, or ""."""

    def __call__(self, texts: list[str], before: Sequence[str] = ()) -> Iterable[Tokens]: ...


def carry_loss(row: Sequence[Segment], config: ExampleConfig) -> list[bool]:
    """Which of a row's segments carry loss.

    Replies do; with `mask_history` the last alone; with `train_on_prompt` contexts too. A masked one never does: a
    context that holds a masked message is masked whole.
    """
    first = len(row) - 1 if config.mask_history else 1
    asked = [config.train_on_prompt or (at % 2 == 1 and at >= first) for at in range(len(row))]
    return [wanted and not segment.masked for wanted, segment in zip(asked, row)]


def to_examples(rows: Sequence[Sequence[Segment]], tokenize: Tokenize, config: ExampleConfig) -> list[Example]:
    """Tokenise all segments of a batch of rows in one call, join each row's, label them and cut them to the cutoff.

    `tokenize` has to give offsets where segments have spans.
    """
    before = [text for row in rows for text in ("", *(segment.text for segment in row[:-1]))]
    tokens = iter(tokenize([segment.text for row in rows for segment in row], before))
    return [_to_example(row, [next(tokens) for _ in row], config) for row in rows]


def _to_example(row: Sequence[Segment], tokens: Sequence[Tokens], config: ExampleConfig) -> Example:
    lengths = [len(ids) for ids, _ in tokens]
    if config.truncation_mode == "llamafactory":
        kept = proportional_cut(lengths, config.cutoff_len, from_the_end=config.mask_history)
    else:
        kept = keep_start(lengths, config.cutoff_len)
    example = Example(cut=sum(lengths) - sum(kept), lost_answer=not kept[-1])
    for segment, trained, (ids, offsets), length in zip(row, carry_loss(row, config), tokens, kept, strict=True):
        ids = ids[:length]
        example.input_ids += ids
        example.also.update(matches_of(span.pattern) for span in segment.spans)
        if trained and segment.spans:
            # A token that reaches over a span's border is masked: part of it is not the model's to write.
            outside = _outside(segment.text, segment.spans)
            masked = [0 in outside[start:end] for start, end in offsets[:length]]
            example.labels += [IGNORED if hidden else token for token, hidden in zip(ids, masked, strict=True)]
            example.also["mask_spans: tokens masked: {}"] += sum(masked)
        else:
            example.labels += ids if trained else [IGNORED] * length
    return example


def mask_replies(row: Sequence[Segment], template: Template, mask_spans: Sequence[str]) -> list[Segment]:
    """The row with the spans of each reply's text before the end of its turn; a reply that is nothing else is masked.

    Raises:
        DatasetError: if an entry takes longer than SPAN_SECONDS on a reply.
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


def _outside(text: str, spans: Iterable[Span]) -> bytearray:
    """For each character, 0 if a span holds it, else 1."""
    outside = bytearray(b"\1" * len(text))
    for span in spans:
        outside[span.start : span.end] = bytes(span.end - span.start)
    return outside


def matches_of(entry: str) -> str:
    """Under what the audit counts the matches of an entry of mask_spans."""
    return f"mask_spans: matches of {entry}: {{}}"


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
