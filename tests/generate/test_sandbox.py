"""Programs of a model are limited and contained; nothing that they start outlives the call."""

from __future__ import annotations

import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from arpo_trl.generate import sandbox
from arpo_trl.generate.sandbox import Isolation, Limits, run_command, run_python

if sys.platform == "win32":
    pytest.skip("limits of POSIX; test_windows.py has those of Windows", allow_module_level=True)
else:
    from arpo_trl.generate.sandbox import find_isolation

QUICK = Limits(seconds=20, megabytes=256)
contained = pytest.mark.skipif(find_isolation().mode == "none", reason="needs user namespaces or bubblewrap")


@pytest.fixture(params=["strongest", "none"])
def isolation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test in the strongest isolation of this system, and in none."""
    if request.param == "none":
        monkeypatch.setattr(sandbox, "find_isolation", lambda: Isolation("none"))
    return str(request.param)


@pytest.mark.parametrize(
    ("code", "result"),
    [
        ("print(6 * 7)", "42"),
        ("for n in range(2):\n    print(n)", "0\n1"),
        ("print('é中')\nx = {}\nx['a']", "é中\nKeyError: 'a'"),
        ("print(", "SyntaxError: '(' was never closed"),
        ("x = bytearray(10 ** 10)", "MemoryError"),
        ("import sys\nprint(1)\nsys.exit(3)", "1\nexit status 3"),
        ("input()", "EOFError: EOF when reading a line"),
        ("import os\nprint(os.listdir(), 'SECRET' in os.environ)", "[] False"),
        ("import os\nos.kill(os.getpid(), 9)", "killed by SIGKILL"),
        ("print(__name__)", "__main__"),
        ("", ""),
        ("open('a', 'w').write('x' * (2 << 20))", "OSError: [Errno 27] File too large"),
        ("print('x' * 200)", "x" * 200),
    ],
)
def test_a_program_returns_what_it_prints(
    code: str, result: str, isolation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "1")
    assert str(run_python(code, QUICK)) == result


@pytest.mark.parametrize(
    ("code", "error"),
    [("print(1)", ""), ("1 / 0", "ZeroDivisionError: division by zero"), ("exit(2)", "exit status 2")],
)
def test_a_failure_is_not_part_of_the_output(code: str, error: str) -> None:
    outcome = run_python(code, QUICK)
    assert (outcome.text, outcome.error) == ("1" if code == "print(1)" else "", error)


def processes_with(mark: str) -> list[psutil.Process]:
    return [one for one in psutil.process_iter(["cmdline"]) if mark in " ".join(one.info["cmdline"] or [])]


def no_process_left(mark: str) -> bool:
    deadline = time.monotonic() + 5
    while processes_with(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not processes_with(mark)


def test_a_timeout_ends_a_program_with_everything_it_started(isolation: str) -> None:
    code = "import subprocess, sys\nprint(1, flush=True)\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(98765)'])"
    began = time.monotonic()
    assert str(run_python(code, Limits(seconds=1.5))) == "1\nstopped after 1.5 s"
    assert time.monotonic() - began < 8
    assert no_process_left("98765")


DAEMON = """
import os, subprocess, sys
if not os.fork():
    os.setsid()
    if not os.fork():
        {before}
        os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(98766)'])
    os._exit(0)
os.wait()
print('left')
{then}
"""


@pytest.mark.parametrize(
    ("before", "then"),
    [("pass", "pass"), ("os.environ.clear()", "pass"), ("pass", "os.kill(os.getppid(), 9)")],
    ids=["setsid and two forks", "without its environment", "the guard killed"],
)
def test_a_daemon_does_not_outlive_the_call(before: str, then: str, isolation: str) -> None:
    outcome = run_python(DAEMON.format(before=before, then=then), QUICK)
    assert outcome.text == "left"
    assert no_process_left("98766")


def test_a_fork_bomb_is_stopped(isolation: str) -> None:
    """At most 128 processes here: an endless bomb was tried by hand, but it slows down the whole machine."""
    code = "import os, time\nfor _ in range(7):\n    os.fork()\ntime.sleep(98769)"
    outcome = run_python(code, Limits(seconds=20, megabytes=2048))
    assert outcome.error.startswith(("stopped: more than 32 processes", "BlockingIOError")) and outcome.seconds < 15
    deadline = time.monotonic() + 5
    while (left := programs()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def programs() -> list[psutil.Process]:
    """Return the running programs of this module's calls: they are started by the runner's text."""
    return processes_with('compile(code, "<python>"')


def test_memory_is_counted_over_all_processes(isolation: str) -> None:
    code = "import os, time\nfor n in range(8):\n    if not os.fork():\n        x = b'x' * (60 << 20)\n        time.sleep(9)\ntime.sleep(9)"
    assert run_python(code, QUICK).error == "stopped: more than 256 MB of memory"


def test_endless_output_is_cut_and_fills_no_disk(isolation: str) -> None:
    result = str(run_python("while True:\n    print('x' * 1000)", Limits(seconds=10)))
    assert len(result) < 11_000 and "(cut after 10000 characters)" in result


@contained
@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("open('{outside}/evil', 'w')", "Read-only file system"),
        ("import shutil\nshutil.rmtree('{outside}')", "Read-only file system"),
        ("import os\nos.unlink('{outside}/precious')", "Read-only file system"),
        ("import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)", "OSError"),
        ("import os\nos.kill({parent}, 9)", "ProcessLookupError"),
        ("for n in range(100):\n    open(str(n), 'wb').write(b'x' * (1 << 20))", "No space left on device"),
        ("import ctypes\nassert ctypes.CDLL(None).mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None) == 0", "AssertionError"),
        ("print(open('/proc/{parent}/environ').read())", "FileNotFoundError"),
    ],
    ids=["write", "delete a tree", "delete a file", "network", "kill", "fill the disk", "mount", "environment"],
)
def test_a_contained_program_reaches_nothing_outside(code: str, error: str, tmp_path: Path) -> None:
    import os
    import socket

    (tmp_path / "precious").write_text("kept", encoding="utf-8")
    tmp_path.chmod(0o777)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outcome = run_python(code.format(outside=tmp_path, port=port, parent=os.getpid()), QUICK)
    assert error in outcome.error
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_calls_run_in_parallel_without_seeing_each_other() -> None:
    results: dict[int, str] = {}

    def call(number: int) -> None:
        code = f"import os, time\nopen('a{number}', 'w').close()\ntime.sleep(0.3)\nprint({number}, os.listdir())"
        results[number] = str(run_python(code, QUICK))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: f"{number} ['a{number}']" for number in range(6)}


def test_a_program_ends_with_the_process_that_called_it(isolation: str) -> None:
    none = "from arpo_trl.generate import sandbox; sandbox.find_isolation = lambda: sandbox.Isolation('none'); "
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(98767)'])"
    call = f"from arpo_trl.generate.sandbox import run_python, Limits; run_python({code!r}, Limits(seconds=60))"
    process = subprocess.Popen([sys.executable, "-c", (none if isolation == "none" else "") + call])
    deadline = time.monotonic() + 20
    while not any(one.ppid() != process.pid for one in processes_with("98767")[1:]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(processes_with("98767")) > 1
    process.kill()
    process.wait()
    assert no_process_left("98767")


Make = Callable[[str], list[str]]


@pytest.fixture
def command(tmp_path: Path) -> Make:
    def make(code: str) -> list[str]:
        (tmp_path / "tool.py").write_text(code, encoding="utf-8")
        return [sys.executable, *shlex.split(str(tmp_path / "tool.py"))]

    return make


@pytest.mark.parametrize(
    ("code", "text", "error"),
    [
        ("import sys; print('found', sys.stdin.read())", "found a 中\nb", ""),
        ("import sys; sys.exit('no index')", "no index", "exit status 1"),
        ("import time; time.sleep(60)", "", "stopped after 2 s"),
        ("while True: print('x' * 10000)", None, "stopped"),
    ],
)
def test_a_command_reads_the_query_and_prints_the_result(
    code: str, text: str | None, error: str, command: Make
) -> None:
    outcome = run_command(command(code), "a 中\nb", Limits(seconds=2))
    assert text is None or outcome.text == text
    assert outcome.error.startswith(error) and bool(outcome.error) == bool(error)
