"""A row in any supported format -> messages in the form that chat templates take. Pure functions.

The order of roles is LLaMA-Factory's where it matters (a system message comes first, an observation answers an
assistant) and otherwise left to the chat template: LLaMA-Factory drops a row with two user turns in a row or one that
starts with the assistant; here it is kept if the template can render it, and dropped with the template's own words
if not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import RowError
from .registry import DatasetInfo
from .strict_json import decode_json, excerpt, parse_json

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """`silent` holds the positions of messages that the row itself keeps from the loss."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    silent: frozenset[int] = frozenset()

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
    messages, silent = _from_alpaca(row, info) if info.formatting == "alpaca" else _from_turns(row, info)
    if messages and messages[0]["role"] == "system" and not messages[0]["content"]:  # As an empty system column.
        messages, silent = messages[1:], {position - 1 for position in silent if position}
    system = _text(row, info.columns["system"], optional=True) if "system" in info.columns else ""
    has_system = bool(messages) and messages[0]["role"] == "system"
    if system and has_system:
        raise RowError("wrong order: a system column and a system message")
    if not has_system and (system or default_system):
        messages.insert(0, {"role": "system", "content": system or default_system})
        silent = {position + 1 for position in silent}
    _check_order(messages)
    tools = to_tools(row.get(info.columns.get("tools")))
    return Conversation(messages, tools, frozenset(silent))


def _from_alpaca(row: dict[str, Any], info: DatasetInfo) -> tuple[list[Message], set[int]]:
    messages: list[Message] = []
    name = info.columns.get("history", "")
    history = _parsed(row.get(name), name) or []
    if not isinstance(history, list):
        raise RowError(f"wrong type: {name} is {_kind(history)}, expected a list of [prompt, reply] pairs")
    for pair in history:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise RowError(f"wrong type: {name} holds {excerpt(pair, 60)}, expected [prompt, reply]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    prompt = _text(row, info.columns["prompt"]) if "prompt" in info.columns else ""
    query = _text(row, info.columns["query"], optional=True) if "query" in info.columns else ""
    messages.append({"role": "user", "content": "\n".join(text for text in (prompt, query) if text)})
    messages.append({"role": "assistant", "content": _text(row, info.columns["response"])})
    return messages, set()


def _from_turns(row: dict[str, Any], info: DatasetInfo) -> tuple[list[Message], set[int]]:
    column, tags = info.columns["messages"], info.tags
    if row.get(column) is None:
        raise RowError(f"missing field: {column}")
    turns = _parsed(row[column], column)
    if not isinstance(turns, list):
        raise RowError(f"wrong type: {column} is {_kind(turns)}, expected a list of messages")
    if not turns:
        raise RowError(f"empty conversation: {column} has no messages")
    roles = {
        tags["user_tag"]: "user",
        tags["assistant_tag"]: "assistant",
        tags["observation_tag"]: "tool",
        tags["function_tag"]: "function_call",
        tags["system_tag"]: "system",
    }
    messages: list[Message] = []
    silent: set[int] = set()
    for position, turn in enumerate(turns):
        where = f"{column}[{position}]"
        if not isinstance(turn, dict):
            raise RowError(f"wrong type: {where} is {_kind(turn)}, expected an object")
        tag = _text(turn, tags["role_tag"], where)
        if tag not in roles:
            raise RowError(f"unknown role: {where} is from {tag[:40]!r}; the tags are {', '.join(roles)}")
        if "function_call" in turn and tags["role_tag"] != "function_call":
            raise RowError(f"unknown field: {where}.function_call is OpenAI's old form; write it as tool_calls")
        calls = _parsed(turn.get("tool_calls"), f"{where}.tool_calls")
        content = _content(turn, tags["content_tag"], where, optional=bool(calls))
        message: Message = {"role": roles[tag], "content": content}
        if roles[tag] == "function_call":
            content, calls = _split_calls(content, where)
            message = {"role": "assistant", "content": content}
        if calls:
            if message["role"] != "assistant":
                raise RowError(f"wrong order: {where} is from {tag!r} and has tool_calls")
            message["tool_calls"] = _to_calls(calls, where)
        for key in ("name", "tool_call_id", "reasoning_content"):
            if isinstance(turn.get(key), str):
                message[key] = turn[key]
        if _is_silent(turn, where):
            silent.add(len(messages))
        messages.append(message)
    return messages, silent


def _is_silent(turn: dict[str, Any], where: str) -> bool:
    loss, weight = turn.get("loss"), turn.get("weight")
    if loss is not None and not isinstance(loss, bool):
        raise RowError(f"wrong type: {where}.loss is {excerpt(loss, 40)}, expected true or false")
    if weight is not None and weight not in (0, 1):
        raise RowError(f"wrong type: {where}.weight is {excerpt(weight, 40)}, expected 0 or 1")
    return loss is False or weight == 0


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
    """Text beside the call (LLaMA-Factory: `<think>..</think>` before it) is the message's content."""
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
            return content[: bracket.start()].rstrip("\n"), calls
    raise RowError(f"wrong type: {where} is a function call but does not end in its JSON")


def _to_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        if isinstance(call, dict) and "function" in call:
            call = call["function"]
        if not isinstance(call, dict):
            raise RowError(f"wrong type: a call in {where} is {_kind(call)}, expected an object")
        name = _text(call, "name", f"a call in {where}")
        if call.get("arguments") is None:
            raise RowError(f"missing field: the call {name!r} in {where} has no arguments")
        arguments = _parsed(call["arguments"], f"the arguments of {name!r} in {where}")
        if not isinstance(arguments, dict):
            raise RowError(f"wrong type: the arguments of {name!r} in {where} are {_kind(arguments)}, not an object")
        found.append({"type": "function", "function": {"name": name, "arguments": arguments}})
    return found


def to_tools(tools: Any) -> list[dict[str, Any]] | None:
    """A row's tools, as JSON text or parsed, in the form that chat templates take. Raises RowError."""
    tools = _parsed(tools, "tools") or None
    if tools is None:
        return None
    found = []
    for tool in tools if isinstance(tools, list) else [tools]:
        if not isinstance(tool, dict):
            raise RowError(f"wrong type: tools holds {_kind(tool)}, expected objects")
        function = tool.get("function", tool) if tool.get("type", "function") == "function" else tool
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"missing field: a tool has no name: {excerpt(tool, 60)}")
        found.append({"type": "function", "function": function})
    return found


def _content(turn: dict[str, Any], key: str, where: str, optional: bool) -> str:
    """OpenAI's content may be a list of parts; those of text are joined."""
    parts = turn.get(key)
    if not isinstance(parts, list):
        return _text(turn, key, where, optional)
    texts = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            raise RowError(f"wrong type: {where}.{key} holds a part that is not text: {excerpt(part, 60)}")
        texts.append(_text(part, "text", f"{where}.{key}"))
    return "".join(texts)


def _text(row: Mapping[str, Any], key: str, where: str = "", optional: bool = False) -> str:
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
