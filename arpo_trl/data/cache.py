"""Encoded datasets on disk: `datasets` encodes each once, under a hash of everything that its tokens depend on.

`datasets` renames the complete folder once it is written, so a killed run leaves nothing incomplete; two runs that prepare
the same data wait for each other. With `overwrite_cache`, rows are encoded into a new folder, and the old one is removed once
no process reads it. With `tokenized_path`, a copy is saved there by `save_to_disk`.
"""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from errno import EROFS
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState
from datasets import Dataset, Features
from datasets.exceptions import DatasetGenerationError
from filelock import FileLock

from ..errors import DatasetError
from ..recipe.keys import Recipe
from ..run_folder import write_text
from ..terminal import progress
from .audit import list_rows
from .encode import FEATURES, Encoder, encode_batches
from .files import estimate_rows, fingerprint, read_dataset, require_unchanged
from .in_use import is_in_use, mark_in_use
from .labels import IGNORED
from .pairs import SIDES
from .registry import saved_by_llamafactory

# Increase it when rows are encoded or described differently, so that cached rows are encoded again.
FORMAT = 8
TRAINED_ON = Features({name: FEATURES[name] for name in ("input_ids", "labels", "source")})
ROWS_IN_MEMORY = 100
Parts = dict[str, object]


@dataclass(frozen=True)
class EncodedDataset:
    """`rows`: every row of the dataset, with FEATURES as columns. `fingerprint`: hash of the data's content."""

    name: str
    rows: Dataset
    fingerprint: str

    def list_changed_rows(self) -> Path | None:
        """Write the list of rows that are not intact next to the encoded rows; None if there are none, or the disk is full."""
        lines = list(list_rows(self.name, self.rows))
        if not lines:
            return None
        path = Path(self.rows.cache_files[0]["filename"]).with_name("row_audit.jsonl")
        with suppress(OSError):  # Another run may be writing the same lines.
            if not path.exists():
                write_text(path, "".join(lines))
        return path if path.exists() else None


def load_or_encode(encoder: Encoder) -> EncodedDataset:
    """Load an encoded dataset, or encode it; with `overwrite_cache` the main process always encodes it.

    Raises:
        DatasetError: the data can't be read or fails the parity check, or `tokenized_path` contains something else.
    """
    info, recipe = encoder.info, encoder.recipe
    saved = Path(recipe.tokenized_path) / info.folder_name if recipe.tokenized_path else None
    rows = _load_saved(saved) if saved and saved.exists() else None
    if rows is not None and info.path and not info.path.exists():
        data = str(_parts_of(rows)["data"])  # encoded on another machine, without the raw data here
    else:
        data = fingerprint(info, streaming=False)
    parts = _parts(encoder, data)
    before = parts if rows is None else _parts_of(rows)
    changed = [part for part in parts if before.get(part) != parts[part]]
    encode_again = recipe.overwrite_cache and (PartialState().is_main_process or bool(changed))
    if changed and not encode_again:
        raise DatasetError(
            f"tokenized_path: {saved} was encoded with other settings ({', '.join(changed)}); set overwrite_cache: true to encode "
            "again, or another tokenized_path"
        )
    if rows is None or encode_again:
        rows = _encode(encoder, parts, encode_again)
        if saved:
            rows = _save(rows, saved)
    return EncodedDataset(info.name, rows, data)


class RowsBuilder(datasets.ArrowBasedBuilder):  # type: ignore[misc]
    """Encodes a dataset into the cache of `datasets`."""

    def __init__(self, encoder: Encoder, parts: Parts) -> None:
        self.encoder, self.parts = encoder, parts
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        super().__init__(dataset_name="arpo_trl", config_id=key)

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(description=json.dumps(self.parts), features=FEATURES)

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator("train", {})]

    def _generate_tables(self) -> Iterator[tuple[int, pa.Table]]:
        info, most = self.encoder.info, _max_samples(self.encoder)
        rows = islice(read_dataset(info, streaming=False), most)
        total = min(estimate_rows(info), most or sys.maxsize) if sys.stdout.isatty() else 0
        with progress(f"encoding {info.name}", total) as advance:
            for number, batch in enumerate(encode_batches(rows, self.encoder)):
                yield number, pa.Table.from_pylist(batch, schema=FEATURES.arrow_schema)
                advance(len(batch))
        require_unchanged(info, str(self.parts["data"]))


def _encode(encoder: Encoder, parts: Parts, encode_again: bool) -> Dataset:
    """Open the newest encoding of the rows; if there is none, or to encode again, write the next one.

    Each has its own folder, because another process, or this one, may be reading an earlier one.
    """
    with _writable_cache():
        builder = RowsBuilder(encoder, parts)
        encodings = Path(builder.cache_dir).parent
        encodings.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{encodings}.lock"):  # until the rows are marked, so that no other run removes them
            newest = max((int(path.name) for path in encodings.iterdir() if path.name.isdecimal()), default=0)
            folder = encodings / str(newest + 1 if encode_again or not newest else newest)
            bars = datasets.are_progress_bars_disabled()
            datasets.disable_progress_bars()  # "Generating train split", which has no ETA; RowsBuilder has its own
            try:
                builder.download_and_prepare(str(folder))
            except DatasetGenerationError as error:
                raise error.__cause__ or error from None
            finally:
                if not bars:
                    datasets.enable_progress_bars()
            mark_in_use(folder)
            _remove_superseded(folder)
            empty = builder.info.splits["train"].num_examples == 0
            return Dataset(FEATURES.arrow_schema.empty_table()) if empty else builder.as_dataset("train")


def _remove_superseded(current: Path) -> None:
    """Remove the earlier encodings that no process reads, and what a killed run left of one."""
    for folder in current.parent.iterdir():
        if folder != current and folder.is_dir() and not is_in_use(folder):
            shutil.rmtree(folder, ignore_errors=True)
    for lock in current.parent.glob("*.lock"):  # of `datasets`: 1_builder.lock, 1.incomplete_info.lock
        if not (current.parent / re.split("[._]", lock.name)[0]).exists():
            lock.unlink(missing_ok=True)


@contextmanager
def _writable_cache() -> Iterator[None]:
    """Raise DatasetError if the cache of `datasets` can't be written: a file in its path, another user's, read-only."""
    try:
        yield
    except OSError as error:
        cannot_write = isinstance(error, (PermissionError, NotADirectoryError, FileExistsError))
        is_cache = str(error.filename).startswith(str(datasets.config.HF_DATASETS_CACHE))
        if not is_cache or not (cannot_write or error.errno == EROFS):
            raise
        raise DatasetError(
            f"{error.filename}: the cache of datasets can't be written ({error.strerror}); set HF_DATASETS_CACHE to a "
            "folder that you can write"
        ) from error


def _max_samples(encoder: Encoder) -> int | None:
    """Return how many rows are encoded: all of those from which `num_samples` are drawn."""
    return encoder.recipe.max_samples if encoder.info.num_samples is None else None


def _parts(encoder: Encoder, data: str) -> Parts:
    """Return everything that the encoded rows depend on, by the name under which a change is reported."""
    info, recipe, tokenizer = encoder.info, encoder.recipe, encoder.template.tokenizer
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    return {
        "format of arpo_trl": FORMAT,
        "data": data,
        "path": str(info.path or info.hf_hub_url),  # part of each row's source
        "dataset_info.json": [info.formatting, info.columns, info.tags, info.ranking],
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "template": encoder.template.hash,
        **asdict(encoder.config),
        "max_samples": _max_samples(encoder),
        "default_system": recipe.default_system,
        "pair_all_answers": recipe.pair_all_answers,
    }


def _parts_of(rows: Dataset) -> Parts:
    """Return the parts with which the rows were encoded."""
    return dict(json.loads(rows.info.description))


def _load_saved(folder: Path) -> Dataset:
    with suppress(OSError, ValueError, TypeError, pa.ArrowException):
        rows = datasets.load_from_disk(str(folder))
        if isinstance(rows, Dataset) and rows.features == FEATURES and _parts_of(rows):
            return rows
    raise DatasetError(
        f"tokenized_path: {folder} was not saved by arpo_trl; set another tokenized_path, or remove the folder"
    )


def _save(rows: Dataset, folder: Path) -> Dataset:
    """Save to a temporary folder, then rename it, so that the folder is always complete."""
    temporary = folder.with_name(f"{folder.name}.unfinished")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        shutil.rmtree(temporary, ignore_errors=True)  # left by a killed run
        try:
            rows.save_to_disk(str(temporary / "new"))
            try:
                folder.rename(temporary / "old")
            except FileNotFoundError:
                pass
            except PermissionError:  # on Windows, where a process reads its files
                raise DatasetError(
                    f"tokenized_path: {folder} is in use by another run; stop it, or set another tokenized_path"
                ) from None
            (temporary / "new").rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return _load_saved(folder)


def load_tokenized(recipe: Recipe) -> dict[str, EncodedDataset] | None:
    """Load what LLaMA-Factory saved in `tokenized_path`: its splits train, validation or validation_NAME, or None.

    Its folder contains all data of the run, mixed and split; as there, all other data keys are ignored.

    Raises:
        DatasetError: the folder contains no token ids.
    """
    folder = saved_by_llamafactory(recipe)
    if folder is None:
        return None
    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DatasetError(f"tokenized_path: {folder}: cannot be read ({error})") from None
    splits = {}
    needed = [f"{side}_{name}" for side in SIDES for name in ("input_ids", "labels")]
    if recipe.stage != "dpo":
        needed = ["input_ids", "labels"]
    for name, rows in (saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}).items():
        if missing := {*needed} - set(rows.column_names):
            raise DatasetError(
                f"tokenized_path: {folder}: missing columns in {name}: {', '.join(sorted(missing))}; set a folder saved by "
                f"arpo_trl or LLaMA-Factory with stage: {recipe.stage}"
            )
        described = rows.select_columns(needed).map(
            _describe_saved,
            with_indices=True,
            input_columns=needed,
            fn_kwargs={"source": f"{folder}/{name}", "format_number": FORMAT},
            remove_columns=[column for column in needed if column not in FEATURES],
            features=FEATURES,
            writer_batch_size=ROWS_IN_MEMORY,
        )
        splits[name] = EncodedDataset(name, described, rows._fingerprint)
    return splits


def _describe_saved(*columns: Any, source: str, format_number: int) -> dict[str, object]:
    """Return our columns of a row or pair that LLaMA-Factory encoded. `format_number` only changes `map`'s fingerprint."""
    *sides, position = columns
    input_ids, labels = sides[::2], sides[1::2]
    trained = [sum(label != IGNORED for label in side) for side in labels]
    outcome, reason = ("intact", "") if all(trained) else ("dropped", "no trained token")
    return {
        "input_ids": list(chain.from_iterable(input_ids)),
        "labels": list(chain.from_iterable(labels)),
        "source": f"{source}:{position + 1}",
        "trained_tokens": sum(trained),
        "outcome": outcome,
        "reason": reason,
        "seq_lengths": [len(side) for side in input_ids] if len(sides) > 2 else [],
        **{"cut": 0, "excerpt": "", "fields": [], "notes": []},
    }


def kept_rows(rows: Dataset) -> Dataset:
    """Select the rows that can be trained on: input_ids, labels and source, and of pairs seq_lengths."""
    outcomes = rows.select_columns("outcome").with_format("arrow")[:]["outcome"]
    kept = pc.indices_nonzero(pc.not_equal(outcomes, "dropped")).to_numpy().astype(np.int64)
    lengths = rows.select_columns("seq_lengths").with_format("arrow")[:]["seq_lengths"]
    are_pairs = len(rows) > 0 and pc.max(pc.list_value_length(lengths)).as_py() > 0
    columns = rows.select_columns([*TRAINED_ON, *(["seq_lengths"] if are_pairs else [])])
    return columns if len(kept) == len(rows) else columns.select(kept)
