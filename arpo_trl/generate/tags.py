"""The tags of ARPO's trajectories, and the tool calls in a reply. Pure functions over text."""

import functools
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

TOOL_TAGS = ("python", "search")
"""A call is `<python>code</python>` or `<search>query</search>`: the tag is the tool's name."""
CALL_ENDS = [*(f"</{tag}>" for tag in TOOL_TAGS), "</tool_call>"]
"""What ends a call inside a reply. Qwen's templates write `<tool_call>` around JSON."""
RESULT, RESULT_END = "<result>", "</result>"
TAG = re.compile(rf"<(/?)(think|{'|'.join(TOOL_TAGS)}|result|answer|tool_call)>")
_JSON_CALL = r'\{\s*"(?:id|type|name|function|arguments|parameters)"'
_REACT_CALL = r"Action:\s*(?P<action>\S+)\s*Action Input:\s*"


class Call(NamedTuple):
    """A tool call as the model wrote it. `arguments`: code, a query, or the JSON text of the arguments."""

    tool: str
    arguments: str


def find_calls(text: str, tags: Sequence[str] = TOOL_TAGS) -> list[Call]:
    """Return the closed tool calls of a reply, in order, up to the first `<result>` in it.

    Recognized are ARPO's `<python>` and `<search>` (or the given tags), `<tool_call>` around JSON or any other form, and JSON objects with
    a name and arguments (or parameters), as Mistral's and Llama's templates write them, and `Action:` with `Action Input:`
    (ReAct). JSON is returned in one canonical form, other text as it is.
    """
    text = text.partition(RESULT)[0]
    calls: list[Call] = []
    at = 0
    call_start = _call_start(tuple(tags))
    while match := call_start.search(text, at):
        tag, at = match[1], match.end()
        if match["action"]:
            react_call, at = _react_call(match["action"], text, at)
            calls.append(react_call)
        elif not tag:
            call, at = _json_call(text, match.start(), or_else=at)
            calls += [call] if call else []
        elif (end := text.find(f"</{tag}>", at)) < 0:
            break  # an unclosed tag calls nothing, nor does anything inside it
        else:
            inside, at = text[at:end], end
            if tag == "tool_call":
                calls += find_calls(inside, tags) or [_call_in_another_form(inside)]
            else:
                calls.append(Call(tag, inside.strip()))
    return calls


@functools.cache
def _call_start(tags: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"<({'|'.join(map(re.escape, tags))}|tool_call)>|{_REACT_CALL}|{_JSON_CALL}")


def _react_call(name: str, text: str, start: int) -> tuple[Call, int]:
    try:
        value, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        argument = re.split("\nObservation:|\nAction:", text[start:], maxsplit=1)[0]
        return Call(name, argument.strip()), start + len(argument)
    return Call(name, json.dumps(value, sort_keys=True)), end


def _json_call(text: str, start: int, or_else: int) -> tuple[Call | None, int]:
    try:
        value, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, or_else
    if isinstance(value.get("function"), dict):
        value = value["function"]
    arguments = value.get("arguments", value.get("parameters"))
    if not isinstance(value.get("name"), str) or arguments is None:
        return None, or_else
    # Text that is not JSON is the only argument.
    return Call(value["name"], json.dumps(json_or_text(arguments), sort_keys=True)), end


def _call_in_another_form(text: str) -> Call:
    """Qwen3-Coder writes `<function=name>`, GLM the name on its own line; broken JSON may still contain a name."""
    if function := re.match(r"\s*<function=([\w.-]+)>(.*)", text, re.DOTALL):
        parameters = re.findall(r"<parameter=([\w.-]+)>\n?(.*?)\n?</parameter>", function[2], re.DOTALL)
        return Call(function[1], json.dumps({key: _value(value) for key, value in parameters}, sort_keys=True))
    name = re.search(r'"name"\s*:\s*"([^"]*)"', text) or re.match(r"\s*(?:<function=)?([\w.-]+)", text)
    return Call(name[1] if name else "", text.strip())


def _value(text: str) -> object:
    """Read a parameter as JSON, else as text."""
    value = json_or_text(text)
    return text if isinstance(value, str) else value


def json_or_text(text: Any) -> Any:
    """Return the value of JSON text, or what is no such text as it is."""
    try:
        return _DECODER.decode(text)
    except (TypeError, ValueError, RecursionError):
        return text


def _float(digits: str) -> int | float:
    """Read 1.0 as the number 1, as JSON and the tool that reads it do."""
    number = float(digits)
    return int(number) if number.is_integer() else number


_DECODER = json.JSONDecoder(parse_float=_float)


def is_well_formed(text: str, label: str = "") -> bool:
    """Return whether the text has tags and each one opens and closes before the next one opens.

    A tag that the label closes but does not open (reasoning, which the generation prompt opens) is open at the start.
    """
    first = TAG.search(label)
    return TAG.search(text) is not None and closes_tags(text, first[2] if first and first[1] else "")


def closes_tags(text: str, inside: str = "") -> bool:
    """Return whether each tag opens and closes before the next one opens. `inside`: the tag that is open at the start."""
    for closes, name in TAG.findall(text):
        if inside != (name if closes else ""):
            return False
        inside = "" if closes else name
    return not inside
