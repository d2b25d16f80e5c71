"""README's own row, its options, its files and its messages are those of the package."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from arpo_trl.__main__ import main
from arpo_trl.recipe.keys import keys
from arpo_trl.recipe.llamafactory import IGNORED, NOT_SUPPORTED, RENAMED

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_own_data_of_the_readme_trains_on_its_replies(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its two files, and the recipe with the four lines changed; the picture shows the same turns."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for name, start in (("mine.jsonl", '{"conversations"'), ("dataset_info.json", '{"mine"')):
        line = next(line for line in README.splitlines() if line.startswith(start))
        (tmp_path / "data" / name).write_text(line + "\n", encoding="utf-8")
    recipe = yaml.safe_load((ROOT / "recipes" / "qwen_toy.yaml").read_text(encoding="utf-8"))
    for line in re.findall(r"`((?:dataset_dir|dataset|max_samples|output_dir): [\w/]+)`", README):
        assert line.split(":")[0] in recipe
        recipe |= yaml.safe_load(line)
    Path("mine.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    assert main(["mine.yaml", "--preview", "1", f"model_name_or_path={tiny_model}"]) == 0
    trained = [line for line in capsys.readouterr().out.splitlines() if line.startswith("+ <")]
    assert trained == [
        "+ <think>A product.</think><python>print(17 * 23)</python><|im_end|>",
        "+ <answer>\\boxed{391}</answer><|im_end|>",
    ]


def test_links_and_files_are_there() -> None:
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    files = re.findall(r"(?<!/)\b(?:recipes|accelerate_configs|scripts|docs)/[\w./]+\w", README)
    assert [name for name in {*links, *files} if not (ROOT / name).exists()] == []


def test_what_a_message_begins_with_is_in_the_code() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "arpo_trl").rglob("*.py"))
    table = README.split("| it says | do |")[1].split("\n\n")[0]
    for said in re.findall(r"^\| `([^`]+)", table, re.MULTILINE):
        if "libuv" in said:  # torch's
            continue
        words = max(
            re.split(r"\.\.\.|NAME|512|67%|\bN\b|data/dataset_info.json|cuda:0|with a training|: |bf16", said), key=len
        )
        assert words.strip(" :;") in source, said


def test_every_key_of_llama_factorys_is_counted() -> None:
    fixtures = Path(__file__).parent / "recipe" / "fixtures" / "llama_factory_keys.json"
    found = json.loads(fixtures.read_text(encoding="utf-8"))
    theirs = found["defaults"].keys() | found["other_defaults"].keys()
    answered = keys().keys() | RENAMED.keys() | IGNORED.keys() | NOT_SUPPORTED.keys()
    assert f"Each of its {len(theirs)} keys" in README and theirs <= answered
