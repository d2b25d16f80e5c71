"""Hostile values in every key are accepted or reported in one line, quickly, and never cause a traceback."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from arpo_trl.errors import LONGEST_LINE, RecipeError
from arpo_trl.model.sft_config import to_sft_config
from arpo_trl.recipe import read_recipe
from arpo_trl.recipe.keys import keys
from arpo_trl.recipe.llamafactory import IGNORED, NOT_SUPPORTED, RENAMED
from arpo_trl.recipe.yaml_file import LARGEST_FILE
from arpo_trl.training.requirements import check_inputs, check_packages

VALUES = {
    "digits": "9" * 5000,
    "2**70": str(2**70),
    "-2**70": str(-(2**70)),
    "2**32": str(2**32),
    "1e300": "1e300",
    "1e-300": "1e-300",
    "-1": "-1",
    "0": "0",
    "nan": ".nan",
    "-inf": "-.inf",
    "true": "true",
    "null": "null",
    "empty": '""',
    "comma": '","',
    "a lone surrogate": '"\\ud800"',
    "NUL": '"a\\0b"',
    "terminal escapes": '"\\e[2J\\u202e"',
    "a new line": '"a\\nb"',
    "longer than a file name": "x" * 300,
    "very long": "x" * 10_000,
    "a parent path": "../../..",
    "an unknown home": "~nobody-here/x",
    "a device": "/dev/zero",
    "a pipe": "{folder}/pipe",
    "a mapping": "{a: b}",
    "an empty mapping": "{}",
    "an empty list": "[]",
    "a list of lists": "[[1]]",
    "a list of nulls": "[null]",
    "an interpolation": '"${x}"',
    "a date": "2024-01-01",
    "binary": "!!binary aGk=",
    "itself": "&a [*a]",
    "JSON": "'{\"a\": 1}'",
    "half of JSON": "'{'",
}
ALL = [*keys(), *RENAMED, *IGNORED, *NOT_SUPPORTED]


@pytest.fixture
def good(tmp_path: Path) -> dict[str, str]:
    """Return a valid recipe, and create the files that it refers to."""
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dataset_info.json").write_text('{"d": {"file_name": "d.jsonl"}}', encoding="utf-8")
    (tmp_path / "d.jsonl").touch()
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    own = {"model_name_or_path": str(tmp_path), "output_dir": f"{tmp_path}/out", "do_train": "true"}
    return own | {"dataset": "d", "dataset_dir": str(tmp_path), "finetuning_type": "full"}


def rejected(path: Path, lines: dict[str, str]) -> set[str]:
    """Return the keys named by the error, or an empty set if the recipe is valid."""
    path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()), encoding="utf-8")
    try:
        recipe = check_inputs(read_recipe(path))
        check_packages(recipe)
        to_sft_config(recipe)
        return set()
    except RecipeError as error:
        text = str(error)
    named = set()
    for line in text.split("\n"):
        assert line.isprintable() and len(line) <= LONGEST_LINE + 5
        number = re.match(rf"(?:  line |{re.escape(str(path))}:)(\d+)", line)
        words = [list(lines)[int(number[1]) - 1]] if number else re.findall(r"\w+", line)
        named |= lines.keys() & words
    assert named, text
    return named


@pytest.mark.parametrize("name", VALUES)
def test_a_hostile_value_in_any_key_is_accepted_or_reported_in_one_line(
    name: str, tmp_path: Path, good: dict[str, str]
) -> None:
    """Set the value in many keys at once, and restore rejected keys until the recipe is valid."""
    value = VALUES[name].replace("{folder}", str(tmp_path))
    parts = 1 + len(value) * len(ALL) // LARGEST_FILE
    for part in range(parts):
        lines = good | dict.fromkeys(ALL[part::parts], value)
        started = time.process_time()
        while keys_in_error := rejected(tmp_path / "r.yaml", lines):
            for key in keys_in_error:
                assert lines.pop(key) != good.get(key), f"{key} is rejected with its good value"
            lines = good | lines
        assert time.process_time() - started < 10


@pytest.mark.parametrize("key", ["output_dir", "tokenized_path", "cache_dir", "resume_from_checkpoint"])
@pytest.mark.parametrize(
    "value",
    [
        "x" * 300,
        pytest.param(
            "/" + "y/" * 2500, marks=pytest.mark.skipif(os.name == "nt", reason="Windows allows 32,767 characters")
        ),
        "{folder}/d.jsonl",
        "{folder}/d.jsonl/x",
        "/dev/null",
    ],
)
def test_a_path_that_cannot_be_a_folder_is_reported_early(
    key: str, value: str, tmp_path: Path, good: dict[str, str]
) -> None:
    value = value.replace("{folder}", str(tmp_path))
    assert rejected(tmp_path / "r.yaml", good | {key: value}) == {key}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes in folders")
def test_a_named_pipe_is_not_read_as_a_recipe(tmp_path: Path, good: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match="expected a file, found a pipe"):
        read_recipe(tmp_path / "pipe")
    reading, writing = os.pipe()
    os.write(writing, "".join(f"{key}: {value}\n" for key, value in good.items()).encode())
    os.close(writing)
    assert read_recipe(f"/dev/fd/{reading}").dataset == ["d"]  # as a shell gives <(...)
    os.close(reading)
