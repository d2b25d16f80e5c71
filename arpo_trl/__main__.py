"""The command line: `python -m arpo_trl RECIPE [key=value ...] [--check | --preview N]`.

Turns errors into exit codes: 0 done, 1 the run failed, 2 the user can mend it before training, 130 and 143 stopped by
Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

# Windows wheels of torch have no libuv, which its store asks for by default since 2.4 (pytorch/pytorch#139990).
os.environ.setdefault("USE_LIBUV", "0")

from .console import silence_libraries
from .errors import RecipeError
from .help import explain_key, list_text, usage
from .recipe import read_recipe

HERE = Path(__file__).parent


def main(argv: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    arguments = [a for a in argv if not a.startswith("--") and "=" not in a]
    overrides = [a for a in argv if not a.startswith("--") and "=" in a]
    flags = [a for a in argv if a.startswith("--")]
    try:
        if not argv or "--help" in flags or "-h" in argv:
            keys = [a for a in arguments if a != "-h"]
            print(explain_key(keys[0]) if keys else usage())
            return 0 if argv else 2
        if "--list" in flags:
            print(list_text())
            return 0
        return _run(arguments, overrides, flags)
    except RecipeError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # every process has the same to say
            print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped at once by Ctrl-C", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        print(_in_one_line(error), file=sys.stderr)
        return 1


def _run(arguments: list[str], overrides: list[str], flags: list[str]) -> int:
    rows = None
    if "--preview" in flags and len(arguments) == 2 and arguments[1].isdecimal():
        rows = int(arguments.pop())
    unknown = [f for f in flags if f not in ("--check", "--preview")]
    if unknown:
        raise RecipeError(f"{unknown[0]}: no such option; options are --check, --preview N, --list, --help [KEY]")
    if len(arguments) != 1:
        raise RecipeError(f"expected one recipe, found {len(arguments)}: {' '.join(arguments)}\n{usage()}")
    recipe = read_recipe(arguments[0], overrides)
    silence_libraries()
    if "--check" in flags:
        from .check import check

        check(recipe)
        return 0
    if "--preview" in flags:
        from .preview import preview

        preview(recipe, rows or 1)
        return 0
    _stop_with_launcher()
    from .errors import RunFailed
    from .train import train

    log = Path(recipe.output_dir) / "training.log"
    try:
        return train(recipe)
    except RecipeError:
        raise
    except RunFailed as error:
        _append(log, str(error))
        print(error, file=sys.stderr)
        return 1
    except Exception as error:
        where = f"the traceback is in {log}" if _append(log, traceback.format_exc()) else f"{log} can't be written"
        print(f"{_in_one_line(error)}; {where}", file=sys.stderr)
        return 1


def _in_one_line(error: Exception) -> str:
    """What a library raised: its kind, its words, and the last line of ours that it passed."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == HERE]
    place = f" (arpo_trl/{Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500] or 'without a word'}{place}"


def _append(log: Path, text: str) -> bool:
    """Add what ended the run to its log; whether that could be done."""
    try:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")
    except OSError:
        return False
    return True


def _stop_with_launcher() -> None:
    """On Linux, ask for a SIGTERM when the launcher dies: `accelerate launch` does not pass its own on."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        import ctypes

        pr_set_pdeathsig = 1  # prctl(2)
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def entry() -> None:
    """The console command `arpo-trl`."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    entry()
