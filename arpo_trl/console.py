"""What the terminal and `training.log` show: lines to both, progress bars to the terminal only."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO


class _Tee:
    """A text stream that writes to the terminal and, line by line, to the log.

    A line that a carriage return rewrote (a progress bar) stays out of the log. A terminal that went away (the reader
    of a pipe died, by Ctrl-C too) must not end a run that is about to save, so its errors are dropped.
    """

    def __init__(self, terminal: TextIO, log: TextIO) -> None:
        self._terminal, self._log, self._line = terminal, log, ""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self._terminal.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if "\r" not in line and "\x1b[A" not in line:
                self._log.write(line + "\n")
        if lines:
            self._log.flush()
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._terminal.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._terminal, name)


@contextlib.contextmanager
def logged_to(path: Path, keep: bool, enabled: bool = True) -> Iterator[None]:
    """Copy what is printed inside the block to `path`; `keep` appends to the log of the run that is resumed.

    With several processes only the main one is `enabled`.
    """
    if not enabled:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    stdout, stderr = sys.stdout, sys.stderr
    with path.open("a" if keep else "w", encoding="utf-8") as log:
        sys.stdout, sys.stderr = _Tee(stdout, log), _Tee(stderr, log)
        handlers = _stream_handlers()
        for handler in handlers:
            handler.setStream(sys.stderr)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = stdout, stderr
            for handler in handlers:
                handler.setStream(stderr)


def _stream_handlers() -> list[logging.StreamHandler[Any]]:
    """The libraries' log handlers, which hold the stderr of the moment they were made."""
    loggers = [
        logging.getLogger(),
        *(logging.getLogger(name) for name in ("transformers", "datasets", "trl", "accelerate")),
    ]
    return [h for logger in loggers for h in logger.handlers if type(h) is logging.StreamHandler]


def silence_libraries() -> None:
    """Quiet the libraries' lines that a user cannot act on; the others stay.

    Call before torch is imported: some of these are read at import.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # DataLoader workers on a machine without a GPU; the flag is Trainer's default, not the user's wish.
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    # TRL marks whole trainers experimental and warns of arguments that it sets itself.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(trl|transformers|accelerate|peft|torch)\b.*")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.(utils\.checkpoint|autograd)\b.*")
