"""What a terminal gets and a log or a pipe does not: lines that are wrapped at words, and progress bars."""

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

LABEL = re.compile(r" *(?:\S{1,12}(?: \S{1,12})? {2,})?")
"""The indentation of a line, or its label, such as `data     `: continuation lines are indented under the text after it."""
RUN_BAR = "{n_fmt}/{total_fmt} |{bar}| {elapsed} < {remaining}{postfix}"
PART_BAR = "{desc}  {percentage:3.0f}% |{bar}| {elapsed} < {remaining}"
DELAY = 1.0  # seconds until a part's bar is drawn
WATCHED = 0.5  # seconds between two looks at a folder


def to_terminal(text: str, stream: TextIO | None = None) -> str:
    """Return `text` with its lines wrapped at words to the width of the terminal `stream` (default: stdout).

    A log and a pipe keep a line in one piece, and so does every stream keep a word.
    """
    width = terminal_width(stream)
    return "\n".join(_wrap(line, width) for line in text.split("\n")) if width else text


def terminal_width(stream: TextIO | None = None) -> int | None:
    """Return the columns of the terminal `stream` (default: stdout), or None if it is no terminal."""
    stream = stream or sys.stdout
    if not stream.isatty():
        return None
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _wrap(line: str, width: int) -> str:
    from rich.cells import cell_len  # a Chinese character takes two columns

    if cell_len(line) <= width:
        return line
    label = LABEL.match(line)
    assert label is not None  # it matches an empty text
    indent = " " * (label.end() + 2)
    fields = re.split(r"(?<=\S)(?=  )", line[label.end() :])  # of a log line: `loss 1.2  lr 1.00e-04  ...`
    words = fields if len(fields) > 2 else re.split(r"(?<=\S)(?= )", line[label.end() :])
    lines = [label[0]]
    for number, word in enumerate(words):
        if number and cell_len(lines[-1] + word) > width:
            lines.append(indent + word.lstrip())
        else:
            lines[-1] += word
    return "\n".join(lines)


def start_bar(total: float, initial: int = 0, what: str = "") -> tqdm | None:
    """Return a progress bar, or None if the output is not a terminal. `initial`: where a resumed run starts.

    `what`: a part of the run. Its bar is drawn under the run's: after DELAY, as a percentage, until it is closed.
    """
    if not sys.stdout.isatty():
        return None
    return tqdm(
        total=total,
        initial=initial,
        desc=what or None,
        file=sys.stdout,
        dynamic_ncols=True,
        leave=not what,
        delay=DELAY if what else 0,
        smoothing=0,  # the mean speed: single batches differ tenfold
        bar_format=PART_BAR if what else RUN_BAR,
    )


@contextlib.contextmanager
def progress(what: str, total: float, enabled: bool = True) -> Iterator[Callable[[float], None]]:
    """Draw a bar during the block, and yield the function that advances it."""
    bar = start_bar(total, what=what) if enabled and total > 0 else None
    if bar is None:
        yield lambda _: None
        return

    def advance(more: float) -> None:
        if bar.n == 0:  # the first batch, or the prompt before the first token, is slower than the others
            now = time.time()
            bar.delay = max(bar.start_t + bar.delay - now, 0)
            bar.start_t, bar.initial = now, more
        bar.update(min(more, total - bar.n))

    with contextlib.closing(bar):
        yield advance


@contextlib.contextmanager
def progress_of_files(what: str, folder: Path, total: int, enabled: bool = True) -> Iterator[None]:
    """Draw a bar of the bytes that the block writes into `folder`."""
    began, done = time.time(), threading.Event()

    def watch(advance: Callable[[float], None]) -> None:
        seen = 0
        while not done.wait(WATCHED):
            with contextlib.suppress(OSError):  # a file that is renamed at this moment
                files = [path.stat() for path in folder.rglob("*") if path.is_file()]
                written = sum(file.st_size for file in files if file.st_mtime >= began)
                advance(max(written - seen, 0))
                seen = max(written, seen)

    with progress(what, total, enabled and sys.stdout.isatty()) as advance:
        thread = threading.Thread(target=watch, args=(advance,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
