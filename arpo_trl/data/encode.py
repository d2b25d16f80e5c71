"""Rows -> encoded rows, in the rows' order: the tokens and labels of each, and what became of it.

A row is read (`to_conversation`), fitted to the template (`Template.fit`), rendered (`to_segments`), its `mask_spans`
marked (`mask_replies`), tokenised and labelled (`to_examples`), and described (`EncodedRow`), which `cache.py` stores.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from ..errors import RowError
from ..recipe.keys import Recipe
from .files import Row
from .labels import IGNORED, Example, ExampleConfig, Tokenize, carry_loss, mask_replies, to_examples
from .messages import Conversation, to_conversation
from .registry import DatasetInfo
from .segments import Segment, to_segments
from .strict_json import excerpt
from .template import Template
from .tokenizer import check_parity, make_tokenize

BATCH_CHARACTERS = 1 << 20
PARITY_ROWS = 32
EXCERPT = 160


class EncodedRow(TypedDict):
    """One row of a dataset, dropped ones too: these are the columns of an encoded dataset.

    `input_ids` and `labels` (-100: no loss) have the shape (tokens,), and are empty where the row was dropped.
    `source`: "file:line". `cut`: tokens past the cutoff. `outcome`: kept, shortened, lost_answer or dropped; `reason`
    and `excerpt` (the first characters of the row) are empty where it was kept. `fields`: the names of the row's own
    columns. `also`: the JSON of `Example.also`, or empty.
    """

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    source: str
    trained_tokens: int
    cut: int
    outcome: str
    reason: str
    excerpt: str
    fields: list[str]
    also: str


@dataclass(frozen=True)
class Encoder:
    """All that decides what a dataset's rows become. It can be pickled, for the processes that encode."""

    info: DatasetInfo
    recipe: Recipe
    template: Template

    @property
    def config(self) -> ExampleConfig:
        r = self.recipe
        return ExampleConfig(r.cutoff_len, r.mask_history, r.train_on_prompt, r.truncation_mode, r.mask_spans)

    def read(self, row: Row) -> Conversation:
        """Raises RowError where the row could not be read, or is malformed."""
        if isinstance(row.value, RowError):
            raise row.value
        return self.template.fit(to_conversation(row.value, self.info, self.recipe.default_system))


def encode_rows(rows: Iterable[Row], encoder: Encoder) -> Iterator[EncodedRow]:
    """`encode_batches`, row by row."""
    return chain.from_iterable(encode_batches(rows, encoder))


def encode_batches(rows: Iterable[Row], encoder: Encoder) -> Iterator[list[EncodedRow]]:
    """Encode rows in batches, since the tokenizer (Rust, on every core) takes many texts at once.

    Two threads: one batch is rendered while another is tokenised.

    Raises:
        DatasetError: if one of the first rows fails the parity check.
    """
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
    """The same rows, once the first of them have passed `check_parity`."""
    sample = list(islice(rows, PARITY_ROWS))
    for row in sample:
        try:
            check_parity(encoder.read(row), encoder.template, encoder.config, row.place)
        except RowError:
            continue  # The row's outcome will say so.
    return chain(sample, rows)


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
    recipe = encoder.recipe
    rendered = [_render(row, encoder) for row in rows]
    segments = [found[1] for found in rendered if not isinstance(found, RowError)]
    examples = iter(to_examples(segments, tokenize, encoder.config))
    results = [
        found if isinstance(found, RowError) else _complete(next(examples), found[0], recipe) for found in rendered
    ]
    return [_to_columns(row, result, recipe.cutoff_len) for row, result in zip(rows, results)]


def _render(row: Row, encoder: Encoder) -> tuple[Conversation, list[Segment]] | RowError:
    config, template = encoder.config, encoder.template
    try:
        conversation = encoder.read(row)
        segments = mask_replies(to_segments(conversation, template), template, config.mask_spans)
    except RowError as error:
        return error
    if any(carry_loss(segments, config)):
        return conversation, segments
    which = "the last" if config.mask_history else "every"
    spans = " or all of it is masked by mask_spans" if config.mask_spans else ""
    return RowError(f"no trained token: {which} reply has loss: false{spans}")


def _complete(example: Example, conversation: Conversation, recipe: Recipe) -> Example | RowError:
    """The example with what is known of its conversation, or why it can't be trained on."""
    if all(label == IGNORED for label in example.labels):
        more = "" if recipe.truncation_mode == "llamafactory" else ", or set truncation_mode: llamafactory"
        return RowError(f"only labels past the cutoff: raise cutoff_len ({recipe.cutoff_len}){more}")
    example.left_out = len(conversation.messages) - conversation.replies[-1] - 1
    example.also += conversation.unread
    return example


def _to_columns(row: Row, result: Example | RowError, cutoff_len: int) -> EncodedRow:
    example = Example() if isinstance(result, RowError) else result
    labels = np.array(example.labels, np.int32)
    outcome, reason = _outcome(result, cutoff_len)
    shown = "" if outcome == "kept" or isinstance(row.value, RowError) else excerpt(row.value, EXCERPT)
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
        "also": json.dumps(example.also) if example.also else "",
    }


def _outcome(result: Example | RowError, cutoff_len: int) -> tuple[str, str]:
    """What became of the row, and why."""
    if isinstance(result, RowError):
        return "dropped", str(result)
    past = f"{result.cut} tokens past the cutoff of {cutoff_len}"
    after = f"{result.left_out} turn{'s' * (result.left_out > 1)} after the last reply"
    reason = " and ".join(text for text, number in ((after, result.left_out), (past, result.cut)) if number)
    return "lost_answer" if result.lost_answer else "shortened" if reason else "kept", reason


def _storable(text: str) -> str:
    """Arrow's strings are UTF-8: half a surrogate pair is written as its escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
