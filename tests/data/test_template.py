"""Templates by LLaMA-Factory's names: each shipped one writes and trains the same text, every other name is known."""

from __future__ import annotations

import json
import re
import tomllib
from datetime import date
from importlib.resources import files
from pathlib import Path
from typing import Any

import compare_templates
import pytest
from compare_templates import DAY, GOLDEN, conversation, golden_texts, tokens_of, trl_template
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from arpo_trl.data.encode import check_parity
from arpo_trl.data.labels import ExampleConfig, trained_segments
from arpo_trl.data.messages import Conversation, Message
from arpo_trl.data.segments import to_segments
from arpo_trl.data.template_probe import find_template
from arpo_trl.data.tokenizer import load_template, shipped_template
from arpo_trl.errors import RecipeError, RowError
from arpo_trl.recipe import Recipe, read_recipe
from arpo_trl.recipe.llamafactory import MULTIMODAL, SHIPPED, TOKENIZERS_OWN, check_template_name
from arpo_trl.report.manifest import run_day

OWN = (
    "{% for m in messages %}<own>{{ m.role }} {{ m.content }}</own>{% endfor %}"
    "{% if add_generation_prompt %}<own>assistant {% endif %}"
)


def make_tokenizer(*special: str, chat_template: Any = OWN) -> PreTrainedTokenizerBase:
    return compare_templates.make_tokenizer("<own>", "</own>", *special, chat_template=chat_template)


def recipe(model: Path, **keys: Any) -> Recipe:
    return Recipe(model_name_or_path=str(model), **({"output_dir": "unused"} | keys))


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_a_shipped_template_writes_and_trains_what_llama_factory_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = GOLDEN["templates"][name]
    ends = set(re.findall(r"<[^<>\s]+>", golden["conversations"]["one turn"][-1][1])) | {golden["eos"]} - {"{eos}"}
    make_tokenizer(*sorted(ends - {"<think>", "</think>"}), chat_template=OWN).save_pretrained(tmp_path)
    template = load_template(recipe(tmp_path, template=name), DAY)
    for kind, expected in golden["conversations"].items():
        segments = to_segments(conversation(kind), template)
        assert [segment.text for segment in segments] == golden_texts(expected), kind
        assert trained_segments(segments, ExampleConfig(1 << 20)) == [False, True] * len(expected)
        check_parity(conversation(kind), template, ExampleConfig(1 << 20), kind)
    turns = conversation("one turn").messages[-2:] * 20
    long = to_segments(Conversation(turns), template)
    with monkeypatch.context() as context:
        context.setattr("arpo_trl.data.segments.WINDOW", len(turns))
        assert long == to_segments(Conversation(turns), template)


def test_the_table_of_the_docs_is_what_the_templates_write() -> None:
    """`python scripts/compare_templates.py` writes it."""
    text = compare_templates.DOCS.read_text(encoding="utf-8")
    lines = compare_templates.table()
    assert "\n".join(lines) in text
    assert all("shipped: 4 of 4" in line for line in lines if "shipped" in line)
    assert f"all {len(SHIPPED)} of them" in text
    assert all(f"`{name}`" in text for name in SHIPPED | TOKENIZERS_OWN)


def test_the_docs_way_to_add_a_templates_tokens_makes_it_run(tmp_path: Path, tiny_model: Path) -> None:
    """A base model that lacks them is refused; after the docs' commands, every reply ends in one trained token."""
    with pytest.raises(RecipeError, match=r"ends replies with '<\|eot_id\|>', which is not a token of this tokenizer"):
        load_template(recipe(tiny_model, template="llama3"))
    code = compare_templates.DOCS.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    exec(code.replace("BASE", tiny_model.as_posix()).replace("NEW", tmp_path.as_posix()), {})
    asked = recipe(tmp_path, template="llama3")
    template = load_template(asked)
    segments = to_segments(conversation("one turn"), template)
    assert segments[1].text == "4.<|eot_id|>"
    check_parity(conversation("one turn"), template, ExampleConfig(1 << 20), "row")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.get_input_embeddings().num_embeddings >= len(template.tokenizer)
    for other in ("default", "alpaca", "vicuna", "mistral"):  # the other way out
        assert load_template(recipe(tiny_model, template=other)).tokenizer.eos_token == "<|im_end|>"


def test_every_name_of_llama_factorys_is_shipped_or_means_the_tokenizers_own(tmp_path: Path) -> None:
    table = tomllib.loads(files("arpo_trl.data").joinpath("templates/names.toml").read_text(encoding="utf-8"))
    assert table.keys() | {"qwen"} == SHIPPED
    assert GOLDEN["templates"].keys() >= SHIPPED
    assert not SHIPPED & TOKENIZERS_OWN and not MULTIMODAL & (SHIPPED | TOKENIZERS_OWN)
    make_tokenizer().save_pretrained(tmp_path)
    for name in GOLDEN["names"]:
        assert check_template_name(name) is None
        if name not in SHIPPED:
            assert name in TOKENIZERS_OWN
            assert load_template(recipe(tmp_path, template=name)).tokenizer.chat_template == OWN


def test_every_name_that_a_release_of_llama_factorys_has_is_known() -> None:
    """The fixture holds the names of its 19 releases read, of its examples and of its repository."""
    facts = Path(__file__).parents[1] / "recipe" / "fixtures" / "llama_factory_templates.json"
    names = json.loads(facts.read_text(encoding="utf-8"))
    assert {*names["text"]} == SHIPPED | TOKENIZERS_OWN and {*GOLDEN["names"]} <= {*names["text"]}
    assert {*names["multimodal"]} == MULTIMODAL
    assert all("for images, video or sound" in str(check_template_name(name)) for name in MULTIMODAL)


LINES = "model_name_or_path: m\noutput_dir: out\ndo_train: true\ndataset: a\ntemplate: "


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "qwn3",
            "line 5  template: unknown template 'qwn3'; did you mean qwen3? Use a LLaMA-Factory name",
        ),
        (
            "qwen2_vl",
            "line 5  template: qwen2_vl is a template for images, video or sound, which are not supported;",
        ),
    ],
)
def test_a_wrong_name_is_answered_with_its_line(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(LINES + name, encoding="utf-8")
    with pytest.raises(RecipeError) as error:
        read_recipe(tmp_path / "r.yaml")
    assert message in str(error.value)


def test_a_name_that_is_not_shipped_is_reported_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(LINES + "glm4", encoding="utf-8")
    line = f"{tmp_path / 'r.yaml'}: template: glm4 is not shipped; using the tokenizer's own template"
    assert line in read_recipe(tmp_path / "r.yaml").notices


def test_text_is_not_trimmed() -> None:
    spaced = [{"role": "user", "content": " Q \n"}, {"role": "assistant", "content": "\n\nA  "}]
    for name in sorted(SHIPPED):
        rendered = make_tokenizer().apply_chat_template(spaced, chat_template=shipped_template(name), tokenize=False)
        assert " Q \n" in rendered and "\n\nA  " in rendered, name


def test_a_tools_parameters_are_described_as_llama_factory_does() -> None:
    parameters = {
        "kind": {"type": "string", "enum": ["a", "b"]},
        "all": {"type": "array", "items": {"type": "integer"}},
    }
    tool = {"name": "f", "parameters": {"type": "object", "properties": parameters, "required": ["kind"]}}
    rendered = str(
        make_tokenizer().apply_chat_template(
            [{"role": "user", "content": "Q"}], [tool], chat_template=shipped_template("default"), tokenize=False
        )
    )
    assert (
        "> Tool Name: f\nTool Description: \nTool Args:\n  - kind (string, required): , should be one of [a, b]\n"
        "  - all (array): , where each item should be integer\n\nUse the following"
    ) in rendered


def test_rows_with_tools_are_rendered_with_the_template_for_them_and_all_are_saved(tmp_path: Path) -> None:
    calls = "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}</own>{% endfor %}"
    tool_use = "{% if tools %}<own>{{ tools | tojson }}</own>{% endif %}" + OWN.replace("</own>{% endfor %}", calls)
    make_tokenizer(chat_template={"default": OWN, "tool_use": tool_use, "rag": OWN}).save_pretrained(
        tmp_path / "model"
    )
    template = load_template(recipe(tmp_path / "model"))
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    plain, with_tools = to_segments(Conversation(chat), template), to_segments(Conversation(chat, tools), template)
    assert plain[0].text == "<own>user Q</own><own>assistant "
    assert with_tools[0].text == f"<own>{json.dumps(tools)}</own>" + plain[0].text
    unlisted = to_segments(template.fit(Conversation([Q, CALLS, FOUND, A])), template)
    assert unlisted[0].text == plain[0].text and unlisted[1].text == "add</own>"
    template.tokenizer.save_pretrained(tmp_path / "out")
    saved = load_template(recipe(tmp_path / "out")).tokenizer.chat_template
    assert saved == {"default": OWN, "tool_use": tool_use, "rag": OWN}


DATED = "<own>Today is {{ strftime_now('%d %b %Y') }}.</own>" + OWN


def test_a_dated_template_writes_the_day_of_the_run_when_it_is_resumed(tmp_path: Path) -> None:
    make_tokenizer(chat_template=DATED).save_pretrained(tmp_path)
    resumed = recipe(tmp_path, output_dir=str(tmp_path))
    assert run_day(resumed) == date.today()
    (tmp_path / "run.json").write_text(
        '{"day": "2026-02-03", "recipe": {}, "data": {}, "versions": {}}', encoding="utf-8"
    )
    earlier = load_template(resumed, run_day(resumed))
    ask = [{"role": "user", "content": "Q"}]
    assert "<own>Today is 03 Feb 2026.</own>" in earlier.render(ask, None, True)
    by_name = recipe(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert load_template(by_name, run_day(by_name)).hash == earlier.hash
    over = recipe(tmp_path, output_dir=str(tmp_path), overwrite_output_dir=True)
    assert run_day(over) == date.today()
    assert f"{date.today():%d %b %Y}" in load_template(over).render(ask, None, True)


def test_the_hash_covers_what_the_template_writes_around_the_row() -> None:
    """The cache's key: another bos token or another day gives other tokens, where the template writes them."""
    first, second = date(2026, 2, 3), date(2026, 2, 4)
    dated, plain = make_tokenizer(chat_template=DATED), make_tokenizer()
    assert find_template(dated, first).hash != find_template(dated, second).hash
    assert find_template(plain, first).hash == find_template(plain, second).hash
    before = find_template(plain, first).hash
    plain.bos_token = "<own>"
    assert find_template(plain, first).hash != before


@pytest.mark.parametrize("wanted", [True, False, None])
def test_enable_thinking_writes_and_trains_what_llama_factory_does(wanted: bool | None, tmp_path: Path) -> None:
    make_tokenizer("<|im_start|>", "<|im_end|>").save_pretrained(tmp_path)
    asked = recipe(tmp_path, template="qwen3", enable_thinking=wanted)
    template = load_template(asked)
    for kind, expected in GOLDEN["enable_thinking"][str(wanted).lower()].items():
        fitted = template.fit(conversation(kind))
        assert [segment.text for segment in to_segments(fitted, template)] == golden_texts(expected), kind
        check_parity(fitted, template, ExampleConfig(1 << 20), kind)


@pytest.mark.parametrize("name", [None, "qwen3"])
def test_the_saved_template_prompts_without_reasoning_after_enable_thinking_false(
    name: str | None, tmp_path: Path
) -> None:
    trl_tokenizer("qwen3").save_pretrained(tmp_path / "base")
    asked = recipe(tmp_path / "base", template=name, enable_thinking=False)
    load_template(asked).tokenizer.save_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    prompt = tokenizer.apply_chat_template([Q], tokenize=False, add_generation_prompt=True)
    template = load_template(asked)
    assert prompt == to_segments(Conversation([Q, A]), template)[0].text
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    again = recipe(tmp_path / "saved")  # a run with thoughts, from what was saved
    assert (
        load_template(again).tokenizer.chat_template
        == load_template(recipe(tmp_path / "base", template=name)).tokenizer.chat_template
    )
    assert to_segments(Conversation([Q, A]), load_template(again))[1].text.startswith("<think>")


def test_mask_history_removes_the_reasoning_of_earlier_replies_as_llama_factory_does(tmp_path: Path) -> None:
    make_tokenizer("<|im_start|>", "<|im_end|>").save_pretrained(tmp_path)
    earlier = {False: "4.<|im_end|>\n", True: "<think>\nTwo and two.\n</think>\n\n4.<|im_end|>\n"}
    for keep, first in earlier.items():
        asked = recipe(tmp_path, template="qwen3", mask_history=True, preserve_thinking=keep)
        template = load_template(asked)
        segments = to_segments(template.fit(conversation("thinking")), template)
        assert segments[1].text == first
        assert segments[3].text == "<think>\nThree and three.\n</think>\n\n6.<|im_end|>\n"
        call = to_segments(template.fit(conversation("a tool call and its result")), template)
        assert call[1].text.startswith("<tool_call>") is not keep
        assert call[3].text == "<think>\n\n</think>\n\nGoethe wrote it.<|im_end|>\n"


Q, A = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
R, B = {"role": "user", "content": "R"}, {"role": "assistant", "content": "B"}
THOUGHT = {"role": "assistant", "content": "<think>\nT\n</think>\n\nA"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLS, FOUND = {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "found"}
ONE_TURN, TURNS, THINKS, THINKS_TWICE = [Q, A], [Q, A, R, B], [Q, THOUGHT], [Q, THOUGHT, R, THOUGHT]
R1_END, GLM_CALL = (
    "<｜end▁of▁sentence｜>",
    "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
)
V3_CALL = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>add\n```json\n"
XML_CALL = "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>\n"
TO_FINAL = "<|end|><|start|>assistant<|channel|>final<|message|>"

# TRL's file, its tokens, the messages -> the end of each context and what is trained after it, reply by reply
HARD: list[tuple[str, list[dict[str, Any]], list[tuple[str, str]]]] = [
    ("deepseek_r1_distill", TURNS, [("<｜Assistant｜><think>\n", f"\n</think>\n\n{text}{R1_END}") for text in "AB"]),
    ("deepseek_r1_distill", THINKS_TWICE, [("<｜Assistant｜><think>\n", f"T\n</think>\n\nA{R1_END}")] * 2),
    (
        "deepseekv3",
        [Q, CALLS, FOUND, A],
        [
            ("<think>\n", f'\n</think>\n\n{V3_CALL}{{"a": 1}}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>{R1_END}'),
            ("found<｜tool▁output▁end｜><｜tool▁outputs▁end｜>", f"A{R1_END}"),
        ],
    ),
    ("deepseekv3", TURNS, [("<｜Assistant｜><think>\n", f"\n</think>\n\n{text}{R1_END}") for text in "AB"]),
    (
        "glm4moe",
        TURNS,
        [("Q<|assistant|>", "\n<think></think>\nA<|user|>"), ("\nR<|assistant|>", "\n<think></think>\nB<|user|>")],
    ),
    (
        "glm4moe",
        [Q, CALLS, FOUND, A],
        [
            ("Q<|assistant|>", f"\n<think></think>\n{GLM_CALL}<|observation|>"),
            ("found\n</tool_response><|assistant|>", "\n<think></think>\nA<|user|>"),
        ],
    ),
    ("nemotron_3_nano", TURNS, [("assistant\n<think>\n", f"</think>{text}<|im_end|>\n") for text in "AB"]),
    ("nemotron_3_ultra", THINKS_TWICE, [("assistant\n<think>\n", "T\n</think>\n\nA<|im_end|>\n")] * 2),
    (
        "nemotron_3_super",
        [Q, CALLS, FOUND, A],
        [("<think>\n", f"</think>\n{XML_CALL}<|im_end|>\n"), ("<think>\n", "</think>A<|im_end|>\n")],
    ),
    (
        "gptoss",
        TURNS,
        [
            ("Q<|end|><|start|>assistant", "<|channel|>final<|message|>A"),  # <|end|> follows, which it does not write
            ("<|end|><|start|>user<|message|>R<|end|><|start|>assistant", "<|channel|>final<|message|>B<|return|>"),
        ],
    ),
    ("gptoss", THINKS, [("<|start|>assistant", f"<|channel|>analysis<|message|>T{TO_FINAL}A<|return|>")]),
    (
        "gptoss",
        [Q, CALLS, FOUND, A],
        [
            ("<|start|>assistant", ' to=functions.add<|channel|>commentary json<|message|>{"a": 1}<|call|>'),
            ('"found"<|end|><|start|>assistant', "<|channel|>final<|message|>A<|return|>"),
        ],
    ),
    ("qwen3_8", THINKS_TWICE, [("assistant\n<think>\n", "T\n</think>\n\nA<|im_end|>\n")] * 2),
    ("qwen3_5_nothink", THINKS, [("assistant\n<think>\n", "T\n</think>\n\nA<|im_end|>\n")]),
    (
        "gemma4_v5",
        [Q, CALLS, FOUND, A],
        [
            ("<|turn>model\n", "<|tool_call>call:add{a:1}<tool_call|><|tool_response>"),
            ("<tool_response|>", "A<turn|>\n"),
        ],
    ),
]


def trl_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer with TRL's template of that name and all tokens that it writes."""
    jinja = trl_template(name)
    tokenizer = make_tokenizer(*tokens_of(jinja), chat_template=jinja)
    if R1_END in jinja:
        tokenizer.eos_token = R1_END
    return tokenizer


@pytest.mark.parametrize(("name", "messages", "expected"), HARD)
def test_what_the_model_would_write_is_trained_whatever_the_generation_prompt_is(
    name: str, messages: list[dict[str, Any]], expected: list[tuple[str, str]]
) -> None:
    tokenizer = trl_tokenizer(name)
    template = find_template(tokenizer)
    tokenizer.eos_token = template.end_of_turn
    tools = [{"type": "function", "function": {"name": "add", "description": "", "parameters": {"properties": {}}}}]
    writes_tools = CALLS in messages and name != "deepseekv3"  # which leaves the list of tools out
    row = template.fit(Conversation(messages, tools if writes_tools else None))
    segments = to_segments(row, template)
    assert [reply.text for reply in segments[1::2]] == [reply for _, reply in expected]
    for context, (end, _) in zip(segments[::2], expected, strict=True):
        assert context.text.endswith(end)
    check_parity(row, template, ExampleConfig(1 << 20), "row")


def test_rows_of_two_turns_are_read_with_every_text_template_that_trl_ships() -> None:
    read = set()
    for file in files("trl").joinpath("chat_templates").iterdir():
        name = file.name.removesuffix(".jinja")
        if name.endswith("_training") or not file.name.endswith(".jinja"):
            continue
        tokenizer = trl_tokenizer(name)
        try:
            tokenizer.eos_token = find_template(tokenizer).end_of_turn
            template = find_template(tokenizer)
            check_parity(template.fit(Conversation(TURNS)), template, ExampleConfig(1 << 20), name)
        except (RecipeError, RowError) as error:
            assert name in ("idefics3", "llava_next", "smolvlm"), error  # whose messages are lists of parts
        else:
            read.add(name)
    assert len(read) > 35


MUSES = {"role": "assistant", "content": "<think>\nmusing\n</think>\n\nA"}
MUSES_TWICE = [Q, MUSES, R, MUSES]


@pytest.mark.parametrize("name", ["gptoss", "glm4moe", "gemma4_v5", "qwen3", "deepseek_r1_distill"])
def test_mask_history_is_the_fix_if_a_template_rewrites_earlier_turns(name: str) -> None:
    """What the refusal says was tried: the last reply is trained after its history as the template writes that."""
    tokenizer = trl_tokenizer(name)
    if name not in ("qwen3", "deepseek_r1_distill"):  # TRL's training forms of these keep the thoughts
        every = find_template(tokenizer)
        with pytest.raises(RowError, match="rewrites an earlier turn once later ones follow; set mask_history: true"):
            to_segments(every.fit(Conversation(MUSES_TWICE)), every)
    template = find_template(tokenizer, last_reasoning_only=True)
    tokenizer.eos_token = template.end_of_turn
    row = template.fit(Conversation(MUSES_TWICE))
    *context, reply = [segment.text for segment in to_segments(row, template)]
    assert "musing" not in "".join(context) and "musing" in reply and template.find_end(reply) is not None
    check_parity(row, template, ExampleConfig(1 << 20, mask_history=True), "row")


def test_a_reply_that_the_next_turns_first_token_ends_is_trained_with_it() -> None:
    """GLM-4's template: no end is written, and the model stops by writing <|user|>, or <|observation|> after a call."""
    jinja = (
        "[gMASK]<sop>{% for m in messages %}<|{{ 'observation' if m.role == 'tool' else m.role }}|>\n{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.name }}\n{{ call.function.arguments | tojson }}{% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    tokenizer = make_tokenizer("<|user|>", "<|assistant|>", "<|observation|>", chat_template=jinja)
    template = find_template(tokenizer)
    tokenizer.eos_token = template.end_of_turn
    row = Conversation([Q, CALLS, FOUND, A, R, B])
    assert [segment.text for segment in to_segments(row, template)] == [
        "[gMASK]<sop><|user|>\nQ<|assistant|>",
        '\nadd\n{"a": 1}<|observation|>',
        "\nfound<|assistant|>",
        "\nA<|user|>",
        "\nR<|assistant|>",
        "\nB<|user|>",
    ]
    check_parity(row, template, ExampleConfig(1 << 20), "row")


MISTRAL = (  # As Mistral 7B v0.3 and Nemo have it: an id of nine characters, in the call and in its result.
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% elif m.tool_calls %}[CALLS] [{% for c in m.tool_calls %}{{ (c.function | tojson)[:-1] }}, "
    "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('call ids have 9 characters') }}{% endif %}"
    '"id": "{{ c.id }}"}{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}'
    "{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}{{ raise_exception('result ids') }}{% endif %}"
    '[RESULT] {"content": {{ m.content }}, "id": "{{ m.tool_call_id }}"}[/RESULT]'
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
KIMI = (  # The id stands in place of the name.
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'tool' %}## Return of {{ m.tool_call_id }}\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<|call|>{{ c['id'] }}<|arg|>{{ c.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def two_calls(*ids: str | None) -> Conversation:
    """A reply with two calls, their results in the other order, and a third call."""

    def call(call_id: str | None) -> dict[str, Any]:
        call: dict[str, Any] = {"type": "function", "function": {"name": "clock", "arguments": {"town": "Oslo"}}}
        return {"id": call_id, **call} if call_id else call

    def result(call_id: str | None) -> dict[str, Any]:
        return {"role": "tool", "content": "1", **({"tool_call_id": call_id} if call_id else {})}

    messages: list[Any] = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "", "tool_calls": [call(ids[0]), call(ids[1])]},
        result(ids[1]),
        result(ids[0]),
        {"role": "assistant", "content": "", "tool_calls": [call(ids[2])]},
        result(ids[2]),
        {"role": "assistant", "content": "A"},
    ]
    return Conversation(messages)


@pytest.mark.parametrize(
    ("jinja", "given", "calls", "results"),
    [
        (MISTRAL, ["abcdefgh1", "abcdefgh2", "abcdefgh3"], "abcdefgh1 abcdefgh2 abcdefgh3", [1, 0, 2]),
        (MISTRAL, [None] * 3, "call00000 call00001 call00002", [0, 1, 2]),
        (MISTRAL, ["call_abcdefghijkl", "call_mno", "x"], "call00000 call00001 call00002", [1, 0, 2]),
        (KIMI, ["functions.clock:7", "clock:8", "functions.clock:9"], "functions.clock:7 clock:8 functions.clock:9", [1, 0, 2]),
        (KIMI, ["call_abc", None, "x"], "functions.clock:0 functions.clock:1 functions.clock:2", [0, 1, 2]),
    ],
)  # fmt: skip
def test_calls_and_their_results_have_ids_where_a_template_writes_them(
    jinja: str, given: list[str | None], calls: str, results: list[int]
) -> None:
    template = find_template(make_tokenizer("<|im_end|>", "</s>", chat_template=jinja))
    ids = calls.split()
    text = "".join(segment.text for segment in to_segments(template.fit(two_calls(*given)), template))
    written = [part for part in re.split(r'"id": "|"}|\|>|<\||Return of |\n', text) if part in ids]
    assert written == [ids[0], ids[1], ids[results[0]], ids[results[1]], ids[2], ids[2]]


def test_ids_are_left_out_where_a_template_writes_none() -> None:
    with_ids, without = two_calls("a", "b", "c"), two_calls(None, None, None)
    template = find_template(make_tokenizer("<|im_end|>", chat_template=shipped_template("qwen")))
    assert template.call_id is None
    assert to_segments(template.fit(with_ids), template) == to_segments(template.fit(without), template)


OSS = OWN.replace(
    "{{ m.content }}", "{% if m.thinking %}<analysis>{{ m.thinking }}</analysis>{% endif %}{{ m.content }}"
)


@pytest.mark.parametrize(
    ("jinja", "reply"),
    [
        (shipped_template("qwen"), "<think>\nR\n</think>\n\nA<|im_end|>\n"),
        (shipped_template("qwen3"), "<think>\nR\n</think>\n\nA<|im_end|>\n"),
        (OSS, "<analysis>R</analysis>A</own>"),
        (OSS.replace("thinking", "reasoning"), "<analysis>R</analysis>A</own>"),
    ],
)
def test_reasoning_is_written_as_the_template_does(jinja: str, reply: str) -> None:
    template = find_template(make_tokenizer("<|im_end|>", chat_template=jinja))
    thinks: Message = {"role": "assistant", "content": "A", "reasoning_content": "R"}
    segments = to_segments(template.fit(Conversation([{"role": "user", "content": "Q"}, thinks])), template)
    assert segments[-1].text == reply


def test_a_template_that_leaves_out_reasoning_is_an_error_with_the_fix() -> None:
    strips = OWN.replace("m.content", "m.content.split('</think>')[-1]")
    template = find_template(make_tokenizer("<|im_end|>", chat_template=strips))
    thinks: Message = {"role": "assistant", "content": "A", "reasoning_content": "R"}
    with pytest.raises(RowError, match="drops this text of the assistant turn: 'R'; use another template"):
        to_segments(template.fit(Conversation([{"role": "user", "content": "Q"}, thinks])), template)


@pytest.mark.parametrize("content", ['{"time": "12:30"}', 'a\n"b"\\', "日本 é"])
def test_a_result_may_be_written_as_json_text(content: str) -> None:
    """Llama 3.1's template does, and gpt-oss's."""
    jinja = OWN.replace(
        "{{ m.content }}", "{% if m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}"
    )
    tokenizer = make_tokenizer(chat_template=jinja)
    tokenizer.eos_token = "</own>"
    template = find_template(tokenizer)
    messages: list[Message] = [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
        {"role": "tool", "content": content},
        {"role": "assistant", "content": "B"},
    ]
    assert json.dumps(content, ensure_ascii=False) in to_segments(Conversation(messages), template)[2].text
    check_parity(Conversation(messages), template, ExampleConfig(1 << 20), "row")


SEARCH = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_an_empty_default_system_renders_no_system_turn(name: str, tmp_path: Path) -> None:
    """As in LLaMA-Factory; with tools, the turn has only their text."""
    ends = re.findall(r"<[^<>\s]+>", GOLDEN["templates"][name]["conversations"]["one turn"][-1][1])
    make_tokenizer(*sorted({*ends} - {"<think>", "</think>"}), chat_template=OWN).save_pretrained(tmp_path)
    usual, empty = (
        load_template(recipe(tmp_path, template=name, **keys), DAY) for keys in ({}, {"default_system": ""})
    )
    table = tomllib.loads(files("arpo_trl.data").joinpath("templates/names.toml").read_text(encoding="utf-8"))
    own = table.get(name, {})
    system = (table.get(own.get("like"), {}) | own).get("default_system") or ("You are Qwen" if name == "qwen" else "")
    row = Conversation([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}])
    before, after = (to_segments(row, template)[0].text for template in (usual, empty))
    assert (before == after) == (not system)
    assert not system or (system in before and system not in after)
    other = Conversation([{"role": "system", "content": "S"}, *row.messages])
    assert to_segments(other, usual) == to_segments(other, empty)


def test_an_empty_default_system_of_qwen_leaves_the_tools_text(tmp_path: Path) -> None:
    make_tokenizer("<|im_start|>", "<|im_end|>").save_pretrained(tmp_path)
    empty = load_template(recipe(tmp_path, template="qwen", default_system=""))
    row = Conversation([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}])
    assert to_segments(row, empty)[0].text == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    text = to_segments(Conversation(row.messages, [SEARCH]), empty)[0].text
    assert text.startswith("<|im_start|>system\n\n\n# Tools\n\n") and "Alibaba" not in text


def test_an_empty_default_system_is_an_error_if_the_template_always_writes_one(tmp_path: Path) -> None:
    make_tokenizer("<|im_start|>", "<|im_end|>", chat_template=shipped_template("qwen")).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="default_system: an empty one is not supported by this chat template"):
        load_template(recipe(tmp_path, default_system=""))
    make_tokenizer(chat_template=OWN).save_pretrained(tmp_path)
    assert load_template(recipe(tmp_path, default_system="")).end_of_turn == "</own>"
    for inside_or_bare in ("vicuna", "mistral"):
        assert load_template(recipe(tmp_path, template=inside_or_bare, default_system="")).end_of_turn == "</s>"
