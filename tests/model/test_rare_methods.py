"""A rare method is one file and some rows: the packages work without it, and nothing else names it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import arpo_trl

PACKAGE = Path(arpo_trl.__file__).parent
TESTS = Path(__file__).parents[1]
RARE = (
    r"galore|apollo|muon|adam.?mini|badam|\boft_|llama_?pro|(?<![a-z])[ae][as]ft|gptq|awq|aqlm|mxfp4|fp8|bitsandbytes|pissa|"
    r"quantization_bit|moe_aux|freeze_|loraplus"
)
MAIN_FILES = """
    model/model.py model/adapters.py model/memory.py model/base.py model/sft_config.py model/token_scores.py
    training/train.py training/trainer.py training/check.py training/preflight.py training/loss.py
    training/checkpoints.py training/evaluate.py training/setup.py training/reference.py training/preference.py recipe/rules.py
""".split()
MAIN_TESTS = [
    "recipe/test_read.py::test_all_problems_are_reported_at_once_in_the_order_of_the_file",
    "recipe/test_read.py::test_resolved_reads_back_to_the_same_recipe",
    "recipe/test_read.py::test_other_fields_of_sft_config_are_passed_on_by_name",
    "model/test_memory.py::test_the_estimated_parts_equal_those_of_the_loaded_model",
    "model/test_model.py::test_full_keeps_float32_master_weights_and_saves_the_dtype_of_the_file",
    "model/test_model.py::test_an_adapter_on_the_original_base_predicts_what_was_trained[lora]",
    "model/test_model.py::test_a_run_in_the_folder_of_an_earlier_one_leaves_one_model",
]


def without_badam(folder: Path) -> Path:
    """Copy the package, and delete BAdam's file, its block of keys and rules, and the lines that list it."""
    package = shutil.copytree(PACKAGE, folder / "arpo_trl", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "model" / "methods" / "badam.py").unlink()
    rows = package / "recipe" / "methods.py"
    text, blocks = re.subn(
        r"^ *# --- BAdam ---.*?(?=^ *# --- )", "", rows.read_text(encoding="utf-8"), flags=re.M | re.S
    )
    assert blocks == 1
    rows.write_text(text, encoding="utf-8")
    for file in (rows, rows.with_name("llamafactory.toml"), package / "model" / "methods" / "chosen.py"):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        file.write_text("".join(line for line in lines if "badam" not in line.lower()), encoding="utf-8")
    return package


def mentions(package: Path, pattern: str) -> list[str]:
    """Return the package's files that match the pattern."""
    files = [path for path in package.rglob("*") if path.suffix in (".py", ".toml", ".yaml", ".json", ".md")]
    names = [path for path in files if re.search(pattern, path.read_text(encoding="utf-8"), re.IGNORECASE)]
    return sorted(path.relative_to(package).as_posix() for path in names)


def test_the_package_trains_without_badam(tmp_path: Path) -> None:
    package = without_badam(tmp_path)
    assert mentions(package, "badam") == []
    code = f"import pytest, sys; sys.exit(pytest.main({['-q', '-p', 'no:cacheprovider', *MAIN_TESTS]}))"
    code = f"import arpo_trl; assert arpo_trl.__file__.startswith({str(tmp_path)!r}); {code}"
    paths = [str(tmp_path), str(TESTS.parent / "scripts"), str(TESTS)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=TESTS, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "skipped" not in done.stdout
    read = (
        "import arpo_trl; arpo_trl.read_recipe(None, ['model_name_or_path=a', 'output_dir=b', 'dataset=c', 'do_train=true', "
        "'use_badam=true'])"
    )
    done = subprocess.run([sys.executable, "-c", read], env=environment, capture_output=True, text=True)
    assert "use_badam: unknown key" in done.stderr


@pytest.mark.parametrize("file", ["model/memory.py", "recipe/keys.py", "training/train.py"])
def test_a_leak_of_badam_is_found(file: str, tmp_path: Path) -> None:
    package = without_badam(tmp_path)
    with (package / file).open("a", encoding="utf-8") as leaking:
        leaking.write("# if recipe.use_badam\n")
    assert mentions(package, "badam") == [file]


@pytest.mark.parametrize("file", MAIN_FILES)
def test_the_main_files_name_no_rare_method(file: str) -> None:
    text = (PACKAGE / file).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if re.search(RARE, line, re.IGNORECASE)]
    assert not lines


def test_each_method_is_listed_and_has_one_file() -> None:
    from arpo_trl.model.methods.chosen import METHODS

    files = {path.stem for path in (PACKAGE / "model" / "methods").glob("*.py")} - {"__init__", "method", "chosen"}
    assert {method.__module__.rpartition(".")[2] for method in METHODS} == files
