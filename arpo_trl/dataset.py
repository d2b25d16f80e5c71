"""Files or hub -> audited, encoded, cached train and eval datasets.

Every row is accounted for: kept, shortened, lost its final answer, or dropped with its place and the reason. All but the
kept ones are listed in `row_audit.jsonl` in the run's folder.

Each dataset is encoded once and kept under a name made of everything it depends on, in `tokenized_path` or in the
Hugging Face datasets cache, so that neither another process of this run nor the next run encodes it again.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from arpo_trl.encoding import IGNORED, Example, Law, Segment, encode, to_segments
from arpo_trl.messages import RowError, to_conversation
from arpo_trl.recipe import Recipe
from arpo_trl.registry import DatasetError, DatasetInfo, read_registry
from arpo_trl.rows import Row, find_files, read_hub, read_rows
from arpo_trl.template import Template, find_template, make_tokenize

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())), ("source", pa.string())])
BATCH_CHARACTERS = 4 << 20
SHOWN_REASONS = 3
EXCERPT = 160


@dataclass
class Counts:
    """Rows of one dataset by their fate, and the tokens of those that stayed. `first`: the first rows dropped."""

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
    with state.main_process_first(), state.local_main_process_first():
        overwrite = recipe.overwrite_cache and state.is_main_process
        encoded = [_find_or_encode(info, recipe, tokenizer, template, overwrite) for info in infos]
    audit = Audit({found.info.name: found.counts for found in encoded})
    if state.is_main_process:
        _write_audit(Path(recipe.output_dir), encoded)
    _check_dropped(audit, recipe)
    datasets = {found.info.name: _load(found, recipe) for found in encoded}
    train = _mix([datasets[name] for name in recipe.dataset], recipe)
    evals = {name: datasets[name] for name in recipe.eval_dataset}
    if recipe.val_size:
        train, held_out = _split(train, recipe)
        evals = {**evals, "validation": held_out}
    fingerprints = {found.info.name: found.fingerprint for found in encoded}
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

    fingerprint, rows = _open(info, recipe)
    parts = _parts(info, fingerprint, recipe, tokenizer, template)
    if recipe.tokenized_path:
        folder = Path(recipe.tokenized_path) / info.name
    else:
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        folder = Path(config.HF_DATASETS_CACHE) / "arpo_trl" / f"{info.name}-{key}"
    if folder.exists() and not overwrite:
        _refuse_changed(folder, parts)
    else:
        _encode_to(folder, rows, info, recipe, tokenizer, template, parts)
    prepared = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    return Encoded(info, folder, Counts(**prepared["counts"]), fingerprint)


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


def _split(dataset: "Dataset", recipe: Recipe) -> "tuple[Dataset, Dataset]":
    """Hold out `val_size`: a share below 1, or a number of rows."""
    held_out = int(recipe.val_size if recipe.val_size >= 1 else recipe.val_size * len(dataset))
    if not 0 < held_out < len(dataset):
        raise DatasetError(f"val_size: {recipe.val_size:g} of {len(dataset):,} rows leaves nothing on one side")
    order = np.random.default_rng(recipe.seed).permutation(len(dataset))
    return dataset.select(order[held_out:]), dataset.select(order[:held_out])


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


def _open(info: DatasetInfo, recipe: Recipe) -> tuple[str, Iterator[Row]]:
    if info.path is not None:
        paths = find_files(info.path)
        content = hashlib.sha256()
        for path in paths:
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    content.update(block)
        return content.hexdigest(), (row for path in paths for row in read_rows(path))
    assert info.hub is not None
    return read_hub(info.hub, name=info.subset, data_dir=info.folder, split=info.split, cache_dir=recipe.cache_dir)


def _parts(
    info: DatasetInfo, fingerprint: str, recipe: Recipe, tokenizer: "PreTrainedTokenizerBase", template: Template
) -> dict[str, Any]:
    """All that the encoded rows depend on, by the name under which a change is reported."""
    vocabulary = json.dumps([sorted(tokenizer.get_vocab().items()), type(tokenizer).__name__])
    return {
        "data": fingerprint,
        "dataset_info.json": [info.formatting, info.columns, info.tags],
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "template": template.hash,
        "law": asdict(_law(recipe)),
        "max_samples": recipe.max_samples if info.num_samples is None else None,
        "default_system": recipe.default_system,
    }


def _law(recipe: Recipe) -> Law:
    return Law(recipe.cutoff_len, recipe.mask_history, recipe.train_on_prompt, recipe.truncation_mode)


def _refuse_changed(folder: Path, parts: dict[str, Any]) -> None:
    try:
        stored = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))["parts"]
    except (OSError, ValueError, KeyError):
        raise DatasetError(
            f"{folder}: not written by arpo_trl (no prepared.json); name another tokenized_path"
        ) from None
    changed = [part for part in parts if stored.get(part) != parts[part]]
    if changed:
        raise DatasetError(
            f"tokenized_path: {folder} was made with another {' and another '.join(changed)}; set overwrite_cache: true "
            "to make it again, or name another tokenized_path"
        )


def _encode_to(
    folder: Path,
    rows: Iterator[Row],
    info: DatasetInfo,
    recipe: Recipe,
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    parts: dict[str, Any],
) -> None:
    """Written beside its place and moved there when whole, so that a killed run leaves nothing half done."""
    if info.num_samples is None:
        rows = islice(rows, recipe.max_samples)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    unfinished.mkdir()
    counts = Counts()
    try:
        with (
            pa.OSFile(str(unfinished / "rows.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, SCHEMA) as writer,
            (unfinished / "audit.jsonl").open("w", encoding="utf-8") as audit,
        ):
            for batch in encode_rows(rows, info, recipe, tokenizer, template):
                kept = [(row, result) for row, result in batch if isinstance(result, Example)]
                for row, result in batch:
                    if finding := _count(counts, row, result, recipe.cutoff_len):
                        audit.write(json.dumps({"dataset": info.name, **finding}, ensure_ascii=False) + "\n")
                columns = (
                    [example.input_ids for _, example in kept],
                    [example.labels for _, example in kept],
                    [row.place for row, _ in kept],
                )
                arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
                writer.write_batch(pa.record_batch(arrays, schema=SCHEMA))
        prepared = {"parts": parts, "counts": asdict(counts)}
        (unfinished / "prepared.json").write_text(json.dumps(prepared, indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def encode_rows(
    rows: Iterable[Row], info: DatasetInfo, recipe: Recipe, tokenizer: "PreTrainedTokenizerBase", template: Template
) -> Iterator[list[tuple[Row, Example | RowError]]]:
    """Batches of rows with what became of each. While one batch is tokenised (in Rust), the next one is rendered."""
    law, tokenize = _law(recipe), make_tokenize(tokenizer)

    def encode_batch(batch: list[tuple[Row, list[Segment] | RowError]]) -> list[tuple[Row, Example | RowError]]:
        examples = iter(
            encode([segments for _, segments in batch if not isinstance(segments, RowError)], tokenize, law)
        )
        return [(row, found if isinstance(found, RowError) else _with_labels(next(examples))) for row, found in batch]

    waiting: Future[list[tuple[Row, Example | RowError]]] | None = None
    with ThreadPoolExecutor(1) as background:
        for batch in _batches(_render_rows(rows, info, recipe, template, law), recipe.preprocessing_batch_size):
            ready, waiting = waiting, background.submit(encode_batch, batch)
            if ready:
                yield ready.result()
        if waiting:
            yield waiting.result()


def _render_rows(
    rows: Iterable[Row], info: DatasetInfo, recipe: Recipe, template: Template, law: Law
) -> Iterator[tuple[Row, list[Segment] | RowError]]:
    for row in rows:
        try:
            if isinstance(row.value, RowError):
                raise row.value
            conversation = to_conversation(row.value, info, recipe.default_system)
            yield row, to_segments(conversation, template.render, law, template.generation_prompt)
        except RowError as error:
            yield row, error


def _batches(
    rows: Iterable[tuple[Row, list[Segment] | RowError]], most: int
) -> Iterator[list[tuple[Row, list[Segment] | RowError]]]:
    batch, characters = [], 0
    for row, segments in rows:
        batch.append((row, segments))
        characters += 0 if isinstance(segments, RowError) else sum(len(segment.text) for segment in segments)
        if len(batch) == most or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


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


def _mix(datasets: "list[Dataset]", recipe: Recipe) -> "Dataset":
    from datasets import concatenate_datasets, interleave_datasets

    if len(datasets) == 1 or recipe.mix_strategy == "concat":
        return concatenate_datasets(datasets)
    return interleave_datasets(
        datasets,
        probabilities=recipe.interleave_probs,
        seed=recipe.seed,
        stopping_strategy="first_exhausted" if recipe.mix_strategy == "interleave_under" else "all_exhausted",
    )
