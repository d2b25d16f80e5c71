"""A row in any supported format -> messages in the form that chat templates take. Pure functions.

The order of roles is LLaMA-Factory's where it matters (a system message comes first, an observation answers an
assistant) and otherwise left to the chat template: LLaMA-Factory drops a row with two user turns in a row or one that
starts with the assistant; here it is kept if the template can render it, and dropped with the template's own words
if not.

A turn may be written as OpenAI's chat messages or Responses items, as Anthropic's blocks, or as ShareGPT. Whatever is
read is taken out of a copy of the row; what is left over is counted in `Conversation.unread`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NotRequired, TypedDict

from ..errors import RowError
from .registry import COLUMNS, DatasetInfo
from .strict_json import decode_json, excerpt, parse_json

Fields = dict[str, Any]
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")  # DeepSeek; vLLM and OpenRouter; gpt-oss and Ollama
LOSS_KEYS = ("loss", "train", "loss_mask", "weight")
TEXT_PARTS = ("text", "input_text", "output_text", "summary_text", "reasoning_text")
MORE_ROLES = {"developer": "system", "function": "tool"}


class Message(TypedDict):
    """A message as chat templates take it. `trained`: False where the row keeps it from the loss.

    The thought of a reply is `reasoning_content`; `Template.fit` calls it `reasoning` or `thinking` where a template does.
    """

    role: str
    content: str
    trained: NotRequired[bool]
    tool_calls: NotRequired[list[Fields]]
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]
    thinking: NotRequired[str]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]


@dataclass(frozen=True)
class Conversation:
    """A row's messages and tools. `unread`: how often each thing that is not read occurs, by a text with {} for the number."""

    messages: list[Message]
    tools: list[Fields] | None = None
    unread: Counter[str] = field(default_factory=Counter)

    @property
    def replies(self) -> list[int]:
        """The positions of the assistant's messages."""
        return [position for position, message in enumerate(self.messages) if message["role"] == "assistant"]


def to_conversation(row: Any, info: DatasetInfo, default_system: str | None = None) -> Conversation:
    """Read one row.

    Raises:
        RowError: if the row is malformed.
    """
    if not isinstance(row, dict):
        raise RowError(f"not an object but {_kind(row)}")
    for column in info.media:
        if row.get(column):
            raise RowError(f"multimodal: {column} holds {excerpt(row[column], 60)}; arpo_trl trains on text")
    rest = {column: value for column, value in row.items() if value is not None}
    unread: Counter[str] = Counter()
    tools: list[list[Fields]] = []
    if info.formatting == "alpaca":
        messages = _read_alpaca(row, rest, info)
    else:
        messages, unread, tools = _read_sharegpt(rest, info)
    leading = list(takewhile(lambda message: message["role"] == "system", messages))
    system = [message for message in leading if message["content"]]
    column = _text(row, info.columns["system"], optional=True) if "system" in info.columns else ""
    if not system and (text := column or default_system):
        system = [{"role": "system", "content": text}]
    if not column or column == system[0]["content"]:  # Another message wins, as in LLaMA-Factory.
        rest.pop(info.columns.get("system"), None)
    if len(system) > 1:
        system = [_join(system)]
    messages[: len(leading)] = system
    _check_order(messages)
    if listed := to_tools(rest.pop(info.columns.get("tools"), None)):
        tools.append(listed)
    if any(other != tools[0] for other in tools):
        raise RowError("wrong type: the row has two lists of tools, and they differ")
    unread.update(_unread_column(name, info) for name, value in rest.items() if value not in ("", [], {}))
    return Conversation(messages, tools[0] if tools else None, unread)


def _unread_column(name: str, info: DatasetInfo) -> str:
    """LLaMA-Factory, too, reads system, tools and history only where the registry names them."""
    text, key = f"not read: column `{name}` of {{}} rows", "tools" if name == "functions" else name
    if key not in COLUMNS[info.formatting].keys() - info.columns.keys():
        return text
    named = json.dumps({"columns": info.columns | {key: name}}, ensure_ascii=False)[1:-1]
    return f"{text}; to read it, write {named} in dataset_info.json"


def _join(system: list[Message]) -> Message:
    joined: Message = {"role": "system", "content": "\n\n".join(message["content"] for message in system)}
    if not all(message.get("trained", True) for message in system):
        joined["trained"] = False
    return joined


def _read_alpaca(row: Fields, rest: Fields, info: DatasetInfo) -> list[Message]:
    columns = info.columns
    messages = _read_history(rest.get(columns.get("history", "")), columns.get("history", ""))
    prompt = _text(row, columns["prompt"], optional=columns["prompt"] in row) if "prompt" in columns else ""
    query = _text(row, columns["query"], optional=True) if "query" in columns else ""
    messages.append({"role": "user", "content": "\n".join(text for text in (prompt, query) if text)})
    messages.append({"role": "assistant", "content": _text(row, columns["response"])})
    for key in ("history", "prompt", "query", "response"):
        rest.pop(columns.get(key, ""), None)
    return messages


def _read_history(value: Any, name: str) -> list[Message]:
    history = _parsed(value, name) or []
    if not isinstance(history, list):
        raise RowError(f"wrong type: {name} is {_kind(history)}, expected a list of [prompt, reply] pairs")
    messages: list[Message] = []
    for pair in history:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise RowError(f"wrong type: {name} holds {excerpt(pair, 60)}, expected [prompt, reply]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def _read_sharegpt(rest: Fields, info: DatasetInfo) -> tuple[list[Message], Counter[str], list[list[Fields]]]:
    """The messages of a sharegpt or openai row, what of them is not read, and the tools that system messages hold."""
    column, tags = info.columns["messages"], info.tags
    if column not in rest:
        raise RowError(f"missing field: {column}")
    turns = _parsed(rest.pop(column), column)
    if not isinstance(turns, list):
        raise RowError(f"wrong type: {column} is {_kind(turns)}, expected a list of messages")
    if not turns:
        raise RowError(f"empty conversation: {column} has no messages")
    messages: list[Message] = []
    unread: Counter[str] = Counter()
    tools: list[list[Fields]] = []
    for position, turn in enumerate(turns):
        where = f"{column}[{position}]"
        if not isinstance(turn, dict):
            raise RowError(f"wrong type: {where} is {_kind(turn)}, expected an object")
        fields = {key: value for key, value in turn.items() if value is not None}
        item = fields.pop("type") if fields.get("type") in ("message", *_ITEMS) else None
        found = _ITEMS[item](fields, where) if item in _ITEMS else _read_turn(fields, tags, where)
        if found[0]["role"] == "system":
            tools += [listed for key in ("tools", "functions") if (listed := to_tools(fields.pop(key, None), where))]
        if not _is_trained(fields, where):
            for message in found:
                message["trained"] = False
        if item and messages and messages[-1]["role"] == found[0]["role"] == "assistant":
            _append(messages[-1], found.pop(0))
        messages += found
        unread.update(
            f"not read: key `{key}` of {{}} messages" for key, value in fields.items() if value not in ("", [], {})
        )
    return messages, unread, tools


def _append(message: Message, item: Message) -> None:
    """The Responses API gives a reply's thought, text and calls as items of their own."""
    message["content"] += item["content"]
    if "tool_calls" in item:
        message["tool_calls"] = [*message.get("tool_calls", []), *item["tool_calls"]]
    if "reasoning_content" in item:
        message["reasoning_content"] = message.get("reasoning_content", "") + item["reasoning_content"]
    if "trained" in item:
        message["trained"] = False


def _read_turn(fields: Fields, tags: dict[str, str], where: str) -> list[Message]:
    """A turn's messages: several where Anthropic puts the results of tools into a user's message."""
    roles = {
        tags["user_tag"]: "user",
        tags["assistant_tag"]: "assistant",
        tags["observation_tag"]: "tool",
        tags["function_tag"]: "function_call",
        tags["system_tag"]: "system",
    }
    tag, key = _text(fields, tags["role_tag"], where), tags["content_tag"]
    role = roles.get(tag) or MORE_ROLES.get(tag)
    if role is None:
        raise RowError(f"unknown role: {where} is from {tag[:40]!r}; the tags are {', '.join(roles)}")
    del fields[tags["role_tag"]]
    results: list[Message] = []
    if isinstance(fields.get(key), list):
        fields[key], more, results = _read_parts(fields[key], f"{where}.{key}")
        fields |= more
    calls = _parsed(fields.pop("tool_calls", None), f"{where}.tool_calls")
    calls = calls or _parsed(fields.pop("function_call", None), f"{where}.function_call")
    refusal = fields.pop("refusal", "")
    content = _text(fields, key, where, optional=bool(calls or refusal)) or refusal
    fields.pop(key, None)
    if role == "function_call":
        role = "assistant"
        content, calls = _split_calls(content, where)
    message: Message = {"role": role, "content": content}
    if calls:
        if role != "assistant":
            raise RowError(f"wrong order: {where} is from {tag!r} and has tool_calls")
        message["tool_calls"] = _to_calls(calls, where)
    if role == "assistant" and (thought := _read_thought(fields, where)):
        message["reasoning_content"] = thought
    if isinstance(fields.get("name"), str):
        message["name"] = fields.pop("name")
    if isinstance(fields.get("tool_call_id"), str):
        message["tool_call_id"] = fields.pop("tool_call_id")
    return [*results, message] if content or not results else results


def _read_thought(fields: Fields, where: str) -> str:
    """vLLM gives the same thought under two names. A key that holds no text is a flag, and is not read."""
    found = {key: fields.pop(key) for key in THOUGHT_KEYS if isinstance(fields.get(key), str)}
    thoughts = [text for text in found.values() if text.strip()]
    if any(text != thoughts[0] for text in thoughts):
        raise RowError(f"wrong type: {where} has {' and '.join(found)}, and they differ")
    return thoughts[0] if thoughts else ""


def _read_parts(parts: list[Any], where: str) -> tuple[str, Fields, list[Message]]:
    """The text of a content given in OpenAI's or Anthropic's parts, its thought and calls as keys of a turn, and results."""
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Fields] = []
    results: list[Message] = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in TEXT_PARTS:
            texts.append(_text(part, "text", where))
        elif kind == "refusal":
            texts.append(_text(part, "refusal", where))
        elif kind == "thinking":
            thoughts.append(_text(part, "thinking", where))
        elif kind == "tool_use":
            calls.append({"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input")})
        elif kind == "tool_result":
            results.append(_to_result(part.get("content") or "", part.get("tool_use_id"), where))
        else:
            raise RowError(f"wrong type: {where} holds a part that is not text: {excerpt(part, 60)}")
    more = {"thinking": "".join(thoughts), "tool_calls": calls}
    return "".join(texts), {key: value for key, value in more.items() if value}, results


def _to_result(content: Any, call_id: Any, where: str) -> Message:
    if isinstance(content, list):
        content = _read_parts(content, where)[0]
    result: Message = {"role": "tool", "content": _text({"result": content}, "result", where)}
    if isinstance(call_id, str):
        result["tool_call_id"] = call_id
    return result


def _read_call_item(fields: Fields, where: str) -> list[Message]:
    call = {
        "id": fields.pop("call_id", None),
        "name": fields.pop("name", None),
        "arguments": fields.pop("arguments", None),
    }
    return [{"role": "assistant", "content": "", "tool_calls": _to_calls(call, where)}]


def _read_result_item(fields: Fields, where: str) -> list[Message]:
    return [_to_result(fields.pop("output", None), fields.pop("call_id", None), where)]


def _read_reasoning_item(fields: Fields, where: str) -> list[Message]:
    summary, content = fields.pop("summary", []), fields.pop("content", [])
    thought = _read_parts(content or summary, where)[0]
    return [{"role": "assistant", "content": "", "reasoning_content": thought}]


_ITEMS = {
    "function_call": _read_call_item,
    "function_call_output": _read_result_item,
    "reasoning": _read_reasoning_item,
}
"""Items of OpenAI's Responses API that are no messages."""


def _is_trained(fields: Fields, where: str) -> bool:
    """`weight` may be any number elsewhere; one that is neither 0 nor 1 is left unread."""
    trained = True
    for key in LOSS_KEYS:
        value = fields.get(key)
        if value in (0, 1):
            trained = trained and bool(fields.pop(key))
        elif value is not None and not (key == "weight" and isinstance(value, int | float)):
            raise RowError(f"wrong type: {where}.{key} is {excerpt(value, 40)}, expected true or false")
    return trained


def _check_order(messages: list[Message]) -> None:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise RowError("no assistant turn")
    for position, role in enumerate(roles):
        before = roles[position - 1] if position else None
        if role == "system" and position:
            raise RowError(f"wrong order: message {position + 1} is a system message, which only the first may be")
        if role == "tool" and before not in ("assistant", "tool"):
            raise RowError(f"wrong order: message {position + 1} is an observation after {before or 'nothing'}")


def _split_calls(content: str, where: str) -> tuple[str, Any]:
    """Text beside the call (LLaMA-Factory: `<think>..</think>` before it) is the message's content.

    Templates write a newline between the two, so one goes; the others are tokens, in LLaMA-Factory as well.
    """
    length = len(content.rstrip())
    for bracket in re.finditer(r"[{\[]", content):
        try:
            calls, end = decode_json(content, bracket.start())
        except ValueError:
            continue
        except RowError as error:
            raise RowError(f"wrong type: {where} is a function call but {error}") from None
        if end == length:
            if not calls:
                raise RowError(f"missing field: {where} is a function call that holds no call")
            text = content[: bracket.start()]
            return text.removesuffix("\n") if text.strip() else "", calls
    raise RowError(f"wrong type: {where} is a function call but does not end in its JSON")


def _to_calls(calls: Any, where: str) -> list[Fields]:
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        given = call.get("id") if isinstance(call, dict) else None
        if isinstance(call, dict) and "function" in call:
            call = call["function"]
        if not isinstance(call, dict):
            raise RowError(f"wrong type: a call in {where} is {_kind(call)}, expected an object")
        name = _text(call, "name", f"a call in {where}")
        if call.get("arguments") is None:
            raise RowError(f"missing field: the call {name!r} in {where} has no arguments")
        arguments = _parsed(call["arguments"], f"the arguments of {name!r} in {where}")
        arguments = {} if arguments is None else arguments
        if not isinstance(arguments, dict):
            raise RowError(f"wrong type: the arguments of {name!r} in {where} are {_kind(arguments)}, not an object")
        _check_numbers(arguments, f"the arguments of {name!r} in {where}")
        made = {"type": "function", "function": {"name": name, "arguments": arguments}}
        found.append({"id": given, **made} if isinstance(given, str) and given else made)
    return found


def to_tools(tools: Any, where: str = "tools") -> list[Fields] | None:
    """A row's tools, as JSON text or parsed, in the form that chat templates take. Raises RowError."""
    tools = _parsed(tools, where) or None
    if tools is None:
        return None
    found = []
    for tool in tools if isinstance(tools, list) else [tools]:
        if not isinstance(tool, dict):
            raise RowError(f"wrong type: {where} holds {_kind(tool)}, expected objects")
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"missing field: a tool has no name: {excerpt(tool, 60)}")
        if function.get("type") == "function":  # The Responses API has the type beside the name.
            function = {key: value for key, value in function.items() if key != "type"}
        if "input_schema" in function:  # Anthropic's
            function = {"parameters" if key == "input_schema" else key: value for key, value in function.items()}
        _check_numbers(function, where)
        found.append({"type": "function", "function": function})
    return found


def _check_numbers(value: Fields, where: str) -> None:
    """JSON has neither NaN nor Infinity (RFC 8259); a Parquet file may."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise RowError(f"not JSON: {where} hold NaN or Infinity") from None
    except TypeError:  # A date or bytes: the template says so.
        return


def _text(row: Fields, key: str, where: str = "", optional: bool = False) -> str:
    value = row.get(key)
    where = f"{where}.{key}" if where else key
    if value is None:
        if optional:
            return ""
        raise RowError(f"missing field: {where}")
    if not isinstance(value, str):
        raise RowError(f"wrong type: {where} is {_kind(value)}, expected text")
    return value


def _parsed(value: Any, where: str) -> Any:
    """JSON text is parsed as late as here: as columns, objects of different shapes would fill each other with nulls."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return parse_json(value)
    except RowError as error:
        raise RowError(f"wrong type: {where} is text but {error}") from None


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)
