"""README and docs: their rows, options, files, messages, commands and figures are those of the package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import memory_table
import pytest
import yaml

from arpo_trl.__main__ import main
from arpo_trl.recipe.keys import keys
from arpo_trl.recipe.llamafactory import IGNORED, NOT_SUPPORTED, RENAMED

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = [*sorted(ROOT.glob("*.md")), ROOT / "recipes" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCS]


def test_the_readme_is_at_most_200_lines_of_100_characters() -> None:
    lines = README.splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 100] == []


@pytest.mark.parametrize("formatting", ["sharegpt", "openai"])
def test_the_own_data_of_the_readme_trains_on_its_replies(
    formatting: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its rows and its registry, and the recipe with the five keys changed; the picture shows the same turns."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    blocks = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    [rows] = [
        block for block in blocks if f'"{"conversations" if formatting == "sharegpt" else "messages"}": [' in block
    ]
    [registry] = [json.loads(block) for block in blocks if block.startswith('{"mine"')]
    if formatting == "openai":
        assert '`"formatting": "openai"` and leave out `columns`' in README
        registry["mine"] = {"file_name": registry["mine"]["file_name"], "formatting": "openai"}
    Path("data", registry["mine"]["file_name"]).write_text(rows, encoding="utf-8")
    Path("data", "dataset_info.json").write_text(json.dumps(registry), encoding="utf-8")
    recipe = yaml.safe_load((ROOT / "recipes" / "qwen_toy.yaml").read_text(encoding="utf-8"))
    changes = re.findall(r"`((?:dataset_dir|dataset|max_samples|output_dir|overwrite_output_dir): [\w/]+)`", README)
    assert len(changes) == 5
    for line in changes:
        assert line.split(":")[0] in recipe
        recipe |= yaml.safe_load(line)
    Path("mine.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["mine.yaml", "--preview", "1", f"model_name_or_path={tiny_model}"]) == 0
    trained = [line for line in capsys.readouterr().out.splitlines() if line.startswith("+ <")]
    assert trained == [
        "+ <think>A product.</think><python>print(17 * 23)</python><|im_end|>",
        "+ <answer>\\boxed{391}</answer><|im_end|>",
    ]


def test_the_python_of_the_readme_trains(tiny_model: Path, tmp_path: Path) -> None:
    [code] = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 6
    overrides = {"model_name_or_path": tiny_model, "output_dir": tmp_path / "run", "val_size": 0, "max_samples": 8}
    overrides |= {"do_eval": False, "eval_on_start": False, "predict_during_eval": "null", "max_steps": 1}
    listed = ", ".join(repr(f"{key}={value}") for key, value in overrides.items())
    code = code.replace('"max_steps=10"', listed)
    assert "max_samples" in code
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model.safetensors").exists()
    code, loss, folder = done.stdout.splitlines()[-1].split()
    assert (code, folder) == ("0", str(tmp_path / "run")) and float(loss) > 0


@pytest.mark.parametrize("path", DOCS, ids=NAMES)
def test_links_files_and_tests_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!http)([^)]+)\)", text)
    missing = [
        link for link in links if link.partition("#")[0] and not (path.parent / link.partition("#")[0]).exists()
    ]
    for link in links:
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if anchor and target.exists() and anchor not in anchors(target.read_text(encoding="utf-8")):
            missing.append(link)
    named = r"(?<![\w/.])((?:recipes|accelerate_configs|scripts|docs|tests|arpo_trl)/[\w./]*\w\.(?:py|sh|yaml|md|png|json|jsonl|toml))\b"
    missing += [name for name in re.findall(named, text) if not (ROOT / name).exists()]
    modules = re.findall(r"`((?:recipe|data|report|model|generate|training)/[\w/]+\.(?:py|toml|md)|\w+\.py)`", text)
    missing += [name for name in modules if not (ROOT / "arpo_trl" / name).exists()]
    assert missing == []


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


PATTERNS = ["*.md", "docs/**/*.md", "recipes/*", "accelerate_configs/*", "scripts/*", "Dockerfile"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_launches_of_one_process_are_quiet(pattern: str) -> None:
    """Otherwise a traceback of the launcher follows the message of an error."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in ROOT.glob(pattern) if path.is_file())
    commands = re.findall(r"accelerate launch (?:(?!accelerate launch)[^`])*?-m arpo_trl", text)
    assert commands
    one = [command for command in commands if re.search(r"(cpu|single_gpu)\.yaml", command)]
    assert [command for command in one if not command.startswith("accelerate launch -q ")] == []


def test_the_messages_of_the_docs_are_in_the_code() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "arpo_trl").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings that are split over lines
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", text.split("| Message | Fix |")[1].split("\n\n")[0], re.MULTILINE)
    assert len(messages) > 10
    for message in messages:
        if "libuv" in message:  # torch's
            continue
        variable = r"\.\.\.|NAME|learning_rate|\b\d+%?|data/dataset_info.json|cuda:0|a training batch of|: |bf16"
        words = max(re.split(variable, message), key=len).strip(" :;,?")
        assert len(words) > 8 and words in source, message


def test_every_key_of_llama_factorys_is_counted() -> None:
    fixtures = Path(__file__).parent / "recipe" / "fixtures" / "llama_factory_keys.json"
    found = json.loads(fixtures.read_text(encoding="utf-8"))
    theirs = found["defaults"].keys() | found["other_defaults"].keys()
    text = (ROOT / "docs" / "llamafactory.md").read_text(encoding="utf-8")
    assert f"Each of its {len(theirs)} keys" in text
    assert theirs <= keys().keys() | RENAMED.keys() | IGNORED.keys() | NOT_SUPPORTED.keys()


@pytest.mark.slow
def test_the_memory_table_of_the_readme_is_what_the_check_estimates() -> None:
    assert "\n".join(memory_table.table()) in README
