"""One literal row in, one literal conversation out; one bad row in, its reason out."""

from datetime import datetime
from typing import Any

import pytest

from arpo_trl.data.messages import Conversation, to_conversation
from arpo_trl.data.registry import COLUMNS, TAGS, DatasetInfo
from arpo_trl.errors import RowError

CALL = {"name": "add", "arguments": {"a": 1}}
TOOL_CALL = {"type": "function", "function": CALL}


def info(formatting: str, **changes: Any) -> DatasetInfo:
    """A dataset that names every column of its format."""
    columns = {key: column or key for key, column in COLUMNS[formatting].items()}
    return DatasetInfo("d", "dataset_info.json:1", formatting, columns=columns, tags=TAGS[formatting], **changes)


def sharegpt(*turns: dict[str, Any], **row: Any) -> Conversation:
    return to_conversation({"conversations": list(turns), **row}, info("sharegpt"))


def turn(role: str, value: Any, **more: Any) -> dict[str, Any]:
    return {"from": role, "value": value, **more}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, *calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **({"tool_calls": list(calls)} if calls else {})}


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
    assert (bare.messages[0], bare.silent) == (user("Q"), {1})
    given = to_conversation({"conversations": turns}, info("sharegpt"), default_system="D")
    assert (given.messages[0], given.silent) == ({"role": "system", "content": "D"}, {2})
    assert sharegpt(*turns, system="S").messages[0] == {"role": "system", "content": "S"}


def test_a_call_is_found_behind_any_number_of_brackets() -> None:
    value = "[1], " * 100_000 + '{"name": "add", "arguments": {"a": 1}}'
    assert sharegpt(turn("human", "Q"), turn("function_call", value)).messages[1]["tool_calls"] == [TOOL_CALL]


def test_the_default_system_is_for_rows_without_one() -> None:
    row = {"conversations": [turn("gpt", "A", loss=False), turn("human", "Q"), turn("gpt", "B")]}
    found = to_conversation(row, info("sharegpt"), default_system="D")
    assert found.messages[0] == {"role": "system", "content": "D"}
    assert found.silent == {1}
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
        assistant("", TOOL_CALL),
        {"role": "tool", "content": "7", "tool_call_id": "1", "name": "add"},
        {"role": "assistant", "content": "A", "reasoning_content": "R"},
    ]
    assert found.silent == {1}


def test_messages_may_be_json_text_as_in_a_csv() -> None:
    row = {"conversations": '[{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]'}
    assert to_conversation(row, info("sharegpt")).messages == [user("Q"), assistant("A")]


def chat(*turns: Any, **row: Any) -> dict[str, Any]:
    return {"conversations": list(turns), **row}


Q, A = turn("human", "Q"), turn("gpt", "A")
BAD_ROWS: dict[str, tuple[str, Any, str]] = {
    "a list": ("sharegpt", [1], "not an object but a list"),
    "null": ("sharegpt", None, "not an object but null"),
    "text": ("sharegpt", "hello", "not an object but text"),
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
        "wrong type: conversations is text but not JSON (Expecting value at column 1): 'Q: A:'",
    ),
    "a turn that is text": ("sharegpt", chat("Q"), "wrong type: conversations[0] is text, expected an object"),
    "a turn without a role": ("sharegpt", chat({"value": "Q"}), "missing field: conversations[0].from"),
    "a turn without text": ("sharegpt", chat(Q, {"from": "gpt"}), "missing field: conversations[1].value"),
    "a number for text": (
        "sharegpt",
        chat(Q, turn("gpt", 42)),
        "wrong type: conversations[1].value is a number, expected text",
    ),
    "true for text": (
        "sharegpt",
        chat(Q, turn("gpt", True)),
        "wrong type: conversations[1].value is true or false, expected text",
    ),
    "an unknown role": (
        "sharegpt",
        chat(turn("user", "Q"), A),
        "unknown role: conversations[0] is from 'user'; the tags are human, gpt, observation, function_call, system",
    ),
    "a role in capitals": (
        "openai",
        {"messages": [{"role": "User", "content": "Q"}]},
        "unknown role: messages[0] is from 'User'; the tags are user, assistant, tool, function_call, system",
    ),
    "no assistant": ("sharegpt", chat(Q), "no assistant turn"),
    "a late system message": (
        "sharegpt",
        chat(Q, turn("system", "S"), A),
        "wrong order: message 2 is a system message, which only the first may be",
    ),
    "two systems": (
        "sharegpt",
        chat(turn("system", "S"), Q, A, system="T"),
        "wrong order: a system column and a system message",
    ),
    "an observation first": (
        "sharegpt",
        chat(turn("observation", "1"), A),
        "wrong order: message 1 is an observation after nothing",
    ),
    "an observation after the user": (
        "sharegpt",
        chat(Q, turn("observation", "1"), A),
        "wrong order: message 2 is an observation after user",
    ),
    "a call that is prose": (
        "sharegpt",
        chat(Q, turn("function_call", "add(1)")),
        "wrong type: conversations[1] is a function call but does not end in its JSON",
    ),
    "a call that is an empty list": (
        "sharegpt",
        chat(Q, turn("function_call", "[]")),
        "missing field: conversations[1] is a function call that holds no call",
    ),
    "a call that is an empty object": (
        "sharegpt",
        chat(Q, turn("function_call", "<think>hm</think>\n{}")),
        "missing field: conversations[1] is a function call that holds no call",
    ),
    "a call nested too deeply": (
        "sharegpt",
        chat(Q, turn("function_call", '{"name": "f", "arguments": {"a": ' + "[" * 100_000 + "]" * 100_000 + "}}")),
        "wrong type: conversations[1] is a function call but not JSON that can be read (nested too deeply)",
    ),
    "tools nested too deeply to render": (
        "sharegpt",
        chat(Q, A, tools='[{"name": "f", "parameters": ' + "[" * 200 + "]" * 200 + "}]"),
        "wrong type: tools is text but not JSON that can be read (nested too deeply)",
    ),
    "tools with a number that Python does not read": (
        "sharegpt",
        chat(Q, A, tools='[{"name": "f", "maximum": ' + "9" * 5000 + "}]"),
        "wrong type: tools is text but not JSON that can be read (a number of 5,000 digits)",
    ),
    "a date in a history": (
        "alpaca",
        {"instruction": "Q", "output": "A", "history": [datetime(2026, 1, 2)]},
        'wrong type: history holds "datetime.datetime(2026, 1, 2, 0, 0)", expected [prompt, reply]',
    ),
    "a call without a name": (
        "sharegpt",
        chat(Q, turn("function_call", '{"arguments": {}}')),
        "missing field: a call in conversations[1].name",
    ),
    "a call without arguments": (
        "sharegpt",
        chat(Q, turn("function_call", '{"name": "f"}')),
        "missing field: the call 'f' in conversations[1] has no arguments",
    ),
    "arguments that are a list": (
        "sharegpt",
        chat(Q, turn("function_call", '{"name": "f", "arguments": [1]}')),
        "wrong type: the arguments of 'f' in conversations[1] are a list, not an object",
    ),
    "arguments that are prose": (
        "openai",
        {
            "messages": [
                {"role": "user", "content": "Q"},
                {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]},
            ]
        },
        "wrong type: the arguments of 'f' in messages[1] is text but not JSON (Expecting value at column 1): 'x'",
    ),
    "a call by the user": (
        "openai",
        {"messages": [{"role": "user", "content": "Q", "tool_calls": [TOOL_CALL]}]},
        "wrong order: messages[0] is from 'user' and has tool_calls",
    ),
    "OpenAI's old calls": (
        "openai",
        {"messages": [{"role": "assistant", "content": None, "function_call": CALL}]},
        "unknown field: messages[0].function_call is OpenAI's old form; write it as tool_calls",
    ),
    "a picture": (
        "openai",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        'wrong type: messages[0].content holds a part that is not text: {"type": "image_url"}',
    ),
    "tools that are prose": (
        "sharegpt",
        chat(Q, A, tools="a calculator"),
        "wrong type: tools is text but not JSON (Expecting value at column 1): 'a calculator'",
    ),
    "a tool without a name": (
        "sharegpt",
        chat(Q, A, tools=[{"description": "d"}]),
        'missing field: a tool has no name: {"description": "d"}',
    ),
    "a tool that is text": ("sharegpt", chat(Q, A, tools=["add"]), "wrong type: tools holds text, expected objects"),
    "loss that is text": (
        "sharegpt",
        chat(Q, turn("gpt", "A", loss="no")),
        'wrong type: conversations[1].loss is "no", expected true or false',
    ),
    "a weight of a half": (
        "openai",
        {"messages": [{"role": "assistant", "content": "A", "weight": 0.5}]},
        "wrong type: messages[0].weight is 0.5, expected 0 or 1",
    ),
    "no instruction": ("alpaca", {"output": "A"}, "missing field: instruction"),
    "no output": ("alpaca", {"instruction": "Q"}, "missing field: output"),
    "an output that is a list": (
        "alpaca",
        {"instruction": "Q", "output": ["A"]},
        "wrong type: output is a list, expected text",
    ),
    "a history of texts": (
        "alpaca",
        {"instruction": "Q", "output": "A", "history": ["Hi"]},
        'wrong type: history holds "Hi", expected [prompt, reply]',
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
