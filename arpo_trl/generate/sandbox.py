"""Run a program that a model wrote, contained as far as this system allows, and commands of the user."""

import contextlib
import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, cast

from .windows_job import Job

GUARD = Path(__file__).with_name("guard.py")
_RUNNER = """
import sys
code = sys.stdin.read()
sys.argv = [""]
try:
    exec(compile(code, "<python>", "exec"), {"__name__": "__main__"})
except Exception as error:
    import traceback
    sys.stdout.flush()
    print(traceback.format_exception_only(error)[-1].strip())
    sys.stdout.flush()
    import os
    os._exit(86)
"""
RAISED = 86  # exit code of a program that ended with an exception, which it printed
DISK_BYTES = 16 << 20
GRACE = 5.0  # seconds after a limit in which the guard itself has to end
_CALLS = itertools.count()
UNUSED_USER = 1_900_000_000  # plus a process id


class Isolation(NamedTuple):
    """How a program is contained; `as_nobody`: root runs it as an unused user."""

    mode: Literal["namespaces", "bubblewrap", "none"]
    as_nobody: bool = False


@dataclass(frozen=True)
class Limits:
    """Limits of a tool call: seconds, megabytes of memory, processes, and characters of output."""

    seconds: float = 20
    megabytes: int = 1024
    processes: int = 32
    output: int = 10_000


class Outcome(NamedTuple):
    """What a program printed. `error`: why it failed, or "". `seconds`: wall-clock time."""

    text: str
    error: str
    seconds: float

    def __str__(self) -> str:
        return "\n".join(part for part in (self.text, self.error) if part)


def run_python(code: str, limits: Limits) -> Outcome:
    """Run a program and return what it printed; if it raised, the last line of its traceback is the error."""
    command = [sys.executable, "-I", "-X", "utf8", "-c", _RUNNER]
    if sys.platform == "win32":
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            home = dict.fromkeys(("USERPROFILE", "APPDATA", "LOCALAPPDATA", "TEMP", "TMP"), folder)
            outcome = _run(command, code, limits, _environment() | home, Path(folder), is_limited=True)
    else:
        outcome = _run_guarded(command, code, limits, find_isolation())
    if outcome.error == f"exit status {RAISED}":
        printed, _, last = outcome.text.rpartition("\n")
        return Outcome(printed, last, outcome.seconds)
    return outcome


def run_command(command: Sequence[str], query: str, limits: Limits) -> Outcome:
    """Run a command of the user, who trusts it: in the current folder, with the user's environment."""
    program = shutil.which(command[0]) or command[0]  # Windows starts a .cmd or .bat by its complete path only
    return _run([program, *command[1:]], query, limits, os.environ, Path())


def describe_isolation(limits: Limits) -> str:
    """Return one line: the limits of a program, and what it can't reach."""
    numbers = f"{limits.seconds:g} s, {limits.megabytes} MB, {limits.processes} processes"
    if sys.platform == "win32":
        return f"{numbers}; not contained: it can read and write your files, fill the disk and use the network"
    else:
        isolation = find_isolation()
        if isolation.mode != "none":
            where = "user namespaces" if isolation.mode == "namespaces" else isolation.mode
            return f"{numbers}; contained ({where}): it can read your files, write only to a temporary folder, use no network"
        user = "an unused user" if isolation.as_nobody else "you"
        return (
            f"{numbers}, as {user}; not contained: it can use the network and this user's files (install bubblewrap)"
        )


def _environment() -> dict[str, str]:
    return {name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ}


if sys.platform != "win32":

    @functools.cache
    def find_isolation() -> Isolation:
        """Return the strongest isolation that works on this system, found by trying."""
        candidates = [Isolation("namespaces")] if sys.platform == "linux" else []
        candidates += [Isolation("bubblewrap")] if shutil.which("bwrap") else []
        candidates = [*candidates, Isolation("none")]
        if os.getuid() == 0:
            candidates = [isolation for each in candidates for isolation in (each._replace(as_nobody=True), each)]
        for isolation in candidates:
            with contextlib.suppress(OSError):
                code = "open('a', 'w').write('1'); print(open('a').read())"
                outcome = _run_guarded([sys.executable, "-I", "-c", code], "", Limits(seconds=20), isolation)
                if outcome[:2] == ("1", ""):
                    return isolation
        return Isolation("none")

    def _run_guarded(command: Sequence[str], text: str, limits: Limits, isolation: Isolation) -> Outcome:
        user = UNUSED_USER + os.getpid() % 100_000 * 1000 + next(_CALLS) % 1000 if isolation.as_nobody else None
        read, write = os.pipe()
        try:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                if user is not None:
                    os.chown(folder, user, user)
                settings = {
                    "mode": isolation.mode,
                    "user": user,
                    "parent": os.getpid(),
                    "folder": folder,
                    **asdict(limits),
                    "disk_bytes": DISK_BYTES,
                    "command": list(command),
                    "status": write,
                }
                argv = [sys.executable, "-I", "-S", str(GUARD), json.dumps(settings)]
                if isolation.mode == "bubblewrap":
                    argv = [*_bubblewrap(folder), *argv]
                environment = _environment() | {"HOME": folder, "TMPDIR": folder}
                patient = replace(limits, seconds=limits.seconds + GRACE)
                outcome = _run(argv, text, patient, environment, Path(folder), status=write)
                os.set_blocking(read, False)
                try:
                    ending = os.read(read, 100).decode()
                except BlockingIOError:  # it was killed
                    ending = ""
                    _kill_marked(folder)
                return outcome._replace(error=_describe_ending(ending, limits))
        finally:
            os.close(read)
            os.close(write)

    def _bubblewrap(folder: str) -> list[str]:
        """Return bwrap's command: no network, processes of its namespace only, everything but the folder read-only."""
        options = "--unshare-all --die-with-parent --new-session --cap-drop ALL --ro-bind / / --dev /dev --proc /proc"
        return ["bwrap", *options.split(), "--size", str(DISK_BYTES), "--tmpfs", folder, "--chdir", folder, "--"]

    def _kill_marked(folder: str) -> None:
        """Kill every process with this HOME: the guard was killed, so its descendants may have other parents now."""
        mark = f"HOME={folder}".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes().split(b"\0"):
                    os.kill(int(path.parent.name), signal.SIGKILL)


def _describe_ending(ending: str, limits: Limits) -> str:
    kind, _, number = ending.partition(" ")
    descriptions = {
        "time": f"stopped after {limits.seconds:g} s",
        "memory": f"stopped: more than {limits.megabytes} MB of memory",
        "processes": f"stopped: more than {limits.processes} processes",
        "": "killed",
    }
    if kind == "exit":
        return "" if number == "0" else f"exit status {number}"
    return f"killed by {signal.Signals(int(number)).name}" if kind == "signal" else descriptions[kind]


def _run(
    command: Sequence[str],
    text: str,
    limits: Limits,
    environment: Mapping[str, str],
    folder: Path,
    is_limited: bool = False,
    status: int | None = None,
) -> Outcome:
    """Run a process in its own group, in `folder`, with this text as standard input; kill the group at the end.

    Args:
        is_limited: Whether the Job object of Windows limits memory and processes.
        status: A file descriptor that the process inherits.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as own:
        files = Path(own)
        (files / "input").write_text(text, encoding="utf-8", errors="replace", newline="")
        with (files / "input").open("rb") as stdin, (files / "output").open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment,
                start_new_session=True,
                pass_fds=() if status is None else (status,),
            )
            error = _wait(process, output.fileno(), limits, is_limited)
        with (files / "output").open("rb") as printed:
            shown = printed.read(4 * limits.output + 4).decode("utf-8", "replace").strip()
    if len(shown) > limits.output:
        shown = f"{shown[: limits.output]}\n(cut after {limits.output} characters)"
    return Outcome(shown, error, time.monotonic() - began)


def _wait(process: subprocess.Popen[bytes], output: int, limits: Limits, is_limited: bool) -> str:
    """Wait for the process, then kill it and everything in its group. Return why it failed, or ""."""
    job, deadline = cast(Job | None, None), time.monotonic() + limits.seconds
    try:
        if sys.platform == "win32":
            job = Job(process, (limits.megabytes << 20, limits.processes) if is_limited else None)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(min(0.25, max(deadline - time.monotonic(), 0.001)))
                return _describe_ending(f"exit {code}" if code >= 0 else f"signal {-code}", limits)
            if time.monotonic() > deadline:
                return _describe_ending("time", limits)
            if os.fstat(output).st_size > DISK_BYTES:
                return f"stopped: more than {DISK_BYTES >> 20} MB of output"
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if sys.platform == "win32":
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
        if job:
            job.close()  # ends every process in it
        process.wait()
