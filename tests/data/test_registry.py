"""dataset_info.json is read strictly: each mistake has its line and what was meant."""

import json
from pathlib import Path

import pytest

from arpo_trl.data.messages import to_conversation
from arpo_trl.data.registry import read_registry
from arpo_trl.errors import DatasetError

GOOD = '{\n  "ours": {\n    "file_name": "a.json"\n  },\n  %s\n}'

# what stands at line 5 (or, where it spans lines, from there) -> the message after "dataset_info.json:"
BAD_REGISTRIES = {
    "a misspelt key": ('"d": {"file_name": "d", "colums": {}}', "5: d: colums: no such key; the nearest is columns"),
    "format for formatting": (
        '"d": {"file_name": "d",\n "format": "sharegpt"}',
        "6: d: format: no such key; the nearest is formatting",
    ),
    "a key like no other": (
        '"d": {"file_name": "d", "zzz": 1}',
        "5: d: zzz: no such key; there are file_name, hf_hub_url, formatting, subset, split, folder, num_samples, "
        "columns, tags, ranking, ms_hub_url, om_hub_url, script_url, cloud_file_name",
    ),
    "a misspelt column": (
        '"d": {"file_name": "d", "columns": {"promt": "x"}}',
        "5: d: columns.promt: no such key for formatting alpaca; the nearest is prompt",
    ),
    "a column of another format": (
        '"d": {"file_name": "d", "columns": {"messages": "x"}}',
        "5: d: columns.messages: no such key for formatting alpaca; it belongs to formatting sharegpt",
    ),
    "a misspelt tag": (
        '"d": {"file_name": "d", "formatting": "sharegpt", "tags": {"role": "r"}}',
        "5: d: tags.role: no such key for formatting sharegpt; the nearest is role_tag",
    ),
    "two tags of one name": (
        '"d": {"file_name": "d", "formatting": "sharegpt",\n"tags": {"user_tag": "gpt"}}',
        "6: d: tags: user_tag and assistant_tag are both 'gpt'",
    ),
    "a column that is no name": (
        '"d": {"file_name": "d", "columns": {"prompt": 3}}',
        "5: d: columns.prompt: expected a name, found 3",
    ),
    "columns that are no object": (
        '"d": {"file_name": "d", "columns": ["prompt"]}',
        '5: d: columns: expected an object, found ["prompt"]',
    ),
    "an unknown format": (
        '"d": {"file_name": "d", "formatting": "chatml"}',
        "5: d: formatting: expected alpaca, sharegpt, openai, found 'chatml'",
    ),
    "a format that is no text": (
        '"d": {"file_name": "d", "formatting": ["alpaca"]}',
        "5: d: formatting: expected alpaca, sharegpt, openai, found ['alpaca']",
    ),
    "an address for a path": (
        '"d": {"file_name": "https://example.org/d.json"}',
        "5: d: file_name: expected a path, found the address 'https://example.org/d.json'; download it first",
    ),
    "a file address": (
        '"d": {"file_name": "file:///etc/passwd"}',
        "5: d: file_name: expected a path, found the address 'file:///etc/passwd'; download it first",
    ),
    "a chain of file systems": (
        '"d": {"file_name": "zip::d.zip"}',
        "5: d: file_name: expected a path, found the address 'zip::d.zip'; download it first",
    ),
    "a file name that is no text": ('"d": {"file_name": 7}', "5: d: file_name: expected text, found 7"),
    "no source": ('"d": {"formatting": "sharegpt"}', "5: d: expected file_name or hf_hub_url, found neither"),
    "samples below one": (
        '"d": {"file_name": "d", "num_samples": 0}',
        "5: d: num_samples: expected a whole number above 0, found 0",
    ),
    "an entry that is no object": ('"d": "d.json"', '5: d: expected an object, found "d.json"'),
    "a dataset twice": ('"ours": {"file_name": "b"}', "5: dataset 'ours' is there twice"),
    "a key twice": ('"d": {"file_name": "a", "file_name": "b"}', "5: d: file_name: is there twice"),
    "a comma too many": ('"d": {"file_name": "a",}', "5: not JSON (Illegal trailing comma before end of object"),
}

# LLaMA-Factory's own keys: fine to have in the file, refused when the dataset is used.
REFUSED = {
    "preference pairs": ('"ranking": true', "ranking: the dataset holds preference pairs, which SFT does not read"),
    "a loading script": (
        '"script_url": "x"',
        "script_url: the dataset is a loading script, which datasets >= 4 no longer runs; set hf_hub_url or file_name",
    ),
    "ModelScope": (
        '"ms_hub_url": "x"',
        "ms_hub_url: the dataset lies on ModelScope; download it and set file_name, or set hf_hub_url",
    ),
    "cloud storage": (
        '"cloud_file_name": "s3://x"',
        "cloud_file_name: the dataset lies in cloud storage; download it and set file_name",
    ),
    "images": ('"columns": {"images": "i"}', "columns.images: the dataset is multimodal; arpo_trl trains on text"),
    "KTO": (
        '"columns": {"kto_tag": "k"}',
        "columns.kto_tag: the dataset holds preference data, which SFT does not read",
    ),
}


def write(folder: Path, text: str) -> Path:
    (folder / "dataset_info.json").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", BAD_REGISTRIES)
def test_a_bad_registry_is_answered_with_its_line(kind: str, tmp_path: Path) -> None:
    entry, message = BAD_REGISTRIES[kind]
    with pytest.raises(DatasetError) as error:
        read_registry(write(tmp_path, GOOD % entry))
    if kind == "a comma too many":  # worded by the Python version
        assert str(error.value).startswith(f"{tmp_path / 'dataset_info.json'}:5: not JSON (")
    else:
        assert str(error.value) == f"{tmp_path / 'dataset_info.json'}:{message}"


@pytest.mark.parametrize("kind", REFUSED)
def test_what_only_llama_factory_does_is_refused_when_used(kind: str, tmp_path: Path) -> None:
    member, message = REFUSED[kind]
    info = read_registry(write(tmp_path, f'{{"d": {{"file_name": "d.json", {member}}}}}'))["d"]
    assert info.refused == f"{tmp_path / 'dataset_info.json'}:1: d: {message}"


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as error:
        read_registry(write(tmp_path, '{"a": {"flie_name": "a"},\n"b": {"file_name": "b", "splt": "x"}}'))
    assert [line.partition("dataset_info.json:")[2] for line in str(error.value).splitlines()] == [
        "1: a: flie_name: no such key; the nearest is file_name",
        "1: a: expected file_name or hf_hub_url, found neither",
        "2: b: splt: no such key; the nearest is split",
    ]


def test_a_missing_registry_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no such file; dataset_dir must be a folder with a dataset_info.json$"):
        read_registry(tmp_path)


@pytest.mark.parametrize("value", ["[" * 10_000 + "]" * 10_000, "9" * 5000])
def test_json_that_python_does_not_read_is_one_line(value: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"dataset_info.json: cannot be read \(.+\)$"):
        read_registry(write(tmp_path, f'{{"d": {{"file_name": "d.json", "num_samples": {value}}}}}'))


def test_the_place_of_each_named_column_is_kept(tmp_path: Path) -> None:
    entry = '{"a": {"file_name": "a.json",\n"columns": {"prompt": "q",\n"system": "s"}}}'
    info = read_registry(write(tmp_path, entry))["a"]
    place = tmp_path / "dataset_info.json"
    assert info.named == {"prompt": f"{place}:2: a: columns.prompt", "system": f"{place}:3: a: columns.system"}


def test_a_list_is_no_registry(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="expected an object of datasets"):
        read_registry(write(tmp_path, "[]"))


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
    assert (info.hub, info.subset, info.split, info.folder, info.refused) == ("o/d", "s", "t", "f", None)


def test_a_renamed_prompt_comes_without_a_query_as_in_llama_factory(tmp_path: Path) -> None:
    """LLaMA-Factory's `firefly`: the prompt is the column that would be the query by default."""
    entry = '{"a": {"file_name": "a.json", "columns": {"prompt": "input", "response": "target"}}}'
    info = read_registry(write(tmp_path, entry))["a"]
    assert info.columns == {"prompt": "input", "response": "target"}
    assert to_conversation({"input": "Q", "target": "A"}, info).messages[0]["content"] == "Q"
