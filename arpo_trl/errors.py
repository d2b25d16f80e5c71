"""Errors of this package. Their messages are complete: location, what is wrong (found, expected), and the fix.

`RecipeError` and its subclasses end in exit code 2, `RunFailed` in 1. A `RowError` drops a row; the audit lists it.
"""

import re
import sys
from pathlib import Path

LONGEST_LINE = 2000  # characters
_CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def program() -> str:
    """Return how this program was called, for messages that show a command."""
    return "arpo-trl" if Path(sys.argv[0]).stem.startswith("arpo-trl") else "python -m arpo_trl"


def printable(text: str) -> str:
    """Escape what a terminal would interpret: control characters and marks of writing direction."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def in_one_line(error: BaseException) -> str:
    """Return a library's message as one line of at most 500 characters, or the error's type if it has no message."""
    text = re.sub(r"\[(Errno|WinError) -?\d+\] ", "", " ".join(str(error).split()))
    return text[:500] or type(error).__name__


def reason(error: BaseException) -> str:
    """Return an error's message for a text that already names the path: "No such file or directory" of an OSError."""
    return (isinstance(error, OSError) and error.strerror) or in_one_line(error)


class RecipeError(Exception):
    """A configuration error, reported before training starts."""

    def __init__(self, problems: str | list[str]):
        lines = (problems if isinstance(problems, str) else "\n".join(problems)).split("\n")
        super().__init__(printable("\n".join(map(_shorten, lines))))


def _shorten(line: str) -> str:
    """Cut the middle out of a line that quotes a very long path or value."""
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 2 :]}"


class DatasetError(RecipeError):
    """An error in the data: in dataset_info.json, in a file, or in too many rows."""


class RowError(Exception):
    """The reason why a row can't be used, as listed in the audit."""


class RunFailed(Exception):
    """A failure after the run has started."""

    def __init__(self, problem: str):
        super().__init__(printable(problem))
