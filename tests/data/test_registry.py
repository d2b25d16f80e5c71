"""dataset_info.json means what LLaMA-Factory takes it to mean; each mistake has its location and what was meant."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from arpo_trl.data.messages import to_conversation
from arpo_trl.data.registry import DatasetInfo, read_registry
from arpo_trl.data.sources import check_datasets
from arpo_trl.errors import DatasetError, RowError
from arpo_trl.recipe import Recipe, read_recipe

# one entry, as it stands in the file -> its mistakes, after "dataset_info.json: "
MISTAKES = {
    "a misspelt column": (
        '{"file_name": "d", "columns": {"promt": "x", "response": "y"}}',
        ["d.columns.promt: unknown key with formatting: alpaca; did you mean prompt?"],
    ),
    "columns of which none is known": (
        '{"file_name": "d", "columns": {"question": "x", "zzz": "y"}}',
        [
            "d.columns.question: unknown key with formatting: alpaca; expected one of prompt, query, response, history, system, tools, answer",
            "d.columns.zzz: unknown key with formatting: alpaca; expected one of prompt, query, response, history, system, tools, answer",
        ],
    ),
    "a column of another format": (
        '{"file_name": "d", "columns": {"messages": "x"}}',
        ["d.columns.messages: unknown key with formatting: alpaca; it belongs to formatting: sharegpt"],
    ),
    "a misspelt tag": (
        '{"file_name": "d", "formatting": "sharegpt", "tags": {"role": "r"}}',
        ["d.tags.role: unknown key with formatting: sharegpt; did you mean role_tag?"],
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
    "preference pairs": (
        '"ranking": true',
        "ranking: preference pairs are not supported in stage: sft; set stage: dpo",
    ),
    "a loading script": (
        '"script_url": "x"',
        "script_url: loading scripts are not supported by datasets >= 4; set hf_hub_url or file_name",
    ),
    "ModelScope": (
        '"ms_hub_url": "x"',
        "ms_hub_url: ModelScope is not supported; set hf_hub_url, or download the data and set file_name",
    ),
    "cloud storage": (
        '"cloud_file_name": "s3://x"',
        "cloud_file_name: cloud storage is not supported; set hf_hub_url, or download the data and set file_name",
    ),
    "KTO": (
        '"columns": {"prompt": "p", "kto_tag": "k"}',
        "columns.kto_tag: KTO rows are not supported",
    ),
}

# What LLaMA-Factory passes over -> the notice
NOTICES = {
    "a key that nobody knows": ('"file_sha1": "00"', "file_sha1: ignored, unknown key; did you mean file_name?"),
    "a misspelt key": ('"colums": {}', "colums: ignored, unknown key; did you mean columns?"),
    "format for formatting": (
        '"format": "sharegpt"',
        "format: ignored, unknown key; did you mean formatting?",
    ),
    "a key like no other": (
        '"zzz": 1',
        "zzz: ignored, unknown key; expected one of file_name, hf_hub_url, formatting, subset, split, folder, num_samples, columns, tags, "
        "ranking, ms_hub_url, om_hub_url and 2 more",
    ),
    "a column beside those of the format": (
        '"columns": {"prompt": "q", "response": "a", "zzz": "z"}',
        "columns.zzz: ignored, unknown key with formatting: alpaca; expected one of prompt, query, response, history, system, tools, answer",
    ),
    "no column for the prompt": (
        '"columns": {"response": "text"}',
        "columns: neither prompt nor query is set, so every prompt is empty, as in LLaMA-Factory",
    ),
}


def write(folder: Path, text: str) -> Path:
    (folder / "dataset_info.json").write_text(text, encoding="utf-8")
    return folder


def recipe(folder: Path, **keys: Any) -> Recipe:
    given: dict[str, Any] = {"dataset": ["d"], "dataset_dir": str(folder), "output_dir": "out"}
    return Recipe(model_name_or_path="m", **(given | keys))


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_an_error_for_recipes_that_use_the_dataset_and_a_notice_for_others(
    kind: str, tmp_path: Path
) -> None:
    entry, mistakes = MISTAKES[kind]
    (tmp_path / "a.json").touch()
    write(tmp_path, f'{{"ours": {{"file_name": "a.json"}}, "d": {entry}}}')
    mistakes = [f"{tmp_path / 'dataset_info.json'}: {mistake}" for mistake in mistakes]
    with pytest.raises(DatasetError) as error:
        check_datasets(recipe(tmp_path))
    assert str(error.value).splitlines() == mistakes
    assert check_datasets(recipe(tmp_path, dataset=["ours"])).notices == [
        f"{mistake} (ignored: not used by this recipe)" for mistake in mistakes
    ]


@pytest.mark.parametrize("kind", REFUSED)
def test_unsupported_keys_are_an_error_for_recipes_that_use_the_dataset(kind: str, tmp_path: Path) -> None:
    member, message = REFUSED[kind]
    (tmp_path / "d.json").touch()
    write(tmp_path, f'{{"ours": {{"file_name": "d.json"}}, "d": {{"file_name": "d.json", {member}}}}}')
    with pytest.raises(DatasetError) as error:
        check_datasets(recipe(tmp_path))
    assert f"{tmp_path / 'dataset_info.json'}: d.{message}" in str(error.value).splitlines()
    assert check_datasets(recipe(tmp_path, dataset=["ours"])).notices == []
    if "_url:" in message or "cloud" in message:
        write(tmp_path, f'{{"d": {{"file_name": "d.json", "hf_hub_url": "o/d", {member}}}}}')
        assert check_datasets(recipe(tmp_path)).notices == []
        write(tmp_path, '{"d": {"file_name": "d.json"}}')
        assert check_datasets(recipe(tmp_path)).notices == []


@pytest.mark.parametrize("kind", NOTICES)
def test_ignored_keys_are_a_notice(kind: str, tmp_path: Path) -> None:
    member, message = NOTICES[kind]
    (tmp_path / "d.json").touch()
    write(tmp_path, f'{{"d": {{"file_name": "d.json", {member}}}, "other": {{"file_name": "o.json", {member}}}}}')
    place = f"{tmp_path / 'dataset_info.json'}: d"
    assert check_datasets(recipe(tmp_path)).notices == [f"{place}.{message}"]


NOT_READ = {
    "a key twice": ('{"d": {"file_name": "a", "file_name": "b"}}', "(duplicate key 'file_name')"),
    "a dataset twice": ('{"d": {}, "d": {}}', "(duplicate key 'd')"),
    "a comma too many": ('{"d": {"file_name": "a",\n}}', "not JSON ("),
    "too deep": ('{"d": ' + "[" * 10_000 + "]" * 10_000 + "}", "unsupported JSON (nested too deeply)"),
    "a number without end": ('{"d": {"num_samples": ' + "9" * 5000 + "}}", "(a number with 5,000 digits)"),
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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX only")
def test_a_pipe_is_not_read_as_a_registry(tmp_path: Path) -> None:
    """Reading one would wait for ever."""
    os.mkfifo(tmp_path / "dataset_info.json")
    with pytest.raises(DatasetError, match=r"dataset_info.json: expected a regular file"):
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
    missing, there = f"no such dataset in {tmp_path / 'dataset_info.json'}", ", ".join(f"set_{n}" for n in range(12))
    assert str(error.value).splitlines() == [
        f"{file}:6: dataset: set_07: {missing}; did you mean set_7?",
        f"{file}:6: dataset: zzz: {missing}; expected one of {there} and 18 more",
        f"{file}:7: eval_dataset: zzz: {missing}; expected one of {there} and 18 more",
    ]


def test_a_missing_file_is_reported_before_heavy_imports(tmp_path: Path) -> None:
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
    "Plain",
    "nul",
    "com1.a",
    "a.",
]


def test_a_name_is_never_a_path() -> None:
    folders = {name: DatasetInfo.read(name, Path("f"), {}).folder_name for name in NAMES}
    assert [folders[name] for name in NAMES[:3]] == NAMES[:3]
    for name, folder in folders.items():
        assert re.fullmatch(r"\w[\w.-]{0,48}|[\w-]{9,49}", folder) and Path(folder).name == folder, name
    # Windows ignores case and a final dot, and reserves the names of devices.
    assert len({folder.lower().rstrip(".") for folder in folders.values()}) == len(NAMES)
    assert not {"nul", "com1.a"} & {*folders.values()}


def test_null_means_not_set(tmp_path: Path) -> None:
    entry = dict.fromkeys(DatasetInfo.model_fields) | {"file_name": "a.json", "ranking": None, "zzz": None}
    plain, nulls = (
        read_registry(write(tmp_path, json.dumps({"a": value})))["a"] for value in ({"file_name": "a.json"}, entry)
    )
    assert nulls == plain
    columns = {"prompt": "q", "query": None, "response": "r", "system": None, "zzz": None, "images": None}
    tags = {"user_tag": None, "zzz": None}
    info = read_registry(write(tmp_path, json.dumps({"a": {"file_name": "a", "columns": columns, "tags": tags}})))["a"]
    assert info.columns == {"prompt": "q", "response": "r"}
    assert info.findings("mistake", "unsupported", "notice") == info.media == []


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
    assert info.findings("mistake", "unsupported", "notice") == []
    row = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    empty: list[Any] = [[], None, ""]
    for none in empty:
        assert to_conversation(row | {"pics": none}, info) == to_conversation(row, info)
    with pytest.raises(RowError, match=r'multimodal: pics contains \["a.png"\]; only text is supported'):
        to_conversation(row | {"pics": ["a.png"]}, info)


def test_a_missing_registry_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError, match=r"no dataset_info.json in this folder; expected the folder of dataset_info.json$"
    ):
        read_registry(tmp_path)


def test_the_location_and_the_named_columns_are_kept(tmp_path: Path) -> None:
    entry = '{"a": {"file_name": "a.json",\n"columns": {"prompt": "q",\n"system": "s"}}}'
    info = read_registry(write(tmp_path, entry))["a"]
    assert (info.named, info.place) == (frozenset(("prompt", "system")), f"{tmp_path / 'dataset_info.json'}: a")


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
    assert (info.path, info.hf_hub_url, info.subset, info.split, info.folder) == (None, "o/d", "s", "t", "f")
    assert info.findings("unsupported") == []


def test_a_renamed_prompt_comes_without_a_query_as_in_llama_factory(tmp_path: Path) -> None:
    """LLaMA-Factory's `firefly`: the prompt is the column that would be the query by default."""
    entry = '{"a": {"file_name": "a.json", "columns": {"prompt": "input", "response": "target"}}}'
    info = read_registry(write(tmp_path, entry))["a"]
    assert info.columns == {"prompt": "input", "response": "target"}
    assert to_conversation({"input": "Q", "target": "A"}, info).messages[0]["content"] == "Q"


@pytest.mark.parametrize("empty", ["", None])
def test_a_column_without_a_name_is_not_read(empty: str | None) -> None:
    """As in LLaMA-Factory."""
    entry = {"file_name": "x.json", "columns": {"prompt": "q", "query": empty, "system": empty, "response": "a"}}
    info = DatasetInfo.read("x", Path("dataset_info.json"), entry)
    assert info.columns == {"prompt": "q", "response": "a"} and info.named == {"prompt", "response"}
