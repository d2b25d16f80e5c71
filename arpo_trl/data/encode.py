"""Rows -> batches of encoded rows, in the rows' order, on two threads or on several processes."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import pyarrow as pa

from ..errors import RowError
from ..recipe.keys import Recipe
from .audit import Counts, count_row
from .files import Row
from .labels import IGNORED, EncodingConfig, Example, Segment, carry_loss, encode, to_segments
from .messages import Conversation, to_conversation
from .registry import DatasetInfo
from .template import Template
from .tokenizer import check_parity, make_tokenize

SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())), ("source", pa.string())])
BATCH_CHARACTERS = 1 << 20
GATE_ROWS = 32


@dataclass(frozen=True)
class Encoder:
    """All that decides what a dataset's rows become. It can be pickled, for the processes that encode."""

    info: DatasetInfo
    recipe: Recipe
    template: Template

    @property
    def config(self) -> EncodingConfig:
        r = self.recipe
        return EncodingConfig(r.cutoff_len, r.mask_history, r.train_on_prompt, r.truncation_mode)

    def read(self, row: Row) -> Conversation:
        """Raises RowError where the row could not be read, or is malformed."""
        if isinstance(row.value, RowError):
            raise row.value
        return self.template.fit(to_conversation(row.value, self.info, self.recipe.default_system))


@dataclass(frozen=True)
class Batch:
    """Encoded rows as SCHEMA has them, and what `row_audit.jsonl` says of the rows that were not simply kept.

    `fields`: the first row's, and those of the columns that the registry names which any row has.
    """

    encoded: pa.RecordBatch
    counts: Counts
    findings: list[dict[str, str]]
    fields: frozenset[str]


def encode_rows(rows: Iterable[Row], encoder: Encoder, workers: int = 1) -> Iterator[Batch]:
    """Encode rows batch by batch, in their order, whatever the number of workers.

    One worker is two threads here: the tokenizer (Rust, on every core) takes one batch while the other is rendered.
    """
    if workers == 1:
        pool: Executor = ThreadPoolExecutor(2)
        work: Callable[[list[Row]], Batch] = partial(_encode_batch, encoder, make_tokenize(encoder.template.tokenizer))
    else:
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, spawn, _start_worker, (encoder,))
        work = _encode_in_worker
    running: deque[Future[Batch]] = deque()
    with pool:
        for batch in _batches(rows, encoder.recipe.preprocessing_batch_size):
            running.append(pool.submit(work, batch))
            if len(running) > workers + 1:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _encode_batch(encoder: Encoder, tokenize: Callable[[list[str]], Iterable[list[int]]], rows: list[Row]) -> Batch:
    rendered: list[tuple[list[Segment], int] | RowError] = []
    for row in rows:
        try:
            rendered.append(_render(row, encoder))
        except RowError as error:
            rendered.append(error)
    segments = [found[0] for found in rendered if not isinstance(found, RowError)]
    examples = iter(encode(segments, tokenize, encoder.config))
    kept: list[tuple[str, Example]] = []
    counts, findings = Counts(), []
    for row, found in zip(rows, rendered):
        result = found if isinstance(found, RowError) else _checked(next(examples), found[1])
        if isinstance(result, Example):
            kept.append((row.place, result))
        if finding := count_row(counts, row, result, encoder.recipe.cutoff_len):
            findings.append({"dataset": encoder.info.name, **finding})
    return Batch(_to_arrow(kept), counts, findings, _fields(encoder.info, rows))


def _render(row: Row, encoder: Encoder) -> tuple[list[Segment], int]:
    """The row's segments, and how many messages follow them."""
    conversation, config = encoder.read(row), encoder.config
    segments = to_segments(conversation, encoder.template)
    if not any(carry_loss(segments, config)):
        raise RowError(f"no trained token: {'the last' if config.mask_history else 'every'} reply is kept silent")
    return segments, len(conversation.messages) - conversation.replies[-1] - 1


def _checked(example: Example, left_out: int) -> Example | RowError:
    if all(label == IGNORED for label in example.labels):
        return RowError("only labels past the cutoff")
    example.left_out = left_out
    return example


def _fields(info: DatasetInfo, rows: list[Row]) -> frozenset[str]:
    values = [row.value for row in rows if isinstance(row.value, dict)]
    named = (info.columns[key] for key in info.named)
    return frozenset(
        [*(values[0] if values else ()), *(name for name in named if any(name in value for value in values))]
    )


def _to_arrow(examples: list[tuple[str, Example]]) -> pa.RecordBatch:
    ends = np.cumsum([0, *(len(example.input_ids) for _, example in examples)], dtype=np.int32)
    columns = ([example.input_ids for _, example in examples], [example.labels for _, example in examples])
    flat = [np.fromiter(chain.from_iterable(column), np.int32, ends[-1]) for column in columns]
    lists = [pa.ListArray.from_arrays(pa.array(ends), pa.array(values)) for values in flat]
    return pa.record_batch([*lists, pa.array([place for place, _ in examples], pa.string())], schema=SCHEMA)


_worker: Callable[[list[Row]], Batch]


def _start_worker(encoder: Encoder) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # The processes are the parallelism.
    _worker = partial(_encode_batch, encoder, make_tokenize(encoder.template.tokenizer))


def _encode_in_worker(rows: list[Row]) -> Batch:
    return _worker(rows)


def _batches(rows: Iterable[Row], most: int) -> Iterator[list[Row]]:
    batch, characters = [], 0
    for row in rows:
        batch.append(row)
        characters += _characters(row.value)
        if len(batch) == most or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _characters(value: Any) -> int:
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(_characters, value)) if isinstance(value, list) else len(value) if isinstance(value, str) else 1


def through_the_gate(rows: Iterator[Row], encoder: Encoder) -> Iterator[Row]:
    """The same rows, once the first of them have passed `check_parity`."""
    sample = list(islice(rows, GATE_ROWS))
    for row in sample:
        try:
            check_parity(encoder.read(row), encoder.template, encoder.config, row.place)
        except RowError:
            continue  # The audit will say so.
    return chain(sample, rows)
