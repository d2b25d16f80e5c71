"""A small template for each behavior met in 160 public chat templates, and what holds for every row it renders.

docs/reference/templates.md lists which family has which.
"""

from __future__ import annotations

import json
from datetime import date
from itertools import groupby, product
from pathlib import Path
from typing import Any, cast

import pytest
from compare_templates import make_tokenizer

from arpo_trl.data.encode import Encoder, check_parity, encode_rows
from arpo_trl.data.files import Row
from arpo_trl.data.labels import IGNORED, ExampleConfig, to_examples
from arpo_trl.data.messages import Conversation, Message
from arpo_trl.data.prepare import prepare_datasets
from arpo_trl.data.registry import DatasetInfo
from arpo_trl.data.segments import to_segments
from arpo_trl.data.template import Template
from arpo_trl.data.template_probe import find_template, set_thinking_default
from arpo_trl.data.tokenizer import load_template, make_tokenize
from arpo_trl.errors import DatasetError, RecipeError, RowError
from arpo_trl.recipe import Recipe

OPEN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role != 'assistant' %}{{ m.content }}{% else %}"
TOOLS = "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
CLOSE = "{% endif %}<|im_end|>\n{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n%s{% endif %}"


def jinja(reply: str, prompt: str = "", before: str = "") -> str:
    return before + TOOLS + OPEN + reply + CALLS + CLOSE + PROMPT.replace("%s", prompt)


TEMPLATES = {
    # Kimi K3: each part of a reply ends with a token, and the turn with another.
    "parts": jinja(
        "<|open|>think<|sep|>{{ m.reasoning_content or '' }}<|close|><|open|>answer<|sep|>{{ m.content }}"
        + CALLS
        + "<|close|>{% if false %}",
        "<|open|>think<|sep|>",
    ).replace("{% if false %}" + CALLS + "{% endif %}", "{% endif %}"),
    # Command R7B, Cohere 2 MoE: a token ends the text, another one the turn.
    "two ends": jinja("<|text|>{{ m.content }}<|end_text|>"),
    # Solar Open: one token ends the reasoning and the turn.
    "one end for both": jinja(
        "{% if m.reasoning_content %}<|think|>{{ m.reasoning_content }}<|im_end|>{% endif %}{{ m.content }}"
    ),
    # GigaChat 3: the token that ends a turn also precedes a call.
    "separator before calls": jinja("{{ m.content }}{% if m.tool_calls %}<|im_end|>\n{% endif %}"),
    # Kimi K2 Thinking: reasoning only before calls, an empty block in other replies.
    "reasoning before calls": jinja(
        "<think>{{ m.reasoning_content if m.reasoning_content and m.tool_calls else '' }}</think>{{ m.content }}"
    ),
    # Gemma 4: a channel, only before calls; the prompt closes it by default, and no reply has that.
    "channel before calls": jinja(
        "{% if m.reasoning and m.tool_calls %}<|channel>thought\n{{ m.reasoning }}<channel|>{% endif %}{{ m.content }}",
        "{% if not enable_thinking %}<|channel>thought\n<channel|>{% endif %}",
    ),
    # DeepSeek V3.2 and V4: reasoning only with a switch, which the generation prompt follows.
    "switch": jinja(
        "{% if thinking and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% else %}</think>{% endif %}"
        "{{ m.content }}",
        "{{ '<think>' if thinking else '</think>' }}",
    ),
    # DeepSeek V3.1: the switch changes the prompt only, and the reasoning in the text is removed.
    "switch of the prompt": jinja(
        "</think>{{ m.content.split('</think>')[-1] }}", "{{ '<think>' if thinking else '</think>' }}"
    ),
    # DeepSeek R1: the prompt opens a block, and the template writes none.
    "only in the prompt": jinja("{{ m.content.split('</think>')[-1] }}", "<think>\n"),
    # MiniMax M2: the prompt opens a block, and replies without reasoning have none.
    "key after an open prompt": jinja(
        "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}",
        "<think>\n",
    ),
    # Nemotron Nano v2: the last reply opens a block, and no key holds its reasoning.
    "opened": jinja("{% if loop.last %}<think>\n{% endif %}{{ m.content }}", "<think>\n"),
    # Ministral 3: reasoning is a chunk of the content.
    "chunks": jinja(
        "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
        "{% if part.type == 'thinking' %}[THINK]{{ part.thinking }}[/THINK]{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}{% endif %}"
    ),
    # gpt-oss, GLM: another token ends a call.
    "end of a call": jinja("{{ m.content }}").replace(
        "{% endif %}<|im_end|>\n", "{% endif %}{{ '<|call|>' if m.tool_calls else '<|im_end|>' }}\n"
    ),
    # gpt-oss, Apertus: once another turn follows, the end token is replaced.
    "end is replaced": jinja("{{ m.content }}").replace(
        "{% endif %}<|im_end|>\n",
        "{% endif %}{{ '<|im_end|>' if loop.last or m.role != 'assistant' else '<|end_text|>' }}",
    ),
    # Qwen 3: reasoning from a key.
    "key": jinja("{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"),
    # Qwen 2.5: no reasoning.
    "plain": jinja("{{ m.content }}"),
}
TOKENS = (
    "<|im_start|> <|im_end|> <|open|> <|sep|> <|close|> <|text|> <|end_text|> <|think|> <|channel> <channel|> [THINK] "
    "[/THINK] <|call|>"
).split()
NEVER = {  # the rows that a template can't render right, with the reason
    "one end for both": "contains '<|im_end|>', at which the model would stop",
    "separator before calls": "contains '<|im_end|>', at which the model would stop",
}
SYSTEM: Message = {"role": "system", "content": "system text"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def find(name: str) -> Template:
    tokenizer = make_tokenizer(*TOKENS, chat_template=TEMPLATES[name])
    tokenizer.eos_token = find_template(tokenizer, date(2026, 11, 29)).end_of_turn
    template = find_template(tokenizer, date(2026, 11, 29))
    tokenizer.chat_template = set_thinking_default(template)
    return template


def row(reasoning: bool, calls: bool, system: bool, turns: int) -> Conversation:
    messages: list[Message] = [SYSTEM] if system else []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"question {turn}"})
        if calls:
            call = {"type": "function", "function": {"name": "add", "arguments": {"a": turn}}}
            asks: Message = {"role": "assistant", "content": f"text {turn}", "tool_calls": [call]}
            messages += [asks | cast(Message, {"reasoning_content": f"plan {turn}"}) if reasoning else asks]
            messages.append({"role": "tool", "content": f"result {turn}"})
        reply: Message = {"role": "assistant", "content": f"answer {turn}"}
        messages.append(reply | cast(Message, {"reasoning_content": f"idea {turn}"}) if reasoning else reply)
    return Conversation(messages, [TOOL] if calls else None)


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_row_ends_where_the_model_stops_and_has_its_reasoning_once(name: str) -> None:
    template = find(name)
    tokenizer, tokenize = template.tokenizer, make_tokenize(template.tokenizer)
    ends = {tokenizer.convert_tokens_to_ids(end) for end in template.turn_ends}
    for shape in product((False, True), (False, True), (False, True), (1, 2)):
        reasoning, calls, _, turns = shape
        given = row(*shape)
        if name in NEVER and (reasoning if name == "one end for both" else calls):
            with pytest.raises(RowError) as error:
                to_segments(template.fit(given), template)
            assert NEVER[name] in str(error.value)
            continue
        fitted = template.fit(given)
        segments = to_segments(fitted, template)
        check_parity(fitted, template, ExampleConfig(1 << 20), str(shape))
        (example,) = to_examples([segments], tokenize, ExampleConfig(1 << 20))
        assert len(segments) == 2 * turns * (1 + calls)
        for reply in segments[1::2]:
            if reply.end is not None:
                assert reply.end in ends and name == "end is replaced"
                continue
            ids = next(iter(tokenize([reply.text]))).ids
            (end,) = [at for at, token in enumerate(ids) if token in ends]
            assert tokenizer.decode(ids[end + 1 :]).strip() == ""
        runs = groupby(example.labels, lambda label: label != IGNORED)
        trained = [list(run) for is_trained, run in runs if is_trained]
        assert [sum(label in ends for label in run) for run in trained] == [1] * turns * (1 + calls)
        text = "".join(segment.text for segment in segments[1::2])
        for turn in range(turns):
            assert text.count(f"idea {turn}") == reasoning
            assert text.count(f"plan {turn}") == (reasoning and calls)
        for tag in ("<think>", "</think>", "[THINK]", "<|channel>", "<channel|>"):
            assert text.count(tag) <= turns * (1 + calls), tag


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"one end for both"}))
@pytest.mark.parametrize("reasoning", [False, True])
def test_the_prompt_is_the_generation_prompt_of_inference(name: str, reasoning: bool) -> None:
    """It is rendered with the saved template; a row without reasoning, with the switch off."""
    template = find(name)
    fitted = template.fit(row(reasoning, False, True, 1))
    prompt, reply = (segment.text for segment in to_segments(fitted, template))
    switch: dict[str, Any] = {} if reasoning or not template.thinking_switch else {template.thinking_switch: False}
    apply: Any = template.tokenizer.apply_chat_template
    assert prompt == apply(fitted.messages[:-1], add_generation_prompt=True, tokenize=False, **switch)
    assert ("idea 0" in reply) == reasoning


@pytest.mark.parametrize(
    ("name", "reply"),
    [
        ("reasoning before calls", "<think>idea 0</think>answer 0<|im_end|>\n"),
        ("channel before calls", "<|channel>thought\nidea 0<channel|>answer 0<|im_end|>\n"),
        ("switch", "idea 0</think>answer 0<|im_end|>\n"),
        ("switch of the prompt", "idea 0</think>answer 0<|im_end|>\n"),
        ("only in the prompt", "idea 0\n</think>\n\nanswer 0<|im_end|>\n"),
        ("key after an open prompt", "idea 0\n</think>\n\nanswer 0<|im_end|>\n"),
        ("opened", "idea 0\n</think>\n\nanswer 0<|im_end|>\n"),
        ("chunks", "[THINK]idea 0[/THINK]answer 0<|im_end|>\n"),
        ("parts", "idea 0<|close|><|open|>answer<|sep|>answer 0<|close|><|im_end|>\n"),
        ("plain", "<think>\nidea 0\n</think>\n\nanswer 0<|im_end|>\n"),
    ],
)
def test_reasoning_has_the_templates_notation(name: str, reply: str) -> None:
    template = find(name)
    assert to_segments(template.fit(row(True, False, False, 1)), template)[1].text == reply
    own = Conversation(
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>\nidea 0\n</think>\n\nanswer 0"}]
    )
    assert to_segments(template.fit(own), template)[1].text == reply


@pytest.mark.parametrize(
    ("name", "prompt", "reply"),
    [
        ("channel before calls", "<|channel>thought\n<channel|>", "answer 0<|im_end|>\n"),
        ("switch of the prompt", "</think>", "answer 0<|im_end|>\n"),
        ("only in the prompt", "<think>\n", "\n</think>\n\nanswer 0<|im_end|>\n"),
        ("key after an open prompt", "<think>\n", "\n</think>\n\nanswer 0<|im_end|>\n"),
        ("opened", "<think>\n", "\n</think>\n\nanswer 0<|im_end|>\n"),
        ("parts", "<|open|>think<|sep|>", "<|close|><|open|>answer<|sep|>answer 0<|close|><|im_end|>\n"),
        ("plain", "", "answer 0<|im_end|>\n"),
    ],
)
def test_a_reply_without_reasoning_closes_what_its_prompt_opens(name: str, prompt: str, reply: str) -> None:
    template = find(name)
    for turns in (1, 2):  # also if another turn follows
        asked, replied = to_segments(template.fit(row(False, False, False, turns)), template)[:2]
        assert asked.text.endswith(f"<|im_start|>assistant\n{prompt}")
        assert replied.text == reply


@pytest.mark.parametrize("reasoning", [False, True])
def test_the_saved_template_prompts_for_reasoning_only_if_a_row_has_it(
    reasoning: bool, tmp_path: Path, tiny_model: Path
) -> None:
    (tmp_path / "t.jinja").write_text(TEMPLATES["switch of the prompt"], encoding="utf-8")
    rows = [{"messages": json.loads(json.dumps(row(reasoning, False, False, 1).messages))}] * 2
    (tmp_path / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    registry = {"rows": {"file_name": "rows.json", "formatting": "openai"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(registry), encoding="utf-8")
    recipe = Recipe(
        model_name_or_path=str(tiny_model),
        output_dir=str(tmp_path / "run"),
        template=str(tmp_path / "t.jinja"),
        dataset=["rows"],
        dataset_dir=str(tmp_path),
    )
    data = prepare_datasets(recipe, load_template(recipe))
    apply: Any = data.template.tokenizer.apply_chat_template
    asked = apply([{"role": "user", "content": "q"}], add_generation_prompt=True, tokenize=False)
    assert asked.endswith("<think>" if reasoning else "</think>")
    (trained,) = {tuple(line["input_ids"]) for line in data.train}
    assert ("<think>idea 0</think>" in data.template.tokenizer.decode(trained)) is reasoning
    assert ("rows: thinking: on for 2 rows with reasoning, off for the others" in data.audit.lines()) is reasoning


def test_a_template_that_always_writes_its_generation_prompt_is_an_error() -> None:
    """vLLM's for Phi-4-mini and ToolACE: its last token would become the end token."""
    always = jinja("{{ m.content }}").replace("{% if add_generation_prompt %}", "{% if true %}")
    with pytest.raises(RecipeError, match="template: writes its generation prompt after every reply; use another"):
        find_template(make_tokenizer(*TOKENS, chat_template=always))


@pytest.mark.parametrize("stops", [(), ("</call>",)])
def test_a_call_whose_end_is_left_out_once_its_result_follows_is_trained_with_it(stops: tuple[str, ...]) -> None:
    """Apertus: its base also stops at the end of a call; another base would not stop."""
    text = TEMPLATES["plain"].replace("{% endif %}<|im_end|>\n", "{% endif %}")
    text = text.replace(CALLS, CALLS + "{% if loop.last or not m.tool_calls %}<|im_end|>\n{% endif %}")
    text = text.replace("{{ m.content }}{% else %}", "{{ m.content }}<|im_end|>\n{% else %}")
    tokenizer = make_tokenizer(*TOKENS, "</call>", chat_template=text)
    tokenizer.eos_token = "<|im_end|>"
    template = find_template(tokenizer, stops=stops)
    fitted = template.fit(row(False, True, False, 1))
    segments = to_segments(fitted, template)
    assert segments[1].text.endswith("</call>") and segments[2].text.startswith("<|im_start|>tool")
    check_parity(fitted, template, ExampleConfig(1 << 20), "row")
    (example,) = to_examples([segments], make_tokenize(tokenizer), ExampleConfig(1 << 20))
    after = len(next(iter(make_tokenize(tokenizer)([segments[0].text + segments[1].text]))).ids)
    assert example.labels[after] == (IGNORED if stops else tokenizer.eos_token_id)
    assert tokenizer.decode([example.input_ids[after]]) == "<|im_start|>"


def test_reasoning_that_a_template_writes_twice_drops_the_row() -> None:
    template = find("key")
    twice = TEMPLATES["key"].replace("{{ m.content }}{% for c", "{{ m.reasoning_content }}{{ m.content }}{% for c")
    template.tokenizer.chat_template = twice
    with pytest.raises(RowError, match="the chat template writes the reasoning 2 times: 'idea 0'"):
        broken = find_template(template.tokenizer)
        to_segments(broken.fit(row(True, False, False, 1)), broken)


def encode(rows: list[Any], name: str) -> list[Any]:
    return encode_values([{"messages": messages} for messages in rows], name)


def encode_values(values: list[Any], name: str, **entry: bool) -> list[Any]:
    info = DatasetInfo.read("rows", Path("x"), {"file_name": "x", "formatting": "openai", **entry})
    recipe = Recipe(model_name_or_path="unused", output_dir="unused")
    read = (Row(f"rows:{number}", value) for number, value in enumerate(values, 1))
    return list(encode_rows(read, Encoder(info, recipe, find(name))))


def test_each_reply_of_a_pair_is_trained_with_its_end_even_if_the_template_replaces_it() -> None:
    first, second, other = ({"role": "assistant", "content": text} for text in ("one", "two", "three"))
    chosen = [first, {"role": "user", "content": "more"}, second]
    value = {"messages": [{"role": "user", "content": "q"}], "chosen": chosen, "rejected": other}
    (pair,) = encode_values([value], "end is replaced", ranking=True)
    end = find("end is replaced").tokenizer.eos_token_id
    at = pair["seq_lengths"][0]
    assert [list(side).count(end) for side in (pair["labels"][:at], pair["labels"][at:])] == [2, 1]


def test_a_reply_with_an_end_token_in_its_own_text_is_dropped_with_its_line() -> None:
    wrong = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a<|im_end|>b"}]
    good = json.loads(json.dumps(row(False, False, False, 1).messages))
    outcomes = [(row["source"], row["outcome"], row["reason"]) for row in encode([good, wrong], "plain")]
    reason = "reply 1 contains '<|im_end|>', at which the model would stop"
    assert outcomes == [("rows:1", "intact", ""), ("rows:2", "dropped", reason)]


def test_a_template_that_breaks_the_end_of_every_row_stops_the_run() -> None:
    rows = [json.loads(json.dumps(row(True, False, False, 1).messages))] * 3
    with pytest.raises(DatasetError, match=r"rows:1: reply 1 contains .*; the same in all of the first 3 rows"):
        encode(rows, "one end for both")
