"""Encoded datasets on disk, each in a folder of rows.arrow, audit.jsonl and prepared.json that is there whole or not at all.

A dataset is encoded once and kept under a name made of everything that its tokens depend on, in `tokenized_path` or in
the Hugging Face datasets cache, so that neither another process of this run nor the next run encodes it again. Any
number of runs may do so at once: each writes a folder of its own and renames it; the first one there is everyone's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pyarrow as pa

from ..errors import DatasetError
from .audit import Counts, missing_columns, to_lines
from .encode import SCHEMA, Encoder, encode_rows, through_the_gate
from .files import fingerprint, read_dataset, require_unchanged
from .registry import DatasetInfo

if TYPE_CHECKING:
    from datasets import Dataset

PROCESSES_PAY_FROM = 200 << 20
ROWS_BEFORE_JUDGED = 1000
LEFT_FOR_DEAD = 24 * 3600
TRIES = 5
MAKERS_OF_TOKENS = ("files", "strict_json", "messages", "tokenizer", "labels", "encode")


@dataclass(frozen=True)
class Encoded:
    """A dataset as it lies on disk: `rows` as SCHEMA has them, and `audit`, the file that lists those not simply kept."""

    info: DatasetInfo
    rows: Dataset
    counts: Counts
    fingerprint: str
    audit: Path


def find_or_encode(encoder: Encoder, run: str) -> Encoded:
    """Encode a dataset, or find it encoded.

    Args:
        run: The name of this run, the same on all its processes: with `overwrite_cache` what another run encoded is
            encoded again, and what this one did is not.

    Raises:
        DatasetError: if the data can't be read, has not the columns that the registry names, or `tokenized_path` holds
            something else.
    """
    from datasets import Dataset, config

    info, recipe = encoder.info, encoder.recipe
    folder = Path(recipe.tokenized_path) / info.folder_name if recipe.tokenized_path else None
    prepared = _read_prepared(folder) if folder else None
    if prepared and info.path and not info.path.exists():
        data = prepared["parts"]["data"]  # Encoded elsewhere: these rows are all there is.
    else:
        data = fingerprint(info, streaming=False)
    parts = _parts(encoder, data)
    if folder is None:
        key = hashlib.sha256(json.dumps([str(info.path), parts], sort_keys=True).encode()).hexdigest()[:16]
        folder = Path(config.HF_DATASETS_CACHE) / "arpo_trl" / f"{info.folder_name}-{key}"
        prepared = _read_prepared(folder)
    elif not prepared and folder.exists() and _read_prepared(folder) is None:
        raise DatasetError(f"{folder}: not written by arpo_trl (no prepared.json); name another tokenized_path")
    replaces = prepared is not None and recipe.overwrite_cache and prepared.get("run") != run
    for _ in range(TRIES):
        if prepared is None or replaces:
            _encode_to(folder, encoder, parts, run, replaces)
            replaces = False
        if (prepared := _read_prepared(folder)) is None:
            continue  # Another run took it away, to put its own there.
        if changed := [part for part in parts if prepared["parts"].get(part) != parts[part]]:
            raise DatasetError(
                f"tokenized_path: {folder} was made with another {' and another '.join(changed)}; set overwrite_cache: "
                "true to make it again, or name another tokenized_path"
            )
        with suppress(FileNotFoundError):
            rows = Dataset.from_file(str(folder / "rows.arrow"))
            return Encoded(info, rows, Counts(**prepared["counts"]), data, folder / "audit.jsonl")
    raise DatasetError(f"{folder}: no rows.arrow beside its prepared.json; set overwrite_cache: true to make it again")


def _encode_to(folder: Path, encoder: Encoder, parts: dict[str, Any], run: str, replaces: bool) -> None:
    """Written beside its place and moved there when whole, so that a killed run leaves nothing half done."""
    info, recipe = encoder.info, encoder.recipe
    most = recipe.max_samples if info.num_samples is None else None
    size, rows = read_dataset(info, streaming=False)
    rows = through_the_gate(islice(rows, most), encoder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder.parent)
    unfinished = _beside(folder)
    unfinished.mkdir()
    counts, fields = Counts(), set[str]()
    try:
        with (
            pa.OSFile(str(unfinished / "rows.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, SCHEMA) as writer,
            (unfinished / "audit.jsonl").open("w", encoding="utf-8", errors="backslashreplace") as audit,
        ):
            for batch in encode_rows(rows, encoder, _workers(size, recipe.preprocessing_num_workers)):
                writer.write_batch(batch.encoded)
                audit.writelines(to_lines(batch.findings))
                counts.add(batch.counts)
                fields |= batch.fields
        is_whole = most is None or counts.rows < most
        if (is_whole or counts.rows >= ROWS_BEFORE_JUDGED) and (missing := missing_columns(info, fields, counts.rows)):
            raise DatasetError(missing)
        require_unchanged(info, parts["data"])
        prepared = {"run": run, "parts": parts, "counts": asdict(counts)}
        (unfinished / "prepared.json").write_text(json.dumps(prepared, indent=1), encoding="utf-8")
        _publish(unfinished, folder, replaces)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _publish(unfinished: Path, folder: Path, replaces: bool) -> None:
    """Put the folder in its place; one that another run put there meanwhile holds the same rows, and stays."""
    aside = _beside(folder)
    try:
        if replaces or (folder.exists() and _read_prepared(folder) is None):
            with suppress(FileNotFoundError):
                folder.rename(aside)
        unfinished.rename(folder)
    except OSError:  # It is there already, or (Windows) open
        if _read_prepared(folder) is None:
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _beside(folder: Path) -> Path:
    """A name of nobody else's; mkdtemp's folders are closed to others, and a cache may be shared."""
    return folder.with_name(f"{folder.name}.unfinished-{uuid4().hex}")


def _remove_leftovers(parent: Path) -> None:
    """Remove what killed runs left behind: folders of ours into which nothing was written for a day."""
    for path in parent.glob("*.unfinished-*"):
        with suppress(OSError):
            written = max(file.stat().st_mtime for file in (path, *path.iterdir()))
            if time.time() - written > LEFT_FOR_DEAD:
                shutil.rmtree(path, ignore_errors=True)


def _read_prepared(folder: Path) -> dict[str, Any] | None:
    """What stands in the file that is written last; None: the folder is not there, not whole, or not ours."""
    try:
        prepared: dict[str, Any] = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
        return prepared if {"parts", "counts"} <= prepared.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _workers(size: int, wanted: int | None) -> int:
    """Processes to encode with: starting them costs seconds, in which one process encodes tens of megabytes."""
    return 1 if size < PROCESSES_PAY_FROM else min(wanted or 1, os.cpu_count() or 1)


def _parts(encoder: Encoder, data: str) -> dict[str, Any]:
    """All that the encoded rows depend on, by the name under which a change is reported."""
    info, recipe, tokenizer = encoder.info, encoder.recipe, encoder.template.tokenizer
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
    return {
        "arpo_trl": hash_of_sources(),
        "data": data,
        "dataset_info.json": [info.formatting, info.columns, info.tags],
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "template": encoder.template.hash,
        **asdict(encoder.config),
        "max_samples": recipe.max_samples if info.num_samples is None else None,
        "default_system": recipe.default_system,
    }


@cache
def hash_of_sources() -> str:
    """The code that makes tokens; its version stays the same while it is worked on."""
    sources = (files("arpo_trl.data").joinpath(f"{name}.py").read_bytes() for name in MAKERS_OF_TOKENS)
    return hashlib.sha256(b"".join(sources)).hexdigest()
