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

from .errors import RecipeError, RunFailed
from .recipe import read_recipe
from .recipe.help import explain_key, list_text, usage
from .report.console import silence_libraries

HERE = Path(__file__).parent


def main(argv: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    try:
        return _run(argv)
    except RecipeError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # every process has the same to say
            print(error, file=sys.stderr)
        return 2
    except RunFailed as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped at once by Ctrl-C", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        notes = getattr(error, "__notes__", None)  # where training.log has the traceback
        if notes:
            print("; ".join([_in_one_line(error), *notes]), file=sys.stderr)
        else:
            traceback.print_exc()
        return 1


def _run(argv: Sequence[str]) -> int:
    flags = [a for a in argv if a.startswith("-")]
    words = [a for a in argv if not a.startswith("-") and ("=" not in a or Path(a).is_file())]
    overrides = [a for a in argv if not a.startswith("-") and a not in words]
    if not argv or {"--help", "-h"} & {*flags}:
        print(explain_key(words[0]) if words else usage())
        return 0 if argv else 2
    if "--list" in flags:
        print(list_text())
        return 0
    for flag in flags:
        if flag not in ("--check", "--preview"):
            way_out = f"write {flag[2:]}" if "=" in flag else "options are --check, --preview N, --list, --help [KEY]"
            raise RecipeError(f"{flag}: no such option; {way_out}")
    rows = 1
    if "--preview" in flags and len(words) == 2:
        rows = next((int(words.pop(i)) for i, word in enumerate(words) if word.isdecimal()), rows)
    if len(words) != 1:
        raise RecipeError(f"expected one recipe, found {len(words)}: {' '.join(words)}\n{usage()}")
    recipe = read_recipe(words[0], overrides)
    silence_libraries()
    if "--check" in flags:
        from .run.check import check

        check(recipe)
        return 0
    if "--preview" in flags:
        from .report.preview import preview

        preview(recipe, rows)
        return 0
    _stop_with_launcher()
    from .run.train import train

    return train(recipe)


def _in_one_line(error: Exception) -> str:
    """What a library raised: its kind, its words, and the last line of ours that it passed."""
    ours = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == HERE]
    place = f" (arpo_trl/{Path(ours[-1].filename).name}:{ours[-1].lineno})" if ours else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500] or 'without a word'}{place}"


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
