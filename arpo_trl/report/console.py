"""Lines for the terminal and `training.log`, and what the libraries log. Progress bars are terminal.py's."""

import contextlib
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from ..errors import RecipeError, RunFailed, in_one_line, printable
from ..recipe import methods
from ..shell import quote_command
from ..terminal import to_terminal

TIED_HEAD_IS_MISSING = "missing keys in the checkpoint model loaded: ['lm_head.weight']"
LIBRARIES = ("accelerate", "datasets", "huggingface_hub", "peft", "transformers", "trl", "py.warnings")

_LOG = logging.getLogger("arpo_trl")
_LOG.setLevel(logging.INFO)
_LOG.propagate = False  # `say` prints the line


@contextlib.contextmanager
def logged_to(path: Path, process: int = 0) -> Iterator[Callable[[], None]]:
    """Append the output of `say` and of the libraries, and the error that ends the block, to `path`.

    Warnings and the libraries' log lines appear above the progress bar. Lines that can't be written are dropped: a full
    disk must not end a run that is about to save.

    Args:
        path: The log; each session starts with the date and its command.
        process: The process's rank. All but the main one, 0, write only the error that ends them, in one line.

    Yields:
        A function that deletes earlier sessions from the log, once their run is replaced.
    """
    if process:
        with _error_logged(path, process):
            yield lambda: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    log = _LogFile(path, encoding="utf-8", errors="backslashreplace")
    start = path.stat().st_size

    def forget_earlier_sessions() -> None:
        session = path.read_bytes()[start:]
        with contextlib.suppress(OSError):
            path.write_bytes(session)  # the open handler continues to append at the end

    with _handlers(log):
        _LOG.info("%s", printable(f"# {time.strftime('%Y-%m-%d %H:%M:%S%z')} {quote_command(sys.argv)}"))
        try:
            yield forget_earlier_sessions
        except (RecipeError, RunFailed) as error:
            _LOG.info("%s", error)  # the caller prints it
            raise
        except Exception as error:
            _LOG.info("%s", traceback.format_exc().rstrip())
            error.add_note(f"{path} can't be written" if log.failed else f"the traceback is in {path}")
            raise


@contextlib.contextmanager
def _error_logged(path: Path, process: int) -> Iterator[None]:
    """Append an error to the log. The main process, which has the log, may see only that this process has ended."""
    try:
        yield
    except RecipeError:
        raise  # the main process raises it too
    except Exception as error:
        kind = "" if isinstance(error, RunFailed) else f"{type(error).__name__}: "
        with contextlib.suppress(OSError), path.open("a", encoding="utf-8", errors="backslashreplace") as log:
            log.write(f"process {process}: {printable(kind + in_one_line(error))}\n")
        raise


class _LogFile(logging.FileHandler):
    """training.log. `failed` is set if a line could not be written; logging would print that to stderr each time."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        self.failed = True

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what a full disk left in the buffer
            super().close()


@contextlib.contextmanager
def _handlers(log: logging.Handler) -> Iterator[None]:
    """Add `log` to our logger and the libraries', and a terminal handler to those without one."""
    from tqdm.contrib.logging import logging_redirect_tqdm  # not above: a typo in a recipe is reported without asyncio

    libraries = [logging.getLogger(name) for name in LIBRARIES]
    before = [(logger, logger.handlers) for logger in (_LOG, *libraries)]
    raises, logging.raiseExceptions = logging.raiseExceptions, False  # if the terminal is closed
    for logger, handlers in before:
        has_terminal = logger is _LOG or any(isinstance(handler, logging.StreamHandler) for handler in handlers)
        logger.handlers = [*handlers, log, *([] if has_terminal else [logging.StreamHandler(sys.stderr)])]
    logging.captureWarnings(True)
    try:
        with logging_redirect_tqdm(libraries):
            yield
    finally:
        logging.captureWarnings(False)
        for logger, handlers in before:
            logger.handlers = handlers
        logging.raiseExceptions = raises
        log.close()


def say(*lines: str) -> None:
    """On the main process, print lines and write them to training.log. A closed terminal does not end the run."""
    from accelerate import PartialState  # not above: this module is imported before torch

    for line in lines if PartialState().is_main_process else ():
        with contextlib.suppress(OSError, ValueError):
            tqdm.write(to_terminal(printable(line)))
            sys.stdout.flush()
        log_only(line)


def log_only(line: str) -> None:
    """Write a line to training.log only, because the terminal has it in the progress bar."""
    _LOG.info("%s", printable(line))


def silence_libraries() -> None:
    """Silence the libraries' messages that a user can't act on.

    Call before torch is imported: some settings are read at import.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    methods.silence_libraries()
    main_process = os.environ.get("RANK", "0") == "0"
    if not (main_process and sys.stdout.isatty() and sys.stderr.isatty()):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars too
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if not main_process:
        warnings.simplefilter("ignore")  # the main process prints them
        return
    # DataLoader workers on a machine without a GPU; the flag is Trainer's default, not the user's choice.
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    # TRL marks trainers as experimental and warns about arguments that it sets itself.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(trl|transformers|accelerate|peft|torch)\b.*")
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.(utils\.checkpoint|autograd)\b.*")
    # A checkpoint contains tied weights once; Trainer warns about it on every resume.
    logging.getLogger("transformers.trainer").addFilter(lambda record: TIED_HEAD_IS_MISSING not in record.getMessage())
