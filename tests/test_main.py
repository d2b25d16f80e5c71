"""Command line: how words are sorted and errors are reported. Exit codes of runs are tested in tests/faults."""

from __future__ import annotations

import contextlib
import gc
import getpass
import io
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_run

import arpo_trl
from arpo_trl import machine, run_folder
from arpo_trl.__main__ import OTHER_COMMANDS, gc_paused, main
from arpo_trl.errors import RecipeError, in_one_line
from arpo_trl.recipe import Recipe, read_recipe
from arpo_trl.recipe.command_line import OPTIONS, read_command_line
from arpo_trl.recipe.keys import keys
from arpo_trl.recipe.llamafactory import IGNORED, NOT_SUPPORTED, RENAMED
from arpo_trl.training import check, requirements, train
from arpo_trl.training.requirements import check_inputs


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Path:
    folder = tmp_path / "lr=1e-5"  # not an override, though it looks like one
    folder.mkdir()
    data = small_run.write_data(folder / "data")
    return small_run.write_recipe(folder, tiny_model, dataset="counting,greetings", dataset_dir=str(data))


def test_the_number_of_rows_can_be_anywhere(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = []
    for argv in (["--preview", str(recipe), "2"], ["--preview", "2", str(recipe)], [str(recipe), "--preview", "2"]):
        assert main([*argv, "dataset=greetings"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] == shown[2]
    assert "greet Bob" in shown[0] and "greet Cy" not in shown[0] and "count to" not in shown[0]


def test_libraries_are_imported_with_the_garbage_collector_off() -> None:
    with pytest.raises(ImportError), gc_paused():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() and gc.get_freeze_count() > 100_000
    gc.unfreeze()


FLAGS = [
    ("--learning_rate 1e-5", "learning_rate: 1e-5"),
    ("--learning_rate=1e-5", "learning_rate: 1e-5"),
    ("--learning-rate 1e-5", "learning_rate: 1e-5"),
    ("--bf16", "bf16: true"),
    ("--bf16 False", "bf16: false"),
    ("--bf16 true --seed 7", "bf16: true\nseed: 7"),
    ("--bf16 --seed 7", "bf16: true\nseed: 7"),
    ("--bf16 seed=7", "bf16: true\nseed: 7"),
    ("seed=7 --bf16", "bf16: true\nseed: 7"),
    ("--no_gradient_checkpointing", "gradient_checkpointing: false"),
    ("--no_cuda", "no_cuda: true"),
    ("--resume_from_checkpoint out/checkpoint-3", "resume_from_checkpoint: out/checkpoint-3"),
    ("--lora_target q_proj,v_proj --finetuning_type lora", "lora_target: q_proj,v_proj\nfinetuning_type: lora"),
    ("--lora_target q_proj v_proj --finetuning_type lora", "lora_target: q_proj,v_proj\nfinetuning_type: lora"),
    ("--report_to none", "report_to: none"),
    ("--deepspeed ds.json", "deepspeed: ds.json"),
    ("--max_steps -1", "max_steps: -1"),
    ("--evaluation_strategy no", "eval_strategy: no"),
    ("--warmup_ratio 0.1 --warmup_ratio 0.2", "warmup_ratio: 0.2"),
    ("--top_p 0.4", "top_p: 0.4"),
    ("--default_system 'You are: a # helper [of] --all'", "default_system: 'You are: a # helper [of] --all'"),
    ("--default_system a=b", "default_system: a=b"),
    ("--lr_scheduler_kwargs '{\"num_cycles\": 2}'", "lr_scheduler_kwargs: {num_cycles: 2}"),
    ("--run_name 007", "run_name: '007'"),
    ("--flash_attn --num_layer_trainable 3", "flash_attn: fa2\nfreeze_trainable_layers: 3"),
]
BASE = "model_name_or_path: m\noutput_dir: o\nstage: sft\ndo_train: true\ndataset: a\n"
BASE_FLAGS = ["--stage", "sft", "--do_train", "--model_name_or_path", "m", "--output_dir", "o", "--dataset", "a"]


def read(argv: list[str]) -> Recipe:
    line = read_command_line(argv)
    assert len(line.words) <= 1 and not line.options
    return read_recipe(line.words[0] if line.words else None, line.overrides)


@pytest.mark.parametrize(("flags", "lines"), FLAGS)
def test_llama_factorys_flags_equal_the_lines_of_a_recipe(tmp_path: Path, flags: str, lines: str) -> None:
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "whole.yaml").write_text(BASE + lines)
    base, whole = str(tmp_path / "base.yaml"), read_recipe(tmp_path / "whole.yaml")
    words = shlex.split(flags)
    for argv in ([*BASE_FLAGS, *words], [*words, *BASE_FLAGS], [base, *words], ["train", base, *words]):
        assert read(argv).resolved() == whole.resolved(), argv
    if words[-1] != "v_proj":
        assert read([*words, base]).resolved() == whole.resolved()


@pytest.mark.parametrize("option", OPTIONS)
def test_no_key_has_the_name_of_an_option(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert not any(option in table for table in (keys(), RENAMED, IGNORED, NOT_SUPPORTED))
    assert main([f"--{option}=1"]) == 2
    assert capsys.readouterr().err == f"--{option}: an option, not a key; it takes no value\n"


def test_an_unknown_flag_is_reported_with_the_nearest_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*BASE_FLAGS, "--lerning_rate", "1"]) == 2
    assert capsys.readouterr().err == (
        "command line: 1 problem\n  override  lerning_rate: unknown key; did you mean learning_rate?\n"
    )


@pytest.mark.parametrize("flag", ["model_name_or_path", "dataset", "template", "checkpoint_dir", "lora_target"])
def test_a_flag_without_its_value_is_an_error(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"--{flag}", *BASE_FLAGS]) == 2
    assert capsys.readouterr().err == f"--{flag}: expected a value\n"


def test_check_and_preview_accept_flags_instead_of_a_recipe(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = []
    for key, value in read_recipe(recipe).resolved().items():
        if value is not None and value != []:
            flags += [f"--{key}", ",".join(value) if isinstance(value, list) else str(value)]
    shown = []
    for argv in ([str(recipe), "--preview"], [*flags, "--preview"]):
        assert main(argv) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] != ""
    assert main([*flags, "--check", "--dataset", "nope"]) == 2
    assert "nope" in capsys.readouterr().err


def test_a_long_text_on_the_command_line_is_read(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "You are a careful assistant who thinks step by step. " * 6
    assert main([str(recipe), "--preview", f"default_system={text}"]) == 0
    assert text.strip() in capsys.readouterr().out.replace("\n", "")
    assert main(["x" * 300]) == 2
    assert capsys.readouterr().err.startswith("x" * 300 + ": ")


def test_inputs_and_packages_are_checked_once(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checking W&B's login sends a request to its server. `train` in Python checks too, without a command line."""
    asked: list[str] = []

    def stop(recipe: Recipe) -> None:
        raise RecipeError("asked for the device")

    for name in ("check_inputs", "check_packages"):
        real = getattr(requirements, name)

        def counted(*args: Any, name: str = name, real: Any = real) -> Any:
            asked.append(name)
            return real(*args)

        monkeypatch.setattr(requirements, name, counted)
    for module in (check, train):
        monkeypatch.setattr(module, "check_after_torch", stop)
    for call in (
        lambda: main([str(recipe)]),
        lambda: main([str(recipe), "--check"]),
        lambda: arpo_trl.train(read_recipe(recipe)),
    ):
        with contextlib.suppress(RecipeError):
            assert call() == 2
        assert asked == ["check_inputs", "check_packages"]
        asked.clear()


def test_the_version_and_the_environment_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"arpo_trl {arpo_trl.__version__}\n"
    assert main(["--env"]) == 0
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert {"arpo_trl", "python", "system", "device", "torch", "transformers", "trl", "text"} <= set(told)
    assert not any(secret in str(told) for secret in (platform.node(), str(Path.home()), getpass.getuser() + "@"))


def test_two_recipes_are_an_error(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(recipe), str(recipe)]) == 2
    assert capsys.readouterr().err.startswith("expected one recipe, found 2: ")


def test_an_unexpected_error_prints_its_traceback_if_no_log_has_it(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arpo_trl.training.check.describe_tokens", lambda rows: 1 / 0)
    assert main([str(recipe), "--check"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and err.rstrip().endswith("ZeroDivisionError: division by zero")


def test_a_console_without_chinese_shows_escapes(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with Windows' cp1252, in rows and in messages."""
    shown, told = (io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", shown)
        patch.setattr(sys, "stderr", told)
        assert main([str(recipe), "--preview", "default_system=你好 👍"]) == 0
        assert main([str(recipe), "--check", "dataset=数据"]) == 2
    for stream, escaped in ((shown, r"\u4f60\u597d \U0001f44d"), (told, r"\u6570\u636e")):
        assert escaped in stream.buffer.getvalue().decode("cp1252")


def test_a_missing_drive_has_no_free_space(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda path, **kwargs: False)
    assert machine.free_space(Path("Z:/run")) == 0
    root = Path("/run").resolve().anchor
    assert str(machine.missing_space(Path("/run"), 1, "a checkpoint")).startswith(
        f"there is no drive {root}; choose another folder"
    )
    with pytest.raises(RecipeError, match="output_dir: there is no drive "):
        check_inputs(read_recipe(recipe))


def test_replacing_a_file_in_use_is_retried_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Linux, the same error is raised at once."""
    refusals = [PermissionError("in use"), PermissionError("in use")]
    replace = Path.replace

    def held(path: Path, target: Path) -> Path:
        if refusals:
            raise refusals.pop()
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", held)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(PermissionError):
        run_folder.write_json(tmp_path / "run.json", 1)
    monkeypatch.setattr(sys, "platform", "win32")
    run_folder.write_json(tmp_path / "run.json", 2)
    assert run_folder.read_json(tmp_path / "run.json") == 2 and not refusals


def test_a_librarys_message_is_reduced_to_one_line() -> None:
    assert in_one_line(OSError("no\n  such\tfile")) == "no such file"
    assert in_one_line(ValueError()) == "ValueError" and len(in_one_line(ValueError("x" * 9999))) == 500


@pytest.mark.parametrize("command", sorted(OTHER_COMMANDS))
def test_a_command_of_llamafactory_names_the_one_here(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "x.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{command}: not supported. Use") and "{" not in line


def test_help_of_a_word_that_is_a_group_and_a_key_shows_both(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help", "dataset"]) == 0
    group, key = capsys.readouterr().out.split("\n\n")
    assert group.startswith("dataset:\n") and key.startswith("dataset  (dataset)\n")


def test_a_closed_pipe_ends_silently() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "arpo_trl", "--help", "all"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == ("", 0)
    process.stderr.close()
