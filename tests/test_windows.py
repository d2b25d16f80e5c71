"""What only Windows has: Job objects, SIGBREAK, names that it reserves. Most was also run under Wine."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from arpo_trl.data.in_use import is_in_use, mark_in_use
from arpo_trl.generate.sandbox import Limits, describe_isolation, run_command, run_python
from arpo_trl.machine import find_invalid_name
from arpo_trl.training.signals import StopOnSignal


def runs_under_wine() -> bool:
    libraries: Any = ctypes
    return sys.platform == "win32" and hasattr(libraries.windll.ntdll, "wine_get_version")


windows = pytest.mark.skipif(sys.platform != "win32", reason="Windows only")


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("runs\\x?", "Windows allows no '?' in a name; choose another one"),
        ("runs/a:b", "Windows allows no ':' in a name; choose another one"),
        ("C:\\runs\\<new>", "Windows allows no '<' in a name; choose another one"),
        ("runs\\con", "Windows reserves the name con; choose another one"),
        ("runs\\Aux.1\\x", "Windows reserves the name Aux.1; choose another one"),
        ("runs\\nul ", "Windows reserves the name nul ; choose another one"),
        ("runs\\a.", "Windows ignores the end of the name 'a.'; choose another one"),
        ("x" * 256, "Windows allows at most 255 characters in a name; choose a shorter one"),
        *(
            (path, None)
            for path in ("runs", "..\\runs", "C:\\runs\\a b", "\\\\server\\share\\run", "D:run", "./a.b/模型")
        ),
        *((path, None) for path in ("x" * 255, "console", "com10", "~/runs", "")),
    ],
)
def test_a_name_that_windows_cannot_have_is_found(path: str, problem: str | None) -> None:
    assert find_invalid_name(path) == problem


@windows
def test_a_folder_in_use_is_known(tmp_path: Path) -> None:
    code = f"from arpo_trl.data.in_use import *; from pathlib import Path; mark_in_use(Path({str(tmp_path)!r})); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1) as reader:
        assert reader.stdout and reader.stdout.readline()
        assert is_in_use(tmp_path)
        reader.kill()
    assert not is_in_use(tmp_path)
    mark_in_use(tmp_path)
    assert is_in_use(tmp_path)


def processes_with(mark: str) -> list[psutil.Process]:
    return [process for process in psutil.process_iter(["cmdline"]) if mark in " ".join(process.info["cmdline"] or [])]


@windows
def test_a_timeout_ends_a_program_with_everything_it_started() -> None:
    child = "import time; time.sleep(98771)"
    code = f"import subprocess, sys\nprint(1, flush=True)\nsubprocess.Popen([sys.executable, '-c', '{child}']).wait()"
    outcome = run_python(code, Limits(seconds=20))
    assert str(outcome) == "1\nstopped after 20 s"
    time.sleep(2)
    assert not processes_with("98771")
    assert str(run_command([sys.executable, "-c", code], "", Limits(seconds=20))) == "1\nstopped after 20 s"
    time.sleep(2)
    assert not processes_with("98771")


@windows
def test_a_program_has_limits_a_home_and_a_folder_for_temporary_files() -> None:
    limits = Limits(seconds=60, megabytes=256, processes=3)
    home = "import os, pathlib, tempfile\nprint(pathlib.Path.home() == pathlib.Path(tempfile.gettempdir()) == pathlib.Path.cwd(), os.listdir())"
    assert str(run_python(home, limits)) == "True []"
    assert describe_isolation(limits) == (
        "60 s, 256 MB, 3 processes; not contained: it can read and write your files, fill the disk and use the network"
    )


@windows
@pytest.mark.skipif(runs_under_wine(), reason="Wine's Job objects limit neither memory nor processes")
def test_a_job_limits_memory_and_processes() -> None:
    limits = Limits(seconds=60, megabytes=256, processes=3)
    assert run_python("x = bytearray(600 << 20)", limits).error == "MemoryError"
    bomb = "import subprocess, sys\nrun = [subprocess.Popen([sys.executable, '-c', 'input()'], stdin=-1) for _ in range(9)]"
    assert "Error" in run_python(bomb, limits).error


@windows
def test_endless_output_is_stopped() -> None:
    outcome = run_python("while True:\n    print('x' * 100_000)", Limits(seconds=120))
    assert outcome.error == "stopped: more than 16 MB of output"


@windows
def test_ctrl_break_ends_the_process_again_after_training() -> None:
    if sys.platform == "win32":  # for mypy
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGBREAK)]
        stop = StopOnSignal()
        try:
            signal.signal(signal.SIGBREAK, stop._on_signal)
            stop.restore_default_handlers()
            assert signal.getsignal(signal.SIGBREAK) == signal.SIG_DFL
        finally:
            for number, handler in zip((signal.SIGINT, signal.SIGTERM, signal.SIGBREAK), before):
                signal.signal(number, handler)
        assert 128 + signal.SIGBREAK == 149 and os.name == "nt"
