"""Files or hub -> audited, encoded, cached train and eval datasets.

Every row is accounted for: kept, shortened, lost its final answer, or dropped with its place and the reason. All but the
kept ones are listed in `row_audit.jsonl` in the run's folder.

Each dataset is encoded once and kept under a name made of everything it depends on, in `tokenized_path` or in the
Hugging Face datasets cache, so that neither another process of this run nor the next run encodes it again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import arpo_trl

from .audit import Audit, Counts, check_dropped, to_lines
from .batches import SCHEMA, encode_rows, encoding_config, through_the_gate
from .errors import DatasetError
from .recipe import Recipe
from .registry import DatasetInfo, read_registry
from .rows import Row, find_files, read_hub, read_rows
from .template import Template, find_template

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

PROCESSES_PAY_FROM = 200 << 20
STREAMED_BEFORE_JUDGED = 1000


@dataclass
class PreparedData:
    """Columns: input_ids, labels (-100: no loss), source ("file:line"). `fingerprints`: content hash per dataset."""

    train: Dataset | IterableDataset
    eval: dict[str, Dataset]
    audit: Audit
    fingerprints: dict[str, str]
    template_hash: str


def prepare_datasets(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> PreparedData:
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
    path = Path(recipe.output_dir) / "row_audit.jsonl"
    if state.is_main_process:
        _write_audit(path, encoded)
    check_dropped(audit, recipe.max_dropped, path)
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


def token_lengths(rows: Dataset) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens of each row, in the rows' order: shape (rows,)."""
    batches = rows.select_columns("input_ids").with_format("arrow").iter(1000)
    lengths = [pc.list_value_length(batch["input_ids"]).to_numpy() for batch in batches]
    return np.concatenate([np.empty(0, np.int64), *lengths])


@dataclass(frozen=True)
class Encoded:
    """A dataset as it lies on disk: rows.arrow, audit.jsonl and prepared.json in `folder`."""

    info: DatasetInfo
    folder: Path
    counts: Counts
    fingerprint: str


def _find_or_encode(
    info: DatasetInfo, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, template: Template, overwrite: bool
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


def _load(encoded: Encoded, recipe: Recipe) -> Dataset:
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
    info: DatasetInfo, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, audit: Audit, writes: bool
) -> tuple[str, IterableDataset]:
    """Rows are encoded as they are asked for, and counted and judged on the first pass over them."""
    from datasets import Features, IterableDataset

    counts = audit.datasets[info.name] = Counts()
    path = Path(recipe.output_dir) / "row_audit.jsonl"

    def examples() -> Iterator[dict[str, Any]]:
        seen = 0
        rows = islice(read_dataset(info, recipe), info.num_samples)
        for batch in encode_rows(through_the_gate(rows, info, recipe, tokenizer), info, recipe, tokenizer):
            seen += batch.counts.rows
            if seen > counts.rows:
                counts.add(batch.counts)
                if writes:
                    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                        file.writelines(to_lines(batch.findings))
                if counts.rows >= STREAMED_BEFORE_JUDGED:
                    check_dropped(Audit({info.name: counts}), recipe.max_dropped, path)
            yield from batch.encoded.to_pylist()
        check_dropped(Audit({info.name: counts}), recipe.max_dropped, path)

    dataset = IterableDataset.from_generator(examples, features=Features.from_arrow_schema(SCHEMA))
    return _fingerprint(info, recipe), dataset


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


def _write_audit(path: Path, encoded: Sequence[Encoded]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as audit:
        for found in encoded:
            with (found.folder / "audit.jsonl").open("rb") as part:
                shutil.copyfileobj(part, audit)


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


def _workers(info: DatasetInfo, recipe: Recipe) -> int:
    """Processes to encode with: starting them costs seconds, in which one process encodes tens of megabytes."""
    files = find_files(info.path) if info.path else []
    if sum(file.stat().st_size for file in files) < PROCESSES_PAY_FROM:
        return 1
    return min(recipe.preprocessing_num_workers or 1, os.cpu_count() or 1)


def _parts(
    info: DatasetInfo, fingerprint: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, template: Template
) -> dict[str, Any]:
    """All that the encoded rows depend on, by the name under which a change is reported."""
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    return {
        "arpo_trl": arpo_trl.__version__,
        "data": fingerprint,
        "dataset_info.json": [info.formatting, info.columns, info.tags],
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "template": template.hash,
        **asdict(encoding_config(recipe)),
        "max_samples": recipe.max_samples if info.num_samples is None else None,
        "default_system": recipe.default_system,
    }


def _encode_to(
    folder: Path,
    info: DatasetInfo,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    parts: dict[str, Any],
) -> None:
    """Written beside its place and moved there when whole, so that a killed run leaves nothing half done."""
    first = islice(read_dataset(info, recipe), recipe.max_samples if info.num_samples is None else None)
    rows = through_the_gate(first, info, recipe, tokenizer)
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
                audit.writelines(to_lines(batch.findings))
                counts.add(batch.counts)
        prepared = {"parts": parts, "counts": asdict(counts)}
        (unfinished / "prepared.json").write_text(json.dumps(prepared, indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(FileExistsError, PermissionError):  # Another run was faster, with the same rows.
            unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


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
        stopping_strategy="first_exhausted" if recipe.mix_strategy == "interleave_under" else "all_exhausted",
    )
