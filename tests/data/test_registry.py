"""dataset_info.json means what LLaMA-Factory takes it to mean; each mistake has its location and what was meant."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from arpo_trl.data.files import check_datasets
from arpo_trl.data.messages import to_conversation
from arpo_trl.data.registry import DatasetInfo, Entry, read_registry
from arpo_trl.errors import DatasetError, RowError
from arpo_trl.recipe import Recipe, read_recipe

# one entry, as it stands in the file -> its mistakes, after "dataset_info.json: "
MISTAKES = {
    "a misspelt column": (
        '{"file_name": "d", "columns": {"promt": "x", "response": "y"}}',
        ["d.columns.promt: no such key for formatting alpaca; the nearest is prompt"],
    ),
    "columns of which none is known": (
        '{"file_name": "d", "columns": {"question": "x", "zzz": "y"}}',
        [
            "d.columns.question: no such key for formatting alpaca; there are prompt, query, response, history, system, tools",
            "d.columns.zzz: no such key for formatting alpaca; there are prompt, query, response, history, system, tools",
        ],
    ),
    "a column of another format": (
        '{"file_name": "d", "columns": {"messages": "x"}}',
        ["d.columns.messages: no such key for formatting alpaca; it belongs to formatting sharegpt"],
    ),
    "a misspelt tag": (
        '{"file_name": "d", "formatting": "sharegpt", "tags": {"role": "r"}}',
        ["d.tags.role: no such key for formatting sharegpt; the nearest is role_tag"],
    ),
    "two tags of one name": (
        '{"file_name": "d", "formatting": "sharegpt", "tags": {"user_tag": "gpt"}}',
        ["d.tags: user_tag and assistant_tag are both 'gpt'"],
    ),
    "a column that is no name": (
        '{"file_name": "d", "columns": {"prompt": 3}}',
        ["d.columns.prompt: expected a string, found 3"],
    ),
    "columns that are no object": (
        '{"file_name": "d", "columns": ["prompt"]}',
        ['d.columns: expected a mapping, found ["prompt"]'],
    ),
    "an unknown format": (
        '{"file_name": "d", "formatting": "chatml"}',
        ['d.formatting: expected one of alpaca, sharegpt, openai, found "chatml"'],
    ),
    "a format that is no text": (
        '{"file_name": "d", "formatting": ["alpaca"]}',
        ['d.formatting: expected one of alpaca, sharegpt, openai, found ["alpaca"]'],
    ),
    "an address for a path": (
        '{"file_name": "https://example.org/d.json"}',
        ["d.file_name: expected a path, found the address 'https://example.org/d.json'; download it first"],
    ),
    "a file address": (
        '{"file_name": "file:///etc/passwd"}',
        ["d.file_name: expected a path, found the address 'file:///etc/passwd'; download it first"],
    ),
    "a chain of file systems": (
        '{"file_name": "zip::d.zip"}',
        ["d.file_name: expected a path, found the address 'zip::d.zip'; download it first"],
    ),
    "a split that no file has": (
        '{"file_name": "d", "split": "test"}',
        ["d.split: expected train or a part of it, such as train[:100], found 'test'"],
    ),
    "a file name that is no text": ('{"file_name": 7}', ["d.file_name: expected a string, found 7"]),
    "no source": ('{"formatting": "sharegpt"}', ["d: expected file_name or hf_hub_url, found neither"]),
    "a source of null": ('{"file_name": null}', ["d: expected file_name or hf_hub_url, found neither"]),
    "samples below one": (
        '{"file_name": "d", "num_samples": 0}',
        ["d.num_samples: expected an integer > 0, found 0"],
    ),
    "samples that are true": (
        '{"file_name": "d", "num_samples": true}',
        ["d.num_samples: expected an integer > 0, found true"],
    ),
    "an entry that is no object": ('"d.json"', ['d: expected a mapping, found "d.json"']),
    "an entry of null": ("null", ["d: expected a mapping, found null"]),
    "two at once": (
        '{"file_name": 7, "split": ["x"]}',
        ["d.file_name: expected a string, found 7", 'd.split: expected a string, found ["x"]'],
    ),
}

# LLaMA-Factory's own keys: fine to have in the file, refused when the dataset is used.
REFUSED = {
    "preference pairs": ('"ranking": true', "ranking: the dataset holds preference pairs, which SFT does not read"),
    "a loading script": (
        '"script_url": "x"',
        "script_url: the dataset is a loading script, which datasets >= 4 no longer runs; set hf_hub_url, or give file_name instead",
    ),
    "ModelScope": (
        '"ms_hub_url": "x"',
        "ms_hub_url: the dataset lies on ModelScope; set hf_hub_url, or download it and give file_name instead",
    ),
    "cloud storage": (
        '"cloud_file_name": "s3://x"',
        "cloud_file_name: the dataset lies in cloud storage; set hf_hub_url, or download it and give file_name instead",
    ),
    "KTO": (
        '"columns": {"prompt": "p", "kto_tag": "k"}',
        "columns.kto_tag: the dataset holds preference data, which SFT does not read",
    ),
}

# What LLaMA-Factory passes over -> the notice
NOTICES = {
    "a key that nobody knows": ('"file_sha1": "00"', "file_sha1: no such key; the nearest is file_name; no effect"),
    "a misspelt key": ('"colums": {}', "colums: no such key; the nearest is columns; no effect"),
    "format for formatting": (
        '"format": "sharegpt"',
        "format: no such key; the nearest is formatting; no effect",
    ),
    "a key like no other": (
        '"zzz": 1',
        "zzz: no such key; there are file_name, hf_hub_url, formatting, subset, split, folder, num_samples, columns, tags, "
        "ranking, ms_hub_url, om_hub_url and 2 more; no effect",
    ),
    "a column beside those of the format": (
        '"columns": {"prompt": "q", "response": "a", "zzz": "z"}',
        "columns.zzz: no such key for formatting alpaca; there are prompt, query, response, history, system, tools; no effect",
    ),
    "no column for the prompt": (
        '"columns": {"response": "text"}',
        "columns: names neither prompt nor query, so every prompt is empty, as in LLaMA-Factory",
    ),
}


def write(folder: Path, text: str) -> Path:
    (folder / "dataset_info.json").write_text(text, encoding="utf-8")
    return folder


def recipe(folder: Path, **keys: Any) -> Recipe:
    given: dict[str, Any] = {"dataset": ["d"], "dataset_dir": str(folder), "output_dir": "out"}
    return Recipe(model_name_or_path="m", **(given | keys))


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_ends_a_recipe_that_uses_the_dataset_and_is_a_notice_to_others(kind: str, tmp_path: Path) -> None:
    entry, mistakes = MISTAKES[kind]
    (tmp_path / "a.json").touch()
    write(tmp_path, f'{{"ours": {{"file_name": "a.json"}}, "d": {entry}}}')
    mistakes = [f"{tmp_path / 'dataset_info.json'}: {mistake}" for mistake in mistakes]
    with pytest.raises(DatasetError) as error:
        check_datasets(recipe(tmp_path))
    assert str(error.value).splitlines() == mistakes
    assert check_datasets(recipe(tmp_path, dataset=["ours"])).notices == [
        f"{mistake}; no effect here: the recipe does not use it" for mistake in mistakes
    ]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_only_llama_factory_does_is_refused_when_used(kind: str, tmp_path: Path) -> None:
    member, message = REFUSED[kind]
    (tmp_path / "d.json").touch()
    write(tmp_path, f'{{"ours": {{"file_name": "d.json"}}, "d": {{"file_name": "d.json", {member}}}}}')
    with pytest.raises(DatasetError) as error:
        check_datasets(recipe(tmp_path))
    assert f"{tmp_path / 'dataset_info.json'}: d.{message}" in str(error.value).splitlines()
    assert check_datasets(recipe(tmp_path, dataset=["ours"])).notices == []
    if " instead" in message:
        write(tmp_path, f'{{"d": {{"file_name": "d.json", "hf_hub_url": "o/d", {member}}}}}')
        assert check_datasets(recipe(tmp_path)).notices == []
        write(tmp_path, '{"d": {"file_name": "d.json"}}')
        assert check_datasets(recipe(tmp_path)).notices == []


@pytest.mark.parametrize("kind", NOTICES)
def test_what_nobody_reads_is_a_notice(kind: str, tmp_path: Path) -> None:
    member, message = NOTICES[kind]
    (tmp_path / "d.json").touch()
    write(tmp_path, f'{{"d": {{"file_name": "d.json", {member}}}, "other": {{"file_name": "o.json", {member}}}}}')
    place = f"{tmp_path / 'dataset_info.json'}: d"
    assert check_datasets(recipe(tmp_path)).notices == [f"{place}.{message}"]


NOT_READ = {
    "a key twice": ('{"d": {"file_name": "a", "file_name": "b"}}', "(an object has the key 'file_name' twice)"),
    "a dataset twice": ('{"d": {}, "d": {}}', "(an object has the key 'd' twice)"),
    "a comma too many": ('{"d": {"file_name": "a",\n}}', "not JSON ("),
    "too deep": ('{"d": ' + "[" * 10_000 + "]" * 10_000 + "}", "not JSON that can be read (nested too deeply)"),
    "a number without end": ('{"d": {"num_samples": ' + "9" * 5000 + "}}", "(a number of 5,000 digits)"),
    "infinity": ('{"d": {"num_samples": 1e400}}', "(the number 1e400 is too large)"),
    "a list": ("[]", "expected an object of datasets, found []"),
}


@pytest.mark.parametrize("kind", NOT_READ)
def test_a_registry_that_cannot_be_read_is_one_line(kind: str, tmp_path: Path) -> None:
    text, message = NOT_READ[kind]
    with pytest.raises(DatasetError) as error:
        read_registry(write(tmp_path, text))
    assert str(error.value).startswith(f"{tmp_path / 'dataset_info.json'}: ")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_pipe_is_no_registry(tmp_path: Path) -> None:
    """Reading one would wait for ever."""
    os.mkfifo(tmp_path / "dataset_info.json")
    with pytest.raises(DatasetError, match=r"dataset_info.json: not a file; expected a folder with"):
        read_registry(tmp_path)


def test_an_unknown_name_has_its_keys_line_and_the_nearest_one(tmp_path: Path) -> None:
    write(tmp_path, json.dumps({f"set_{number}": {"file_name": "a.json"} for number in range(30)}))
    file = tmp_path / "r.yaml"
    file.write_text(
        f"model_name_or_path: m\noutput_dir: o\nfinetuning_type: full\ndo_train: true\ndataset_dir: {tmp_path}\n"
        "dataset: set_07, zzz\neval_dataset: zzz\n"
    )
    with pytest.raises(DatasetError) as error:
        check_datasets(read_recipe(file))
    missing, there = f"no such dataset in {tmp_path}/dataset_info.json", ", ".join(f"set_{n}" for n in range(12))
    assert str(error.value).splitlines() == [
        f"{file}:6: dataset: set_07: {missing}; the nearest is set_7",
        f"{file}:6: dataset: zzz: {missing}; there are {there} and 18 more",
        f"{file}:7: eval_dataset: zzz: {missing}; there are {there} and 18 more",
    ]


def test_a_missing_file_is_told_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    """Also a wrong name is; what is encoded already needs no raw data."""
    write(tmp_path, '{"d": {"file_name": "none.json"}}')
    with pytest.raises(DatasetError, match=r"none.json: no such file$"):
        check_datasets(recipe(tmp_path))
    assert check_datasets(recipe(tmp_path, tokenized_path="there")).notices == []
    heavy = "import sys, arpo_trl.data.files; print({'torch', 'transformers', 'datasets', 'pyarrow', 'numpy'} & {*sys.modules})"
    assert (
        subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True).stdout == "set()\n"
    )


NAMES = [
    "plain",
    "a.b-c_1",
    "数据",
    "/etc/x",
    "../x",
    "..",
    ".",
    "a/b",
    "a\\b",
    "",
    "x" * 300,
    "a b",
    "\x00",
    "-rf",
    "\ud800",
]


def test_a_name_is_never_a_path() -> None:
    folders = {name: DatasetInfo(name, "").folder_name for name in NAMES}
    assert [folders[name] for name in NAMES[:3]] == NAMES[:3]
    for name, folder in folders.items():
        assert re.fullmatch(r"\w[\w.-]{0,48}|[\w-]{9,49}", folder) and Path(folder).name == folder, name
    assert len({*folders.values()}) == len(NAMES)


def test_null_means_not_given(tmp_path: Path) -> None:
    entry = dict.fromkeys(Entry.model_fields) | {"file_name": "a.json", "ranking": None, "zzz": None}
    plain, nulls = (
        read_registry(write(tmp_path, json.dumps({"a": value})))["a"] for value in ({"file_name": "a.json"}, entry)
    )
    assert nulls == plain
    columns = {"prompt": "q", "query": None, "response": "r", "system": None, "zzz": None, "images": None}
    tags = {"user_tag": None, "zzz": None}
    info = read_registry(write(tmp_path, json.dumps({"a": {"file_name": "a", "columns": columns, "tags": tags}})))["a"]
    assert info.columns == {"prompt": "q", "response": "r"}
    assert (info.mistakes, info.refused, info.notices, info.media) == ((), (), (), ())


def test_what_columns_leave_out_has_no_column_as_in_llama_factory(tmp_path: Path) -> None:
    row = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    more = {"tools": "search, python", "system": 3, "history": "none"}
    for columns in ({}, {"messages": "conversations"}):
        entry = {"file_name": "a.json", "formatting": "sharegpt", "columns": columns}
        info = read_registry(write(tmp_path, json.dumps({"a": entry})))["a"]
        assert info.columns == {"messages": "conversations"}
        found, bare = to_conversation(row | more, info), to_conversation(row, info)
        assert (found.messages, found.tools) == (bare.messages, bare.tools) and len(found.unread) == 3
    entry = {"file_name": "a.json", "columns": {"query": "input", "response": "output"}}
    info = read_registry(write(tmp_path, json.dumps({"a": entry})))["a"]
    assert info.columns == {"query": "input", "response": "output"}
    messages = to_conversation({"instruction": "no", "input": "Q", "output": "A", "history": 3}, info).messages
    assert [message["content"] for message in messages] == ["Q", "A"]


def test_an_images_column_without_images_is_text(tmp_path: Path) -> None:
    entry = {"file_name": "a", "formatting": "sharegpt", "columns": {"messages": "conversations", "images": "pics"}}
    info = read_registry(write(tmp_path, json.dumps({"a": entry})))["a"]
    assert (info.mistakes, info.refused, info.notices) == ((), (), ())
    row = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    for none in ([], None, ""):
        assert to_conversation(row | {"pics": none}, info) == to_conversation(row, info)
    with pytest.raises(RowError, match=r'multimodal: pics holds \["a.png"\]; arpo_trl trains on text'):
        to_conversation(row | {"pics": ["a.png"]}, info)


def test_a_missing_registry_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no such file; expected a folder with a dataset_info.json$"):
        read_registry(tmp_path)


def test_the_place_of_each_named_column_is_kept(tmp_path: Path) -> None:
    entry = '{"a": {"file_name": "a.json",\n"columns": {"prompt": "q",\n"system": "s"}}}'
    info = read_registry(write(tmp_path, entry))["a"]
    place = tmp_path / "dataset_info.json"
    assert info.named == {"prompt": f"{place}: a.columns.prompt", "system": f"{place}: a.columns.system"}


def test_unset_tags_and_columns_keep_their_defaults(tmp_path: Path) -> None:
    entry = {"file_name": "a.json", "formatting": "sharegpt", "tags": {"user_tag": "user", "role_tag": "role"}}
    info = read_registry(write(tmp_path, json.dumps({"a": entry})))["a"]
    assert info.columns == {"messages": "conversations"}
    assert info.tags == {
        "role_tag": "role",
        "content_tag": "value",
        "user_tag": "user",
        "assistant_tag": "gpt",
        "observation_tag": "observation",
        "function_tag": "function_call",
        "system_tag": "system",
    }


def test_a_file_name_is_relative_to_the_registry_and_may_leave_it(tmp_path: Path) -> None:
    info = read_registry(write(tmp_path, '{"a": {"file_name": "../b [x]*.json"}}'))["a"]
    assert info.path == tmp_path / "../b [x]*.json"


def test_the_hub_is_preferred_to_a_file_as_in_llama_factory(tmp_path: Path) -> None:
    entry = '{"a": {"hf_hub_url": "o/d", "ms_hub_url": "o/d", "subset": "s", "split": "t", "folder": "f"}}'
    info = read_registry(write(tmp_path, entry))["a"]
    assert (info.hub, info.subset, info.split, info.folder, info.refused) == ("o/d", "s", "t", "f", ())


def test_a_renamed_prompt_comes_without_a_query_as_in_llama_factory(tmp_path: Path) -> None:
    """LLaMA-Factory's `firefly`: the prompt is the column that would be the query by default."""
    entry = '{"a": {"file_name": "a.json", "columns": {"prompt": "input", "response": "target"}}}'
    info = read_registry(write(tmp_path, entry))["a"]
    assert info.columns == {"prompt": "input", "response": "target"}
    assert to_conversation({"input": "Q", "target": "A"}, info).messages[0]["content"] == "Q"
