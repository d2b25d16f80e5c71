"""Rows -> encoded rows, in the same order: the tokens and labels of each, and its outcome.

A row is read (`to_conversation`), fitted to the template (`Template.fit`), rendered (`to_segments`), its `mask_spans`
marked (`mask_replies`), tokenized and labelled (`to_examples`), and described (`EncodedRow`), which `cache.py` stores.
"""

import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice
from typing import Annotated, TypedDict, get_type_hints

import numpy as np
import numpy.typing as npt
from datasets import Features, List, Value

from ..errors import DatasetError, RowError
from ..recipe.keys import Recipe
from .files import Row
from .labels import IGNORED, Example, ExampleConfig, Tokenize, mask_replies, to_examples, trained_segments
from .messages import Conversation
from .pairs import SIDES, Rendered, read_sides, side_start, split_answers, to_pair_examples
from .registry import DatasetInfo
from .segments import Segment, TurnEndError, as_rendered, is_written, to_segments
from .strict_json import excerpt
from .template import Template
from .tokenizer import decode, make_tokenize

RESULT = re.compile(r"<result>.+?</result>", re.DOTALL)
BATCH_CHARACTERS = 1 << 20
PARITY_ROWS = 32
EXCERPT = 160


class RowNote(TypedDict):
    """Something that the audit counts in a row (`Example.notes`)."""

    kind: str
    name: str
    count: int


class EncodedRow(TypedDict):
    """One row of a dataset, dropped or not: the columns of an encoded dataset, with their Arrow types.

    `input_ids` and `labels` (-100: masked) have the shape (tokens,), and are empty if the row was dropped. `source`:
    "file:line". `cut`: tokens past the cutoff. `outcome`: intact, shortened, lost_answer or dropped; `reason` and `excerpt`
    (the first characters of the row) are empty if it is intact. `fields`: the row's own columns. `seq_lengths`: of a pair,
    the tokens of the chosen and of the rejected side; empty for other rows.
    """

    input_ids: Annotated[npt.NDArray[np.int32], List(Value("int32"))]
    labels: Annotated[npt.NDArray[np.int32], List(Value("int32"))]
    source: Annotated[str, Value("string")]
    trained_tokens: Annotated[int, Value("int64")]
    cut: Annotated[int, Value("int64")]
    outcome: Annotated[str, Value("string")]
    reason: Annotated[str, Value("string")]
    excerpt: Annotated[str, Value("string")]
    fields: Annotated[list[str], List(Value("string"))]
    seq_lengths: Annotated[list[int], List(Value("int32"))]
    notes: Annotated[list[RowNote], List({"kind": Value("string"), "name": Value("string"), "count": Value("int64")})]


FEATURES = Features(
    {name: hint.__metadata__[0] for name, hint in get_type_hints(EncodedRow, include_extras=True).items()}
)


@dataclass(frozen=True)
class Encoder:
    """Everything that decides how the rows of a dataset are encoded."""

    info: DatasetInfo
    recipe: Recipe
    template: Template

    @property
    def config(self) -> ExampleConfig:
        r = self.recipe
        return ExampleConfig(r.cutoff_len, r.mask_history, r.train_on_prompt, r.truncation_mode, r.mask_spans)

    def read_sides(self, row: Row) -> list[Conversation]:
        """Read a row as one conversation, or a pair as two, and fit them. Raises RowError if it is malformed."""
        if isinstance(row.value, RowError):
            raise row.value
        return [self.template.fit(side) for side in read_sides(row.value, self.info, self.recipe.default_system)]


def encode_rows(rows: Iterable[Row], encoder: Encoder) -> Iterator[EncodedRow]:
    """Encode rows one by one, as `encode_batches` does."""
    return chain.from_iterable(encode_batches(rows, encoder))


def encode_batches(rows: Iterable[Row], encoder: Encoder) -> Iterator[list[EncodedRow]]:
    """Encode rows in batches, since the tokenizer (Rust, on all cores) takes many texts at once.

    One thread renders a batch while another tokenizes the previous one.

    Raises:
        DatasetError: one of the first rows fails the parity check.
    """
    if encoder.info.ranking and encoder.recipe.pair_all_answers:
        rows = chain.from_iterable(split_answers(row, encoder.info) for row in rows)
    rows = _check_first(iter(rows), encoder)
    tokenize = make_tokenize(encoder.template.tokenizer, with_offsets=bool(encoder.recipe.mask_spans))
    running: deque[Future[list[EncodedRow]]] = deque()
    with ThreadPoolExecutor(2) as pool:
        for batch in _batches(rows, encoder.recipe.preprocessing_batch_size):
            running.append(pool.submit(_encode_batch, batch, encoder, tokenize))
            if len(running) > 2:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _check_first(rows: Iterator[Row], encoder: Encoder) -> Iterator[Row]:
    """Return the same rows after the first of them have passed `check_parity`, and not all have a wrong end."""
    sample = list(islice(rows, PARITY_ROWS))
    wrong: list[str] = []
    for row in sample:
        try:
            for conversation in encoder.read_sides(row):
                check_parity(conversation, encoder.template, encoder.config, row.place)
        except TurnEndError as error:
            wrong.append(f"{row.place}: {error}")
        except RowError:
            continue  # becomes the row's outcome
    if len(wrong) == len(sample) > 1:
        raise DatasetError(f"{wrong[0]}; the same in all of the first {len(wrong)} rows: use another template")
    return chain(sample, rows)


def check_parity(conversation: Conversation, template: Template, config: ExampleConfig, location: str) -> None:
    """Check one row before training: its segments joined are the conversation, and its labels are the replies.

    Compares decoded tokens: all of them with the conversation rendered and tokenized at once, each trained run for its
    end-of-turn token, and the rest for the text of every message that must be masked.

    Raises:
        DatasetError: names the row and the difference.
        RowError: the row can't be rendered.
    """
    tokenizer, template = template.tokenizer, template.of_row(conversation)

    def failed(reason: str) -> DatasetError:
        return DatasetError(f"{location}: {reason}; use another template")

    config, tokenize = replace(config, cutoff_len=sys.maxsize), make_tokenize(tokenizer)
    segments = to_segments(conversation, template)
    messages = conversation.messages[: conversation.replies[-1] + 1]
    (at_once,) = tokenize(["".join(segment.text for segment in segments)])
    if tokenizer.eos_token != template.end_of_turn:
        raise failed(f"turns do not end with the eos token {tokenizer.eos_token!r}")
    (example,) = to_examples([segments], tokenize, config)
    rendered = as_rendered(segments) == template.render(messages, conversation.tools, False)
    if not rendered or decode(tokenizer, example.input_ids) != decode(tokenizer, at_once.ids):
        raise failed("the encoded text differs from the rendered chat template")
    if config.train_on_prompt:
        return
    runs = [list(run) for trained, run in groupby(example.labels, lambda label: label != IGNORED) if trained]
    ends = {tokenizer.convert_tokens_to_ids(end) for end in (*template.turn_ends, *template.stops)}
    replies = [segment.text for segment, trained in zip(segments, trained_segments(segments, config)) if trained]
    if sum(not ends.isdisjoint(run) for run in runs) < sum(template.find_end(reply) is not None for reply in replies):
        raise failed(f"a reply is trained without its end-of-turn token {tokenizer.eos_token!r}")
    masked = decode(tokenizer, [token for token, label in zip(example.input_ids, example.labels) if label == IGNORED])
    for message in messages:
        (text,) = tokenize([message["content"].strip()])
        if message["role"] != "assistant" and not is_written(decode(tokenizer, text.ids).strip(), masked):
            raise failed(f"a {message['role']} message is not fully masked")


def _batches(rows: Iterable[Row], most: int) -> Iterator[list[Row]]:
    batch, characters = [], 0
    for row in rows:
        batch.append(row)
        characters += len(repr(row.value))
        if len(batch) == most or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode_batch(rows: list[Row], encoder: Encoder, tokenize: Tokenize) -> list[EncodedRow]:
    rendered = [_render(row, encoder) for row in rows]
    complete = [sides for sides in rendered if not isinstance(sides, RowError)]
    examples: Iterator[Example | RowError]
    if encoder.info.ranking:
        examples = iter(to_pair_examples(complete, tokenize, encoder.config))
    else:
        examples = iter(to_examples([segments for ((_, segments),) in complete], tokenize, encoder.config))
    results = [
        sides if isinstance(sides, RowError) else _complete(next(examples), sides, encoder) for sides in rendered
    ]
    return [_to_columns(row, result, encoder.recipe.cutoff_len) for row, result in zip(rows, results)]


def _render(row: Row, encoder: Encoder) -> list[Rendered] | RowError:
    """Return the conversation of a row, or both of a pair, with its segments."""
    config, template = encoder.config, encoder.template
    rendered: list[Rendered] = []
    try:
        for conversation in encoder.read_sides(row):
            segments = mask_replies(to_segments(conversation, template), template, config.mask_spans)
            if encoder.info.ranking:
                side_start(conversation, segments)  # raises RowError
            rendered.append((conversation, segments))
    except RowError as error:
        return error
    for (_, segments), side in zip(rendered, SIDES):
        if not any(trained_segments(segments, config)):
            which = f"every reply of {side!r}" if len(rendered) > 1 else "every reply"
            spans = " or is masked by mask_spans" if config.mask_spans else ""
            return RowError(
                f"no trained token: {'the last reply' if config.mask_history else which} has loss: false{spans}"
            )
    return rendered


def _complete(example: Example | RowError, sides: list[Rendered], encoder: Encoder) -> Example | RowError:
    """Add what is known of the conversations to their example, or return why it can't be trained on."""
    if isinstance(example, RowError):
        return example
    recipe, config, template = encoder.recipe, encoder.config, encoder.template
    if all(label == IGNORED for label in example.labels):
        more = "" if recipe.truncation_mode == "llamafactory" else ", or set truncation_mode: llamafactory"
        return RowError(f"all trained tokens are past cutoff_len {recipe.cutoff_len}; raise it{more}")
    for conversation, _ in sides:
        example.left_out += len(conversation.messages) - conversation.replies[-1] - 1
        example.notes += conversation.unread
        if (switch := template.thinking_switch) and template.of_row(conversation).thinking_switch:
            example.notes["thinking switch", switch] = 1
    if any(_trains_on_result(segments, config) for _, segments in sides):
        example.notes["result inside", "<result>"] = 1
    return example


def _trains_on_result(segments: Sequence[Segment], config: ExampleConfig) -> bool:
    """Return whether a trained reply has a tool result that mask_spans does not mask."""
    trained = (segment for segment, is_trained in zip(segments, trained_segments(segments, config)) if is_trained)
    return any(
        not any(span.start <= match.start() < span.end for span in segment.spans)
        for segment in trained
        for match in RESULT.finditer(segment.text)
    )


def _to_columns(row: Row, result: Example | RowError, cutoff_len: int) -> EncodedRow:
    example = Example() if isinstance(result, RowError) else result
    labels = np.array(example.labels, np.int32)
    outcome, reason = _outcome(result, cutoff_len)
    shown = "" if outcome == "intact" or isinstance(row.value, RowError) else excerpt(row.value, EXCERPT)
    return {
        "input_ids": np.array(example.input_ids, np.int32),
        "labels": labels,
        "source": row.place,
        "trained_tokens": int(np.count_nonzero(labels != IGNORED)),
        "cut": example.cut,
        "outcome": outcome,
        "reason": _storable(reason),
        "excerpt": _storable(shown),
        "fields": [_storable(str(name)) for name in row.value] if isinstance(row.value, dict) else [],
        "seq_lengths": example.seq_lengths,
        "notes": [
            {"kind": kind, "name": _storable(name), "count": count} for (kind, name), count in example.notes.items()
        ],
    }


def _outcome(result: Example | RowError, cutoff_len: int) -> tuple[str, str]:
    """Return the outcome of the row, and the reason."""
    if isinstance(result, RowError):
        return "dropped", str(result)
    past = f"{result.cut} tokens past the cutoff of {cutoff_len}"
    after = f"{result.left_out} turn{'s' * (result.left_out > 1)} after the last reply"
    reason = " and ".join(text for text, number in ((after, result.left_out), (past, result.cut)) if number)
    return "lost_answer" if result.lost_answer else "shortened" if reason else "intact", reason


def _storable(text: str) -> str:
    """Escape lone surrogates, since Arrow's strings are UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
