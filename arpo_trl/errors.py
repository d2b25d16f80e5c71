"""The errors of this package. Their texts are finished: location, what was found, what was expected, the way out.

`RecipeError` and its kind end in exit code 2, `RunFailed` in 1; a `RowError` ends a row, and the audit says which.
"""

import re
import sys
from pathlib import Path

LONGEST_LINE = 2000  # characters


def program() -> str:
    """How this program was called, for a message that names a command."""
    return "arpo-trl" if Path(sys.argv[0]).stem.startswith("arpo-trl") else "python -m arpo_trl"


def printable(text: str) -> str:
    """The text without what a terminal would obey: control characters and marks of writing direction are escaped."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def in_one_line(error: BaseException) -> str:
    """What a library raised, for a line of ours: no more than 500 characters, and its kind where it says nothing."""
    return " ".join(str(error).split())[:500] or type(error).__name__


_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class RecipeError(Exception):
    """What a user can mend before training starts."""

    def __init__(self, problems: str | list[str]):
        lines = (problems if isinstance(problems, str) else "\n".join(problems)).split("\n")
        super().__init__(printable("\n".join(map(_without_its_middle, lines))))


def _without_its_middle(line: str) -> str:
    """A line that names a path or a value of any length stays one that a person reads."""
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"


class DatasetError(RecipeError):
    """Data that the user can mend: the registry, a file, or too many of its rows."""


class RowError(Exception):
    """Why a row can't be used, as the audit gives it."""


class RunFailed(Exception):
    """A run that began and cannot go on."""

    def __init__(self, problem: str):
        super().__init__(printable(problem))
