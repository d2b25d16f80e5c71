"""What became of each row: kept, shortened, lost its final answer, or dropped, with its location and the reason."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from ..errors import printable
from .labels import matches_of
from .registry import NEEDED, DatasetInfo

if TYPE_CHECKING:
    from datasets import Dataset

    from .encode import EncodedRow

SHOWN_REASONS = 3
CUT_ROWS_ALLOWED = 0.1
ROWS_TO_FIT = 0.95
SHOWN_FIELDS = 12
SHOWN_COUNTS = 12
COUNTED = ["source", "trained_tokens", "outcome", "reason", "also"]


@dataclass
class Counts:
    """Rows of one dataset by their outcome, and the tokens of those that stayed. `first`: why the first were dropped.

    `also`: what else was counted in the rows that stayed, in words that wait for the number (`Example.also`).
    """

    kept: int = 0
    shortened: int = 0
    lost_answer: int = 0
    dropped: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    first: list[str] = field(default_factory=list)
    also: dict[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.kept + self.shortened + self.lost_answer + self.dropped

    def add(self, row: EncodedRow, tokens: int) -> None:
        """Count one row, of which the columns COUNTED are needed."""
        setattr(self, row["outcome"], getattr(self, row["outcome"]) + 1)
        self.tokens += tokens
        self.trained_tokens += row["trained_tokens"]
        if row["outcome"] == "dropped" and len(self.first) < SHOWN_REASONS:
            self.first.append(f"{row['source']}: {row['reason']}")
        for what, times in json.loads(row["also"] or "{}").items():
            self.also[what] = self.also.get(what, 0) + times


@dataclass
class Audit:
    """Counts by dataset. Of a stream they grow on the first pass over it. `mask_spans`: the entries that should match."""

    datasets: dict[str, Counts] = field(default_factory=dict)
    mask_spans: Sequence[str] = ()

    def lines(self) -> list[str]:
        """One line a dataset for people, and one for each thing that was counted beside its rows."""
        lines = []
        for name, counts in self.datasets.items():
            lines.append(
                f"{name}: {counts.rows:,} rows: {counts.kept:,} kept, {counts.shortened:,} shortened, "
                f"{counts.lost_answer:,} lost their final answer, {counts.dropped:,} dropped; {counts.tokens:,} tokens, "
                f"{counts.trained_tokens:,} trained"
            )
            lines += [f"{name}: {line}" for line in describe_also(counts.also)]
        matched = {what for counts in self.datasets.values() for what in counts.also}
        unmatched = (entry for entry in self.mask_spans if matches_of(entry) not in matched)
        return lines + [f"mask_spans: {entry} matches nothing in any row" for entry in unmatched]


def describe_also(also: dict[str, int]) -> list[str]:
    """For people: what was counted beside the rows (`Example.also`), the most frequent first."""
    most = Counter(also).most_common(SHOWN_COUNTS)
    return [printable(f"{times:,}".join(what.rsplit("{}", 1))) for what, times in most]


def count(rows: Dataset) -> Counts:
    """The counts of an encoded dataset."""
    counts = Counts()
    for row, tokens in zip(rows.select_columns(COUNTED).with_format("arrow")[:].to_pylist(), token_lengths(rows)):
        counts.add(row, int(tokens))
    return counts


def token_lengths(rows: Dataset) -> npt.NDArray[np.int64]:
    """Tokens of each row, in the rows' order: shape (rows,)."""
    batches = rows.select_columns("input_ids").with_format("arrow").iter(1000)
    lengths = [pc.list_value_length(batch["input_ids"]).to_numpy() for batch in batches]
    return np.concatenate([np.empty(0, np.int64), *lengths])


def advise_cutoff(name: str, rows: Dataset, counts: Counts, cutoff_len: int) -> Iterator[str]:
    """Where many rows lost their end: the cutoff that most of them fit whole, and its cost.

    A trajectory that is one reply is only shortened, and its final answer is lost all the same.
    """
    used, cut = counts.rows - counts.dropped, rows.select_columns("cut").with_format("numpy")["cut"][:]
    cut_rows = np.count_nonzero(cut)  # A dropped row has none.
    if cut_rows <= CUT_ROWS_ALLOWED * used:
        return
    lengths = token_lengths(rows)
    whole = (lengths + cut)[lengths > 0]
    enough = math.ceil(np.percentile(whole, 100 * ROWS_TO_FIT, method="inverted_cdf") / 64) * 64
    tokens = np.minimum(whole, enough).sum() / lengths.sum()
    yield (
        f"{name}: at cutoff_len {cutoff_len:,}, {cut_rows / used:.0%} of the rows lose their end, with it all or part "
        f"of the final answer, and are trained on without it; cutoff_len {enough:,} fits {ROWS_TO_FIT:.0%} of them whole, for {tokens:.1f} times "
        f"the tokens and time, and {enough / cutoff_len:.1f} times the activations of the longest row"
    )


def to_line(dataset: str, row: EncodedRow) -> str | None:
    """What `row_audit.jsonl` says of a row, unless it was simply kept."""
    if row["outcome"] == "kept":
        return None
    about = {"place": row["source"], "outcome": row["outcome"], "reason": row["reason"], "excerpt": row["excerpt"]}
    return json.dumps({"dataset": dataset, **about}, ensure_ascii=False) + "\n"


def list_rows(dataset: str, rows: Dataset) -> Iterator[str]:
    """The lines of `row_audit.jsonl` for an encoded dataset."""
    about = rows.select_columns(["source", "outcome", "reason", "excerpt"])
    for batch in about.with_format("arrow").iter(1000):
        yield from filter(None, (to_line(dataset, row) for row in batch.to_pylist()))


@dataclass
class StreamedLines:
    """The lines of a stream's rows, kept until there is a run with a file for them."""

    path: Path | None = None
    waiting: list[str] = field(default_factory=list)

    def add(self, lines: Iterable[str]) -> None:
        self.waiting += lines
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(self.waiting)
            self.waiting.clear()


def too_many_dropped(name: str, counts: Counts, max_dropped: float, find_list: Callable[[], Path | None]) -> list[str]:
    """The problem of a dataset without rows, or with more dropped than allowed; `find_list` says where all are listed."""
    if counts.rows == 0:
        return [f"{name}: no rows"]
    if counts.dropped <= max_dropped * counts.rows and counts.dropped < counts.rows:
        return []
    problem = (
        f"{name}: {counts.dropped:,} of {counts.rows:,} rows dropped, max_dropped allows a share of {max_dropped:g}"
    )
    path = find_list()
    problem += f"; all are in {path}, the first are" if path else "; the first are"
    return [problem, *(f"  {reason}" for reason in counts.first)]


def missing_columns(info: DatasetInfo, fields: Iterable[str], rows: int) -> list[str]:
    """The problem of each column that the registry names, or a row needs, and none of the rows has."""
    there = sorted(set(fields))
    found = ", ".join(there[:SHOWN_FIELDS])
    mend, give = "mend the name, or take the key out of columns", "name theirs in columns, or set formatting"
    return [
        f"{info.place}.columns.{key}: expected a column {column!r}, found none in {rows:,} rows; they have {found}; "
        f"{mend if key in info.named else give}"
        for key, column in info.columns.items()
        if there and column not in there and (key in info.named or key in NEEDED)
    ]
