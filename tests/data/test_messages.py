"""One literal row in, one literal conversation out; one bad row in, its reason out."""

from datetime import datetime
from typing import Any

import pytest

from arpo_trl.data.audit import Counts
from arpo_trl.data.messages import Conversation, to_conversation
from arpo_trl.data.registry import COLUMNS, DatasetInfo
from arpo_trl.errors import RowError

CALL = {"name": "add", "arguments": {"a": 1}}
TOOL_CALL = {"type": "function", "function": CALL}


def info(formatting: str, **changes: Any) -> DatasetInfo:
    """A dataset that names every column of its format."""
    columns = {key: column or key for key, column in COLUMNS[formatting].items()}
    return DatasetInfo(**{"formatting": formatting, "columns": columns, **changes})


def sharegpt(*turns: dict[str, Any], **row: Any) -> Conversation:
    return to_conversation({"conversations": list(turns), **row}, info("sharegpt"))


def turn(role: str, value: Any, **more: Any) -> dict[str, Any]:
    return {"from": role, "value": value, **more}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, *calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **({"tool_calls": list(calls)} if calls else {})}


def untrained(found: Conversation) -> list[int]:
    return [position for position, message in enumerate(found.messages) if not message.get("trained", True)]


def test_alpaca_joins_instruction_and_input() -> None:
    row = {
        "instruction": "Add.",
        "input": "1 and 2",
        "output": "3",
        "history": [["Hi", "Hello"]],
        "system": "Be brief.",
    }
    assert to_conversation(row, info("alpaca")).messages == [
        {"role": "system", "content": "Be brief."},
        user("Hi"),
        assistant("Hello"),
        user("Add.\n1 and 2"),
        assistant("3"),
    ]


def test_alpaca_needs_no_input() -> None:
    assert to_conversation({"instruction": "Add.", "output": ""}, info("alpaca")).messages == [
        user("Add."),
        assistant(""),
    ]
    assert to_conversation({"instruction": "", "input": "x", "output": "y"}, info("alpaca")).messages[0] == user("x")


def test_sharegpt_has_tools_calls_and_observations() -> None:
    found = sharegpt(
        turn("system", "S"),
        turn("human", "Q"),
        turn("function_call", '<think>hm</think>\n{"name": "add", "arguments": {"a": 1}}'),
        turn("observation", "1"),
        turn("observation", "2"),
        turn("gpt", "A"),
        tools='[{"name": "add"}]',
    )
    assert found.messages == [
        {"role": "system", "content": "S"},
        user("Q"),
        assistant("<think>hm</think>", TOOL_CALL),
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        assistant("A"),
    ]
    assert found.tools == [{"type": "function", "function": {"name": "add"}}]


def test_a_turn_may_hold_several_calls() -> None:
    value = '[{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": "{\\"a\\": 1}"}]'
    assert sharegpt(turn("human", "Q"), turn("function_call", value)).messages[1] == assistant(
        "", TOOL_CALL, TOOL_CALL
    )


@pytest.mark.parametrize(
    ("text", "expected"), [("", ""), ("Look.\n", "Look."), ("<think>hm</think>\n", "<think>hm</think>")]
)
def test_calls_may_be_in_the_tags_that_templates_write(text: str, expected: str) -> None:
    """As LLaMA-Factory reads the first of them."""
    tagged = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
    for times in (1, 2):
        message = sharegpt(turn("human", "Q"), turn("function_call", text + tagged * times)).messages[1]
        assert message == assistant(expected, *[TOOL_CALL] * times)


def test_the_assistant_may_begin() -> None:
    assert sharegpt(turn("gpt", "Hi"), turn("human", "Q"), turn("gpt", "A")).messages[0] == assistant("Hi")


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_no_tools_in_any_spelling(tools: Any) -> None:
    assert sharegpt(turn("human", "Q"), turn("gpt", "A"), tools=tools).tools is None


@pytest.mark.parametrize("tools", ['{"name": "f"}', {"type": "function", "function": {"name": "f"}}, [{"name": "f"}]])
def test_tools_in_any_spelling(tools: Any) -> None:
    found = sharegpt(turn("human", "Q"), turn("gpt", "A"), tools=tools).tools
    assert found == [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize("system", [None, ""])
def test_an_empty_system_column_is_no_system_message(system: str | None) -> None:
    assert sharegpt(turn("human", "Q"), turn("gpt", "A"), system=system).messages[0] == user("Q")


def test_an_empty_system_message_is_none() -> None:
    """The default system message stands in for it, a system column is not in its way, and no position shifts."""
    turns = [
        turn("system", ""),
        turn("human", "Q"),
        turn("gpt", "A", loss=False),
        turn("human", "R"),
        turn("gpt", "B"),
    ]
    bare = sharegpt(*turns)
    assert (bare.messages[0], untrained(bare)) == (user("Q"), [1])
    given = to_conversation({"conversations": turns}, info("sharegpt"), default_system="D")
    assert (given.messages[0], untrained(given)) == ({"role": "system", "content": "D"}, [2])
    assert sharegpt(*turns, system="S").messages[0] == {"role": "system", "content": "S"}


def test_a_call_is_found_behind_any_number_of_brackets() -> None:
    value = "[1], " * 100_000 + '{"name": "add", "arguments": {"a": 1}}'
    assert sharegpt(turn("human", "Q"), turn("function_call", value)).messages[1]["tool_calls"] == [TOOL_CALL]


def test_the_default_system_is_for_rows_without_one() -> None:
    row = {"conversations": [turn("gpt", "A", loss=False), turn("human", "Q"), turn("gpt", "B")]}
    found = to_conversation(row, info("sharegpt"), default_system="D")
    assert found.messages[0] == {"role": "system", "content": "D"}
    assert untrained(found) == [1]
    row["system"] = "S"  # type: ignore[assignment]
    assert to_conversation(row, info("sharegpt"), default_system="D").messages[0]["content"] == "S"


def test_openai_messages() -> None:
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", **TOOL_CALL}], "weight": 0},
            {"role": "tool", "content": "7", "tool_call_id": "1", "name": "add"},
            {"role": "assistant", "content": "A", "reasoning_content": "R", "weight": 1},
        ],
        "tools": [{"type": "function", "function": {"name": "add"}}],
    }
    found = to_conversation(row, info("openai"))
    assert found.messages == [
        user("ab"),
        {**assistant("", {"id": "1", **TOOL_CALL}), "trained": False},
        {"role": "tool", "content": "7", "tool_call_id": "1", "name": "add"},
        {"role": "assistant", "content": "A", "reasoning_content": "R"},
    ]
    assert found.unread == {}


def test_messages_may_be_json_text_as_in_a_csv() -> None:
    row = {"conversations": '[{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]'}
    assert to_conversation(row, info("sharegpt")).messages == [user("Q"), assistant("A")]


# Rows as other tools write them


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_several_keys(key: str) -> None:
    row = {"messages": [user("Q"), {**assistant("A"), key: "R"}]}
    assert to_conversation(row, info("openai")).messages[1] == {**assistant("A"), "reasoning_content": "R"}


def test_vllms_two_keys_for_the_same_reasoning_are_read_once() -> None:
    found = to_conversation(
        {"messages": [{**assistant("A"), "reasoning": "R", "reasoning_content": "R", "thinking": True}]},
        info("openai"),
    )
    assert found.messages == [{**assistant("A"), "reasoning_content": "R"}]
    assert found.unread == {("ignored message key", "thinking"): 1}


@pytest.mark.parametrize("key", ["loss", "train", "loss_mask", "weight"])
def test_a_turn_can_be_masked_with_several_keys(key: str) -> None:
    for value, positions in ((0, [1]), (False, [1]), (0.0, [1]), (1, []), (True, []), (None, [])):
        found = sharegpt(turn("human", "Q"), turn("gpt", "A", **{key: value}))
        assert (untrained(found), found.unread) == (positions, {})


def test_a_weight_of_a_half_is_ignored() -> None:
    found = sharegpt(turn("human", "Q"), turn("gpt", "A", weight=0.5))
    assert (untrained(found), found.unread) == ([], {("ignored message key", "weight"): 1})


def test_the_nulls_of_an_sdk_are_absent() -> None:
    nulls = dict.fromkeys(("refusal", "function_call", "tool_calls", "audio", "name", "reasoning_content", "weight"))
    found = to_conversation({"messages": [user("Q"), {**assistant("A"), **nulls}], "tools": None}, info("openai"))
    assert (found.messages, found.tools, found.unread) == ([user("Q"), assistant("A")], None, {})


def test_openais_forms_of_text_and_calls() -> None:
    turns = [
        {"role": "developer", "content": [{"type": "input_text", "text": "S"}]},
        {"role": "system", "content": "T"},
        {"role": "user", "content": [{"type": "input_text", "text": "Q"}]},
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
        {"role": "function", "name": "add", "content": "7"},
        {"role": "assistant", "content": None, "refusal": "No."},
        {"role": "user", "content": "R"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "A"}, {"type": "refusal", "refusal": "B"}]},
    ]
    assert to_conversation({"messages": turns}, info("openai")).messages == [
        {"role": "system", "content": "S\n\nT"},
        user("Q"),
        assistant("", TOOL_CALL),
        {"role": "tool", "name": "add", "content": "7"},
        assistant("No."),
        user("R"),
        assistant("AB"),
    ]


def test_items_of_the_responses_api() -> None:
    """A reply's thought, text and calls are one message; results answer them by their ids."""
    call, answer = {"type": "function_call", "name": "add"}, {"type": "function_call_output"}
    items = [
        {"role": "user", "content": "Q"},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "R"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I add."}]},
        {**call, "call_id": "c1", "arguments": '{"a": 1}'},
        {**call, "call_id": "c2", "arguments": ""},
        {**answer, "call_id": "c1", "output": "7"},
        {**answer, "call_id": "c2", "output": [{"type": "input_text", "text": "8"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "A"}]},
    ]
    tools = [{"type": "function", "name": "add", "parameters": {}}]
    found = to_conversation({"messages": items, "tools": tools}, info("openai"))
    none = {"type": "function", "function": {"name": "add", "arguments": {}}}
    assert found.messages == [
        user("Q"),
        {**assistant("I add.", {"id": "c1", **TOOL_CALL}, {"id": "c2", **none}), "reasoning_content": "R"},
        {"role": "tool", "content": "7", "tool_call_id": "c1"},
        {"role": "tool", "content": "8", "tool_call_id": "c2"},
        assistant("A"),
    ]
    assert found.tools == [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    assert found.unread == {("ignored message key", "id"): 1}


def test_empty_reasoning_is_none() -> None:
    """OpenAI hides it: `summary` is empty. Others write it as text."""
    for summary, thought in (([], {}), ("", {}), ("R", {"reasoning_content": "R"})):
        items = [{"type": "reasoning", "summary": summary}, {"type": "message", "role": "assistant", "content": "A"}]
        assert to_conversation({"messages": items}, info("openai")).messages == [{**assistant("A"), **thought}]


def test_anthropics_blocks() -> None:
    use = {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "7"}]}
    thinking = {"type": "thinking", "thinking": "R", "signature": "x"}
    row = {
        "system": "S",
        "messages": [
            {"role": "user", "content": "Q"},
            {"role": "assistant", "content": [thinking, {"type": "text", "text": "I add."}, use]},
            {"role": "user", "content": [result]},
            {"role": "assistant", "content": [{"type": "text", "text": "A"}, use]},
            {"role": "user", "content": [result, {"type": "text", "text": "Thanks"}]},
            {"role": "assistant", "content": "B"},
        ],
        "tools": [{"name": "add", "input_schema": {"type": "object"}}],
    }
    found = to_conversation(row, info("openai"))
    call, answer = {"id": "t1", **TOOL_CALL}, {"role": "tool", "content": "7", "tool_call_id": "t1"}
    assert found.messages == [
        {"role": "system", "content": "S"},
        user("Q"),
        {**assistant("I add.", call), "reasoning_content": "R"},
        answer,
        assistant("A", call),
        answer,
        user("Thanks"),
        assistant("B"),
    ]
    assert found.tools == [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def test_tools_are_found_where_people_put_them() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    in_a_message = sharegpt(turn("system", "S", tools=tools), turn("human", "Q"), turn("gpt", "A"))
    row = {"conversations": [turn("human", "Q"), turn("gpt", "A")], "functions": [{"name": "f"}]}
    columns = {"messages": "conversations", "tools": "functions"}
    in_a_column = to_conversation(row, info("sharegpt", columns=columns))
    in_both = sharegpt(
        turn("system", "S", functions='[{"name": "f"}]'), turn("human", "Q"), turn("gpt", "A"), tools=tools
    )
    for found in (in_a_message, in_a_column, in_both):
        assert (found.tools, found.unread) == (tools, {})


def test_leading_system_messages_are_one() -> None:
    found = sharegpt(turn("system", "S"), turn("system", ""), turn("system", "T", loss=False), turn("gpt", "A"))
    assert found.messages == [{"role": "system", "content": "S\n\nT", "trained": False}, assistant("A")]


def test_a_system_message_overrides_a_system_column() -> None:
    turns = [turn("system", "S"), turn("human", "Q"), turn("gpt", "A")]
    found = to_conversation({"conversations": turns, "system": "T"}, info("sharegpt"), default_system="D")
    assert found.messages[0] == {"role": "system", "content": "S"}
    assert found.unread == {("ignored column", "system"): 1}
    assert sharegpt(*turns, system="S").unread == {}


@pytest.mark.parametrize("column", ["tools", "functions", "system", "score", "id"])
def test_an_ignored_column_is_counted(column: str) -> None:
    """LLaMA-Factory ignores it, too, but does not report it."""
    bare = info("sharegpt", columns={"messages": "conversations"})
    found = to_conversation({"conversations": [turn("gpt", "A")], column: ["search, python"]}, bare)
    key = "tools" if column == "functions" else column
    line = f'"columns": {{"messages": "conversations", "{key}": "{column}"}}'
    fix = f"; to read it, set {line} in dataset_info.json" * (key in ("tools", "system"))
    assert found.unread == {("ignored column", column): 1}
    counts = Counts(notes={"ignored column": {column: 1234}})
    assert counts.describe_notes(bare) == [f"ignored column `{column}` (1,234 rows){fix}"]
    assert (found.messages, found.tools) == ([assistant("A")], None)


def test_an_instruction_of_null_is_an_empty_one() -> None:
    row = {"instruction": None, "input": "2+2?", "output": "4"}
    assert to_conversation(row, info("alpaca")).messages[0] == user("2+2?")


def test_newlines_before_a_call_are_tokens() -> None:
    """Templates write one newline between text and call; LLaMA-Factory keeps the second that stands in the row."""
    for text, content in (("a\n\n", "a\n"), ("a\n", "a"), ("a", "a"), ("a ", "a "), ("\n\n", "")):
        found = sharegpt(turn("human", "Q"), turn("function_call", text + '{"name": "add", "arguments": {"a": 1}}'))
        assert found.messages[1] == assistant(content, TOOL_CALL)


def chat(*turns: Any, **row: Any) -> dict[str, Any]:
    return {"conversations": list(turns), **row}


Q, A = turn("human", "Q"), turn("gpt", "A")
BAD_ROWS: dict[str, tuple[str, Any, str]] = {
    "a list": ("sharegpt", [1], "expected an object, found a list"),
    "null": ("sharegpt", None, "expected an object, found null"),
    "text": ("sharegpt", "hello", "expected an object, found a string"),
    "no conversation": ("sharegpt", {"messages": []}, "missing field: conversations"),
    "a conversation of null": ("sharegpt", {"conversations": None}, "missing field: conversations"),
    "an empty conversation": ("sharegpt", chat(), "empty conversation: conversations has no messages"),
    "a conversation that is an object": (
        "sharegpt",
        {"conversations": {"from": "human"}},
        "wrong type: conversations is an object, expected a list of messages",
    ),
    "a conversation that is prose": (
        "sharegpt",
        {"conversations": "Q: A:"},
        "wrong type: conversations: not JSON (Expecting value at column 1): 'Q: A:'",
    ),
    "a turn that is text": ("sharegpt", chat("Q"), "wrong type: conversations[0] is a string, expected an object"),
    "a turn without a role": ("sharegpt", chat({"value": "Q"}), "missing field: conversations[0].from"),
    "a turn without text": ("sharegpt", chat(Q, {"from": "gpt"}), "missing field: conversations[1].value"),
    "a number for text": (
        "sharegpt",
        chat(Q, turn("gpt", 42)),
        "wrong type: conversations[1].value is a number, expected a string",
    ),
    "true for text": (
        "sharegpt",
        chat(Q, turn("gpt", True)),
        "wrong type: conversations[1].value is a boolean, expected a string",
    ),
    "an unknown role": (
        "sharegpt",
        chat(turn("user", "Q"), A),
        "unknown role: conversations[0] is from 'user', expected one of human, gpt, observation, function_call, system",
    ),
    "a role in capitals": (
        "openai",
        {"messages": [{"role": "User", "content": "Q"}]},
        "unknown role: messages[0] is from 'User', expected one of user, assistant, tool, function_call, system",
    ),
    "no assistant": ("sharegpt", chat(Q), "no assistant turn"),
    "a late system message": (
        "sharegpt",
        chat(Q, turn("system", "S"), A),
        "wrong order: message 2 of 3 is a system message, expected only as the first",
    ),
    "an observation first": (
        "sharegpt",
        chat(turn("observation", "1"), A),
        "wrong order: message 1 of 2 is an observation, expected only after an assistant turn",
    ),
    "an observation after the user": (
        "sharegpt",
        chat(Q, turn("observation", "1"), A),
        "wrong order: message 2 of 3 is an observation, expected only after an assistant turn",
    ),
    "a call that is prose": (
        "sharegpt",
        chat(Q, turn("function_call", "add(1)")),
        "wrong type: conversations[1] is a function call but does not end with JSON",
    ),
    "a call that is an empty list": (
        "sharegpt",
        chat(Q, turn("function_call", "[]")),
        "conversations[1] is marked as a function call, but contains none",
    ),
    "a call that is an empty object": (
        "sharegpt",
        chat(Q, turn("function_call", "<think>hm</think>\n{}")),
        "conversations[1] is marked as a function call, but contains none",
    ),
    "a call nested too deeply": (
        "sharegpt",
        chat(Q, turn("function_call", '{"name": "f", "arguments": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}}")),
        "wrong type: conversations[1] (a function call): unsupported JSON (nested too deeply)",
    ),
    "tools nested too deeply to render": (
        "sharegpt",
        chat(Q, A, tools='[{"name": "f", "parameters": ' + "[" * 200 + "]" * 200 + "}]"),
        "wrong type: tools: unsupported JSON (nested too deeply)",
    ),
    "tools with a number that Python does not read": (
        "sharegpt",
        chat(Q, A, tools='[{"name": "f", "maximum": ' + "9" * 5000 + "}]"),
        "wrong type: tools: unsupported JSON (a number with 5,000 digits)",
    ),
    "a date in a history": (
        "alpaca",
        {"instruction": "Q", "output": "A", "history": [datetime(2026, 1, 2)]},
        'wrong type: history contains "datetime.datetime(2026, 1, 2, 0, 0)", expected [prompt, reply]',
    ),
    "a call without a name": (
        "sharegpt",
        chat(Q, turn("function_call", '{"arguments": {}}')),
        "missing field: the name of a call in conversations[1]",
    ),
    "a call without arguments": (
        "sharegpt",
        chat(Q, turn("function_call", '{"name": "f"}')),
        "missing field: the call 'f' in conversations[1] has no arguments; write {} if it takes none",
    ),
    "arguments that are a list": (
        "sharegpt",
        chat(Q, turn("function_call", '{"name": "f", "arguments": [1]}')),
        "wrong type: the arguments of 'f' in conversations[1] must be an object, not a list",
    ),
    "arguments that are prose": (
        "openai",
        {
            "messages": [
                {"role": "user", "content": "Q"},
                {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]},
            ]
        },
        "wrong type: the arguments of 'f' in messages[1]: not JSON (Expecting value at column 1): 'x'",
    ),
    "a call by the user": (
        "openai",
        {"messages": [{"role": "user", "content": "Q", "tool_calls": [TOOL_CALL]}]},
        "messages[0] has tool_calls, but is from 'user': only assistant turns may have them",
    ),
    "a refusal that is no text": (
        "openai",
        {"messages": [{"role": "assistant", "content": None, "refusal": {"reason": "no"}}]},
        "wrong type: messages[0].refusal is an object, expected a string",
    ),
    "a thought of the Responses API that is a number": (
        "openai",
        {"messages": [{"type": "reasoning", "summary": 5}]},
        "wrong type: messages[0].content is a number, expected a string",
    ),
    "two thoughts": (
        "openai",
        {"messages": [{"role": "assistant", "content": "A", "reasoning": "R", "thinking": "T"}]},
        "messages[0] has 'reasoning' and 'thinking', which differ; keep one",
    ),
    "two lists of tools": (
        "sharegpt",
        chat(turn("system", "S", tools=[{"name": "f"}]), Q, A, tools=[{"name": "g"}]),
        "the row has two different lists of tools (in messages, or in a message and the tools column); keep one",
    ),
    "arguments that are no number of JSON's": (
        "openai",
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": [float("nan")]}}}]}
            ]
        },
        "not JSON: the arguments of 'f' in messages[0] contain NaN or Infinity",
    ),
    "a picture": (
        "openai",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        'wrong type: messages[0].content contains a part that is not text: {"type": "image_url"}',
    ),
    "tools that are prose": (
        "sharegpt",
        chat(Q, A, tools="a calculator"),
        "wrong type: tools: not JSON (Expecting value at column 1): 'a calculator'",
    ),
    "a tool without a name": (
        "sharegpt",
        chat(Q, A, tools=[{"description": "d"}]),
        'missing field: a tool has no name: {"description": "d"}',
    ),
    "a tool that is text": (
        "sharegpt",
        chat(Q, A, tools=["add"]),
        "wrong type: tools contains a string, expected objects",
    ),
    "loss that is text": (
        "sharegpt",
        chat(Q, turn("gpt", "A", loss="no")),
        'wrong type: conversations[1].loss is "no", expected true or false',
    ),
    "a loss mask of every token": (
        "openai",
        {"messages": [{"role": "assistant", "content": "A", "loss_mask": [0, 1]}]},
        "wrong type: messages[0].loss_mask is [0, 1], expected true or false",
    ),
    "no instruction": ("alpaca", {"output": "A"}, "missing field: instruction"),
    "no output": ("alpaca", {"instruction": "Q"}, "missing field: output"),
    "an output that is a list": (
        "alpaca",
        {"instruction": "Q", "output": ["A"]},
        "wrong type: output is a list, expected a string",
    ),
    "a history of texts": (
        "alpaca",
        {"instruction": "Q", "output": "A", "history": ["Hi"]},
        'wrong type: history contains "Hi", expected [prompt, reply]',
    ),
    "a history that is an object": (
        "alpaca",
        {"instruction": "Q", "output": "A", "history": {"a": 1}},
        "wrong type: history is an object, expected a list of [prompt, reply] pairs",
    ),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_is_answered_with_its_reason(kind: str) -> None:
    formatting, row, reason = BAD_ROWS[kind]
    with pytest.raises(RowError) as error:
        to_conversation(row, info(formatting))
    assert str(error.value) == reason
