"""A chat's prompts have the tokens of training, and results go where the training data has them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import small_run
import torch
from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

from arpo_trl.__main__ import main
from arpo_trl.data.encode import Encoder, encode_rows
from arpo_trl.data.files import Row
from arpo_trl.data.labels import IGNORED
from arpo_trl.data.registry import read_registry
from arpo_trl.data.template_probe import find_template
from arpo_trl.data.tokenizer import load_template, make_tokenize
from arpo_trl.errors import RecipeError
from arpo_trl.generate import chat
from arpo_trl.generate.engines import Request, TransformersEngine
from arpo_trl.generate.sandbox import Limits, describe_isolation
from arpo_trl.generate.trajectory import to_context
from arpo_trl.recipe import Recipe, read_recipe
from arpo_trl.report.manifest import find_manifest, sample_rows

ROOT = Path(__file__).parents[2]


def test_the_command_answers_one_prompt(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", str(tiny_model), "--prompt", "你好", "--max-new-tokens", "4"]) == 0
    captured = capsys.readouterr()
    system, tools, results, python, *reply = captured.out.splitlines()
    assert system == "system   none (run.json does not have the training rows'; --system TEXT sets one)"
    assert tools == "tools    none (run.json does not have the training rows'; --tools FILE.json offers some)"
    assert (results, captured.err) == (f"results  {chat.NOT_TRAINED}", "") and reply
    assert python == "python   not run, you type its results (--run-python runs it)"


TOOLS_ROW = json.loads((ROOT / "recipes" / "data" / "tool_calls_demo.json").read_text(encoding="utf-8"))[0]


def encoded(tiny_model: Path, dataset: str, row: dict[str, Any]) -> tuple[list[int], list[int]]:
    recipe = Recipe(model_name_or_path=str(tiny_model), output_dir="unused")
    encoder = Encoder(read_registry(ROOT / "recipes")[dataset], recipe, load_template(recipe))
    [trained] = encode_rows([Row("row", row)], encoder)
    return trained["input_ids"].tolist(), trained["labels"].tolist()


@pytest.mark.parametrize("text", [TOOLS_ROW["tools"], json.dumps(TOOLS_ROW["tools"])], ids=["a list", "a row's text"])
def test_tools_are_in_the_prompt_as_in_training(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    prompts: list[list[int]] = []
    generate = Qwen2ForCausalLM.generate

    def recorded(self: Qwen2ForCausalLM, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        prompts.append(input_ids[0].tolist())
        return generate(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(Qwen2ForCausalLM, "generate", recorded)
    (tmp_path / "tools.json").write_text(text, encoding="utf-8")
    question = TOOLS_ROW["conversations"][0]["value"]
    options = ["--tools", str(tmp_path / "tools.json"), "--prompt", question, "--max-new-tokens", "2"]
    assert main(["chat", str(tiny_model), *options]) == 0
    ids, labels = encoded(tiny_model, "tool_calls_demo", TOOLS_ROW)
    first_reply = next(at for at, label in enumerate(labels) if label != IGNORED)
    assert prompts == [ids[:first_reply]]


def test_every_later_prompt_has_the_tokens_of_training(
    tiny_model: Path, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    with (ROOT / "recipes" / "data" / "arpo_sft_toy.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(next(lines)) for _ in range(10)]
    template, tokenize = find_template(tiny_tokenizer), make_tokenize(tiny_tokenizer)
    prompts = 0
    for row in rows:
        ids, labels = encoded(tiny_model, "arpo_sft_toy", row)
        starts = [at for at in range(1, len(ids)) if labels[at - 1] == IGNORED != labels[at]]
        roles = {"human": "user", "gpt": "assistant"}
        turns = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        messages = [{"role": "system", "content": row["system"]}, *turns]
        for number, start in enumerate(starts):
            pieces = to_context(messages[: 2 + 2 * number], None, template)
            assert [token for piece in tokenize(pieces) for token in piece.ids] == ids[:start]
            prompts += 1
    assert prompts > 20


@pytest.mark.parametrize(
    "text",
    [None, "{", '[{"description": "no name"}]', "[" * 100_000],
    ids=["no file", "not JSON", "no name", "nested too deeply"],
)
def test_tools_that_cannot_be_read_are_named(
    tiny_model: Path, tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "tools.json").write_text(text, encoding="utf-8")
    assert main(["chat", str(tiny_model), "--tools", str(tmp_path / "tools.json")]) == 2
    assert re.fullmatch(
        r"--tools: .*tools\.json: .*\. Use a JSON file with the content of a row.s `tools`\n", capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("max-new-tokens", "0"),
        ("time-limit", "-1"),
        ("time-limit", "nan"),
        ("memory-limit", "0"),
        ("temperature", "-1"),
    ],
)
def test_a_limit_of_nothing_is_rejected(
    option: str, value: str, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["chat", str(tiny_model), "--prompt", "hi", f"--{option}", value])
    assert "must be > 0, --temperature >= 0" in capsys.readouterr().err


def test_a_folder_without_weights_or_model_is_named_in_one_line(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_model, tmp_path / "run", ignore=shutil.ignore_patterns("*.safetensors"))
    assert main(["chat", str(tmp_path / "run"), "--prompt", "hi"]) == 2
    assert re.fullmatch(
        r".*run: can't be loaded \(.+\)\. Use the output_dir of a finished run, and run this.*\n",
        capsys.readouterr().err,
    )
    assert main(["chat", str(tmp_path)]) == 2
    assert "is not a model folder. Use the output_dir of a finished run" in capsys.readouterr().err


# --- where results go ---

Written = Callable[[list[str], list[str]], list[str]]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: PreTrainedTokenizerBase) -> Written:
    """Make the model write given texts and the user type others; returns the prompts that the model gets."""

    def make(texts: list[str], typed: list[str]) -> list[str]:
        prompts: list[str] = []
        writes, types = iter(texts), iter(typed)

        def generate(self: TransformersEngine, requests: Sequence[Request]) -> list[list[int]]:
            prompts.extend(str(tiny_tokenizer.decode(request.ids)) for request in requests)
            return [tiny_tokenizer(next(writes), add_special_tokens=False).input_ids for _ in requests]

        monkeypatch.setattr(TransformersEngine, "generate", generate)
        monkeypatch.setattr("builtins.input", lambda prompt: next(types))
        return prompts

    return make


SEARCH, PYTHON, END = "<search>Karamont</search>", "<python>\nprint(6 * 7)\n</python>", "<|im_end|>"


def test_a_typed_result_is_a_separate_turn(
    tiny_model: Path, written: Written, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [SEARCH + END, "<answer>Kasivik</answer>" + END, SEARCH + END]
    prompts = written(texts, ["Who founded it?", "Kasivik", "And?", "", ""])
    assert main(["chat", str(tiny_model), "--system", "Be brief.", "--results", "turn"]) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert printed == ["[search would be called here with: Karamont]"] * 2
    turns = prompts[1].split("<|im_start|>")[1:]
    assert [turn.partition("\n")[0] for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert turns[3] == "user\n<result>\nKasivik\n</result><|im_end|>\n"
    assert prompts[2].endswith("user\nAnd?<|im_end|>\n<|im_start|>assistant\n")


def test_a_result_inside_the_turn_is_written_as_in_arpo_s_rollouts(tiny_model: Path, written: Written) -> None:
    texts = [SEARCH, "<answer>Kasivik</answer>" + END, "bye" + END]
    prompts = written(texts, ["Who founded it?", "Kasivik", "thanks", ""])
    assert main(["chat", str(tiny_model), "--results", "inside"]) == 0
    turn = f"{SEARCH} <result>\nKasivik\n</result>"
    assert prompts[1] == prompts[0] + turn
    assert f"{turn}<answer>Kasivik</answer><|im_end|>" in prompts[2]


def test_a_program_runs_only_if_asked_for(
    tiny_model: Path, written: Written, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = written([PYTHON, "done" + END], [])
    assert main(["chat", str(tiny_model), "--prompt", "6 * 7?", "--run-python", "--results", "inside"]) == 0
    assert prompts[1].endswith(f"{PYTHON} <result>\n42\n</result>")
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:4] == ["results  inside the reply", f"python   {describe_isolation(Limits())}"]
    assert [line for line in lines[4:] if line] == ["[result of python]", "42"]
    prompts = written([PYTHON], [])
    assert main(["chat", str(tiny_model), "--prompt", "6 * 7?", "--results", "inside"]) == 0
    assert len(prompts) == 1 and "[python would be called here with: print(6 * 7)]\n" in capsys.readouterr().out


def test_a_model_that_never_stops_calling_is_stopped(
    tiny_model: Path, written: Written, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "MAX_CALLS", 2)
    written(["<python>print(1)</python>" + END] * 3, [])
    assert main(["chat", str(tiny_model), "--prompt", "hi", "--run-python"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["[stopped: max_tool_calls]", ""]


def chat_args(model: Path, **changes: Any) -> Any:
    values = {"model": model, "tools": None, "results": None, "run_python": False, "max_new_tokens": 4}
    return type("Args", (), values | {"temperature": 0.0, "system": None, "trust_remote_code": False} | changes)()


SYSTEM = ("system", "Results come between <result> and </result>.")
ROWS = {
    "turn": [("human", "q"), ("gpt", SEARCH), ("human", "<result>\na\n</result>"), ("gpt", "<answer>a</answer>")],
    "tool": [("human", "q"), ("gpt", SEARCH), ("observation", "a"), ("gpt", "<answer>a</answer>")],
    "inside": [SYSTEM, ("human", "q"), ("gpt", f"{SEARCH} <result>\na\n</result><answer>a</answer>")],
    "none": [SYSTEM, ("human", "Is <result> a tag?"), ("gpt", "a")],
}


@pytest.mark.parametrize(("rows", "form"), [("turn", "turn"), ("tool", "turn"), ("inside", "inside"), ("none", None)])
def test_where_results_go_is_found_in_the_first_rows(
    rows: str, form: str | None, tmp_path: Path, tiny_model: Path
) -> None:
    row = {"conversations": [{"from": who, "value": text} for who, text in ROWS[rows]]}
    (tmp_path / "d.json").write_text(json.dumps([row, {"broken": 1}]), encoding="utf-8")
    info = {"d": {"file_name": "d.json", "formatting": "sharegpt"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    recipe = read_recipe(small_run.write_recipe(tmp_path, tiny_model, dataset="d", dataset_dir=str(tmp_path)))
    assert sample_rows(recipe)["results"] == form
    (tmp_path / "d.json").unlink()
    assert sample_rows(recipe) == {}


@pytest.mark.parametrize("streaming", [False, True])
def test_where_results_go_is_found_in_a_dataset_of_the_hub(streaming: bool, tmp_path: Path, tiny_model: Path) -> None:
    row = {"conversations": [{"from": who, "value": text} for who, text in ROWS["inside"]]}
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "train.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    info = {"d": {"hf_hub_url": str(tmp_path / "repo"), "formatting": "sharegpt"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    keys = {"dataset": "d", "dataset_dir": str(tmp_path), "streaming": streaming}
    assert sample_rows(read_recipe(small_run.write_recipe(tmp_path, tiny_model, **keys)))["results"] == "inside"


@pytest.mark.parametrize(
    ("dataset", "form", "place"), [("arpo_sft_toy_inside", "inside", "inside"), ("arpo_sft_toy", "turn", "user")]
)
def test_a_chat_puts_results_where_the_run_s_manifest_has_them(
    dataset: str, form: str, place: str, tmp_path: Path, tiny_model: Path
) -> None:
    data = {"dataset": dataset, "dataset_dir": str(ROOT / "recipes"), "max_samples": 2, "tokenized_path": None}
    keys = {"finetuning_type": "lora", "cutoff_len": 1024, "max_steps": 1, "preflight": False}
    run = small_run.run(tmp_path, tiny_model, **data, **keys)
    for adapter in (run, run / "checkpoint-1"):
        merged = tmp_path / f"merged {adapter.name}" / "model"
        assert main(["merge", str(adapter), str(merged)]) == 0
        for model in (adapter, merged):
            loaded = chat.load_chat(chat_args(model))
            assert loaded.form.place == place and "<python>" in loaded.system, model
            assert chat.load_chat(chat_args(model, system="")).system == ""
            made = find_manifest(model)
            assert made and (made.results, made.recipe["output_dir"]) == (form, str(run)), model
    assert find_manifest(tiny_model) is None


def rows_with(*systems: str, tools: list[Any] | None = None) -> list[dict[str, Any]]:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    kept = {"tools": tools} if tools else {}
    return [{"messages": [{"role": "system", "content": text}] * bool(text) + turns, **kept} for text in systems]


OFFERED = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}]
CHANGE, SET = "--system TEXT changes it", "--system TEXT sets one"


@pytest.mark.parametrize(
    ("rows", "system", "system_line", "tools_line"),
    [
        (
            rows_with("S", "S", "T", tools=OFFERED),
            "S",
            f"S (of 67% of the training rows; {CHANGE})",
            "search (of 100% of the training rows; --tools FILE.json changes them, --tools none removes them)",
        ),
        (
            [*rows_with("S", tools=OFFERED), *rows_with("T"), *rows_with("U", tools=OFFERED[:1] * 2)],
            None,
            f"none (no system message shared by half of the training rows; {SET})",
            "none (no tools shared by half of the training rows; --tools FILE.json offers some)",
        ),
        (
            rows_with("", "", "S"),
            None,
            f"none (67% of the training rows have no system message; {SET})",
            "none (the training rows have no tools; --tools FILE.json offers some)",
        ),
    ],
    ids=["shared", "not shared", "none"],
)
def test_chat_and_card_use_what_at_least_half_of_the_rows_share(
    rows: list[dict[str, Any]],
    system: str | None,
    system_line: str,
    tools_line: str,
    tmp_path: Path,
    tiny_model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the rows to run.json, the merged model, the banner and the card."""
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    keys = {"dataset": str(tmp_path / "rows.json"), "max_steps": 1, "preflight": False, "finetuning_type": "lora"}
    run = small_run.run(tmp_path, tiny_model, **keys)
    card = (run / "README.md").read_text(encoding="utf-8")
    assert ("\n> S\n" in card, "offer these tools: search." in card) == (system == "S", system == "S")
    assert main(["merge", str(run), str(tmp_path / "merged")]) == 0
    for model in (run, tmp_path / "merged"):
        loaded = chat.load_chat(chat_args(model))
        assert (loaded.system, loaded.tools) == (system or "", OFFERED if system else None)
        lines = chat.describe(loaded, chat_args(model, prompt=None), None)
        assert lines[:2] == [f"system   {system_line}", f"tools    {tools_line}"]
        assert lines[-1] == "leave    with an empty line"
        removed = chat.load_chat(chat_args(model, system="", tools=[]))
        assert (removed.system, removed.tools) == ("", None)


def test_a_recipe_that_is_called_chat_is_still_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("chat").write_text("model_name_or_path: m\n", encoding="utf-8")
    assert main(["chat"]) == 2
    assert "chat: " in capsys.readouterr().err and [path.name for path in Path().iterdir()] == ["chat"]


def test_a_template_that_raises_an_error_is_reported_in_one_line(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "m")
    jinja = (tiny_model / "chat_template.jinja").read_text(encoding="utf-8")
    refuses = "{%- if messages | length > 2 %}{{ raise_exception('one question only') }}{%- endif %}" + jinja
    (tmp_path / "m" / "chat_template.jinja").write_text(refuses, encoding="utf-8")
    loaded = chat.load_chat(chat_args(tmp_path / "m"))
    user = {"role": "user", "content": "hi"}
    with pytest.raises(RecipeError, match="one question only"):
        loaded.answer([user, {"role": "assistant", "content": "a"}, user], chat.ChatTools(None, None))  # type: ignore[list-item]
