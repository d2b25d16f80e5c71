"""A row in any supported format -> messages as chat templates take them.

The order of roles is checked only where LLaMA-Factory's matters (the system message comes first, an observation follows an
assistant message) and otherwise left to the chat template. LLaMA-Factory drops a row with two user turns in a row, or with
a first turn of the assistant; here the row is kept if the template can render it, and dropped with the template's own error
otherwise.

`read_alpaca_prompt` reads alpaca rows, `read_turns` sharegpt and openai rows. `_turn_to_messages` reads one turn:
ShareGPT's, OpenAI's chat messages and Responses items, and Anthropic's blocks. Everything that is read is removed from a
copy of the row; the rest is counted in `Conversation.unread`.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise, takewhile
from typing import Any, NotRequired, TypedDict, cast

from ..errors import RowError
from .registry import PROVENANCE, TAGS, DatasetInfo
from .strict_json import decode_json, excerpt, parse_json

Fields = dict[str, Any]  # a JSON object
Note = tuple[str, str]  # what the audit counts: its kind and its name
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # DeepSeek; vLLM and OpenRouter; gpt-oss and Ollama
LOSS_KEYS = ("loss", "train", "loss_mask", "weight")
# A tag of dataset_info.json -> the role as OpenAI calls it. Two roles have a second name there.
ROLES = {tag: role for tag, role in TAGS["openai"].items() if tag not in ("role_tag", "content_tag")}
MORE_ROLES = {"developer": "system", "function": "tool"}
# The items of OpenAI's Responses API other than messages, with the keys that are read.
ITEMS = {
    "reasoning": ("content", "summary"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
}


class Message(TypedDict):
    """A message as chat templates take it. `trained`: False if the row masks it.

    Reasoning is in `reasoning_content`; `Template.fit` renames it to `reasoning` or `thinking` if the template does.
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
    """The messages and tools of a row, of one side of a pair, or of a list of turns.

    `unread`: how often each key or column is ignored. `prompt`: how many messages are the prompt of a pair, whose replies
    are not trained; None if the row is not a pair.
    """

    messages: list[Message]
    tools: list[Fields] | None = None
    unread: Counter[Note] = field(default_factory=Counter)
    prompt: int | None = None

    @property
    def replies(self) -> list[int]:
        """The positions of the assistant's messages."""
        return [position for position, message in enumerate(self.messages) if message["role"] == "assistant"]


def to_conversation(row: object, info: DatasetInfo, default_system: str | None = None) -> Conversation:
    """Read one row. Raises RowError if the row is malformed."""
    rest, columns = to_fields(row, info), info.columns
    if info.formatting == "alpaca":
        response = columns["response"]
        prompt = read_alpaca_prompt(rest, columns)
        reply: Message = {"role": "assistant", "content": _text(rest.pop(response, None), response)}
        turns = Conversation([*prompt, reply])
    else:  # sharegpt and openai rows differ in their tags
        column = columns["messages"]
        if rest.get(column) is None:
            raise RowError(f"missing field: {column}")
        turns = read_turns(_parsed(rest.pop(column), column), column, info.tags)
    return complete(turns, rest, info, default_system)


def to_fields(row: object, info: DatasetInfo) -> Fields:
    """Return a copy of the row. Raises RowError if it is not an object, or not text only."""
    if not isinstance(row, dict):
        raise RowError(f"expected an object, found {_kind(row)}")
    for column in info.media:
        if row.get(column):
            raise RowError(f"multimodal: {column} contains {excerpt(row[column], 60)}; only text is supported")
    return dict(row)


def complete(turns: Conversation, rest: Fields, info: DatasetInfo, default_system: str | None) -> Conversation:
    """Complete the turns with the system message and tools of the other columns, which are removed from `rest`."""
    messages = _with_system(turns.messages, rest, info.columns.get("system", ""), default_system)
    check_order(messages)
    tools = unite_tools([turns.tools, to_tools(rest.pop(info.columns.get("tools", ""), None))])
    for column in (info.columns.get("answer", ""), *PROVENANCE):
        rest.pop(column, None)
    turns.unread.update(("ignored column", name) for name in _names_left(rest))
    return Conversation(messages, tools, turns.unread)


def unite_tools(lists: Iterable[list[Fields] | None]) -> list[Fields] | None:
    """Return the list of tools that several places of a row have. Raises RowError if they differ."""
    listed = [tools for tools in lists if tools]
    if any(other != listed[0] for other in listed):
        raise RowError(
            "the row has two different lists of tools (in messages, or in a message and the tools column); keep one"
        )
    return listed[0] if listed else None


def read_alpaca_prompt(rest: Fields, columns: dict[str, str]) -> list[Message]:
    """Return the history, then instruction and input as a user message; they are removed from `rest`."""
    history, prompt, query = (columns.get(key, "") for key in ("history", "prompt", "query"))
    messages = _read_history(rest.get(history), history)
    asked = [
        _text(rest.get(prompt), prompt, optional=not prompt or prompt in rest),
        _text(rest.get(query), query, optional=True),
    ]
    for column in (history, prompt, query):
        rest.pop(column, None)
    return [*messages, {"role": "user", "content": "\n".join(filter(None, asked))}]


def _read_history(value: object, name: str) -> list[Message]:
    history = _parsed(value, name) or []
    if not isinstance(history, list):
        raise RowError(f"wrong type: {name} is {_kind(history)}, expected a list of [prompt, reply] pairs")
    messages: list[Message] = []
    for pair in history:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise RowError(f"wrong type: {name} contains {excerpt(pair, 60)}, expected [prompt, reply]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def read_turns(turns: object, column: str, tags: dict[str, str]) -> Conversation:
    """Read a list of turns. Raises RowError, which names the column."""
    if not isinstance(turns, list):
        raise RowError(f"wrong type: {column} is {_kind(turns)}, expected a list of messages")
    if not turns:
        raise RowError(f"empty conversation: {column} has no messages")
    messages: list[Message] = []
    tools: list[list[Fields] | None] = []
    unread: Counter[Note] = Counter()
    for position, turn in enumerate(turns):
        where = f"{column}[{position}]"
        if not isinstance(turn, dict):
            raise RowError(f"wrong type: {where} is {_kind(turn)}, expected an object")
        fields = dict(turn)
        is_item = fields.get("type") in ("message", *ITEMS)
        read = _turn_to_messages(_item_to_turn(fields, tags) if is_item else fields, tags, where)
        if read[0]["role"] == "system":
            tools += [to_tools(fields.pop(key, None), where) for key in ("tools", "functions")]
        if not _is_trained(fields, where):
            for message in read:
                message["trained"] = False
        if is_item and messages and messages[-1]["role"] == read[0]["role"] == "assistant":
            _append(messages[-1], read.pop(0))
        messages += read
        unread.update(("ignored message key", key) for key in _names_left(fields))
    return Conversation(messages, unite_tools(tools), unread)


def _turn_to_messages(fields: Fields, tags: dict[str, str], where: str) -> list[Message]:
    """Return a turn's messages: several if a user message contains tool results (Anthropic)."""
    roles = {tags[tag]: role for tag, role in ROLES.items()}
    key, tag = tags["content_tag"], _text(fields.pop(tags["role_tag"], None), f"{where}.{tags['role_tag']}")
    role = roles.get(tag) or MORE_ROLES.get(tag)
    if role is None:
        raise RowError(f"unknown role: {where} is from {tag[:40]!r}, expected one of {', '.join(roles)}")
    content, results = fields.pop(key, None), list[Message]()
    if isinstance(content, list):
        content, more, results = _read_parts(content, f"{where}.{key}")
        fields |= more
    calls = _parsed(fields.pop("tool_calls", None), f"{where}.tool_calls")
    calls = calls or _parsed(fields.pop("function_call", None), f"{where}.function_call")
    refusal = _text(fields.pop("refusal", None), f"{where}.refusal", optional=True)
    text = _text(content, f"{where}.{key}", optional=bool(calls or refusal)) or refusal
    if role == "function_call":
        role = "assistant"
        text, calls = _split_calls(text, where)
    message: Message = {"role": role, "content": text}
    if calls:
        if role != "assistant":
            raise RowError(f"{where} has tool_calls, but is from {tag!r}: only assistant turns may have them")
        message["tool_calls"] = [_to_call(call, where) for call in (calls if isinstance(calls, list) else [calls])]
    if role == "assistant" and (reasoning := _read_reasoning(fields, where)):
        message["reasoning_content"] = reasoning
    names = {key: fields.pop(key) for key in ("name", "tool_call_id") if isinstance(fields.get(key), str)}
    message |= cast(Message, names)
    return [*results, message] if text or calls or not results else results


def _item_to_turn(fields: Fields, tags: dict[str, str]) -> Fields:
    """Turn an item of OpenAI's Responses API into an assistant turn with one part; changes `fields` in place."""
    kind = fields.pop("type")
    if kind != "message":
        part = {"type": kind, **{key: fields.pop(key) for key in ITEMS[kind] if key in fields}}
        fields |= {tags["role_tag"]: tags["assistant_tag"], tags["content_tag"]: [part]}
    return fields


def _append(message: Message, item: Message) -> None:
    """Merge an item into its reply: the Responses API lists a reply's reasoning, text and calls as separate items."""
    message["content"] += item["content"]
    if "tool_calls" in item:
        message["tool_calls"] = [*message.get("tool_calls", []), *item["tool_calls"]]
    if "reasoning_content" in item:
        message["reasoning_content"] = message.get("reasoning_content", "") + item["reasoning_content"]
    if "trained" in item:
        message["trained"] = False


def _read_parts(parts: list[Any], where: str) -> tuple[str, Fields, list[Message]]:
    """Return the text of OpenAI's or Anthropic's parts, their reasoning and calls as keys of a turn, and tool results."""
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[Fields] = []
    results: list[Message] = []
    for part in parts:
        match part:
            case {"type": "text" | "input_text" | "output_text" | "summary_text" | "reasoning_text"}:
                texts.append(_text(part.get("text"), f"{where}.text"))
            case {"type": "refusal"}:
                texts.append(_text(part.get("refusal"), f"{where}.refusal"))
            case {"type": "thinking"}:
                reasoning.append(_text(part.get("thinking"), f"{where}.thinking"))
            case {"type": "reasoning"}:
                reasoning.append(_plain(part.get("content") or part.get("summary") or "", where))
            case {"type": "tool_use"}:
                calls.append({"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input")})
            case {"type": "function_call"}:
                calls.append({**part, "id": part.get("call_id")})
            case {"type": "tool_result"}:
                results.append(_to_result(part.get("content") or "", part.get("tool_use_id"), where))
            case {"type": "function_call_output"}:
                results.append(_to_result(part.get("output"), part.get("call_id"), where))
            case _:
                raise RowError(f"wrong type: {where} contains a part that is not text: {excerpt(part, 60)}")
    more = {"thinking": "".join(reasoning), "tool_calls": calls}
    return "".join(texts), {key: value for key, value in more.items() if value}, results


def _to_result(content: object, call_id: object, where: str) -> Message:
    result: Message = {"role": "tool", "content": _plain(content, where)}
    if isinstance(call_id, str):
        result["tool_call_id"] = call_id
    return result


def _plain(content: object, where: str) -> str:
    return _read_parts(content, where)[0] if isinstance(content, list) else _text(content, where)


def _read_reasoning(fields: Fields, where: str) -> str:
    """Return a reply's reasoning; vLLM gives it under two names. A value that is not text is a flag, and ignored."""
    values = {key: fields.pop(key) for key in REASONING_KEYS if isinstance(fields.get(key), str)}
    texts = [text for text in values.values() if text.strip()]
    if any(text != texts[0] for text in texts):
        raise RowError(f"{where} has {' and '.join(map(repr, values))}, which differ; keep one")
    return texts[0] if texts else ""


def _is_trained(fields: Fields, where: str) -> bool:
    """Read the keys that mask a message. `weight` may be any number in other data; other than 0 and 1, it is ignored."""
    trained = True
    for key in LOSS_KEYS:
        value = fields.get(key)
        if value in (0, 1):
            trained = trained and bool(fields.pop(key))
        elif value is not None and not (key == "weight" and isinstance(value, int | float)):
            raise RowError(f"wrong type: {where}.{key} is {excerpt(value, 40)}, expected true or false")
    return trained


def _with_system(messages: list[Message], rest: Fields, column: str, default_system: str | None) -> list[Message]:
    """Put one system message first: the leading ones joined, or else the column, or else the default."""
    leading, others = split_system(messages)
    written = [message for message in leading if message["content"]]
    system: Message = written[0] if written else {"role": "system", "content": ""}
    in_column = _text(rest.get(column), column, optional=True)
    system["content"] = "\n\n".join(message["content"] for message in written) or in_column or default_system or ""
    if not all(message.get("trained", True) for message in written):
        system["trained"] = False
    if in_column == system["content"]:  # Otherwise a message overrides the column, as in LLaMA-Factory.
        rest.pop(column, None)
    return [system] * bool(system["content"]) + others


def split_system(messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """Return the leading system messages, and the others."""
    leading = list(takewhile(lambda message: message["role"] == "system", messages))
    return leading, messages[len(leading) :]


def _names_left(fields: Fields) -> list[str]:
    return [name for name, value in fields.items() if value not in (None, "", [], {})]


def check_order(messages: list[Message]) -> None:
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise RowError("no assistant turn")
    for number, (before, role) in enumerate(pairwise(["", *roles]), 1):
        if role == "system" and number > 1:
            raise RowError(
                f"wrong order: message {number} of {len(messages)} is a system message, expected only as the first"
            )
        if role == "tool" and before not in ("assistant", "tool"):
            raise RowError(
                f"wrong order: message {number} of {len(messages)} is an observation, expected only after an assistant turn"
            )


def _split_calls(content: str, where: str) -> tuple[str, object]:
    """Split the text before a call (LLaMA-Factory: `<think>..</think>`) from the call's JSON, or JSON in `<tool_call>` tags.

    Templates write one newline between the two, so one is removed; the others are trained, as in LLaMA-Factory.
    """
    if tagged := re.fullmatch(r"(.*?)((?:<tool_call>.*?</tool_call>\s*)+)", content, re.DOTALL):
        texts = re.findall(r"<tool_call>\s*(.*?)\s*</tool_call>", tagged[2], re.DOTALL)
        content = tagged[1] + (texts[0] if len(texts) == 1 else f"[{','.join(texts)}]")
    length = len(content.rstrip())
    for bracket in re.finditer(r"[{\[]", content):
        try:
            calls, end = decode_json(content, bracket.start())
        except ValueError:
            continue
        except RowError as error:
            raise RowError(f"wrong type: {where} (a function call): {error}") from None
        if end == length:
            if not calls:
                raise RowError(f"{where} is marked as a function call, but contains none")
            text = content[: bracket.start()]
            return text.removesuffix("\n") if text.strip() else "", calls
    raise RowError(f"wrong type: {where} is a function call but does not end with JSON")


def _to_call(call: object, where: str) -> Fields:
    call_id = call.get("id") if isinstance(call, dict) else None
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        raise RowError(f"wrong type: a call in {where} is {_kind(function)}, expected an object")
    name = _text(function.get("name"), f"the name of a call in {where}")
    place = f"the arguments of {name!r} in {where}"
    if function.get("arguments") is None:
        raise RowError(f"missing field: the call {name!r} in {where} has no arguments; write {{}} if it takes none")
    arguments = _parsed(function["arguments"], place)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise RowError(f"wrong type: {place} must be an object, not {_kind(arguments)}")
    _check_numbers(arguments, place)
    read = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"id": call_id, **read} if isinstance(call_id, str) and call_id else read


def to_tools(tools: object, where: str = "tools") -> list[Fields] | None:
    """Convert a row's tools, JSON text or parsed, to the form that chat templates take. Raises RowError."""
    tools = _parsed(tools, where) or []
    converted = []
    for tool in tools if isinstance(tools, list) else [tools]:
        if not isinstance(tool, dict):
            raise RowError(f"wrong type: {where} contains {_kind(tool)}, expected objects")
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"missing field: a tool has no name: {excerpt(tool, 60)}")
        # The Responses API has the type next to the name; input_schema is Anthropic's.
        own = {key: value for key, value in function.items() if (key, value) != ("type", "function")}
        function = {"parameters" if key == "input_schema" else key: value for key, value in own.items()}
        _check_numbers(function, where)
        converted.append({"type": "function", "function": function})
    return converted or None


def _check_numbers(value: Fields, where: str) -> None:
    """Raise RowError for NaN and Infinity, which a Parquet file may contain and JSON may not (RFC 8259)."""
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        raise RowError(f"not JSON: {where} contain NaN or Infinity") from None
    except TypeError:  # A date or bytes: the template raises an error.
        return


def _text(value: object, where: str, optional: bool = False) -> str:
    if value is None:
        if optional:
            return ""
        raise RowError(f"missing field: {where}")
    if not isinstance(value, str):
        raise RowError(f"wrong type: {where} is {_kind(value)}, expected a string")
    return value


def _parsed(value: object, where: str) -> object:
    """Parse JSON text only now: as Arrow columns, objects of different shapes would fill each other with nulls."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return parse_json(value)
    except RowError as error:
        raise RowError(f"wrong type: {where}: {error}") from None


def _kind(value: object) -> str:
    kinds = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return "null" if value is None else kinds.get(type(value), type(value).__name__)
