"""The scripts that users run, and the data and the model that they make."""

from __future__ import annotations

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compare_golden
import make_tiny_model
import make_toy_dataset
import pytest
import torch
from benchmark import MODES
from benchmark_steps import spread, take_turns, times_trl
from safetensors import safe_open
from transformers import AutoTokenizer

from arpo_trl.data.tokenizer import shipped_template
from arpo_trl.generate.tags import find_calls

ROOT = Path(__file__).parents[1]
INSIDE = [json.loads(line) for line in make_toy_dataset.TOY_DATA_INSIDE.read_text(encoding="utf-8").splitlines()]
ROWS = [json.loads(line) for line in make_toy_dataset.TOY_DATA.read_text(encoding="utf-8").splitlines()]
needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


def run(*command: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    text = [str(part) for part in command]
    settings: dict[str, Any] = {"cwd": ROOT, "timeout": 120} | kwargs
    return subprocess.run(text, capture_output=True, encoding="utf-8", check=False, **settings)


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("make_toy_dataset.py --rows 0", "--rows: found 0, expected 1 or more"),
        ("make_toy_dataset.py --source not_there.json", "--source: not_there.json: [Errno 2]"),
        ("benchmark_steps.py --help", "usage: python scripts/benchmark.py steps, which calls this file"),
        ("benchmark_preparation.py", "usage: python scripts/benchmark.py preparation, which calls this file"),
        ("make_keys.py --chek", "unrecognized arguments: --chek"),
    ],
)
def test_wrong_usage_ends_with_2_and_names_the_error(command: str, wrong: str) -> None:
    script, *arguments = command.split()
    done = run(sys.executable, ROOT / "scripts" / script, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert wrong in done.stderr.splitlines()[-1]


# The toy data


def test_the_shipped_toy_data_begins_with_what_the_script_generates() -> None:
    assert list(make_toy_dataset.generate(rows=40, seed=0)) == ROWS[:40]
    assert list(make_toy_dataset.generate(rows=20, seed=0, form="inside")) == INSIDE[:20]


def test_another_seed_gives_other_rows() -> None:
    assert next(make_toy_dataset.generate(rows=1, seed=1)) != ROWS[0]


def test_the_shipped_toy_data_is_small_and_does_not_repeat_itself() -> None:
    assert make_toy_dataset.TOY_DATA.stat().st_size < 3_000_000
    assert len(ROWS) == len({row["conversations"][0]["value"] for row in ROWS}) == 500


def test_every_toy_row_is_a_conversation_in_arpos_form() -> None:
    for row in ROWS:
        turns = row["conversations"]
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert re.fullmatch(r"<think>.+</think>\n<answer>.*\\boxed\{.+\}.*</answer>", turns[-1]["value"], re.DOTALL)
        for call, result in zip(turns[1:-1:2], turns[2::2], strict=True):
            assert len(find_calls(call["value"])) == 1, call
            assert re.fullmatch(r"<result>\n.+\n</result>", result["value"], re.DOTALL)


def test_a_trajectory_inside_one_turn_holds_its_results() -> None:
    """As in ARPO-SFT-54K: question and trajectory, about 9 KB a row."""
    for row in INSIDE:
        assert [turn["from"] for turn in row["conversations"]] == ["human", "gpt"]
        text = row["conversations"][1]["value"]
        form = r"(<think>.+?</think>\n<(python|search)>.+?</\2> <result>\n.+?\n</result>\n)*<think>.+?</think>\n<answer>.*</answer>"
        assert re.fullmatch(form, text, re.DOTALL)
    assert len(INSIDE) == 60 and make_toy_dataset.TOY_DATA_INSIDE.stat().st_size < 800_000
    assert 6_000 < sum(len(json.dumps(row)) for row in INSIDE) / 60 < 12_000
    code, search = 0, 0
    for row in INSIDE[:12]:
        for tag, call, result in re.findall(
            r"<(python|search)>\n?(.+?)\n?</\1> <result>\n(.+?)\n</result>",
            row["conversations"][1]["value"],
            re.DOTALL,
        ):
            code, search = code + (tag == "python"), search + (tag == "search")
            found = (
                make_toy_dataset.run_python(call)
                if tag == "python"
                else make_toy_dataset.search(call, 5, full_pages=True)
            )
            assert result == found
    assert code and search


def test_toy_results_are_what_the_programs_print_and_the_searches_find() -> None:
    rounds = [
        pair for row in ROWS for pair in zip(row["conversations"][1:-1:2], row["conversations"][2::2], strict=True)
    ]
    for call, result in random.Random(0).sample(rounds, 40):
        tag, text = re.findall(r"<(python|search)>(.*?)</\1>", call["value"], re.DOTALL)[-1]
        found = make_toy_dataset.run_python(text.strip()) if tag == "python" else make_toy_dataset.search(text.strip())
        assert result["value"] == f"<result>\n{found}\n</result>"


def test_toy_data_has_errors_second_attempts_long_rows_and_chinese() -> None:
    texts = [" ".join(turn["value"] for turn in row["conversations"]) for row in ROWS]
    for error in ("TypeError", "KeyError", "IndexError", "No page found."):
        assert any(error in text for text in texts)
    assert sum(len(text) > 10_000 for text in texts) >= 5
    assert any("剩" in text for text in texts)


@pytest.mark.parametrize("name", ["list.json", "lines.json", "lines.jsonl"])
def test_source_takes_the_first_rows_of_a_list_or_of_lines(tmp_path: Path, name: str) -> None:
    source, out = tmp_path / name, tmp_path / "out.jsonl"
    lines = "\n".join(json.dumps(row) for row in ROWS[:5])
    source.write_text(json.dumps(ROWS[:5]) if name == "list.json" else lines, encoding="utf-8")
    done = run(sys.executable, "scripts/make_toy_dataset.py", "--source", source, "--rows", 3, "--out", out)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] == ROWS[:3]


def test_a_program_that_fails_gives_the_last_line_of_its_traceback() -> None:
    assert make_toy_dataset.run_python("print(1)\nint('x')").splitlines() == [
        "1",
        "ValueError: invalid literal for int() with base 10: 'x'",
    ]


def test_dataset_info_names_the_toy_file_and_the_real_set() -> None:
    info = json.loads((ROOT / "recipes" / "dataset_info.json").read_text(encoding="utf-8"))
    assert (ROOT / "recipes" / info["arpo_sft_toy"]["file_name"]).resolve() == make_toy_dataset.TOY_DATA
    assert info["arpo_sft_54k"]["hf_hub_url"] == "dongguanting/ARPO-SFT-54K"


# The tiny model


def test_tiny_model_has_a_million_parameters_in_bfloat16_and_one_seed_makes_one_model(tmp_path: Path) -> None:
    make_tiny_model.main([str(tmp_path / "one")])
    done = run(sys.executable, "scripts/make_tiny_model.py", tmp_path / "two")  # another process has other hashes
    assert done.returncode == 0, done.stderr
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in ("one", "two"))
    assert one == two
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} < set(one)
    with safe_open(tmp_path / "one" / "model.safetensors", "pt") as weights:
        tensors = [weights.get_tensor(name) for name in weights.keys()]  # noqa: SIM118
    assert 1_000_000 < sum(tensor.numel() for tensor in tensors) < 3_000_000
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}


def test_tiny_tokenizer_is_built_as_qwens(tiny_tokenizer: Any) -> None:
    assert (tiny_tokenizer.eos_token, tiny_tokenizer.pad_token, tiny_tokenizer.bos_token) == (
        "<|im_end|>",
        "<|endoftext|>",
        None,
    )
    added = [make_tiny_model.SPECIAL_TOKENS, make_tiny_model.WHOLE_WORDS]
    ids = tiny_tokenizer.convert_tokens_to_ids([token for tokens in added for token in tokens])
    assert ids == list(range(len(tiny_tokenizer) - 22, len(tiny_tokenizer)))
    text = "Numbers 1234 split; 中文, <tool_call>\n\n  tabs\tand émojis 🙂 come back.\r\n"
    assert tiny_tokenizer.decode(tiny_tokenizer(text).input_ids) == text
    assert tiny_tokenizer.tokenize("2024") == list("2024")
    fresh = AutoTokenizer.from_pretrained(
        tiny_tokenizer.name_or_path
    )  # other tests set the template of the shared one
    assert fresh.chat_template == shipped_template("qwen")


# quickstart.sh


@needs_bash
def test_the_quickstart_rejects_another_argument(checkout: Path) -> None:
    done = run("bash", "scripts/quickstart.sh", "--quick", cwd=checkout)
    assert (done.returncode, done.stderr) == (2, "usage: bash scripts/quickstart.sh [--tiny]\n")


@needs_bash
@pytest.mark.slow
def test_the_quickstart_shows_a_held_out_question_before_and_after_training(checkout: Path) -> None:
    """With the tiny model, in the environment of the tests: its venv is complete."""
    for name in ("recipes", "accelerate_configs", "arpo_trl"):
        (checkout / name).symlink_to(ROOT / name)
    (checkout / "scripts" / "install.sh").write_text('echo "$# arguments"', encoding="utf-8")
    done = run("bash", "scripts/quickstart.sh", "--tiny", cwd=checkout, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0 arguments\n")
    [question] = re.findall(r"^A held-out question: (.+)$", done.stdout, re.MULTILINE)
    assert question in {row["conversations"][0]["value"] for row in ROWS}
    before, after = re.split(
        r"After training, checkpoints/tiny_cpu answers; --run-python runs its Python", done.stdout
    )
    assert "Before training, checkpoints/tiny_qwen2 answers:" in before
    assert re.search(r"^python   \d+ s, \d+ MB", after, re.MULTILINE)
    assert after.splitlines()[-1] == "chat       .venv/bin/arpo-trl chat checkpoints/tiny_cpu --run-python"


# install.sh


@needs_bash
@pytest.mark.parametrize("state", ["no pip", "half of pip", "no python"])
def test_install_repairs_a_venv_whose_installation_was_interrupted(checkout: Path, state: str) -> None:
    """Packages are installed again, too: the files that record what was installed are removed."""
    venv = pytest.importorskip("venv")  # Python's embeddable build for Windows has none
    venv.create(checkout / ".venv", with_pip=state == "half of pip", symlinks=os.name != "nt")
    [python] = [*checkout.glob(".venv/bin/python"), *checkout.glob(".venv/Scripts/python.exe")]
    if state == "half of pip":
        [init] = checkout.glob(".venv/**/site-packages/pip/__init__.py")
        shutil.rmtree(init.parent / "_internal")
    if state == "no python":
        python.unlink()
    (checkout / ".venv" / "installed-plain").touch()
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, checkout)
    no_network = os.environ | {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
    done = run("bash", "-c", "set -e; . scripts/install.sh", cwd=checkout, env=no_network)
    assert done.stdout.startswith("repairing .venv: it has no working pip\ninstalling arpo_trl into .venv")
    assert "torch" in done.stderr  # pip works and finds no package
    assert run(python, "-m", "pip", "--version").returncode == 0
    assert not (checkout / ".venv" / "installed-plain").exists()


# compare_golden.py

GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture
def golden(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    """`compare_golden.main`: its exit code, and the lines that it wrote."""

    def main(golden_dir: Path, *options: str) -> tuple[int, list[str]]:
        try:
            code = compare_golden.main([*map(str, (golden_dir, GOLDEN / "data", GOLDEN / "tokenizer")), *options])
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        captured = capsys.readouterr()
        return code, (captured.out + captured.err).splitlines()

    return main


def test_compare_golden_prints_where_a_row_differs_and_ends_with_1(golden: Any, tmp_path: Path) -> None:
    """One row each: another token, another label under the same token, a shorter row, an entry without a row."""
    rows = json.loads((GOLDEN / "tokens" / "alpaca.json").read_text(encoding="utf-8"))
    tokens, labels, short = json.loads(json.dumps(rows[:3]))
    tokens[0][5] += 1
    labels[1][-1] = 1 - labels[1][-1]
    changed = [tokens, labels, [column[:-2] for column in short], *rows[3:], rows[0]]
    (tmp_path / "alpaca.json").write_text(json.dumps(changed), encoding="utf-8")
    code, lines = golden(tmp_path)
    lengths = [len(row[0]) for row in rows[:3]]
    data = GOLDEN / "data" / "alpaca_en_demo.json"
    assert [re.sub(r"^\d+: ", "", line.removeprefix(f"{data}:")) for line in lines] == [
        f"expected {lengths[0]} tokens, found {lengths[0]}; the first difference is at 5",
        f"expected {lengths[1]} tokens, found {lengths[1]}; the first difference is at {lengths[1] - 1}",
        f"expected {lengths[2] - 2} tokens, found {lengths[2]}; the first difference is at {lengths[2] - 2}",
        f"{tmp_path / 'alpaca.json'}: {len(changed)} entries, {len(rows)} rows in {data}",
        f"{len(rows) - 3} of {len(changed)} rows equal",
    ]
    assert code == 1


def test_compare_golden_ends_with_0_when_all_rows_are_equal(golden: Any) -> None:
    assert golden(GOLDEN / "tokens", "--own-template") == (0, ["9 of 9 rows equal"])


def test_compare_golden_ends_with_2_where_there_is_nothing_to_compare(golden: Any, tmp_path: Path) -> None:
    code, lines = golden(tmp_path)
    assert (code, lines[-1].endswith(f"{tmp_path}: no .json files, expected one for each dataset")) == (2, True)
    (tmp_path / "poems.json").write_text("[]", encoding="utf-8")
    code, lines = golden(tmp_path)
    assert (code, "poems.json: no dataset 'poems' in " in lines[-1]) == (2, True)
    code, lines = golden(GOLDEN / "tokens", "yours")
    assert (code, lines[-1].endswith("unrecognized arguments: yours")) == (2, True)


# benchmark.py


@pytest.mark.parametrize("mode", [[], ["step"]], ids=["no mode", "another mode"])
def test_benchmark_without_a_mode_lists_the_modes(mode: list[str]) -> None:
    done = run(sys.executable, ROOT / "scripts" / "benchmark.py", *mode)
    assert (done.returncode, done.stdout) == (2, "")
    assert " | ".join(MODES) in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("preparation --rows 10 20", "unrecognized arguments: 20"),
        ("startup --rows 10", "unrecognized arguments: --rows 10"),
        ("steps --count 0", "argument --count: expected an integer of 1 or more, found '0'"),
    ],
)
def test_benchmark_takes_no_option_that_its_mode_does_not_read(command: str, wrong: str) -> None:
    done = run(sys.executable, ROOT / "scripts" / "benchmark.py", *command.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].endswith(wrong)


def test_benchmark_measures_all_variants_in_a_round_before_the_next() -> None:
    order: list[str] = []

    def measure(name: str) -> int:
        order.append(name)
        return len(order)

    found = take_turns(2, ["trl", "ours"], measure)
    assert order == ["trl", "ours", "trl", "ours"]
    assert found == {"trl": [1, 3], "ours": [2, 4]}


def test_benchmark_counts_how_many_times_as_fast_as_trl_we_are() -> None:
    assert spread([3.0, 1.0, 8.0]) == {"seconds": 3.0, "min": 1.0, "max": 8.0}
    assert times_trl([3.0, 1.0, 8.0], trl=[6.0, 5.0, 70.0]) == 2.0


def benchmark(tmp_path: Path, mode: str, *options: object) -> list[dict[str, Any]]:
    """The rows that a mode writes to --json, which are those that it shows."""
    out = tmp_path / "new" / "figures.json"
    done = run(sys.executable, ROOT / "scripts" / "benchmark.py", mode, *options, "--json", out, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text(encoding="utf-8"))
    assert list(figures) == [mode]
    names = done.stdout.splitlines()[-len(figures[mode]) - 1]
    assert names.split() == list(figures[mode][0])
    for row in figures[mode]:
        assert row.get("min", 0) <= row["seconds"] <= row.get("max", row["seconds"])
    rows: list[dict[str, Any]] = figures[mode]
    return rows


@pytest.mark.slow
def test_benchmark_steps_trains_trls_losses(tmp_path: Path) -> None:
    variants = ["trl", "ours", "ours, packed"]
    small = ("--batch", 2, "--cutoff", 256, "--count", 1, "--repeats", 1, "--float32")
    table = benchmark(tmp_path, "steps", *small, "--variants", *variants)
    assert [row["variant"] for row in table] == variants
    assert all(row["largest_loss_difference"] < 1e-4 and row["times_trl"] for row in table[:2])
    assert table[0]["times_trl"] == 1
    # a packed step has other tokens than a padded one
    assert (table[2]["largest_loss_difference"], table[2]["times_trl"]) == (None, None)
    assert all(row["tokens_per_s"] > 0 and row["peak_gb"] > 0 for row in table)


@pytest.mark.slow
def test_benchmark_startup_divides_trls_seconds_by_ours(tmp_path: Path) -> None:
    trl, ours = benchmark(tmp_path, "startup", "--repeats", 1)
    assert (trl["variant"], trl["times_trl"], ours["variant"]) == ("trl", 1, "ours")
    assert ours["times_trl"] == pytest.approx(trl["seconds"] / ours["seconds"], abs=0.01)


@pytest.mark.slow
def test_benchmark_preparation_makes_trls_tokens(tmp_path: Path) -> None:
    table = benchmark(tmp_path, "preparation", "--rows", 40, "--repeats", 1)
    found = [(row["variant"], row["processes"]) for row in table]
    assert found == [("ours", 1), ("trl", 1), ("trl", 2)]
    assert len({row["tokens"] for row in table}) == 1
    assert [row["times_trl"] for row in table if row["variant"] == "trl"] == [1, 1]


@pytest.mark.slow
def test_benchmark_memory_measures_each_size_and_the_imports_alone(tiny_model: Path, tmp_path: Path) -> None:
    table = benchmark(tmp_path, "memory", "--rows", 20, 40, "--model", tiny_model)
    assert [row["rows"] for row in table] == [10, 20, 40]
    assert all(100 < row["peak_mib"] < 4000 for row in table)


@pytest.mark.slow
def test_benchmark_scaling_gives_the_exponent_of_each_size_after_the_first(tiny_model: Path, tmp_path: Path) -> None:
    small = ("--lengths", 64, 256, "--batches", 1, "--count", 1, "--repeats", 1, "--float32", "--model", tiny_model)
    table = benchmark(tmp_path, "scaling", *small, "--plot", tmp_path / "plots" / "scaling.png")
    assert [(row["axis"], row["size"]) for row in table] == [("length", 64), ("length", 256), ("batch", 1)]
    expected = math.log(table[1]["seconds"] / table[0]["seconds"]) / math.log(256 / 64)
    assert table[1]["exponent"] == pytest.approx(expected, abs=0.01)
    assert (table[0]["exponent"], table[2]["exponent"]) == (None, None)
    assert (tmp_path / "plots" / "scaling.png").read_bytes().startswith(b"\x89PNG")


# Shell scripts


@needs_bash
@pytest.mark.parametrize(
    "script", [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"], ids=lambda p: p.name
)
def test_shell_scripts_parse_and_have_unix_line_ends(script: Path) -> None:
    assert b"\r" not in script.read_bytes()
    assert run("bash", "-n", script.as_posix()).stderr == ""


def fake_programs(folder: Path, **programs: str) -> dict[str, str]:
    """An environment in which the named programs are these bash scripts."""
    for name, body in programs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8", newline="\n")
        (folder / name).chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("CUDA_", "SLURM_", "WANDB_"))}
    return kept | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the scripts, so that training.log is not written into the repository."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    return tmp_path


@needs_bash
@pytest.mark.parametrize(
    ("environment", "arguments", "expected"),
    [
        (
            {},
            [],
            "-q --num_processes 1 --config_file accelerate_configs/single_gpu.yaml -m arpo_trl recipes/qwen_toy.yaml",
        ),
        (
            {"CUDA_VISIBLE_DEVICES": "0,1,3", "WANDB_DISABLED": "true"},
            ["seed=1"],
            "--num_processes 3 --config_file accelerate_configs/multi_gpu.yaml --main_process_port 29500 "
            "-m arpo_trl recipes/qwen_toy.yaml seed=1",
        ),
        (
            {"CUDA_VISIBLE_DEVICES": ""},
            ["--check", "a b=c d"],
            "-q --num_processes 1 --config_file accelerate_configs/single_gpu.yaml -m arpo_trl recipes/qwen_toy.yaml "
            "--check a b=c d",
        ),
        (
            {"NNODES": "2", "NODE_RANK": "1", "PROC_PER_NODE": "8", "MASTER_ADDR": "node0", "MASTER_PORT": "1234"},
            ["my.yaml"],
            "--num_processes 16 --config_file accelerate_configs/multi_node.yaml --num_machines 2 --machine_rank 1 "
            "--main_process_ip node0 --main_process_port 1234 -m arpo_trl my.yaml",
        ),
    ],
    ids=["plain", "three cards", "a flag first", "two machines"],
)
def test_sft_train_toy_turns_the_environment_into_a_launch(
    checkout: Path, environment: dict[str, str], arguments: list[str], expected: str
) -> None:
    fakes = fake_programs(checkout, accelerate='echo "$@" "libuv $USE_LIBUV"; exit 7')
    done = run("bash", (checkout / "scripts" / "sft_train_toy.sh").as_posix(), *arguments, env=fakes | environment)
    assert done.stdout == f"launch {expected} libuv 0\n"
    date, *log = (checkout / "training.log").read_text(encoding="utf-8").splitlines(keepends=True)
    assert re.match(r"# \d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4} \S*/sft_train_toy\.sh \S*\.yaml", date)
    assert "".join(log) == done.stdout
    assert done.returncode == 7


@needs_bash
def test_sft_train_toy_keeps_the_log_of_the_launch_before(checkout: Path) -> None:
    fakes = fake_programs(checkout, accelerate='echo "${@: -1}"')
    for seed in ("seed=1", "seed=2"):
        run("bash", (checkout / "scripts" / "sft_train_toy.sh").as_posix(), seed, env=fakes)
    log = (checkout / "training.log").read_text(encoding="utf-8")
    assert [line for line in log.splitlines() if line[0] != "#"] == ["seed=1", "seed=2"]


@needs_bash
def test_sft_train_toy_uses_the_venv_of_the_quickstart(checkout: Path) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)
    fakes = fake_programs(checkout / ".venv" / "bin", accelerate="echo found") | {"PATH": "/usr/bin:/bin"}
    done = run("bash", (checkout / "scripts" / "sft_train_toy.sh").as_posix(), env=fakes)
    assert (done.stdout, done.returncode) == ("found\n", 0)


SLURM = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[1-2]"}
FAKE_SLURM = {
    "scontrol": 'if [ "$1" = show ]; then echo n1; echo n2; else echo "$@"; fi',
    "srun": 'shift; SLURM_NODEID=1 exec "$@"',
}


@needs_bash
def test_slurm_launches_every_machine_with_its_rank(checkout: Path) -> None:
    fakes = fake_programs(checkout, **FAKE_SLURM, accelerate='echo "$@"')
    script = (checkout / "scripts" / "slurm_multi_node.sh").as_posix()
    done = run("bash", script, "my.yaml", "seed=1", env=fakes | SLURM, cwd=checkout)  # no .venv there to activate
    assert done.stdout == (
        "launch --config_file accelerate_configs/multi_node.yaml --num_machines 2 --num_processes 8 --machine_rank 1 "
        "--main_process_ip n1 --main_process_port 20077 -m arpo_trl my.yaml seed=1 overwrite_output_dir=false\n"
    )
    assert done.returncode == 0


@needs_bash
def test_slurm_script_outside_slurm_prints_its_usage(checkout: Path) -> None:
    script = (checkout / "scripts" / "slurm_multi_node.sh").as_posix()
    done = run("bash", script, "my.yaml", env=fake_programs(checkout), cwd=checkout)
    assert (done.returncode, done.stderr) == (2, "usage: sbatch scripts/slurm_multi_node.sh RECIPE [key=value ...]\n")


@needs_bash
@pytest.mark.skipif(sys.platform == "win32", reason="Slurm is not on Windows")
def test_slurm_forwards_sigterm_and_requeues(checkout: Path) -> None:
    fakes = fake_programs(
        checkout,
        **FAKE_SLURM,
        accelerate="trap 'echo saved; exit 143' TERM; echo $$ > pid; while true; do sleep 0.05; done",
        scancel='kill -TERM "$(cat pid)"',
    )
    script = checkout / "scripts" / "slurm_multi_node.sh"
    with subprocess.Popen(
        ["bash", str(script), "my.yaml"], stdout=subprocess.PIPE, encoding="utf-8", cwd=checkout, env=fakes | SLURM
    ) as job:
        for _ in range(200):
            if (checkout / "pid").exists() and (checkout / "pid").read_text(encoding="utf-8").strip():
                break
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        output, _ = job.communicate(timeout=30)
    assert output == "saved\nrequeue 77\n"
    assert job.returncode == 143
