"""Any recipe, registry, row or command line ends in a run or in a RecipeError. More examples: -m slow."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arpo_trl.__main__ import main
from arpo_trl.data.files import READERS, read_rows
from arpo_trl.data.messages import to_conversation
from arpo_trl.data.prepare import prepare_datasets
from arpo_trl.data.registry import DatasetInfo, read_registry
from arpo_trl.data.strict_json import excerpt
from arpo_trl.data.template_probe import find_template
from arpo_trl.errors import RecipeError, RowError
from arpo_trl.recipe import read_recipe
from arpo_trl.recipe.keys import keys
from arpo_trl.report.manifest import read_manifest
from arpo_trl.run_folder import read_json
from arpo_trl.training.checkpoints import find_problem

NAMES = sorted(keys())
TEXT = st.text(max_size=12)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.just("1e-5"), st.just("true, x"))
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=8
)
BYTES = st.binary(max_size=200)
YAMLISH = st.text(
    alphabet=string.ascii_letters + string.digits + " \n\t:-{}[],&*!|>'\"%@#?.\x00\x85\ufeff", max_size=120
)

# JSON that Python does not read, or that takes recursion too far.
STRANGE = [
    "[" * 100_000,
    "[" * 900 + "]" * 900,
    '{"a":' * 200 + "1" + "}" * 200,
    "9" * 5000,
    '{"a": -' + "9" * 5000 + "}",
]


def always(test: Callable[..., None]) -> Callable[..., None]:
    """Run a property with few examples, and again with many, marked slow."""

    @pytest.mark.parametrize("examples", [40, pytest.param(3000, marks=pytest.mark.slow)])
    def run(examples: int, tmp_path_factory: pytest.TempPathFactory) -> None:
        folder = tmp_path_factory.mktemp("fuzz")
        profile = settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
        )
        profile(given(st.data())(lambda data: test(folder, data)))()

    run.__doc__ = test.__doc__
    return run


def read(path: Path, overrides: list[str] | None = None) -> None:
    try:
        read_recipe(path, overrides or []).resolved()
    except RecipeError as error:
        assert str(error) and "Traceback" not in str(error)


@always
def test_bytes_as_a_recipe(folder: Path, data: Any) -> None:
    """A recipe, or a RecipeError."""
    (folder / "r.yaml").write_bytes(data.draw(BYTES | YAMLISH.map(lambda text: text.encode("utf-8", "replace"))))
    read(folder / "r.yaml")


@always
def test_any_values_of_known_keys(folder: Path, data: Any) -> None:
    """A recipe, or a RecipeError; a recipe can be written and read back."""
    values = data.draw(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=6))
    values = {"model_name_or_path": "m", "output_dir": "o", "do_train": True, "dataset": "d"} | values
    (folder / "r.yaml").write_text(yaml.safe_dump(values), encoding="utf-8", errors="surrogatepass")
    read(folder / "r.yaml")


@always
def test_any_override(folder: Path, data: Any) -> None:
    """A recipe, or a RecipeError."""
    (folder / "r.yaml").write_text("model_name_or_path: m\noutput_dir: o\ndo_train: true\ndataset: d\n")
    key = data.draw(st.sampled_from(NAMES) | TEXT)
    read(folder / "r.yaml", [f"{key}={data.draw(YAMLISH | JSON.map(str))}"])


@always
def test_any_command_line(folder: Path, data: Any) -> None:
    """Exit code 0 or 2."""
    (folder / "r.yaml").write_text("model_name_or_path: [\n")
    words = [
        "--check",
        "--preview",
        "--help",
        "-h",
        "--",
        "",
        "=",
        "x=1",
        "3",
        str(folder / "r.yaml"),
        "x.yaml",
    ]
    argv = data.draw(st.lists(st.sampled_from(words) | TEXT.filter(lambda word: "\0" not in word), max_size=4))
    try:
        code = main(argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code in (0, 2), argv


@always
def test_any_registry(folder: Path, data: Any) -> None:
    """Datasets, or a RecipeError."""
    words = [
        "file_name",
        "hf_hub_url",
        "formatting",
        "columns",
        "tags",
        "num_samples",
        "messages",
        "role_tag",
        "prompt",
    ]
    words += ["alpaca", "sharegpt", "openai", "ranking", "split", "subset", "folder", "system", "tools", "content_tag"]
    word = st.sampled_from(words)
    value = st.recursive(
        SCALARS | word, lambda inner: st.dictionaries(word | TEXT, inner, max_size=4) | st.lists(inner)
    )
    entries = st.dictionaries(TEXT, st.dictionaries(word | TEXT, value, max_size=5) | value, max_size=3)
    text = data.draw(entries.map(json.dumps) | BYTES.map(lambda b: b.decode("latin-1")) | JSON.map(json.dumps))
    (folder / "dataset_info.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        read_registry(folder)
    except RecipeError as error:
        assert str(error)


@always
def test_any_row(folder: Path, data: Any) -> None:
    """Messages, or a RowError that says why."""
    words = [
        "conversations",
        "messages",
        "from",
        "value",
        "role",
        "content",
        "tool_calls",
        "function",
        "name",
        "history",
    ]
    words += [
        "instruction",
        "input",
        "output",
        "system",
        "tools",
        "arguments",
        "loss",
        "weight",
        "function_call",
        "type",
    ]
    words += [
        "human",
        "gpt",
        "user",
        "assistant",
        "tool",
        "observation",
        "text",
        '{"name": "f", "arguments": {}}',
        "[",
        "[1]",
        "[]",
        "{}",
        *STRANGE,
    ]
    word = st.sampled_from(words)
    leaf = SCALARS | word
    inner = st.recursive(leaf, lambda i: st.lists(i, max_size=4) | st.dictionaries(word, i, max_size=5), max_leaves=16)
    turn = st.fixed_dictionaries(
        {"from": word, "value": leaf, "role": word, "content": leaf | inner},
        optional={"tool_calls": inner, "loss": leaf},
    )
    columns = {"conversations": st.lists(turn, max_size=4) | inner, "messages": st.lists(turn, max_size=4) | inner}
    columns |= dict.fromkeys(("instruction", "input", "output"), leaf | inner)
    row = data.draw(
        st.fixed_dictionaries({}, optional=columns | {"history": inner, "tools": inner, "system": leaf}) | inner
    )
    formatting = data.draw(st.sampled_from(["alpaca", "sharegpt", "openai"]))
    info_folder = folder / formatting
    if not info_folder.exists():
        info_folder.mkdir()
        entry = {"d": {"file_name": "d.json", "formatting": formatting}}
        (info_folder / "dataset_info.json").write_text(json.dumps(entry), encoding="utf-8")
    info: DatasetInfo = read_registry(info_folder)["d"]
    try:
        assert to_conversation(row, info).messages
    except RowError as error:
        assert str(error)


@always
def test_any_value_has_an_excerpt(folder: Path, data: Any) -> None:
    """As JSON where it is JSON, and of no more than is asked for."""
    value = data.draw(JSON)
    assert excerpt(value, 10**6) == json.dumps(value, ensure_ascii=False)
    others = st.dates() | st.datetimes() | st.binary() | st.decimals() | st.complex_numbers() | st.timedeltas()
    keys = st.tuples(st.integers()) | st.binary() | st.none() | st.dates()
    deep = st.recursive(others | SCALARS, lambda i: st.lists(i) | st.dictionaries(keys, i) | st.sets(st.integers()))
    most = data.draw(st.integers(1, 300))
    assert 0 < len(excerpt(data.draw(deep), most)) <= most


@always
def test_any_data_file(folder: Path, data: Any) -> None:
    """Rows, RowErrors, or a RecipeError that names the place."""
    suffix = data.draw(st.sampled_from(sorted(READERS)))
    text = data.draw(
        BYTES
        | YAMLISH.map(str.encode)
        | st.lists(JSON, max_size=3).map(lambda rows: json.dumps(rows).encode())
        | st.lists(st.sampled_from(STRANGE) | JSON.map(json.dumps), max_size=3).map(
            lambda rows: "\n".join(rows).encode()
        )
        | st.lists(st.sampled_from(STRANGE) | JSON.map(json.dumps)).map(lambda rows: f"[{','.join(rows)}]".encode())
    )
    (folder / f"rows{suffix}").write_bytes(text)
    try:
        for row in read_rows(folder / f"rows{suffix}"):
            assert row.place
    except RecipeError as error:
        assert f"rows{suffix}" in str(error)


@always
def test_any_checkpoint(folder: Path, data: Any) -> None:
    """A reason why it is not whole, whatever is in its files."""
    checkpoint = folder / "checkpoint-3"
    checkpoint.mkdir(exist_ok=True)
    json_bytes = JSON.map(lambda value: json.dumps(value).encode())
    content = BYTES | json_bytes | st.just(b'{"global_step": 3}') | BYTES.map(lambda b: b"PK\x03\x04" + b)
    for name in ("trainer_state.json", "files.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (checkpoint / name).write_bytes(data.draw(content))
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (checkpoint / name).write_bytes(data.draw(content))
    if data.draw(st.booleans()):
        (checkpoint / "trainer_state.json").write_bytes(b'{"global_step": 3}')
        (checkpoint / "files.json").unlink()
    assert find_problem(checkpoint)
    (checkpoint / "run.json").write_bytes(data.draw(content))
    assert read_manifest(checkpoint) is None or (checkpoint / "run.json").read_bytes().strip().startswith(b"{")
    read_json(checkpoint / "run.json")


@always
def test_any_text_in_a_row(folder: Path, data: Any) -> None:
    """Encoded rows, or a RecipeError: lone surrogates, control characters, special tokens, the template's own words."""
    words = ["\ud800", "\udfff\ud800", "\x00", "\u202e", "<|im_end|>", "<|im_start|>system\n", "{{ x }}", "{%", "\r\n"]
    words += ["<tool_call>", "</think>", "", " ", "\n", "é", "e\u0301", "\U0001f600", "\ufffe", "a" * 5000]
    text = st.lists(st.sampled_from(words) | TEXT, max_size=4).map("".join)
    role = st.sampled_from(["human", "gpt", "observation", "function_call", "system"])
    call = st.fixed_dictionaries({"name": text, "arguments": st.dictionaries(text, JSON, max_size=2)}).map(json.dumps)
    turn = st.fixed_dictionaries({"from": role, "value": text | call})
    tools = st.lists(st.fixed_dictionaries({"name": text, "parameters": JSON}), max_size=2).map(json.dumps)
    row = st.fixed_dictionaries(
        {"conversations": st.lists(turn, max_size=5)}, optional={"tools": tools, "system": text}
    )
    rows = data.draw(st.lists(row, min_size=1, max_size=8))
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    entry = {"d": {"file_name": "rows.jsonl", "formatting": "sharegpt"}}
    (folder / "dataset_info.json").write_text(json.dumps(entry), encoding="utf-8")
    values = {"model_name_or_path": "m", "output_dir": str(folder / "run"), "do_train": True, "dataset": "d"}
    values |= {"dataset_dir": str(folder), "max_dropped": 1, "tokenized_path": str(folder / "encoded")}
    values |= {"overwrite_cache": True, "cutoff_len": 64}
    (folder / "r.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    try:
        prepared = prepare_datasets(read_recipe(folder / "r.yaml"), find_template(TOKENIZER[0]))
    except RecipeError as error:
        assert str(error)
    else:
        assert prepared.audit.datasets["d"].rows == len(rows)


TOKENIZER: list[Any] = []


@pytest.fixture(scope="module", autouse=True)
def tokenizer(tiny_tokenizer: Any) -> None:
    TOKENIZER.append(tiny_tokenizer)
