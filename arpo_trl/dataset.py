"""Files or hub -> audited, encoded, cached train and eval datasets.

Every row is accounted for: kept, shortened, lost its final answer, or dropped with its place and the reason. All but the
kept ones are listed in `row_audit.jsonl` in the run's folder.

Each dataset is encoded once and kept under a name made of everything it depends on, in `tokenized_path` or in the
Hugging Face datasets cache, so that neither another process of this run nor the next run encodes it again.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

import arpo_trl
from arpo_trl.encoding import IGNORED, Example, Law, Segment, encode, to_segments
from arpo_trl.messages import RowError, to_conversation
from arpo_trl.recipe import Recipe
from arpo_trl.registry import DatasetError, DatasetInfo, read_registry
from arpo_trl.rows import Row, find_files, read_hub, read_rows
from arpo_trl.template import Template, check_parity, find_template, make_tokenize

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())), ("source", pa.string())])
BATCH_CHARACTERS = 1 << 20
PROCESSES_PAY_FROM = 200 << 20
GATE_ROWS = 32
STREAMED_BEFORE_JUDGED = 1000
SHOWN_REASONS = 3
EXCERPT = 160


@dataclass
class Counts:
    """Rows of one dataset by their fate, and the tokens of those that stayed. `first`: why the first were dropped."""

    kept: int = 0
    shortened: int = 0
    lost_answer: int = 0
    dropped: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    first: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        return self.kept + self.shortened + self.lost_answer + self.dropped

    def add(self, other: "Counts") -> None:
        for fate in ("kept", "shortened", "lost_answer", "dropped", "tokens", "trained_tokens"):
            setattr(self, fate, getattr(self, fate) + getattr(other, fate))
        self.first = (self.first + other.first)[:SHOWN_REASONS]


@dataclass(frozen=True)
class Batch:
    """Encoded rows as SCHEMA has them, and what `row_audit.jsonl` says of the rows that were not simply kept."""

    encoded: pa.RecordBatch
    counts: Counts
    findings: list[dict[str, str]]


@dataclass
class Audit:
    datasets: dict[str, Counts] = field(default_factory=dict)

    def lines(self) -> list[str]:
        return [
            f"{name}: {counts.rows:,} rows: {counts.kept:,} kept, {counts.shortened:,} shortened, "
            f"{counts.lost_answer:,} lost their final answer, {counts.dropped:,} dropped; {counts.tokens:,} tokens, "
            f"{counts.trained_tokens:,} trained"
            for name, counts in self.datasets.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        return {name: asdict(counts) for name, counts in self.datasets.items()}


@dataclass
class PreparedData:
    """Columns: input_ids, labels (-100: no loss), source ("file:line"). `fingerprints`: content hash per dataset."""

    train: "Dataset | IterableDataset"
    eval: "dict[str, Dataset]"
    audit: Audit
    fingerprints: dict[str, str]
    template_hash: str


def prepare_datasets(recipe: Recipe, tokenizer: "PreTrainedTokenizerBase") -> PreparedData:
    """Encode what the recipe names, or find it encoded.

    On several processes the main one prepares while the others wait; on nodes that share no disk, the first of each.

    Raises:
        DatasetError: if the registry, a file, or more than `max_dropped` of a dataset's rows can't be used.
    """
    from accelerate import PartialState

    infos = select_datasets(recipe)
    template = find_template(tokenizer)
    state = PartialState()
    streamed = set(recipe.dataset) if recipe.streaming else set()
    with state.main_process_first(), state.local_main_process_first():
        overwrite = recipe.overwrite_cache and state.is_main_process
        encoded = [
            _find_or_encode(info, recipe, tokenizer, template, overwrite)
            for info in infos
            if info.name not in streamed
        ]
    audit = Audit({found.info.name: found.counts for found in encoded})
    if state.is_main_process:
        _write_audit(Path(recipe.output_dir), encoded)
    _check_dropped(audit, recipe)
    datasets = {found.info.name: _load(found, recipe) for found in encoded}
    fingerprints = {found.info.name: found.fingerprint for found in encoded}
    for info in infos:
        if info.name in streamed:
            fingerprints[info.name], datasets[info.name] = _stream(
                info, recipe, tokenizer, audit, state.is_main_process
            )
    train = _mix([datasets[name] for name in recipe.dataset], recipe)
    evals = {name: datasets[name] for name in recipe.eval_dataset}
    if recipe.streaming and not recipe.disable_shuffling:
        train = train.shuffle(seed=recipe.seed, buffer_size=recipe.buffer_size)
    if recipe.val_size:
        train, evals["validation"] = _split(train, recipe)
    return PreparedData(train, evals, audit, fingerprints, template.hash)


def select_datasets(recipe: Recipe) -> list[DatasetInfo]:
    registry = read_registry(Path(recipe.dataset_dir))
    problems, infos = [], []
    for name in dict.fromkeys([*recipe.dataset, *recipe.eval_dataset]):
        info = registry.get(name)
        if info is None:
            there = ", ".join(registry) or "none"
            problems.append(
                f"dataset: {name}: no such dataset in {recipe.dataset_dir}/dataset_info.json; there are {there}"
            )
        elif info.refused:
            problems.append(info.refused)
        else:
            infos.append(info)
    if problems:
        raise DatasetError(problems)
    return infos


@dataclass(frozen=True)
class Encoded:
    """A dataset as it lies on disk: rows.arrow, audit.jsonl and prepared.json in `folder`."""

    info: DatasetInfo
    folder: Path
    counts: Counts
    fingerprint: str


def _find_or_encode(
    info: DatasetInfo, recipe: Recipe, tokenizer: "PreTrainedTokenizerBase", template: Template, overwrite: bool
) -> Encoded:
    from datasets import config

    folder = Path(recipe.tokenized_path) / info.name if recipe.tokenized_path else None
    if folder and folder.exists() and info.path and not info.path.exists():
        fingerprint = _read_prepared(folder)["parts"]["data"]  # Prepared elsewhere: these rows are all there is.
    else:
        fingerprint = _fingerprint(info, recipe)
    parts = _parts(info, fingerprint, recipe, tokenizer, template)
    if folder is None:
        key = hashlib.sha256(json.dumps([str(info.path), parts], sort_keys=True).encode()).hexdigest()[:16]
        folder = Path(config.HF_DATASETS_CACHE) / "arpo_trl" / f"{info.name}-{key}"
    if overwrite or not folder.exists():
        _encode_to(folder, info, recipe, tokenizer, parts)
    prepared = _read_prepared(folder)
    if changed := [part for part in parts if prepared["parts"].get(part) != parts[part]]:
        raise DatasetError(
            f"tokenized_path: {folder} was made with another {' and another '.join(changed)}; set overwrite_cache: true "
            "to make it again, or name another tokenized_path"
        )
    return Encoded(info, folder, Counts(**prepared["counts"]), fingerprint)


def _read_prepared(folder: Path) -> dict[str, Any]:
    try:
        prepared: dict[str, Any] = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DatasetError(
            f"{folder}: not written by arpo_trl (no prepared.json); name another tokenized_path"
        ) from None
    return prepared


def _load(encoded: Encoded, recipe: Recipe) -> "Dataset":
    """LLaMA-Factory's order: num_samples of a dataset at random (again and again if it has fewer), then max_samples."""
    from datasets import Dataset

    dataset = Dataset.from_file(str(encoded.folder / "rows.arrow"))
    wanted = encoded.info.num_samples
    if wanted is None:
        return dataset
    random = np.random.default_rng(recipe.seed)
    order = [random.permutation(len(dataset)) for _ in range(-(-wanted // len(dataset)))]
    return dataset.select(np.concatenate(order)[:wanted][: recipe.max_samples])


def _stream(
    info: DatasetInfo, recipe: Recipe, tokenizer: "PreTrainedTokenizerBase", audit: Audit, writes: bool
) -> "tuple[str, IterableDataset]":
    """Rows are encoded as they are asked for, and counted and judged on the first pass over them."""
    from datasets import Features, IterableDataset

    counts = audit.datasets[info.name] = Counts()
    path = Path(recipe.output_dir) / "row_audit.jsonl"

    def examples() -> Iterator[dict[str, Any]]:
        seen = 0
        rows = islice(read_dataset(info, recipe), info.num_samples)
        for batch in encode_rows(_through_the_gate(rows, info, recipe, tokenizer), info, recipe, tokenizer):
            seen += batch.counts.rows
            if seen > counts.rows:
                counts.add(batch.counts)
                if writes:
                    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                        file.writelines(_lines(batch))
                if counts.rows >= STREAMED_BEFORE_JUDGED:
                    _check_dropped(Audit({info.name: counts}), recipe)
            yield from batch.encoded.to_pylist()
        _check_dropped(Audit({info.name: counts}), recipe)

    dataset = IterableDataset.from_generator(examples, features=Features.from_arrow_schema(SCHEMA))
    return _fingerprint(info, recipe), dataset


def _split(dataset: "Dataset | IterableDataset", recipe: Recipe) -> "tuple[Dataset | IterableDataset, Dataset]":
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


def _write_audit(output_dir: Path, encoded: Sequence[Encoded]) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / "row_audit.jsonl").open("wb") as audit:
        for found in encoded:
            with (found.folder / "audit.jsonl").open("rb") as part:
                shutil.copyfileobj(part, audit)


def _check_dropped(audit: Audit, recipe: Recipe) -> None:
    problems = []
    for name, counts in audit.datasets.items():
        if counts.rows == 0:
            problems.append(f"{name}: no rows")
        elif counts.dropped > recipe.max_dropped * counts.rows or counts.dropped == counts.rows:
            problems.append(
                f"{name}: {counts.dropped:,} of {counts.rows:,} rows dropped, max_dropped allows a share of "
                f"{recipe.max_dropped:g}; all are in {Path(recipe.output_dir) / 'row_audit.jsonl'}, the first are"
            )
            problems += [f"  {reason}" for reason in counts.first]
    if problems:
        raise DatasetError(problems)


def read_dataset(info: DatasetInfo, recipe: Recipe) -> Iterator[Row]:
    """All rows of a dataset, read as they are asked for."""
    if info.path is None:
        return read_hub(info, recipe.streaming)[1]
    return chain.from_iterable(map(read_rows, find_files(info.path)))


def _fingerprint(info: DatasetInfo, recipe: Recipe) -> str:
    """The content's hash; of a stream, its files' names, sizes and times."""
    if info.path is None:
        return read_hub(info, recipe.streaming)[0]
    content = hashlib.sha256()
    for path in find_files(info.path):
        if recipe.streaming:
            content.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
            continue
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                content.update(block)
    return content.hexdigest()


def _parts(
    info: DatasetInfo, fingerprint: str, recipe: Recipe, tokenizer: "PreTrainedTokenizerBase", template: Template
) -> dict[str, Any]:
    """All that the encoded rows depend on, by the name under which a change is reported."""
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    return {
        "arpo_trl": arpo_trl.__version__,
        "data": fingerprint,
        "dataset_info.json": [info.formatting, info.columns, info.tags],
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "template": template.hash,
        **asdict(_law(recipe)),
        "max_samples": recipe.max_samples if info.num_samples is None else None,
        "default_system": recipe.default_system,
    }


def _law(recipe: Recipe) -> Law:
    return Law(recipe.cutoff_len, recipe.mask_history, recipe.train_on_prompt, recipe.truncation_mode)


def _encode_to(
    folder: Path,
    info: DatasetInfo,
    recipe: Recipe,
    tokenizer: "PreTrainedTokenizerBase",
    parts: dict[str, Any],
) -> None:
    """Written beside its place and moved there when whole, so that a killed run leaves nothing half done."""
    first = islice(read_dataset(info, recipe), recipe.max_samples if info.num_samples is None else None)
    rows = _through_the_gate(first, info, recipe, tokenizer)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    unfinished.mkdir()
    counts = Counts()
    try:
        with (
            pa.OSFile(str(unfinished / "rows.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, SCHEMA) as writer,
            (unfinished / "audit.jsonl").open("w", encoding="utf-8", errors="backslashreplace") as audit,
        ):
            for batch in encode_rows(rows, info, recipe, tokenizer, _workers(info, recipe)):
                writer.write_batch(batch.encoded)
                audit.writelines(_lines(batch))
                counts.add(batch.counts)
        prepared = {"parts": parts, "counts": asdict(counts)}
        (unfinished / "prepared.json").write_text(json.dumps(prepared, indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(FileExistsError, PermissionError):  # Another run was faster, with the same rows.
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _through_the_gate(
    rows: Iterator[Row], info: DatasetInfo, recipe: Recipe, tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[Row]:
    sample, template = list(islice(rows, GATE_ROWS)), find_template(tokenizer)
    for row in sample:
        try:
            conversation = to_conversation(row.value, info, recipe.default_system)
            check_parity(conversation, tokenizer, template, _law(recipe), row.place)
        except RowError:
            continue  # The audit will say so.
    return chain(sample, rows)


def encode_rows(
    rows: Iterable[Row],
    info: DatasetInfo,
    recipe: Recipe,
    tokenizer: "PreTrainedTokenizerBase",
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
    law = _law(recipe)
    rendered: list[list[Segment] | RowError] = []
    for row in rows:
        try:
            if isinstance(row.value, RowError):
                raise row.value
            conversation = to_conversation(row.value, info, recipe.default_system)
            rendered.append(to_segments(conversation, template.render, law, template.generation_prompt))
        except RowError as error:
            rendered.append(error)
    examples = iter(encode([segments for segments in rendered if isinstance(segments, list)], tokenize, law))
    kept: list[tuple[str, Example]] = []
    counts, findings = Counts(), []
    for row, segments in zip(rows, rendered):
        result = segments if isinstance(segments, RowError) else _with_labels(next(examples))
        if isinstance(result, Example):
            kept.append((row.place, result))
        if finding := _count(counts, row, result, recipe.cutoff_len):
            findings.append({"dataset": info.name, **finding})
    return Batch(_to_arrow(kept), counts, findings)


def _lines(batch: Batch) -> list[str]:
    return [json.dumps(finding, ensure_ascii=False) + "\n" for finding in batch.findings]


def _to_arrow(examples: list[tuple[str, Example]]) -> pa.RecordBatch:
    ends = np.cumsum([0, *(len(example.input_ids) for _, example in examples)], dtype=np.int32)
    columns = ([example.input_ids for _, example in examples], [example.labels for _, example in examples])
    flat = [np.fromiter(chain.from_iterable(column), np.int32, ends[-1]) for column in columns]
    lists = [pa.ListArray.from_arrays(pa.array(ends), pa.array(values)) for values in flat]
    return pa.record_batch([*lists, pa.array([place for place, _ in examples], pa.string())], schema=SCHEMA)


_worker: Callable[[list[Row]], Batch]


def _start_worker(info: DatasetInfo, recipe: Recipe, tokenizer: "PreTrainedTokenizerBase") -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # The processes are the parallelism.
    _worker = partial(_encode_batch, info, recipe, find_template(tokenizer), make_tokenize(tokenizer))


def _encode_in_worker(rows: list[Row]) -> Batch:
    return _worker(rows)


def _workers(info: DatasetInfo, recipe: Recipe) -> int:
    """Processes to encode with: starting them costs seconds, in which one process encodes tens of megabytes."""
    files = find_files(info.path) if info.path else []
    if sum(file.stat().st_size for file in files) < PROCESSES_PAY_FROM:
        return 1
    return min(recipe.preprocessing_num_workers or 1, os.cpu_count() or 1)


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


def _count(counts: Counts, row: Row, result: Example | RowError, cutoff_len: int) -> dict[str, str] | None:
    """Count the row; what `row_audit.jsonl` says of it, unless it was simply kept."""
    if isinstance(result, RowError):
        outcome, reason = "dropped", str(result)
        if len(counts.first) < SHOWN_REASONS:
            counts.first.append(f"{row.place}: {reason}")
    else:
        outcome = "lost_answer" if result.lost_answer else "shortened" if result.cut else "kept"
        reason = f"{result.cut} tokens past the cutoff of {cutoff_len}"
        counts.tokens += len(result.input_ids)
        counts.trained_tokens += len(result.labels) - result.labels.count(IGNORED)
    setattr(counts, outcome, getattr(counts, outcome) + 1)
    if outcome == "kept":
        return None
    excerpt = "" if isinstance(row.value, RowError) else json.dumps(row.value, ensure_ascii=False)[:EXCERPT]
    return {"place": row.place, "outcome": outcome, "reason": reason, "excerpt": excerpt}


def _mix(datasets: "list[Dataset | IterableDataset]", recipe: Recipe) -> Any:
    from datasets import Dataset, concatenate_datasets, interleave_datasets

    if not datasets:
        return Dataset(SCHEMA.empty_table())
    if len(datasets) == 1 or recipe.mix_strategy == "concat":
        return concatenate_datasets(datasets)
    return interleave_datasets(
        datasets,
        probabilities=recipe.interleave_probs,
        seed=recipe.seed,
        stopping_strategy="first_exhausted" if recipe.mix_strategy == "interleave_under" else "all_exhausted",
    )
