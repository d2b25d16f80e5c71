"""Files or hub -> audited, encoded, cached train and eval datasets.

Every row is accounted for: kept, shortened, lost its final answer, or dropped with its place and the reason. All but the
kept ones are listed beside the encoded rows, and in `row_audit.jsonl` in the folder of a run that trains on them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import pyarrow.compute as pc

from ..errors import DatasetError
from ..processes import on_main_process
from ..recipe.keys import Recipe
from .audit import Audit, Counts, StreamedFindings, missing_columns, to_lines, too_many_dropped
from .cache import ROWS_BEFORE_JUDGED, Encoded, find_or_encode
from .encode import SCHEMA, Encoder, encode_rows, through_the_gate
from .files import fingerprint, read_dataset
from .registry import select_datasets
from .template import template_of

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase


@dataclass
class PreparedData:
    """Columns: input_ids, labels (-100: no loss), source ("file:line"). `fingerprints`: content hash per dataset.

    `day`: the date that a dated chat template wrote.
    `lists`: per dataset that is not a stream, the file that lists its rows that were not simply kept.
    """

    train: Dataset | IterableDataset
    eval: dict[str, Dataset]
    audit: Audit
    fingerprints: dict[str, str]
    template_hash: str
    day: date
    lists: dict[str, Path] = field(default_factory=dict)
    streamed: StreamedFindings = field(default_factory=StreamedFindings)

    def write_audit(self, path: Path) -> None:
        """Write `row_audit.jsonl`, on the main process; the rows of a stream follow as they are read."""
        from accelerate import PartialState

        if not PartialState().is_main_process:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as audit:
            for part in self.lists.values():
                with part.open("rb") as lines:
                    shutil.copyfileobj(lines, audit)
        self.streamed.path = path
        self.streamed.add([])

    def listed(self) -> list[str]:
        """For people: where the rows are listed that were not simply kept."""
        paths = [path for path in self.lists.values() if path.stat().st_size]
        return [f"each row that was not simply kept is in {path}" for path in paths]


def prepare_datasets(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    """Encode what the recipe names, or find it encoded. Nothing is written into output_dir.

    On several processes the main one prepares while the others wait; on nodes that share no disk, the first of each.

    Raises:
        DatasetError: if the registry, a file, or more than `max_dropped` of a dataset's rows can't be used.
    """
    from accelerate import PartialState

    template = template_of(recipe, tokenizer)
    encoders = {info.name: Encoder(info, recipe, template) for info in select_datasets(recipe)}
    streamed = set(recipe.dataset) if recipe.streaming else set()
    state = PartialState()
    run = on_main_process(lambda: uuid4().hex)
    with state.main_process_first(), state.local_main_process_first():
        encoded = [find_or_encode(encoder, run) for name, encoder in encoders.items() if name not in streamed]
    dropped = (too_many_dropped(one.info.name, one.counts, recipe.max_dropped, one.audit) for one in encoded)
    if problems := list(chain.from_iterable(dropped)):
        raise DatasetError(problems)
    audit, findings = Audit({one.info.name: one.counts for one in encoded}), StreamedFindings()
    datasets: dict[str, Any] = {one.info.name: _draw(one, recipe) for one in encoded}
    fingerprints = {one.info.name: one.fingerprint for one in encoded}
    for name in [name for name in encoders if name in streamed]:
        fingerprints[name] = fingerprint(encoders[name].info, streaming=True)
        counts = audit.datasets[name] = Counts()
        datasets[name] = _stream(encoders[name], counts, findings if state.is_main_process else None)
    train = _mix([datasets[name] for name in recipe.dataset], recipe)
    evals = {name: datasets[name] for name in recipe.eval_dataset}
    if recipe.streaming and not recipe.disable_shuffling:
        train = train.shuffle(seed=recipe.seed, buffer_size=recipe.buffer_size)
    if recipe.val_size:
        train, evals["validation"] = _split(train, recipe)
    lists = {one.info.name: one.audit for one in encoded}
    return PreparedData(train, evals, audit, fingerprints, template.hash, template.day, lists, findings)


def token_lengths(rows: Dataset) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens of each row, in the rows' order: shape (rows,)."""
    batches = rows.select_columns("input_ids").with_format("arrow").iter(1000)
    lengths = [pc.list_value_length(batch["input_ids"]).to_numpy() for batch in batches]
    return np.concatenate([np.empty(0, np.int64), *lengths])


def _draw(encoded: Encoded, recipe: Recipe) -> Dataset:
    """LLaMA-Factory's order: num_samples of a dataset at random (again and again if it has fewer), then max_samples."""
    rows, wanted = encoded.rows, encoded.info.num_samples
    if wanted is None:
        return rows
    random = np.random.default_rng(recipe.seed)
    order = [random.permutation(len(rows)) for _ in range(-(-wanted // len(rows)))]
    return rows.select(np.concatenate(order)[:wanted][: recipe.max_samples])


def _stream(encoder: Encoder, counts: Counts, findings: StreamedFindings | None) -> IterableDataset:
    """Rows are encoded as they are asked for, and counted and judged on the first pass over them."""
    from datasets import Features, IterableDataset

    info, recipe = encoder.info, encoder.recipe
    fields = set[str]()

    def judge() -> None:
        path = findings.path if findings else None
        problems = too_many_dropped(info.name, counts, recipe.max_dropped, path)
        if problems := problems + missing_columns(info, fields, counts.rows):
            raise DatasetError(problems)

    def examples() -> Iterator[dict[str, Any]]:
        seen = 0
        rows = islice(read_dataset(info, recipe.streaming)[1], info.num_samples)
        for batch in encode_rows(through_the_gate(rows, encoder), encoder):
            seen += batch.counts.rows
            if seen > counts.rows:
                counts.add(batch.counts)
                fields.update(batch.fields)
                if findings:
                    findings.add(to_lines(batch.findings))
                if counts.rows >= ROWS_BEFORE_JUDGED:
                    judge()
            yield from batch.encoded.to_pylist()
        judge()

    return IterableDataset.from_generator(examples, features=Features.from_arrow_schema(SCHEMA))


def _split(dataset: Dataset | IterableDataset, recipe: Recipe) -> tuple[Dataset | IterableDataset, Dataset]:
    """Hold out `val_size`: a share below 1, or a number of rows. A stream gives its first ones."""
    from datasets import Dataset

    if not isinstance(dataset, Dataset):
        size = int(recipe.val_size)
        return dataset.skip(size), Dataset.from_list(list(dataset.take(size)), features=dataset.features)
    size = int(recipe.val_size if recipe.val_size >= 1 else recipe.val_size * len(dataset))
    if not 0 < size < len(dataset):
        raise DatasetError(f"val_size: {recipe.val_size:g} of {len(dataset):,} rows leaves nothing on one side")
    order = np.random.default_rng(recipe.seed).permutation(len(dataset))
    return dataset.select(order[size:]), dataset.select(order[:size])


_STOP: dict[str, Any] = {
    "interleave_under": "first_exhausted",
    "interleave_over": "all_exhausted",
    "interleave_once": "all_exhausted_without_replacement",
}


def _mix(datasets: list[Dataset | IterableDataset], recipe: Recipe) -> Any:
    from datasets import Dataset, concatenate_datasets, interleave_datasets

    if not datasets:
        return Dataset(SCHEMA.empty_table())
    if len(datasets) == 1 or recipe.mix_strategy == "concat":
        return concatenate_datasets(datasets)
    return interleave_datasets(
        datasets,
        probabilities=recipe.interleave_probs,
        seed=recipe.seed,
        stopping_strategy=_STOP[recipe.mix_strategy],
    )
