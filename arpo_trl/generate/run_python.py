"""Runs a program that a model wrote, in a process of its own, and returns what it prints."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Sets its own limits, since a function that runs between fork and exec can hang where there are threads (torch's).
_RUNNER = """
import sys
code, memory = sys.stdin.read(), int(sys.argv[1])
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
except ImportError:
    pass  # Windows
sys.argv = [""]
try:
    exec(compile(code, "<python>", "exec"), {"__name__": "__main__"})
except Exception as error:
    import traceback
    sys.stdout.flush()
    print(traceback.format_exception_only(error)[-1].strip())
"""
SHOWN = 10_000  # characters of what a program prints


@dataclass(frozen=True)
class Limits:
    """`seconds` of wall-clock time, and `megabytes` of address space (no limit on Windows)."""

    seconds: float = 20
    megabytes: int = 1024

    def __str__(self) -> str:
        memory = f"{self.megabytes} MB of memory" if sys.platform != "win32" else "no limit on memory"
        return f"{self.seconds:g} s, {memory}, files of 1 MB, started in an empty folder"


def run_python(code: str, limits: Limits) -> str:
    """What the program prints, and of an error the last line of its traceback, as the toy data has it.

    There is no shell, and its standard input is empty. It is not kept from this user's files or from the network.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        output = Path(folder) / "output"
        inside = Path(folder) / "empty"
        inside.mkdir()
        with output.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-I", "-X", "utf8", "-c", _RUNNER, str(limits.megabytes << 20)],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=inside,
                env={name: os.environ[name] for name in ("PATH", "SYSTEMROOT") if name in os.environ},
                start_new_session=True,
            )
            try:
                process.communicate(code.encode("utf-8", "replace"), timeout=limits.seconds)
                ending = _ending(process.returncode)
            except subprocess.TimeoutExpired:
                ending = f"stopped after {limits.seconds:g} s"
            finally:
                _kill(process)
        with output.open("rb") as file:
            text = file.read(4 * SHOWN + 1).decode("utf-8", "replace").strip()
    if len(text) > SHOWN:
        text = f"{text[:SHOWN]}\n(cut after {SHOWN} characters)"
    return "\n".join(part for part in (text, ending) if part)


def _ending(code: int) -> str:
    if code == 0:
        return ""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End it with all that it started."""
    try:
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()
