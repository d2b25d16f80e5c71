"""What the terminal and `training.log` show: lines to both, progress bars to the terminal only."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from ..errors import RecipeError, RunFailed

TIED_HEAD_IS_MISSING = "missing keys in the checkpoint model loaded: ['lm_head.weight']"


class _Tee:
    """A text stream that writes to the terminal and, line by line, to the log.

    A line that a carriage return rewrote (a progress bar) stays out of the log. What cannot be written is dropped: a
    terminal that went away (the reader of a pipe died, by Ctrl-C too) or a full disk must not end a run that is about
    to save.
    """

    bar: tqdm[Any] | None = None

    def __init__(self, terminal: TextIO, log: TextIO) -> None:
        self.terminal, self._log, self._line = terminal, log, ""

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        with contextlib.suppress(OSError, ValueError):
            if self.bar is None or self.bar.disable:
                self.terminal.write(text)
            elif lines:
                self.bar.clear()
                self.terminal.write("\n".join(lines) + "\n")
                self.bar.refresh()
        self.write_log([line for line in lines if "\r" not in line and "\x1b[A" not in line])
        return len(text)

    def write_log(self, lines: list[str]) -> bool:
        """Write lines to the log alone; whether that could be done."""
        with contextlib.suppress(OSError, ValueError):
            self._log.writelines(line + "\n" for line in lines)
            if lines:
                self._log.flush()
            return True
        return False

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.terminal.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.terminal, name)


@contextlib.contextmanager
def logged_to(path: Path, enabled: bool = True) -> Iterator[Callable[[], None]]:
    """Append what is printed inside the block, and the error that ends it, to `path`.

    Args:
        path: The log; each session begins with the date and its command.
        enabled: False on all processes but the main one.

    Yields:
        A function that removes the sessions before this one from the log, once their run is replaced.
    """
    if not enabled:
        yield lambda: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    stdout, stderr = sys.stdout, sys.stderr
    with path.open("a", encoding="utf-8") as log:
        start = path.stat().st_size
        log.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S%z')} {shlex.join(sys.argv)}\n")
        log.flush()
        tee = sys.stdout = _Tee(stdout, log)
        sys.stderr = _Tee(stderr, log)
        handlers = [(handler, handler.stream) for handler in _stream_handlers()]
        for handler, _ in handlers:
            handler.stream = sys.stderr  # not setStream: it flushes the old one, which may be closed
        try:
            yield lambda: _forget_before(path, start)
        except (RecipeError, RunFailed) as error:
            tee.write_log([str(error)])  # the caller prints it
            raise
        except Exception as error:
            written = tee.write_log([traceback.format_exc().rstrip()])
            error.add_note(f"the traceback is in {path}" if written else f"{path} can't be written")
            raise
        finally:
            sys.stdout, sys.stderr = stdout, stderr
            for handler, stream in handlers:
                handler.stream = stream


def _forget_before(path: Path, start: int) -> None:
    """Leave what stands from byte `start` on; whoever appends to the file goes on behind it."""
    session = path.read_bytes()[start:]
    with contextlib.suppress(OSError):
        path.write_bytes(session)


def start_bar(total: int, initial: int) -> tqdm[Any] | None:
    """The run's progress bar, or None where output is not a terminal. Lines printed meanwhile appear above it."""
    if not sys.stdout.isatty():
        return None
    from transformers.utils.logging import disable_progress_bar  # not above: this module is imported before torch

    disable_progress_bar()  # "Writing model shards" would be drawn across ours
    _Tee.bar = tqdm(
        total=total,
        initial=initial,
        file=getattr(sys.stdout, "terminal", sys.stdout),
        dynamic_ncols=True,
        bar_format="{n_fmt}/{total_fmt} |{bar}| {elapsed} < {remaining}{postfix}",
    )
    return _Tee.bar


def say(line: str) -> None:
    """Print a line on the main process."""
    from accelerate import PartialState  # not above: this module is imported before torch

    if PartialState().is_main_process:
        print(line, flush=True)


def log_only(line: str) -> None:
    """Write a line to training.log that the terminal shows otherwise, in the progress bar."""
    if isinstance(sys.stdout, _Tee):
        sys.stdout.write_log([line])


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
    main_process = os.environ.get("RANK", "0") == "0"
    if not (main_process and sys.stdout.isatty() and sys.stderr.isatty()):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars too
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not main_process:
        warnings.simplefilter("ignore")  # the main process shows them
        return
    # DataLoader workers on a machine without a GPU; the flag is Trainer's default, not the user's wish.
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    # TRL marks whole trainers experimental and warns of arguments that it sets itself.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(trl|transformers|accelerate|peft|torch)\b.*")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.(utils\.checkpoint|autograd)\b.*")
    # A checkpoint holds tied weights once; Trainer says so on every resume.
    logging.getLogger("transformers.trainer").addFilter(lambda record: TIED_HEAD_IS_MISSING not in record.getMessage())
    # It looks for a kernel on the hub as soon as it is imported, on a machine that will never use it.
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
