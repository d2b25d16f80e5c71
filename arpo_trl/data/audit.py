"""The outcome of each row: intact, shortened, truncated before the final answer, or dropped, with location and reason."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
from datasets import Dataset

from ..errors import printable
from .encode import EncodedRow
from .registry import COLUMNS, NEEDED, DatasetInfo

SHOWN_REASONS = 3
CUT_ROWS_ALLOWED = 0.1
ROWS_TO_FIT = 0.95
SHOWN_FIELDS = 12
SHOWN_NOTES = 12
COUNTED = ["source", "trained_tokens", "outcome", "reason", "notes"]


@dataclass
class Counts:
    """The rows of one dataset by outcome, and the tokens of those that were not dropped.

    Attributes:
        first: Why the first rows were dropped.
        notes: Other counts in the rows that were not dropped, by kind and name.
    """

    intact: int = 0
    shortened: int = 0
    lost_answer: int = 0
    dropped: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    first: list[str] = field(default_factory=list)
    notes: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.intact + self.shortened + self.lost_answer + self.dropped

    def add(self, row: EncodedRow, tokens: int) -> None:
        """Count one row, of which the columns COUNTED are needed."""
        setattr(self, row["outcome"], getattr(self, row["outcome"]) + 1)
        self.tokens += tokens
        self.trained_tokens += row["trained_tokens"]
        if row["outcome"] == "dropped" and len(self.first) < SHOWN_REASONS:
            self.first.append(f"{row['source']}: {row['reason']}")
        for note in row["notes"]:
            of_kind = self.notes.setdefault(note["kind"], {})
            of_kind[note["name"]] = of_kind.get(note["name"], 0) + note["count"]

    def describe_notes(self, info: DatasetInfo | None) -> list[str]:
        """Return a line for each of the most frequent notes."""
        notes = [(times, kind, name) for kind, counts in self.notes.items() for name, times in counts.items()]
        most = sorted(notes, key=lambda note: -note[0])[:SHOWN_NOTES]
        return [printable(_describe_note(kind, name, times, info)) for times, kind, name in most]


def _describe_note(kind: str, name: str, times: int, info: DatasetInfo | None) -> str:
    if kind == "mask_spans match":
        return f"mask_spans: {name}: {times:,} match{'es' * (times != 1)}"
    if kind == "cut":
        return f"truncated: {times:,} {name}"
    if kind == "masked tokens":
        return f"mask_spans: {times:,} token{'s' * (times != 1)} masked"
    if kind == "thinking switch":
        return f"{name}: on for {times:,} row{'s' * (times != 1)} with reasoning, off for the others"
    if kind == "result inside":
        have = "row has" if times == 1 else "rows have"
        return f"{times:,} {have} {name} inside a trained reply: tool results are trained on (to mask them: mask_spans: result)"
    text = f"{kind} `{name}` ({times:,} {'message' if 'message' in kind else 'row'}{'s' * (times != 1)})"
    # LLaMA-Factory also reads system, tools and history only if the registry names them.
    key = "tools" if name == "functions" else name
    if kind != "ignored column" or not info or key not in COLUMNS[info.formatting].keys() - info.columns.keys():
        return text
    columns = json.dumps({"columns": info.columns | {key: name}}, ensure_ascii=False)[1:-1]
    return f"{text}; to read it, set {columns} in dataset_info.json"


@dataclass
class Audit:
    """Counts by dataset; those of a stream grow in the first pass. `mask_spans`: the entries that should match."""

    datasets: dict[str, Counts] = field(default_factory=dict)
    infos: Mapping[str, DatasetInfo] = field(default_factory=dict)
    mask_spans: Sequence[str] = ()

    def lines(self) -> list[str]:
        """Return a line for each dataset, followed by its notes."""
        lines = []
        for name, counts in self.datasets.items():
            lines.append(
                f"{name}: {counts.rows:,} rows: {counts.intact:,} intact, {counts.shortened:,} shortened, "
                f"{counts.lost_answer:,} truncated before the final answer, {counts.dropped:,} dropped; "
                f"{counts.tokens:,} tokens, {counts.trained_tokens:,} trained"
            )
            lines += [f"{name}: {line}" for line in counts.describe_notes(self.infos.get(name))]
        matched = {name for counts in self.datasets.values() for name in counts.notes.get("mask_spans match", ())}
        return lines + [
            f"mask_spans: {entry}: no match in any row" for entry in self.mask_spans if entry not in matched
        ]


def count(rows: Dataset) -> Counts:
    counts = Counts()
    for row, tokens in zip(rows.select_columns(COUNTED).with_format("arrow")[:].to_pylist(), token_lengths(rows)):
        counts.add(row, int(tokens))
    return counts


def token_lengths(rows: Dataset) -> npt.NDArray[np.int64]:
    """Return the tokens of each row: shape (rows,)."""
    batches = rows.select_columns("input_ids").with_format("arrow").iter(1000)
    lengths = [pc.list_value_length(batch["input_ids"]).to_numpy() for batch in batches]
    return np.concatenate([np.empty(0, np.int64), *lengths])


def advise_cutoff(name: str, rows: Dataset, counts: Counts, cutoff_len: int) -> Iterator[str]:
    """Suggest the cutoff that keeps most rows intact, with its cost, if many are truncated.

    A trajectory in one reply only counts as shortened, but its final answer is cut all the same.
    """
    if counts.notes.get("cut"):  # pairs, whose truncated sides are counted
        return
    used, cut = counts.rows - counts.dropped, rows.select_columns("cut").with_format("numpy")["cut"][:]
    cut_rows = np.count_nonzero(cut)  # 0 for a dropped row
    if cut_rows <= CUT_ROWS_ALLOWED * used:
        return
    lengths = token_lengths(rows)
    intact = (lengths + cut)[lengths > 0]
    enough = math.ceil(np.percentile(intact, 100 * ROWS_TO_FIT, method="inverted_cdf") / 64) * 64
    tokens = np.minimum(intact, enough).sum() / lengths.sum()
    yield (
        f"{name}: {cut_rows / used:.0%} of rows are truncated at cutoff_len {cutoff_len}; {enough} keeps {ROWS_TO_FIT:.0%} "
        f"intact ({tokens:.1f}x tokens)"
    )


def to_line(dataset: str, row: EncodedRow) -> str | None:
    """Return the line of a row in `row_audit.jsonl`, or None if it is intact."""
    if row["outcome"] == "intact":
        return None
    columns = {"place": row["source"], "outcome": row["outcome"], "reason": row["reason"], "excerpt": row["excerpt"]}
    return json.dumps({"dataset": dataset, **columns}, ensure_ascii=False) + "\n"


def list_rows(dataset: str, rows: Dataset) -> Iterator[str]:
    """Yield the lines of `row_audit.jsonl` for an encoded dataset."""
    columns = rows.select_columns(["source", "outcome", "reason", "excerpt"])
    for batch in columns.with_format("arrow").iter(1000):
        yield from filter(None, (to_line(dataset, row) for row in batch.to_pylist()))


@dataclass
class StreamedLines:
    """The lines of a stream's rows, kept until the run has a file for them."""

    path: Path | None = None
    waiting: list[str] = field(default_factory=list)

    def add(self, lines: Iterable[str]) -> None:
        self.waiting += lines
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(self.waiting)
            self.waiting.clear()


def too_many_dropped(name: str, counts: Counts, max_dropped: float, list_path: Callable[[], Path | None]) -> list[str]:
    """Return an error message if no row is left or too many were dropped; `list_path` returns the path of the full list."""
    if counts.rows == 0:
        return [f"{name}: no rows"]
    if counts.dropped <= max_dropped * counts.rows and counts.dropped < counts.rows:
        return []
    path = list_path()
    problem = f"{name}: {counts.dropped:,} of {counts.rows:,} rows dropped"
    if counts.dropped < counts.rows:
        problem += f", more than max_dropped ({100 * max_dropped:g}%)"
    problem += f"; all are listed in {path}; the first:" if path else "; the first:"
    return [problem, *(f"  {reason}" for reason in counts.first)]


def missing_columns(info: DatasetInfo, fields: Iterable[str], rows: int) -> list[str]:
    """Return a problem for each column that the registry names, or a row needs, and no row has."""
    existing = sorted(set(fields))
    shown = ", ".join(existing[:SHOWN_FIELDS])
    rename, name = "fix the name, or remove the key from columns", "set columns, or formatting"
    if "messages" in existing and info.formatting != "openai":
        rename = name = 'if the rows are in OpenAI form, set "formatting": "openai" and remove columns'
    return [
        f"{info.place}.columns.{key}: column {column!r} is missing in {rows:,} of {rows:,} rows (found {shown}); "
        f"{rename if key in info.named else name}"
        for key, column in info.columns.items()
        if existing and column not in existing and (key in info.named or (key in NEEDED and not info.ranking))
    ]
