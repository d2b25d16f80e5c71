"""Files or hub -> audited, encoded, cached train and eval datasets.

Every row is accounted for: kept, shortened, lost its final answer, or dropped with its location and the reason. All but
the kept ones are listed beside the encoded rows, and in `row_audit.jsonl` in the folder of a run that trains on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from hashlib import blake2b, sha256
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets
from transformers import PreTrainedTokenizerBase

from ..errors import DatasetError
from ..recipe.keys import Recipe
from .audit import (
    Audit,
    Counts,
    StreamedLines,
    advise_cutoff,
    count,
    list_rows,
    missing_columns,
    to_line,
    too_many_dropped,
)
from .cache import TRAINED_ON, EncodedDataset, kept_rows, load_or_encode, load_tokenized
from .encode import Encoder, encode_rows
from .files import fingerprint, read_dataset
from .registry import DatasetInfo, select_datasets
from .template import Template, template_of

ROWS_BEFORE_JUDGED = 1000
Rows: TypeAlias = Dataset | IterableDataset
STOPPING = {
    "interleave_under": "first_exhausted",
    "interleave_over": "all_exhausted",
    "interleave_once": "all_exhausted_without_replacement",
}


@dataclass
class PreparedData:
    """Columns: input_ids, labels (-100: no loss), source ("file:line").

    `day`: the date that a dated chat template wrote. `encoded`: every row of each dataset that is not a stream, dropped ones too.
    `fingerprints`: content hash per dataset, and of the rows that `val_size` holds out. `notices`: lines for people.
    `trained_on`: the datasets whose rows `train` holds.
    """

    train: Rows
    eval: dict[str, Dataset]
    audit: Audit
    fingerprints: dict[str, str]
    template_hash: str
    day: date
    encoded: dict[str, EncodedDataset] = field(default_factory=dict)
    trained_on: list[str] = field(default_factory=list)
    streamed: StreamedLines = field(default_factory=StreamedLines)
    notices: list[str] = field(default_factory=list)

    def write_audit(self, path: Path) -> None:
        """Write `row_audit.jsonl`, on the main process; the rows of a stream follow as they are read."""
        if not PartialState().is_main_process:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for one in self.encoded.values():
                file.writelines(list_rows(one.name, one.rows))
        self.streamed.path = path
        self.streamed.add([])

    def listed(self) -> list[str]:
        """For people: where the rows are listed that were not simply kept."""
        paths = filter(None, (one.list_changed_rows() for one in self.encoded.values()))
        return [f"each row that was not simply kept is in {path}" for path in paths]


def prepare_datasets(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
    """Encode what the recipe names, or find it encoded. Nothing is written into output_dir.

    On several processes the main one prepares while the others wait; on nodes that share no disk, the first of each.

    Raises:
        DatasetError: if the registry, a file, or more than `max_dropped` of a dataset's rows can't be used.
    """
    template, state = template_of(recipe, tokenizer), PartialState()
    if saved := load_tokenized(recipe):
        return _from_llamafactory(saved, recipe, template)
    infos = select_datasets(recipe)
    streams = [info for info in infos if recipe.streaming and info.name in recipe.dataset]
    stored = [info for info in infos if info not in streams]
    with state.main_process_first(), state.local_main_process_first():
        encoded = {info.name: load_or_encode(Encoder(info, recipe, template)) for info in stored}
    data = _unmixed(encoded, template)
    data.audit.mask_spans = [] if streams else recipe.mask_spans
    data.trained_on = recipe.dataset
    _judge(data, stored, recipe)
    data.eval = {name: kept_rows(encoded[name].rows) for name in recipe.eval_dataset}
    if streams:
        _add_streams(data, [Encoder(info, recipe, template) for info in streams], recipe)
    else:
        _add_rows(data, stored, recipe)
    return data


def _unmixed(encoded: dict[str, EncodedDataset], template: Template) -> PreparedData:
    audit = Audit({name: count(one.rows) for name, one in encoded.items()})
    fingerprints = {name: one.fingerprint for name, one in encoded.items()}
    return PreparedData(_empty(), {}, audit, fingerprints, template.hash, template.day, encoded)


def _judge(data: PreparedData, infos: list[DatasetInfo], recipe: Recipe) -> None:
    """Raises DatasetError if a column that the registry names is in no row, or too many rows were dropped."""
    problems: list[str] = []
    for info in infos:
        one, counts = data.encoded[info.name], data.audit.datasets[info.name]
        is_whole = info.num_samples is not None or recipe.max_samples is None or counts.rows < recipe.max_samples
        if (info.named or counts.dropped) and (is_whole or counts.rows >= ROWS_BEFORE_JUDGED):
            columns = one.rows.select_columns("fields").with_format("arrow")[:]["fields"]
            fields = pc.unique(pc.list_flatten(columns)).to_pylist()
            problems += missing_columns(info, fields, counts.rows)
        problems += too_many_dropped(info.name, counts, recipe.max_dropped, one.list_changed_rows)
        data.notices += advise_cutoff(info.name, one.rows, counts, recipe.cutoff_len)
    if problems:
        raise DatasetError(problems)


def _add_rows(data: PreparedData, infos: list[DatasetInfo], recipe: Recipe) -> None:
    """Draw, hold out, repeat, mix: rows are held out before any is repeated, so that none is trained on."""
    random = {info.name: np.random.default_rng(recipe.seed) for info in infos}
    wanted = {info.name: info.num_samples for info in infos if info.name in recipe.dataset}
    rows = {name: kept_rows(data.encoded[name].rows) for name in wanted}
    for name, number in wanted.items():
        if number is not None and number <= len(rows[name]):
            rows[name] = rows[name].select(random[name].permutation(len(rows[name]))[:number][: recipe.max_samples])
            wanted[name] = None
    before = {name: len(one) for name, one in rows.items()}
    if recipe.val_size:
        rows, held_out = _hold_out(rows, recipe)
        data.eval["validation"], data.fingerprints["validation"] = held_out, _content_hash(held_out)
        if equal := sum(before.values()) - len(held_out) - sum(map(len, rows.values())):
            data.notices.append(f"val_size: {equal:,} rows that equal a held-out row are left out of training")
    for name, number in wanted.items():
        if number is not None and len(rows[name]):
            times = -(-number // len(rows[name]))
            order = np.concatenate([random[name].permutation(len(rows[name])) for _ in range(times)])
            fewer = before[name] - len(rows[name])
            rows[name] = rows[name].select(order[: number - fewer][: recipe.max_samples])
    data.train = _mix([rows[name] for name in recipe.dataset], recipe)


def _hold_out(rows: dict[str, Dataset], recipe: Recipe) -> tuple[dict[str, Dataset], Dataset]:
    """The rows that LLaMA-Factory holds out for the same seed; the others without any that equals one of them."""
    joined = concatenate_datasets(list(rows.values()))
    size = math.ceil(recipe.val_size if recipe.val_size >= 1 else recipe.val_size * len(joined))
    if not 0 < size < len(joined):
        raise DatasetError(f"val_size: {recipe.val_size:g} of {len(joined):,} rows leaves nothing on one side")
    positions = Dataset.from_dict({"at": np.arange(len(joined))}).train_test_split(test_size=size, seed=recipe.seed)
    chosen, order = (positions[side].with_format("numpy")[:]["at"] for side in ("test", "train"))
    digests = np.array(list(_digests(joined)))
    order = order[~np.isin(digests, digests[chosen])[order]]
    if not len(order):
        raise DatasetError(f"val_size: {recipe.val_size:g}: every other row equals one of those held out")
    ends = np.cumsum([0, *map(len, rows.values())])
    inside = {name: order[(order >= start) & (order < end)] for name, start, end in zip(rows, ends, ends[1:])}
    return {name: joined.select(part) for name, part in inside.items()}, joined.select(chosen)


def _digest(input_ids: npt.ArrayLike) -> bytes:
    return blake2b(np.asarray(input_ids, np.int32).tobytes(), digest_size=16).digest()


def _digests(rows: Dataset) -> Iterator[bytes]:
    for batch in rows.select_columns("input_ids").with_format("arrow").iter(1000):
        yield from map(_digest, batch["input_ids"].to_numpy())


def _content_hash(rows: Dataset) -> str:
    return sha256(b"".join(_digests(rows))).hexdigest()


def _mix(datasets: list[Rows], recipe: Recipe) -> Rows:
    if not datasets:
        return _empty()
    if len(datasets) == 1 or recipe.mix_strategy == "concat":
        return concatenate_datasets(datasets)
    return interleave_datasets(
        datasets,
        probabilities=recipe.interleave_probs,
        seed=recipe.seed,
        stopping_strategy=STOPPING[recipe.mix_strategy],
    )


def _empty() -> Dataset:
    return Dataset.from_dict({name: [] for name in TRAINED_ON}, features=TRAINED_ON)


def _add_streams(data: PreparedData, encoders: list[Encoder], recipe: Recipe) -> None:
    lines = data.streamed if PartialState().is_main_process else None
    streams = {}
    for encoder in encoders:
        name = encoder.info.name
        data.fingerprints[name] = fingerprint(encoder.info, streaming=True)
        counts = data.audit.datasets[name] = Counts()
        streams[name] = IterableDataset.from_generator(_streamed_rows(encoder, counts, lines), features=TRAINED_ON)
    train = _mix([streams[name] for name in recipe.dataset], recipe)
    if not recipe.disable_shuffling:
        train = train.shuffle(seed=recipe.seed, buffer_size=recipe.buffer_size)
    if recipe.val_size:
        held_out = Dataset.from_list(list(train.take(int(recipe.val_size))), features=TRAINED_ON)
        data.eval["validation"], data.fingerprints["validation"] = held_out, _content_hash(held_out)
        # By content, since a shuffled stream begins each pass with other rows and a mixed one may repeat them.
        digests = set(_digests(held_out))
        train = train.filter(lambda row: _digest(row["input_ids"]) not in digests)
    data.train = train


def _streamed_rows(
    encoder: Encoder, counts: Counts, lines: StreamedLines | None
) -> Callable[[], Iterator[dict[str, object]]]:
    """Rows are encoded as they are asked for, and counted and judged on the first pass over them."""
    info, recipe = encoder.info, encoder.recipe
    fields = set[str]()

    def judge() -> None:
        problems = too_many_dropped(info.name, counts, recipe.max_dropped, lambda: lines.path if lines else None)
        if problems := problems + missing_columns(info, fields, counts.rows):
            raise DatasetError(problems)

    def examples() -> Iterator[dict[str, object]]:
        rows = islice(read_dataset(info, recipe.streaming), info.num_samples)
        for number, row in enumerate(encode_rows(rows, encoder)):
            if number >= counts.rows:
                counts.add(row, len(row["input_ids"]))
                fields.update(row["fields"])
                if lines and (line := to_line(info.name, row)):
                    lines.add([line])
                if counts.rows % ROWS_BEFORE_JUDGED == 0:
                    judge()
            if row["outcome"] != "dropped":
                yield {"input_ids": row["input_ids"], "labels": row["labels"], "source": row["source"]}
        judge()

    return examples


def _from_llamafactory(saved: dict[str, EncodedDataset], recipe: Recipe, template: Template) -> PreparedData:
    """The splits of a folder that LLaMA-Factory saved, as they are."""
    data, rows = _unmixed(saved, template), {name: kept_rows(one.rows) for name, one in saved.items()}
    data.train, data.trained_on = rows.pop("train", data.train), ["train"] if "train" in saved else []
    data.eval = {name.removeprefix("validation_"): one for name, one in rows.items()}
    data.notices.append(
        f"tokenized_path: {recipe.tokenized_path} was saved by LLaMA-Factory; every other key of the data, such as dataset, "
        "template and cutoff_len, has no effect on it"
    )
    return data
