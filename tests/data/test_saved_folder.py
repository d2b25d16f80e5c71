"""A saved folder is compared with what was trained; each planted fault is named, and an untouched folder has none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import make_tiny_model
import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer
from trl import chat_template_utils

from arpo_trl.data.prepare import prepare_datasets
from arpo_trl.data.saved_folder import PromptCheck, check_folder, check_saved
from arpo_trl.data.serving_causes import UNKNOWN
from arpo_trl.data.serving_rows import SERVING_ROWS, ServingRow, built_in_rows, choose_rows, read_rows, write_rows
from arpo_trl.data.tokenizer import load_template, shipped_template
from arpo_trl.errors import RecipeError
from arpo_trl.recipe import read_recipe

TRL = Path(chat_template_utils.__file__).parent / "chat_templates"
TEMPLATES = {
    "qwen2_5": shipped_template("qwen"),
    "qwen3": (TRL / "qwen3.jinja").read_text(encoding="utf-8"),
    "llama3_2": (TRL / "llama3_2.jinja").read_text(encoding="utf-8"),
    "smollm2": shipped_template("smollm2"),
    "default": shipped_template("default"),
    "own": shipped_template("qwen").replace("<|im_start|>", "<|object_ref_start|>"),
}
MARKS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
TOOLS = [
    {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}}
]


def _rows() -> list[dict[str, Any]]:
    """Two turns with reasoning, calls with their results, and a system message in half of the rows."""
    rows = []
    for n in range(12):
        think = f"<think>\nI add {n}.\n</think>\n\n" if n % 3 == 0 else ""
        ask = {"role": "user", "content": f"What is {n} + {n}?"}
        messages = [ask, {"role": "assistant", "content": f"{think}It is {2 * n}."}]
        messages += [
            {"role": "user", "content": "And twice that?"},
            {"role": "assistant", "content": f"{think}{4 * n}."},
        ]
        if n % 4 == 1:
            call = {"type": "function", "function": {"name": "add", "arguments": {"a": n}}}
            asked = [
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": str(2 * n)},
            ]
            messages[1:1] = asked
        system = [{"role": "system", "content": f"You count, {n}."}] if n % 2 else []
        rows.append({"messages": system + messages} | ({"tools": TOOLS} if n % 4 == 1 else {}))
    return rows


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a tokenizer of each template."""
    home = tmp_path_factory.mktemp("models")

    def make(name: str) -> Path:
        folder = home / name
        if not folder.exists():
            tokenizer = make_tiny_model.train_tokenizer(make_tiny_model.TOY_DATA, rows=40, vocab_size=600)
            tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in MARKS])
            folder.mkdir()
            tokenizer.save(str(folder / "tokenizer.json"))
            (folder / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
            config = {
                "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>",
                "tokenizer_class": "PreTrainedTokenizerFast",
            }
            bos = {"bos_token": "<|begin_of_text|>"} if name == "llama3_2" else {}
            (folder / "tokenizer_config.json").write_text(json.dumps(config | bos), encoding="utf-8")
        return folder

    return make


@pytest.fixture
def trained(tmp_path: Path, models: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Leave what a finished run leaves in its folder, but the weights."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, _rows())), encoding="utf-8")
    info = {
        "d": {"file_name": "d.jsonl", "formatting": "openai", "columns": {"messages": "messages", "tools": "tools"}}
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")

    def run(name: str, info: dict[str, Any] = info, **keys: Any) -> Path:
        (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
        values = {"model_name_or_path": str(models(name)), "output_dir": str(tmp_path / "out"), "do_train": True}
        values |= {"finetuning_type": "full", "dataset": "d", "dataset_dir": str(tmp_path), "max_dropped": 1.0} | keys
        (tmp_path / "r.yaml").write_text(json.dumps(values), encoding="utf-8")
        recipe = read_recipe(tmp_path / "r.yaml", [])
        template = load_template(recipe)
        tokenizer = template.tokenizer
        tokenizer.save_pretrained(tmp_path / "out")
        ends = {"eos_token_id": [tokenizer.eos_token_id]}
        (tmp_path / "out" / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
        write_rows(choose_rows(recipe, prepare_datasets(recipe, template)), tmp_path / "out")
        return tmp_path / "out"

    return run


def check(folder: Path) -> PromptCheck:
    return check_saved(folder, read_rows(folder))


def edit_template(folder: Path, change: Callable[[str], str]) -> None:
    path = folder / "chat_template.jinja"
    before = path.read_text(encoding="utf-8")
    assert change(before) != before
    path.write_text(change(before), encoding="utf-8")


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_untouched_folder_has_no_difference(name: str, trained: Callable[..., Path]) -> None:
    folder = trained(name, mask_history=name == "qwen3")
    found = check(folder)
    assert not found.differences
    assert found.rows >= 8
    assert found.identical + found.borders == found.rows
    (line,) = check_folder(folder)
    assert f"{found.identical} of {found.rows} prompts identical" in line


@pytest.mark.parametrize("name", TEMPLATES)
def test_built_in_rows_have_no_difference(name: str, models: Callable[[str], Path]) -> None:
    rows = built_in_rows(AutoTokenizer.from_pretrained(models(name)))
    assert len(rows) >= 16
    (models(name) / "generation_config.json").write_text(json.dumps({"eos_token_id": rows[0].end}), encoding="utf-8")
    assert not check_saved(models(name), rows).differences


def no_system(jinja: str) -> str:
    head = "{%- set kept = messages | rejectattr('role', 'equalto', 'system') | list %}{%- set messages = kept %}"
    return head + jinja


def other_marks(jinja: str) -> str:
    return jinja.replace("<|im_start|>", "<|fim_prefix|>").replace("<|start_header_id|>", "<|fim_prefix|>")


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a template of another name": (
        lambda folder: edit_template(folder, lambda _: shipped_template("zephyr")),
        "chat template",
    ),
    "a template that is nobody's": (lambda folder: edit_template(folder, other_marks), "chat template"),
    "no system message": (lambda folder: edit_template(folder, no_system), "chat template"),
    "no end token": (
        lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": 0}') and None,
        "end-of-turn token",
    ),
    "no chat template": (lambda folder: (folder / "chat_template.jinja").unlink(), "chat template"),
}


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_2", "smollm2"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(fault: str, name: str, trained: Callable[..., Path]) -> None:
    plant, cause = FAULTS[fault]
    folder = trained(name)
    plant(folder)
    found = check(folder)
    assert [one.cause for one in found.differences] == [cause], found.differences
    if fault == "no system message":
        assert "system message" in str(found.differences[0])
    assert cause in check_folder(folder)[0]


def test_what_nothing_explains_is_reported_as_unknown_with_the_first_difference(trained: Callable[..., Path]) -> None:
    folder = trained("own")
    edit_template(folder, lambda jinja: jinja.replace("message.content", "message.content | upper"))
    difference, *others = check(folder).differences
    assert (difference.cause, list(map(str, others))) == (UNKNOWN, [])
    assert "user\\nWhat is" in difference.found and "WHAT IS" in difference.found
    assert len(difference.rows) == check(folder).rows


def test_the_thinking_switch_is_named_with_its_value(trained: Callable[..., Path]) -> None:
    folder = trained("qwen3", enable_thinking=False, mask_history=True)
    assert not check(folder).differences
    edit_template(
        folder, lambda jinja: jinja.removeprefix("{%- set enable_thinking = enable_thinking | default(false) %}")
    )
    (difference,) = check(folder).differences
    assert difference.cause == "thinking switch"
    assert 'chat_template_kwargs {"enable_thinking": false}' in difference.fix


def test_reasoning_of_earlier_turns_is_named_where_training_keeps_it(trained: Callable[..., Path]) -> None:
    (difference,) = check(trained("qwen3")).differences
    assert difference.cause == "reasoning of earlier turns"
    assert "mask_history" in difference.fix


def test_the_recipes_default_system_is_named_as_what_clients_have_to_send(trained: Callable[..., Path]) -> None:
    (difference,) = check(trained("smollm2", default_system="You count.")).differences
    assert difference.cause == "default system prompt"
    assert "default_system as the system message" in difference.fix


def test_the_templates_own_default_system_prompt_is_named(trained: Callable[..., Path]) -> None:
    folder = trained("qwen2_5")
    edit_template(
        folder, lambda jinja: jinja.replace("You are Qwen, created by Alibaba Cloud. ", "You work for Acme. ")
    )
    (difference,) = check(folder).differences
    assert difference.cause == "default system prompt"
    assert "default system" in difference.cause


def on_another_day(rows: list[ServingRow]) -> list[ServingRow]:
    """The rows of a training on 3 February 2024."""
    day = date.today().strftime("%d %b %Y")
    assert day in rows[0].text, "this template writes the day"
    return [
        replace(row, day="2024-02-03", segments=[text.replace(day, "03 Feb 2024", 1) for text in row.segments])
        for row in rows
    ]


def test_todays_date_is_no_difference(trained: Callable[..., Path]) -> None:
    folder = trained("llama3_2")
    rows = on_another_day(read_rows(folder))
    checked = check_saved(folder, rows)
    assert not checked.differences
    assert checked.summary() == (
        f"{len(rows)} of {len(rows)} prompts identical, except for today's date, which the chat template writes"
    )
    edit_template(folder, lambda own: "{{- bos_token }}" + own)
    assert [one.cause for one in check_saved(folder, rows).differences] == ["BOS twice"]


def test_another_date_than_todays_is_named(trained: Callable[..., Path]) -> None:
    folder = trained("llama3_2")
    rows = read_rows(folder)
    edit_template(folder, lambda own: '{%- set date_string = "03 Feb 2024" %}' + own)
    for trained_rows in (rows, on_another_day(rows)):
        (difference,) = check_saved(folder, trained_rows).differences
        assert difference.cause == "date"
        assert "03 Feb 2024 served" in difference.found


def test_a_doubled_bos_is_named(trained: Callable[..., Path]) -> None:
    folder = trained("llama3_2")
    for jinja in ("{{- bos_token }}", '{%- set date_string = "01 Jan 2020" %}'):  # also on another day
        edit_template(folder, lambda own, jinja=jinja: jinja + own)
        assert [one.cause for one in check(folder).differences] == ["BOS twice"]


def test_one_cause_is_named_where_it_explains_every_row(trained: Callable[..., Path]) -> None:
    """ChatML with a BOS before it is a prompt with a BOS in most rows, and another text in those with tools."""
    folder = trained("smollm2")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"bos_token": "<|begin_of_text|>"}), "utf-8")
    edit_template(folder, lambda own: (TRL / "lfm2.jinja").read_text(encoding="utf-8"))
    checked = check(folder)
    (difference,) = checked.differences
    assert difference.cause == "chat template" and len(difference.rows) == checked.rows
    edit_template(folder, lambda _: "{{- bos_token }}" + TEMPLATES["smollm2"])
    (difference,) = check(folder).differences
    assert difference.cause == "BOS added"


def test_another_tokenizer_is_named_where_the_text_is_the_same(trained: Callable[..., Path]) -> None:
    folder = trained("qwen2_5")
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["model"]["merges"] = values["model"]["merges"][:50]
    path.write_text(json.dumps(values), encoding="utf-8")
    (difference,) = check(folder).differences
    assert difference.cause == "tokenizer"
    assert "the same text" in difference.found


def test_only_replies_that_cutoff_len_leaves_complete_are_chosen(trained: Callable[..., Path]) -> None:
    lengths = [len(row.ids) + len(row.reply_ids) for row in read_rows(trained("qwen2_5"))]
    cutoff = sorted(lengths)[len(lengths) // 2]
    kept = read_rows(trained("qwen2_5", cutoff_len=cutoff))
    assert 0 < len(kept) < len(lengths)
    assert all(len(row.ids) + len(row.reply_ids) <= cutoff for row in kept)


def test_held_out_rows_come_first(trained: Callable[..., Path]) -> None:
    rows = read_rows(trained("qwen2_5", val_size=2))
    held_out = list(dict.fromkeys(row.source for row in rows))[:2]
    assert len({row.source for row in rows}) > 2
    assert all(row.source not in held_out for row in rows[len([r for r in rows if r.source in held_out]) :])


def test_pairs_are_checked_with_their_chosen_side(trained: Callable[..., Path], tmp_path: Path) -> None:
    rows = [
        {
            "conversations": [{"from": "human", "value": f"Say {n}."}],
            **{side: {"from": "gpt", "value": f"{n}, {side}"} for side in ("chosen", "rejected")},
        }
        for n in range(6)
    ]
    (tmp_path / "p.json").write_text(json.dumps(rows), encoding="utf-8")
    info = json.loads((trained("qwen2_5").parent / "dataset_info.json").read_text(encoding="utf-8"))
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    info["p"] = {"file_name": "p.json", "formatting": "sharegpt", "ranking": True, "columns": columns}
    folder = trained("qwen2_5", info=info, dataset="p", stage="dpo")
    assert [row.reply for row in read_rows(folder)] == [f"{n}, chosen<|im_end|>" for n in range(6)]
    assert not check(folder).differences


def test_a_check_that_cannot_be_made_says_why(tmp_path: Path, trained: Callable[..., Path]) -> None:
    folder = trained("qwen2_5")
    (folder / SERVING_ROWS).unlink()
    assert "skipped" in check_folder(folder)[0]
    (folder / SERVING_ROWS).write_text('{"a": 1}\n', encoding="utf-8")
    with pytest.raises(RecipeError, match="not a file that a run wrote"):
        read_rows(folder)
