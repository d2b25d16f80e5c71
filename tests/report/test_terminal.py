"""On a terminal, lines are wrapped at words, and each part of a run has a bar; logs and pipes keep a line in one piece."""

from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import small_run

from arpo_trl import terminal
from arpo_trl.terminal import progress, progress_of_files, to_terminal


class Terminal(io.StringIO):
    """A terminal of unknown size, which counts as 80 columns."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("line", "lines"),
    [
        ("short", ["short"]),
        (f"data     {'word ' * 20}end", [f"data     {'word ' * 14}".rstrip(), f"           {'word ' * 6}end"]),
        (f"         {'word ' * 15}", [f"         {'word ' * 14}".rstrip(), "           word "]),
        (f"{'word ' * 16}end", [f"{'word ' * 16}".rstrip(), "  end"]),
        (f"see {'path/' * 20}file", [f"see {'path/' * 20}file"[:3], f"  {'path/' * 20}file"]),
        (f"data     {'数据，' * 10} {'数据' * 6}", [f"data     {'数据，' * 10}", f"           {'数据' * 6}"]),
        (
            f"step 4/9  {'loss 1.25  right tool 9 of 12  ' * 3}end",
            [
                "step 4/9  " + "  ".join(["loss 1.25  right tool 9 of 12"] * 2),
                "            loss 1.25  right tool 9 of 12  end",
            ],
        ),
    ],
    ids=["short", "a label", "indented", "neither", "a path", "wide characters", "the fields of a log line"],
)
def test_a_long_line_is_wrapped_at_words_under_its_text(line: str, lines: list[str]) -> None:
    assert [part.rstrip() for part in to_terminal(line, Terminal()).split("\n")] == [part.rstrip() for part in lines]
    assert to_terminal(line, io.StringIO()) == line


def test_each_line_of_a_message_is_wrapped_for_itself() -> None:
    assert to_terminal("one\n" + "word " * 17, Terminal()).split("\n") == ["one", ("word " * 16)[:-1], "  word "]


def test_a_parts_bar_appears_after_a_while_and_is_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its speed leaves out the first item: 3 more take as long as the second and third, not as the first."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(terminal, "DELAY", 0.4)
    with progress("evaluating", 6) as advance:
        for seconds in (0.5, 0.12, 0.12):
            time.sleep(seconds)
            advance(1)
            assert "evaluating   17% |" in screen.getvalue()
        last = screen.getvalue().split("\r")[-1]
        assert re.match(r"evaluating   50% \|.+\| 00:00 < 00:00", last)
    assert screen.getvalue().split("\r")[-2].strip() == ""
    with progress("at once", 2) as advance:
        advance(2)
    assert "at once" not in screen.getvalue()


def test_the_bytes_of_a_save_advance_its_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(terminal, "DELAY", 0)
    monkeypatch.setattr(terminal, "WATCHED", 0.02)
    (tmp_path / "earlier").write_bytes(bytes(1000))
    os.utime(tmp_path / "earlier", (1, 1))
    with progress_of_files("saving", tmp_path, total=400):
        (tmp_path / "model").write_bytes(bytes(100))
        time.sleep(0.2)
    assert "saving   25% |" in screen.getvalue() and "50%" not in screen.getvalue()


def test_a_pipe_gets_no_bar_and_watches_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("evaluating", 6) as advance, progress_of_files("saving", tmp_path / "missing", 400):
        advance(6)
    assert capsys.readouterr() == ("", "")


@small_run.QUIET
def test_each_long_part_of_a_run_has_a_bar(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(terminal, "DELAY", 0)
    changes = {"val_size": 2, "do_eval": True, "predict_during_eval": 2, "max_new_tokens": 8, "overwrite_cache": True}
    small_run.run(tmp_path, tiny_model, eval_on_start=True, **changes)
    parts = re.findall(r"\r *([a-z][\w -]*?) +\d+% \|", screen.getvalue())
    expected = ["encoding counting", "evaluating", "generating", "saving checkpoint-2", "saving checkpoint-4"]
    assert [part for part in dict.fromkeys(parts) if part in expected] == expected
    assert "saving the model" in parts
    log = (tmp_path / "run" / "training.log").read_text(encoding="utf-8")
    assert "%" not in log and "step 4/4  loss" in log


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_real_terminal_of_80_columns_shows_no_longer_line(tiny_model: Path, tmp_path: Path) -> None:
    """A run and its error; a log and a pipe have the same lines in one piece. No bar is left behind."""
    recipe = small_run.write_recipe(
        tmp_path,
        tiny_model,
        dataset="counting",
        dataset_dir=str(small_run.write_data(tmp_path / "data")),
        val_size=2,
        do_eval=True,
        eval_on_start=True,
    )
    command = [sys.executable, "-m", "arpo_trl", str(recipe)]
    code, screen = run_in_terminal(command)
    assert code == 0, screen
    lines = [line for line in final_lines(screen) if "real_accelerator.py" not in line]  # DeepSpeed's, if installed
    assert [line for line in lines if len(line) > 80 and len(line.split()) > 2] == []  # a label and a long path
    indented = [line for line in lines if line.startswith("           ") and line[11] != " "]
    assert indented, lines
    log = (tmp_path / "run" / "training.log").read_text(encoding="utf-8").splitlines()
    words = " ".join(" ".join(lines).split())
    reported = [line for line in log if line.startswith(("model ", "data ", "disk ", "done "))]
    assert len(reported) == 5 and all(" ".join(line.split()) in words for line in reported)
    assert any(len(line) > 80 for line in log)
    assert not [line for line in lines if re.match(r"(evaluating|encoding|saving)", line)]
    assert [line for line in lines if re.match(r"4/4 \|.*\| 00:\d\d < 00:00, loss ", line)]

    code, screen = run_in_terminal([*command, "learning_rat=1", f"dataset_dir={tmp_path}"])
    assert code == 2 and max(map(len, final_lines(screen))) <= max(80, len(str(recipe)) + 10)
    piped = subprocess.run([*command, "learning_rat=1"], capture_output=True, text=True, check=False)
    assert len(piped.stderr.splitlines()) == 2  # a title, and the problem


def run_in_terminal(command: list[str]) -> tuple[int, str]:
    """Run a command in a terminal of 80 columns; return its exit code and all that it wrote."""
    if sys.platform == "win32":
        raise AssertionError
    import fcntl
    import pty
    import termios

    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 80, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    streams: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), follower)
    process = subprocess.Popen(command, env=environment, **streams)
    os.close(follower)
    written = b""
    while True:
        try:
            block = os.read(leader, 65536)
        except OSError:  # EIO: the process has closed the terminal
            break
        if not block:
            break
        written += block
    os.close(leader)
    return process.wait(), written.decode()


def final_lines(screen: str) -> list[str]:
    """Return the lines that remain on the screen: of each, what was written after the last carriage return."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", screen.replace("\r\n", "\n"))
    lines = [line.rstrip("\r").rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    return [line for line in lines if line]
