"""What became of each row: kept, shortened, lost its final answer, or dropped, with its place and the reason."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RowError
from .files import Row
from .labels import IGNORED, Example
from .registry import DatasetInfo
from .strict_json import excerpt

SHOWN_REASONS = 3
SHOWN_FIELDS = 12
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

    def add(self, other: Counts) -> None:
        for fate in ("kept", "shortened", "lost_answer", "dropped", "tokens", "trained_tokens"):
            setattr(self, fate, getattr(self, fate) + getattr(other, fate))
        self.first = (self.first + other.first)[:SHOWN_REASONS]


@dataclass
class Audit:
    """Counts by dataset. Of a stream they grow on the first pass over it."""

    datasets: dict[str, Counts] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """One line a dataset, for people."""
        return [
            f"{name}: {counts.rows:,} rows: {counts.kept:,} kept, {counts.shortened:,} shortened, "
            f"{counts.lost_answer:,} lost their final answer, {counts.dropped:,} dropped; {counts.tokens:,} tokens, "
            f"{counts.trained_tokens:,} trained"
            for name, counts in self.datasets.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        return {name: asdict(counts) for name, counts in self.datasets.items()}


def count_row(counts: Counts, row: Row, result: Example | RowError, cutoff_len: int) -> dict[str, str] | None:
    """Count the row; what `row_audit.jsonl` says of it, unless it was simply kept."""
    if isinstance(result, RowError):
        outcome, reason = "dropped", str(result)
        if len(counts.first) < SHOWN_REASONS:
            counts.first.append(f"{row.place}: {reason}")
    else:
        outcome = "lost_answer" if result.lost_answer else "shortened" if result.cut or result.left_out else "kept"
        past = f"{result.cut} tokens past the cutoff of {cutoff_len}"
        after = f"{result.left_out} turn{'s' * (result.left_out > 1)} after the last reply"
        reason = " and ".join(text for text, number in ((after, result.left_out), (past, result.cut)) if number)
        counts.tokens += len(result.input_ids)
        counts.trained_tokens += len(result.labels) - result.labels.count(IGNORED)
    setattr(counts, outcome, getattr(counts, outcome) + 1)
    if outcome == "kept":
        return None
    shown = "" if isinstance(row.value, RowError) else excerpt(row.value, EXCERPT)
    return {"place": row.place, "outcome": outcome, "reason": reason, "excerpt": shown}


def to_lines(findings: list[dict[str, str]]) -> list[str]:
    """Lines of `row_audit.jsonl`; write them with errors="backslashreplace", since bad text is quoted as it was."""
    return [json.dumps(finding, ensure_ascii=False) + "\n" for finding in findings]


@dataclass
class StreamedFindings:
    """The lines of a stream's rows, kept until there is a run with a file for them."""

    path: Path | None = None
    waiting: list[str] = field(default_factory=list)

    def add(self, lines: list[str]) -> None:
        self.waiting += lines
        if self.path:
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(self.waiting)
            self.waiting.clear()


def too_many_dropped(name: str, counts: Counts, max_dropped: float, path: Path | None) -> list[str]:
    """The problem of a dataset without rows, or with more dropped than allowed; `path` is where all are listed."""
    if counts.rows == 0:
        return [f"{name}: no rows"]
    if counts.dropped <= max_dropped * counts.rows and counts.dropped < counts.rows:
        return []
    problem = (
        f"{name}: {counts.dropped:,} of {counts.rows:,} rows dropped, max_dropped allows a share of {max_dropped:g}"
    )
    problem += f"; all are in {path}, the first are" if path else "; the first are"
    return [problem, *(f"  {reason}" for reason in counts.first)]


def missing_columns(info: DatasetInfo, fields: set[str], rows: int) -> list[str]:
    """The problem of each column that the registry names and none of the rows has: every row would train without it."""
    found = ", ".join(sorted(fields)[:SHOWN_FIELDS])
    return [
        f"{place}: expected a column {info.columns[key]!r}, found none in {rows:,} rows; they have {found}; mend the name, "
        "or take the key out of columns"
        for key, place in info.named.items()
        if fields and info.columns[key] not in fields
    ]
