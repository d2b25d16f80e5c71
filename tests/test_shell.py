"""Printed commands can be pasted into the shell at hand."""

from __future__ import annotations

import ctypes
import shlex
import subprocess
import sys
from typing import Any

import pytest

from arpo_trl.shell import quote_command, split_command

WORDS = [
    "my run",
    "a&b",
    "it's",
    'say "x"',
    "C:\\out put\\",
    "C:\\plain\\",
    "50%",
    "(a)",
    "a^b",
    "",
    "$HOME",
    "Ünï中",
    "a;b|c>d",
]


@pytest.mark.skipif(sys.platform == "win32", reason="sh")
def test_a_command_is_read_by_sh_as_it_was_meant() -> None:
    command = quote_command(
        [sys.executable, "-c", "import os, sys; print(sys.argv[1:], os.environ['X'])", *WORDS], X="a 'b'"
    )
    printed = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout
    assert printed == f"{WORDS} a 'b'\n"
    assert split_command(quote_command(WORDS)) == WORDS


def test_a_command_is_quoted_for_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    command = quote_command(["python", "-m", "arpo_trl", *WORDS], TRACKIO_DIR="C:\\my runs")
    assert command == (
        'set "TRACKIO_DIR=C:\\my runs" && python -m arpo_trl "my run" "a&b" "it\'s" "say \\"x\\"" "C:\\out put\\\\" '
        'C:\\plain\\ "50%" "(a)" "a^b" "" "$HOME" Ünï中 "a;b|c>d"'
    )
    assert split_command("\"C:\\my tools\\search.exe\" --top 3 C:\\index 'a b'") == [
        "C:\\my tools\\search.exe",
        "--top",
        "3",
        "C:\\index",
        "a b",
    ]
    with pytest.raises(ValueError, match="No closing quotation"):
        split_command('"C:\\my tools')


@pytest.mark.skipif(sys.platform != "win32", reason="Windows' own reader of command lines")
def test_windows_reads_a_command_as_it_was_meant() -> None:
    windows: Any = ctypes
    read = windows.windll.shell32.CommandLineToArgvW
    read.restype = ctypes.POINTER(ctypes.c_wchar_p)
    count = ctypes.c_int()
    words = read(quote_command(["python", *WORDS]), ctypes.byref(count))
    assert [words[number] for number in range(1, count.value)] == WORDS


def test_split_is_that_of_sh_elsewhere() -> None:
    if sys.platform != "win32":
        assert split_command("python 'a b' c\\ d") == shlex.split("python 'a b' c\\ d") == ["python", "a b", "c d"]
