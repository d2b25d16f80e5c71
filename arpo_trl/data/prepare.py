"""Files or the Hub -> audited, encoded, cached train and eval datasets.

Every row is accounted for: intact, shortened, truncated before the final answer, or dropped, with its location and the reason.
Rows that are not intact are listed next to the encoded rows, and in `row_audit.jsonl` in the folder of a run.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b, sha256
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets

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
from .registry import DatasetInfo
from .sources import select_datasets
from .template import Template
from .template_probe import set_thinking_default

ROWS_BEFORE_CHECK = 1000
Rows: TypeAlias = Dataset | IterableDataset
STOPPING = {
    "interleave_under": "first_exhausted",
    "interleave_over": "all_exhausted",
    "interleave_once": "all_exhausted_without_replacement",
}


@dataclass
class PreparedData:
    """Rows to train and evaluate on. Columns: input_ids, labels (-100: masked), source ("file:line").

    Attributes:
        template: Renders the rows.
        fingerprints: Content hash of each dataset, and of the rows that `val_size` holds out.
        encoded: Every row of each dataset that is not streamed, including dropped ones.
        trained_on: The datasets whose rows are in `train`.
        notices: Lines to print.
    """

    template: Template
    train: Rows
    eval: dict[str, Dataset]
    audit: Audit
    fingerprints: dict[str, str]
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
            for dataset in self.encoded.values():
                file.writelines(list_rows(dataset.name, dataset.rows))
        self.streamed.path = path
        self.streamed.add([])

    def list_changed_rows(self) -> list[str]:
        """Return a line for each list of rows that are not intact."""
        paths = filter(None, (dataset.list_changed_rows() for dataset in self.encoded.values()))
        return [f"shortened and dropped rows are listed in {path}" for path in paths]


def prepare_datasets(recipe: Recipe, template: Template) -> PreparedData:
    """Encode the recipe's datasets, or load them encoded. Writes nothing into output_dir.

    With several processes, the main one prepares while the others wait; on nodes without a shared disk, the first of each.

    Raises:
        DatasetError: the registry, a file, or more than `max_dropped` of a dataset's rows can't be used.
    """
    state = PartialState()
    if saved := load_tokenized(recipe):
        return _from_llamafactory(saved, recipe, template)
    infos = select_datasets(recipe)
    streams = [info for info in infos if recipe.streaming and info.name in recipe.dataset]
    stored = [info for info in infos if info not in streams]
    with state.main_process_first(), state.local_main_process_first():
        encoded = {info.name: load_or_encode(Encoder(info, recipe, template)) for info in stored}
    data = _unmixed(encoded, template, infos)
    data.audit.mask_spans = [] if streams else recipe.mask_spans
    data.trained_on = recipe.dataset
    _check(data, stored, recipe)
    data.eval = {name: kept_rows(encoded[name].rows) for name in recipe.eval_dataset}
    if streams:
        _add_streams(data, [Encoder(info, recipe, template) for info in streams], recipe)
    else:
        if not any("thinking switch" in counts.notes for counts in data.audit.datasets.values()):
            template.tokenizer.chat_template = set_thinking_default(replace(template, thinking_switch=None))
        _add_rows(data, stored, recipe)
    return data


def _unmixed(
    encoded: dict[str, EncodedDataset], template: Template, infos: Sequence[DatasetInfo] = ()
) -> PreparedData:
    counts = {name: count(dataset.rows) for name, dataset in encoded.items()}
    fingerprints = {name: dataset.fingerprint for name, dataset in encoded.items()}
    audit = Audit(counts, {info.name: info for info in infos})
    return PreparedData(template, _empty(), {}, audit, fingerprints, encoded)


def _check(data: PreparedData, infos: list[DatasetInfo], recipe: Recipe) -> None:
    """Raise DatasetError if a column that the registry names is in no row, or too many rows were dropped."""
    problems: list[str] = []
    for info in infos:
        dataset, counts = data.encoded[info.name], data.audit.datasets[info.name]
        is_complete = info.num_samples is not None or recipe.max_samples is None or counts.rows < recipe.max_samples
        if (info.named or counts.dropped) and (is_complete or counts.rows >= ROWS_BEFORE_CHECK):
            columns = dataset.rows.select_columns("fields").with_format("arrow")[:]["fields"]
            fields = pc.unique(pc.list_flatten(columns)).to_pylist()
            problems += missing_columns(info, fields, counts.rows)
        problems += too_many_dropped(info.name, counts, recipe.max_dropped, dataset.list_changed_rows)
        data.notices += advise_cutoff(info.name, dataset.rows, counts, recipe.cutoff_len)
    if problems:
        raise DatasetError(problems)


def _add_rows(data: PreparedData, infos: list[DatasetInfo], recipe: Recipe) -> None:
    """Sample, hold out, repeat and mix rows. They are held out before any is repeated, so that none is trained on."""
    random = {info.name: np.random.default_rng(recipe.seed) for info in infos}
    samples = {info.name: info.num_samples for info in infos if info.name in recipe.dataset}
    rows = {name: kept_rows(data.encoded[name].rows) for name in samples}
    for name, number in samples.items():
        if number is not None and number <= len(rows[name]):
            rows[name] = rows[name].select(random[name].permutation(len(rows[name]))[:number][: recipe.max_samples])
            samples[name] = None
    before = {name: len(dataset) for name, dataset in rows.items()}
    if recipe.val_size:
        rows, held_out = _hold_out(rows, recipe)
        data.eval["validation"], data.fingerprints["validation"] = held_out, _content_hash(held_out)
        if equal := sum(before.values()) - len(held_out) - sum(map(len, rows.values())):
            data.notices.append(f"val_size: {equal:,} rows equal to a held-out row are not trained on")
    for name, number in samples.items():
        if number is not None and len(rows[name]):
            times = -(-number // len(rows[name]))
            order = np.concatenate([random[name].permutation(len(rows[name])) for _ in range(times)])
            fewer = before[name] - len(rows[name])
            rows[name] = rows[name].select(order[: number - fewer][: recipe.max_samples])
    data.train = _mix([rows[name] for name in recipe.dataset], recipe)


def _hold_out(rows: dict[str, Dataset], recipe: Recipe) -> tuple[dict[str, Dataset], Dataset]:
    """Hold out the rows that LLaMA-Factory does for the same seed; remove rows equal to one of them from the others."""
    joined = concatenate_datasets(list(rows.values()))
    size = math.ceil(recipe.val_size if recipe.val_size >= 1 else recipe.val_size * len(joined))
    if not 0 < size < len(joined):
        raise DatasetError(f"val_size: {size:,} rows requested, but the datasets have only {len(joined):,}")
    positions = Dataset.from_dict({"at": np.arange(len(joined))}).train_test_split(test_size=size, seed=recipe.seed)
    chosen, order = (positions[side].with_format("numpy")[:]["at"] for side in ("test", "train"))
    digests = np.array(list(_digests(joined)))
    order = order[~np.isin(digests, digests[chosen])[order]]
    if not len(order):
        raise DatasetError(f"val_size: {recipe.val_size:g}: every other row equals a held-out row; lower val_size")
    ends = np.cumsum([0, *map(len, rows.values())])
    inside = {name: order[(order >= start) & (order < end)] for name, start, end in zip(rows, ends, ends[1:])}
    return {name: joined.select(part) for name, part in inside.items()}, joined.select(chosen)


def digest(input_ids: npt.ArrayLike) -> bytes:
    return blake2b(np.asarray(input_ids, np.int32).tobytes(), digest_size=16).digest()


def _digests(rows: Dataset) -> Iterator[bytes]:
    for batch in rows.select_columns("input_ids").with_format("arrow").iter(1000):
        yield from map(digest, batch["input_ids"].to_numpy())


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
        # By content, since each pass over a shuffled stream starts with other rows, and a mixed one may repeat rows.
        digests = set(_digests(held_out))
        train = train.filter(lambda row: digest(row["input_ids"]) not in digests)
    data.train = train


def _streamed_rows(
    encoder: Encoder, counts: Counts, lines: StreamedLines | None
) -> Callable[[], Iterator[dict[str, object]]]:
    """Encode rows lazily; count and check them in the first pass."""
    info, recipe = encoder.info, encoder.recipe
    fields = set[str]()

    def check() -> None:
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
                if counts.rows % ROWS_BEFORE_CHECK == 0:
                    check()
            if row["outcome"] != "dropped":
                yield {"input_ids": row["input_ids"], "labels": row["labels"], "source": row["source"]}
        check()

    return examples


def _from_llamafactory(saved: dict[str, EncodedDataset], recipe: Recipe, template: Template) -> PreparedData:
    """Return the splits of a folder that LLaMA-Factory saved, unchanged."""
    data, rows = _unmixed(saved, template), {name: kept_rows(dataset.rows) for name, dataset in saved.items()}
    data.train, data.trained_on = rows.pop("train", data.train), ["train"] if "train" in saved else []
    data.eval = {name.removeprefix("validation_"): split for name, split in rows.items()}
    data.notices.append(
        f"tokenized_path: {recipe.tokenized_path} was saved by LLaMA-Factory; all other data keys (dataset, template, "
        "cutoff_len, ...) are ignored"
    )
    return data
