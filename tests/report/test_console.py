"""Lines reach the terminal and training.log; progress bars only the terminal."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from tqdm import tqdm
from transformers.utils import logging as library_logging

from arpo_trl.errors import RecipeError, RunFailed
from arpo_trl.report import console
from arpo_trl.report.console import log_only, logged_to, say
from arpo_trl.terminal import start_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class GoneTerminal(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError("the reader died")


def log_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()[1:]


def test_lines_reach_terminal_and_log_but_a_progress_bar_only_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with logged_to(tmp_path / "log"):
        say("one")
        log_only("for the log")
        for _ in tqdm(range(2), desc="Loading"):
            pass
    say("after")
    assert log_of(tmp_path / "log") == ["one", "for the log"]
    shown = capsys.readouterr()
    assert shown.out == "one\nafter\n" and "100%" in shown.err


@pytest.mark.parametrize("library", ["transformers.trainer", "datasets.builder", "accelerate.utils", "trl.trainer"])
def test_a_librarys_warning_is_shown_once_and_is_in_the_log(
    library: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    library_logging.set_verbosity_warning()  # a merge in this process turns it down
    logger = logging.getLogger(library)
    for handler in logging.getLogger(library.split(".")[0]).handlers:
        if type(handler) is logging.StreamHandler:
            handler.setStream(sys.stderr)  # pytest has another one for each test
    with logged_to(tmp_path / "log"):
        logger.warning("rope_scaling is ignored")
        logger.info("not shown")
    logger.handlers.clear()
    assert log_of(tmp_path / "log") == ["rope_scaling is ignored"]
    assert re.fullmatch(r"(\[\w+\] )?rope_scaling is ignored\n", capsys.readouterr().err)


def test_a_python_warning_is_shown_and_in_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with logged_to(tmp_path / "log"), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("use another kernel", stacklevel=1)
    assert "use another kernel" in "".join(log_of(tmp_path / "log"))
    assert capsys.readouterr().err.count("UserWarning: use another kernel") == 1


def test_control_characters_are_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with logged_to(tmp_path / "log"):
        say("run \x1b]0;title\x07 \u202egpj.exe \r 100 %")
    escaped = r"run \x1b]0;title\x07 \u202egpj.exe \r 100 %"
    assert capsys.readouterr().out == escaped + "\n"
    assert log_of(tmp_path / "log") == [escaped]


def test_each_session_begins_with_its_date_and_command_and_is_appended_until_a_run_is_replaced(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for _ in range(2):
        with logged_to(log):
            say("step")
    lines = log.read_text(encoding="utf-8").splitlines()
    assert [line[:3] for line in lines] == ["# 2", "ste", "# 2", "ste"]
    with logged_to(log) as forget_earlier_sessions:
        say("before")
        forget_earlier_sessions()
        say("after")
    assert [line[:6] for line in log.read_text(encoding="utf-8").splitlines()[1:]] == ["before", "after"]


def test_an_unexpected_errors_traceback_is_in_the_log_and_the_error_points_to_it(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught, logged_to(tmp_path / "log"):
        1 / 0  # noqa: B018
    lines = log_of(tmp_path / "log")
    assert lines[0] == "Traceback (most recent call last):" and lines[-1] == "ZeroDivisionError: division by zero"
    assert caught.value.__notes__ == [f"the traceback is in {tmp_path / 'log'}"]


def test_the_error_that_ends_a_run_is_in_its_log(tmp_path: Path) -> None:
    with pytest.raises(RunFailed), logged_to(tmp_path / "log"):
        raise RunFailed("step 7: the loss is nan")
    assert log_of(tmp_path / "log") == ["step 7: the loss is nan"]


def test_a_closed_terminal_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", GoneTerminal())
    with logged_to(tmp_path / "log"):
        say("still here")
    assert log_of(tmp_path / "log") == ["still here"]


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    with logged_to(tmp_path / "log", process=1):
        log_only("from another process")
    with pytest.raises(RecipeError), logged_to(tmp_path / "log", process=1):
        raise RecipeError("also raised by the main process")
    assert not (tmp_path / "log").exists()


def test_another_process_writes_the_error_that_ends_it(tmp_path: Path) -> None:
    for error in (RunFailed("step 3: the loss is nan"), ValueError("two\nlines")):
        with pytest.raises(type(error)), logged_to(tmp_path / "log", process=1):
            raise error
    lines = (tmp_path / "log").read_text("utf-8").splitlines()
    assert lines == ["process 1: step 3: the loss is nan", "process 1: ValueError: two lines"]


def test_lines_printed_during_a_progress_bar_appear_above_it_and_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with logged_to(tmp_path / "log"):
        bar = start_bar(total=10, initial=4)
        assert bar is not None
        bar.update(1)
        say("step 5  eval_loss 1.0")
        bar.close()
        say("after")
    assert log_of(tmp_path / "log") == ["step 5  eval_loss 1.0", "after"]
    drawn = terminal.getvalue()
    assert "4/10" in drawn and "5/10" in drawn
    line = next(part for part in drawn.split("\n") if part.endswith("step 5  eval_loss 1.0"))
    assert line.split("\r")[-1] == "step 5  eval_loss 1.0" and line.split("\r")[-2].strip() == ""  # bar wiped first


def test_a_pipe_gets_no_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    assert start_bar(total=10, initial=0) is None
    assert capsys.readouterr() == ("", "")


def test_useful_warnings_stay_and_libraries_bars_are_off_in_a_pipe() -> None:
    code = """
import warnings
from arpo_trl.report import console
from arpo_trl.report.console import silence_libraries
silence_libraries()
warnings.warn_explicit("use another kernel", UserWarning, "model.py", 1, module="somewhere")
warnings.warn_explicit("renamed in v6", FutureWarning, "args.py", 1, module="transformers.training_args")
warnings.warn_explicit("'pin_memory' argument is set as true", UserWarning, "loader.py", 1, module="torch.utils.data")
from transformers.utils import logging
print(logging.is_progress_bar_enabled())
trainer = logging.get_logger("transformers.trainer")
for keys in (["lm_head.weight"], ["model.norm.weight"]):
    trainer.warning(f"There were missing keys in the checkpoint model loaded: {keys}.")
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_HUB_DISABLE", "PYTHONWARNINGS"))}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert found.stdout == "False\n"
    assert "use another kernel" in found.stderr
    assert "['model.norm.weight']" in found.stderr and "lm_head" not in found.stderr
    assert "renamed" not in found.stderr and "pin_memory" not in found.stderr


def test_nothing_in_the_package_bypasses_the_log() -> None:
    """But the command line's answers, a chat, and the process that runs its Python: no log keeps these."""
    package = Path(console.__file__).parents[1]
    printing = {
        path.stem for path in package.rglob("*.py") if re.search(r"(?<![.\w])print\(", path.read_text("utf-8"))
    }
    assert printing <= {"__main__", "chat", "check_serving", "sandbox"}
