"""Command line: `arpo-trl [RECIPE] [key=value ...] [--key value ...] [--check | --preview N]`.

Exit codes: 0 done, 1 run failed, 2 configuration error; stopped by a signal: 130 Ctrl-C, 143 SIGTERM, 149 Ctrl-Break.
"""

import contextlib
import errno
import gc
import io
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from os.path import isfile
from pathlib import Path

# torch's store defaults to libuv since 2.4, which torch's Windows wheels lack (pytorch/pytorch#139990).
os.environ.setdefault("USE_LIBUV", "0")

from .arguments import chat_arguments, check_serving_arguments, merge_arguments, select_arguments
from .errors import RecipeError, RunFailed, in_one_line, printable, program, reason
from .machine import environment
from .recipe import Recipe, read_recipe
from .recipe.command_line import CommandLine, read_command_line
from .recipe.help import explain, usage
from .report.console import silence_libraries
from .terminal import to_terminal
from .training.requirements import check_before_torch, check_inputs
from .version import __version__

HERE = Path(__file__).parent
OTHER_COMMANDS = {
    "export": "Use: {0} merge ADAPTER OUTPUT",
    "eval": "Use: {0} RECIPE.yaml do_train=false do_eval=true, or do_predict=true",
    "webui": "Use: {0} --check RECIPE.yaml, then {0} RECIPE.yaml",
    "webchat": "Use: {0} chat MODEL",
    "api": "Use a server such as vLLM, and: {0} check-serving MODEL --url URL",
}
"""Commands of llamafactory-cli, and what to use here."""


def main(argv: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a cp1252 console escapes Chinese instead of failing
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except (RecipeError, RunFailed) as error:
        is_configuration = isinstance(error, RecipeError)
        if is_configuration and os.environ.get("LOCAL_RANK", "0") != "0":
            # If the main process raises it too, the launcher ends this one before it repeats the message.
            time.sleep(5)
        print(to_terminal(str(error), sys.stderr), file=sys.stderr)
        return 2 if is_configuration else 1
    except KeyboardInterrupt:
        print("interrupted by Ctrl-C", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception as error:
        if _is_closed_pipe(error):  # as of `| head`; nothing can be printed
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        notes = getattr(error, "__notes__", None)  # where training.log has the traceback
        if notes:
            print(to_terminal(printable("; ".join([_describe(error), *notes])), sys.stderr), file=sys.stderr)
        else:
            print(printable(traceback.format_exc()), file=sys.stderr, end="")
        return 1


def _is_closed_pipe(error: Exception) -> bool:
    """Return whether standard output's reader has ended, which Windows reports as an invalid argument without a file."""
    is_invalid = isinstance(error, OSError) and error.errno == errno.EINVAL and error.filename is None
    return isinstance(error, BrokenPipeError) or (sys.platform == "win32" and is_invalid)


def _run(argv: Sequence[str]) -> int:
    """Run a command, which imports what it needs: a typo is reported before torch is imported."""
    silence_libraries()
    if not argv:
        print(usage())
        return 2
    subcommands: dict[str, Callable[[Sequence[str]], int | None]] = {
        "chat": _chat,
        "merge": _merge,
        "check-serving": _check_serving,
        "rollout": _rollout,
        "select": _select,
    }
    if argv[0] in subcommands and not isfile(argv[0]):
        return subcommands[argv[0]](argv[1:]) or 0
    if argv[0] in OTHER_COMMANDS and not isfile(argv[0]):
        raise RecipeError(f"{argv[0]}: not supported. {OTHER_COMMANDS[argv[0]].format(program())}")
    line = read_command_line(argv)
    options: dict[str, Callable[[CommandLine], None]] = {
        "help": lambda line: print(to_terminal(explain(line.words) or usage())),
        "version": lambda line: print(f"arpo_trl {__version__}"),
        "env": lambda line: print(environment()),
        "init": _init,
        "check": _check,
        "preview": _preview,
    }
    for option, command in options.items():
        if option in line.options:
            command(line)
            return 0
    return _train(line)


def _chat(argv: Sequence[str]) -> None:
    args = chat_arguments(argv)
    with gc_paused():
        from .generate.chat import chat_command
    chat_command(args)


def _merge(argv: Sequence[str]) -> None:
    args = merge_arguments(argv)
    with gc_paused():
        from .model.merge import merge_command
    print(to_terminal(merge_command(args)))


def _check_serving(argv: Sequence[str]) -> int:
    args = check_serving_arguments(argv)
    with gc_paused():
        from .generate.check_serving import check_serving_command
    return check_serving_command(args)


def _rollout(argv: Sequence[str]) -> None:
    line = read_command_line(argv)
    if "help" in line.options:
        print(f"{program()} rollout RECIPE.yaml [key=value ...]\n\n{explain(line.words or ['rollout'])}")
        return
    recipe = _recipe(line, rollout=True)
    checked = check_inputs(recipe.model_copy(update={"do_train": False}))  # its output_dir holds a finished run
    recipe = recipe.with_notices(*checked.notices)
    with gc_paused():
        from .generate.rollout import WAIT_FOR_OTHERS, rollout
        from .processes import join_processes
        from .training.output_dir import own_output_dir
    join_processes(WAIT_FOR_OTHERS)
    with own_output_dir(recipe):
        rollout(recipe)


def _select(argv: Sequence[str]) -> None:
    args = select_arguments(argv)
    with gc_paused():
        from .generate.selection import select
    print("\n".join(select(args.folder, args.max_per_question, args.max_pairs_per_question)))


def _init(line: CommandLine) -> None:
    """Write a first recipe, its data, the Accelerate configs and the JSON Schema to a folder that has none of them."""
    if len(line.words) != 1:
        raise RecipeError(f"--init: expected one folder, found {len(line.words)}")
    folder, starter = Path(line.words[0]), HERE / "starter"
    sources = {folder / path.relative_to(starter): path for path in sorted(starter.rglob("*.*"))}
    for path in _files_outside_package():
        sources[folder / ("accelerate_configs" if path.suffix == ".yaml" else "") / path.name] = path
    try:
        if existing := [path for path in sources if path.exists()]:
            raise RecipeError(f"{existing[0]}: already exists; choose another folder for --init")
        for target, source in sources.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            print(f"wrote {target}")
    except (OSError, ValueError) as error:
        raise RecipeError(f"--init {folder}: cannot be written ({reason(error)})") from None
    print(f"next: cd {folder} && {program()} --check recipe.yaml")


def _files_outside_package() -> list[Path]:
    """Return the Accelerate configs and the JSON Schema, from the repository or from where the wheel installed them."""
    schema = HERE.parent / "recipes" / "schema.json"
    if schema.is_file():
        return [*sorted((HERE.parent / "accelerate_configs").glob("*.yaml")), schema]
    from importlib.metadata import PackageNotFoundError, files

    with contextlib.suppress(PackageNotFoundError):
        return [Path(str(file.locate())) for file in files("arpo_trl") or [] if "share" in file.parts]
    return []


def _check(line: CommandLine) -> None:
    recipe = check_before_torch(_recipe(line), starts_run=False)
    with gc_paused():
        from .training.check import check
    check(recipe, verbose="verbose" in line.options)


def _preview(line: CommandLine) -> None:
    rows = next((word for word in line.words if word.isdecimal() and not isfile(word)), None)
    if rows:
        line.words.remove(rows)
    recipe = check_inputs(_recipe(line), starts_run=False)
    with gc_paused():
        from .report.preview import preview
    preview(recipe, int(rows or 1))


def _train(line: CommandLine) -> int:
    recipe = check_before_torch(_recipe(line))
    _stop_with_launcher()
    with gc_paused():
        from .training.train import run
    return run(recipe).exit_code


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Import libraries with the garbage collector off, and exclude their objects from later collections.

    There are a million of them: collecting them again and again takes a quarter of the time until the first step.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _recipe(line: CommandLine, rollout: bool = False) -> Recipe:
    if len(line.words) > 1 or not (line.words or line.overrides):
        recipes = f"{len(line.words)}: {' '.join(line.words)}" if line.words else "none"
        raise RecipeError(f"expected one recipe, found {recipes}\n{usage()}")
    return read_recipe(line.words[0] if line.words else None, line.overrides, rollout)


def _describe(error: Exception) -> str:
    """Return a library's error in one line: its type, its message, and the last line of this package in its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [(Path(frame.filename), frame.lineno) for frame in frames if HERE in Path(frame.filename).parents]
    location = f" (arpo_trl/{lines[-1][0].relative_to(HERE).as_posix()}:{lines[-1][1]})" if lines else ""
    return f"{type(error).__name__}: {in_one_line(error)}{location}"


def _stop_with_launcher() -> None:
    """On Linux, request a SIGTERM when the launcher dies, because `accelerate launch` does not forward its own."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:
        import ctypes

        pr_set_pdeathsig = 1  # prctl(2)
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def entry() -> None:
    """Run the console command `arpo-trl`."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    entry()
