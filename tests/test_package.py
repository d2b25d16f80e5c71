"""What `import arpo_trl` gives, and the example of docs/guide.md."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import arpo_trl

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "transformers", "datasets", "trl", "accelerate", "peft", "numpy", "pyarrow")


def python(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_reading_a_recipe_imports_nothing_heavy(tmp_path: Path) -> None:
    code = (
        "import sys, arpo_trl; arpo_trl.read_recipe(None, ['model_name_or_path=a', 'output_dir=b', 'dataset=c', 'do_train=true'])\n"
        f"print(sorted(set({HEAVY}) & set(sys.modules)))"
    )
    assert python(code, tmp_path) == "[]\n"


@pytest.mark.parametrize("name", arpo_trl.__all__)
def test_every_public_name_exists_and_has_a_docstring(name: str) -> None:
    assert getattr(arpo_trl, name).__doc__
    assert getattr(arpo_trl, name).__module__.startswith("arpo_trl.")


def test_an_unknown_name_raises() -> None:
    with pytest.raises(AttributeError, match="module 'arpo_trl' has no attribute 'trian'"):
        arpo_trl.trian  # noqa: B018


def test_the_example_of_the_docs_runs(tiny_model: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "guide.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code.count("\n") <= 12
    printed = python(
        code.replace('"max_samples=30"', f'"max_samples=30", "model_name_or_path={tiny_model.as_posix()}"'), ROOT
    )
    assert re.fullmatch(r"arpo_sft_toy: 30 rows: \d+ intact, .*\n\S+arpo_sft_toy\.jsonl:\d+ \d+\n", printed)


def test_every_module_named_in_the_docs_exists() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(\w+/\w+\.py|\w+\.py)`", text))
    assert len(named) > 15
    assert not [name for name in named if not (ROOT / "arpo_trl" / name).exists()]


@pytest.mark.parametrize(("theirs", "policy"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_without_spinning_unless_the_user_decides(theirs: str | None, policy: str) -> None:
    """Decided on import of the package, before torch, so that it holds for every entry point."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    code = "import arpo_trl, os, sys; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    run = [sys.executable, "-c", code]
    done = subprocess.run(
        run, env=env | ({"OMP_WAIT_POLICY": theirs} if theirs else {}), capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [policy, "False"]
