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
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from .audit import Counts, count_row
from .encoding import IGNORED, EncodingConfig, Example, Segment, encode, to_segments
from .errors import RowError
from .messages import to_conversation
from .recipe import Recipe
from .registry import DatasetInfo
from .rows import Row
from .template import Template, check_parity, find_template, make_tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())), ("source", pa.string())])
BATCH_CHARACTERS = 1 << 20
GATE_ROWS = 32


@dataclass(frozen=True)
class Batch:
    """Encoded rows as SCHEMA has them, and what `row_audit.jsonl` says of the rows that were not simply kept."""

    encoded: pa.RecordBatch
    counts: Counts
    findings: list[dict[str, str]]


def encode_rows(
    rows: Iterable[Row],
    info: DatasetInfo,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    workers: int = 1,
) -> Iterator[Batch]:
    """Encode rows batch by batch, in their order, whatever the number of workers.

    One worker is two threads here: the tokenizer (Rust, on every core) takes one batch while the other is rendered.
    """
    if workers == 1:
        pool: Executor = ThreadPoolExecutor(2)
        work: Callable[[list[Row]], Batch] = partial(
            _encode_batch, info, recipe, find_template(tokenizer), make_tokenize(tokenizer)
        )
    else:
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, spawn, _start_worker, (info, recipe, tokenizer))
        work = _encode_in_worker
    running: deque[Future[Batch]] = deque()
    with pool:
        for batch in _batches(rows, recipe.preprocessing_batch_size):
            running.append(pool.submit(work, batch))
            if len(running) > workers + 1:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()


def _encode_batch(
    info: DatasetInfo,
    recipe: Recipe,
    template: Template,
    tokenize: Callable[[list[str]], Iterable[list[int]]],
    rows: list[Row],
) -> Batch:
    config = encoding_config(recipe)
    rendered: list[list[Segment] | RowError] = []
    for row in rows:
        try:
            if isinstance(row.value, RowError):
                raise row.value
            conversation = to_conversation(row.value, info, recipe.default_system)
            rendered.append(to_segments(conversation, template.render, config, template.generation_prompt))
        except RowError as error:
            rendered.append(error)
    examples = iter(encode([segments for segments in rendered if isinstance(segments, list)], tokenize, config))
    kept: list[tuple[str, Example]] = []
    counts, findings = Counts(), []
    for row, segments in zip(rows, rendered):
        result = segments if isinstance(segments, RowError) else _with_labels(next(examples))
        if isinstance(result, Example):
            kept.append((row.place, result))
        if finding := count_row(counts, row, result, recipe.cutoff_len):
            findings.append({"dataset": info.name, **finding})
    return Batch(_to_arrow(kept), counts, findings)


def _to_arrow(examples: list[tuple[str, Example]]) -> pa.RecordBatch:
    ends = np.cumsum([0, *(len(example.input_ids) for _, example in examples)], dtype=np.int32)
    columns = ([example.input_ids for _, example in examples], [example.labels for _, example in examples])
    flat = [np.fromiter(chain.from_iterable(column), np.int32, ends[-1]) for column in columns]
    lists = [pa.ListArray.from_arrays(pa.array(ends), pa.array(values)) for values in flat]
    return pa.record_batch([*lists, pa.array([place for place, _ in examples], pa.string())], schema=SCHEMA)


_worker: Callable[[list[Row]], Batch]


def _start_worker(info: DatasetInfo, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # The processes are the parallelism.
    _worker = partial(_encode_batch, info, recipe, find_template(tokenizer), make_tokenize(tokenizer))


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


def _with_labels(example: Example) -> Example | RowError:
    if all(label == IGNORED for label in example.labels):
        return RowError(
            "only labels past the cutoff" if example.cut else "no trained token: every reply is kept silent"
        )
    return example


def through_the_gate(
    rows: Iterator[Row], info: DatasetInfo, recipe: Recipe, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Row]:
    """The same rows, once the first of them have passed `check_parity`."""
    sample, template = list(islice(rows, GATE_ROWS)), find_template(tokenizer)
    for row in sample:
        try:
            conversation = to_conversation(row.value, info, recipe.default_system)
            check_parity(conversation, tokenizer, template, encoding_config(recipe), row.place)
        except RowError:
            continue  # The audit will say so.
    return chain(sample, rows)


def encoding_config(recipe: Recipe) -> EncodingConfig:
    return EncodingConfig(recipe.cutoff_len, recipe.mask_history, recipe.train_on_prompt, recipe.truncation_mode)
