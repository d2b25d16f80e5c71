"""Commands as text: quoted for the shell at hand, and split into words."""

import re
import shlex
import subprocess
import sys
from collections.abc import Sequence


def quote_command(words: Sequence[str], **variables: str) -> str:
    """Return a command that can be pasted: into sh, or into cmd on Windows (without variables, into PowerShell too)."""
    if sys.platform == "win32":
        settings = [f'set "{name}={value}" && ' for name, value in variables.items()]
        return "".join(settings) + " ".join(map(_quote_for_windows, words))
    else:
        settings = [f"{name}={shlex.quote(value)} " for name, value in variables.items()]
        return "".join(settings) + shlex.join(words)


def _quote_for_windows(word: str) -> str:
    """Quote as Windows' C runtime reads it, which knows no single quotes; also what only the shells interpret, as `&`."""
    quoted = subprocess.list2cmdline([word])
    if quoted.startswith('"') or re.fullmatch(r"[\w@+=:,./\\~-]+", word):
        return quoted
    end = quoted[len(quoted.rstrip("\\")) :]  # backslashes before the closing quote count double
    return f'"{quoted}{end}"'


def split_command(text: str) -> list[str]:
    """Return the words of a command. On Windows a backslash is part of a path, and quotes enclose words.

    Raises:
        ValueError: a quote is not closed.
    """
    if sys.platform == "win32":
        return [word.strip("\"'") for word in shlex.split(text, posix=False)]
    else:
        return shlex.split(text)
