"""Encoded datasets on disk: each is encoded once by `datasets`, under a name made of everything that its tokens depend on.

`datasets` moves the whole folder into place once it is written, so a killed run leaves nothing half done; two runs that
prepare the same data at once wait for each other. With `tokenized_path` a copy is kept there by `save_to_disk`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState
from datasets import (
    ArrowBasedBuilder,
    Dataset,
    DatasetDict,
    DatasetInfo,
    DownloadManager,
    DownloadMode,
    Features,
    List,
    SplitGenerator,
    Value,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from filelock import FileLock

from ..errors import DatasetError
from ..recipe.keys import Recipe
from ..run_folder import write_text
from .audit import list_rows
from .encode import Encoder, encode_batches
from .files import fingerprint, read_dataset, require_unchanged, size_of
from .labels import IGNORED
from .registry import saved_by_llamafactory

# Raise it when the tokens of a row, or what is said of it, come out otherwise: rows encoded before are encoded again.
FORMAT = 4
FEATURES = Features(
    input_ids=List(Value("int32")),
    labels=List(Value("int32")),
    source=Value("string"),
    trained_tokens=Value("int64"),
    cut=Value("int64"),
    outcome=Value("string"),
    reason=Value("string"),
    excerpt=Value("string"),
    fields=List(Value("string")),
    also=Value("string"),
)
TRAINED_ON = Features({name: FEATURES[name] for name in ("input_ids", "labels", "source")})
PROCESSES_PAY_FROM = 200 << 20
ROWS_IN_MEMORY = 100
Range = tuple[int, int | None]
Parts = dict[str, object]


@dataclass(frozen=True)
class EncodedDataset:
    """`rows`: every row of the dataset, with FEATURES as columns. `fingerprint`: hash of the data's content."""

    name: str
    rows: Dataset
    fingerprint: str

    def list_changed_rows(self) -> Path | None:
        """The file beside the encoded rows that lists those not simply kept; None if there are none, or no room for it."""
        lines = list(list_rows(self.name, self.rows))
        if not lines:
            return None
        path = Path(self.rows.cache_files[0]["filename"]).with_name("row_audit.jsonl")
        with suppress(OSError):  # Another run may write the same lines.
            if not path.exists():
                write_text(path, "".join(lines))
        return path if path.exists() else None


def load_or_encode(encoder: Encoder) -> EncodedDataset:
    """Find a dataset encoded, or encode it; with `overwrite_cache` the main process always encodes.

    Raises:
        DatasetError: if the data can't be read, fails the parity check, or `tokenized_path` holds something else.
    """
    info, recipe = encoder.info, encoder.recipe
    saved = Path(recipe.tokenized_path) / info.folder_name if recipe.tokenized_path else None
    found = _load_saved(saved) if saved and saved.exists() else None
    if found and info.path and not info.path.exists():
        data = str(_parts_of(found)["data"])  # It was encoded elsewhere: these rows are all there is.
    else:
        data = fingerprint(info, streaming=False)
    parts = _parts(encoder, data)
    before = _parts_of(found) if found else parts
    changed = [part for part in parts if before.get(part) != parts[part]]
    encode_again = recipe.overwrite_cache and (PartialState().is_main_process or bool(changed))
    if changed and not encode_again:
        raise DatasetError(
            f"tokenized_path: {saved} was made with another {' and another '.join(changed)}; set overwrite_cache: true to "
            "make it again, or name another tokenized_path"
        )
    if found is None or encode_again:
        found = _encode(encoder, parts, encode_again)
        if saved:
            found = _save(found, saved)
    return EncodedDataset(info.name, found, data)


class RowsBuilder(ArrowBasedBuilder):  # type: ignore[misc]
    """Encodes a dataset into the datasets cache, in as many processes as it is given ranges of rows."""

    def __init__(self, encoder: Encoder, parts: Parts, ranges: list[Range]) -> None:
        self.encoder, self.parts, self.ranges = encoder, parts, ranges
        key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
        super().__init__(dataset_name="arpo_trl", config_id=key)

    def _info(self) -> DatasetInfo:
        return DatasetInfo(description=json.dumps(self.parts), features=FEATURES)

    def _split_generators(self, dl_manager: DownloadManager) -> list[SplitGenerator]:
        return [SplitGenerator("train", {"ranges": self.ranges})]

    def _generate_tables(self, ranges: list[Range]) -> Iterator[tuple[int, pa.Table]]:
        if len(self.ranges) > 1:
            # The processes are the parallelism, and the threads of a forked tokenizer would wait for ever.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
        for start, stop in ranges:
            rows = islice(read_dataset(self.encoder.info, streaming=False), start, stop)
            for number, batch in enumerate(encode_batches(rows, self.encoder)):
                yield number, pa.Table.from_pylist(batch, schema=FEATURES.arrow_schema)
        require_unchanged(self.encoder.info, str(self.parts["data"]))


def _encode(encoder: Encoder, parts: Parts, encode_again: bool) -> Dataset:
    ranges = _ranges(encoder)
    builder = RowsBuilder(encoder, parts, ranges)
    mode = DownloadMode.FORCE_REDOWNLOAD if encode_again else None
    folder = Path(builder.cache_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):  # until the rows are open, lest another run's overwrite_cache replaces them
        try:
            builder.download_and_prepare(download_mode=mode, num_proc=len(ranges))
        except DatasetGenerationError as error:
            raise error.__cause__ or error from None
        empty = builder.info.splits["train"].num_examples == 0
        return Dataset(FEATURES.arrow_schema.empty_table()) if empty else builder.as_dataset("train")


def _ranges(encoder: Encoder) -> list[Range]:
    """The rows that each process encodes; the data must be worth the seconds that processes take to start."""
    info, recipe = encoder.info, encoder.recipe
    most = recipe.max_samples if info.num_samples is None else None
    processes = min(recipe.preprocessing_num_workers or 1, os.cpu_count() or 1)
    if processes == 1 or size_of(info) < PROCESSES_PAY_FROM:
        return [(0, most)]
    total = sum(1 for _ in islice(read_dataset(info, streaming=False), most))
    ends = [total * number // processes for number in range(processes + 1)]
    return list(pairwise(ends))


def _parts(encoder: Encoder, data: str) -> Parts:
    """All that the encoded rows depend on, by the name under which a change is reported."""
    info, recipe, tokenizer = encoder.info, encoder.recipe, encoder.template.tokenizer
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    return {
        "format of arpo_trl": FORMAT,
        "data": data,
        "path": str(info.path or info.hub),  # Rows are named by it.
        "dataset_info.json": [info.formatting, info.columns, list(info.media), info.tags],
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "template": encoder.template.hash,
        **asdict(encoder.config),
        "max_samples": recipe.max_samples if info.num_samples is None else None,
        "default_system": recipe.default_system,
    }


def _parts_of(rows: Dataset) -> Parts:
    """The parts that encoded rows were made of."""
    return dict(json.loads(rows.info.description))


def _load_saved(folder: Path) -> Dataset:
    with suppress(OSError, ValueError, TypeError, pa.ArrowException):
        rows = load_from_disk(str(folder))
        if isinstance(rows, Dataset) and rows.features == FEATURES and _parts_of(rows):
            return rows
    raise DatasetError(
        f"tokenized_path: {folder} holds no rows that arpo_trl saved; name another tokenized_path, or remove the folder"
    )


def _save(rows: Dataset, folder: Path) -> Dataset:
    """`save_to_disk` beside the folder and a rename, so that it is there whole or not at all."""
    beside = folder.with_name(f"{folder.name}.unfinished")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        shutil.rmtree(beside, ignore_errors=True)  # a killed run left it
        try:
            rows.save_to_disk(str(beside / "new"))
            with suppress(FileNotFoundError):
                folder.rename(beside / "old")
            (beside / "new").rename(folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return _load_saved(folder)


def load_tokenized(recipe: Recipe) -> dict[str, EncodedDataset] | None:
    """What LLaMA-Factory saved in `tokenized_path`: its splits train, validation or validation_NAME, or None.

    Its folder is the whole data of the run, mixed and split; as there, every other key of the data has no effect.

    Raises:
        DatasetError: if the folder holds no token ids.
    """
    folder = saved_by_llamafactory(recipe)
    if folder is None:
        return None
    try:
        saved = load_from_disk(str(folder))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise DatasetError(f"tokenized_path: {folder}: cannot be read ({error})") from None
    found = {}
    for name, rows in (saved if isinstance(saved, DatasetDict) else {"train": saved}).items():
        if missing := {"input_ids", "labels"} - set(rows.column_names):
            raise DatasetError(
                f"tokenized_path: {folder}: its {name} has no column {' and '.join(sorted(missing))}; name a folder that "
                "arpo_trl or LLaMA-Factory saved"
            )
        ours = rows.select_columns(["input_ids", "labels"]).map(
            _as_ours,
            with_indices=True,
            input_columns="labels",
            fn_kwargs={"source": f"{folder}/{name}", "format_number": FORMAT},
            features=FEATURES,
            writer_batch_size=ROWS_IN_MEMORY,
        )
        found[name] = EncodedDataset(name, ours, rows._fingerprint)
    return found


def _as_ours(labels: list[int], position: int, source: str, format_number: int) -> dict[str, object]:
    """Our other columns of a row that LLaMA-Factory encoded. `format_number` is there for `map`'s fingerprint."""
    trained = sum(label != IGNORED for label in labels)
    return {
        "source": f"{source}:{position + 1}",
        "trained_tokens": trained,
        "cut": 0,
        "outcome": "kept" if trained else "dropped",
        "reason": "" if trained else "no trained token",
        "excerpt": "",
        "fields": [],
        "also": "",
    }


def kept_rows(rows: Dataset) -> Dataset:
    """The rows that can be trained on: input_ids, labels and source."""
    outcomes = rows.select_columns("outcome").with_format("arrow")[:]["outcome"]
    kept = pc.indices_nonzero(pc.not_equal(outcomes, "dropped")).to_numpy().astype(np.int64)
    columns = rows.select_columns(list(TRAINED_ON))
    return columns if len(kept) == len(rows) else columns.select(kept)
