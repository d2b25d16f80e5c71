"""How a generated reply compares with its label: form, tool call, answer. Pure functions over literal text.

Each score is a share with its count: of the replies whose label has something to compare, those that are right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import pandas

TAG = re.compile(r"<(/?)(think|python|search|result|answer|tool_call)>")
_CALL = re.compile(r'<(python|search|tool_call)>|\{\s*"(?:id|type|name|function|arguments|parameters)"')
_FRACTION = re.compile(r"\\[dt]?frac\{(-?\d{1,50})\}\{(\d{1,50})\}|(-?\d{1,50})\s*/\s*(\d{1,50})")
_DECIMAL = re.compile(
    r"([+-]?(?:\d{1,3}(?:,\d{3}){1,20}|\d{1,50})(?:\.\d{0,50})?|[+-]?\.\d{1,50})(e[+-]?\d{1,2})?(%?)"
)


@dataclass(frozen=True)
class Reply:
    """A generated reply and its label, both up to the end of the turn; lengths in tokens, the end-of-turn included.

    `stopped`: it ended by an end-of-turn token and not at max_new_tokens.
    """

    predict: str
    label: str
    stopped: bool
    tokens: int
    label_tokens: int


class Call(NamedTuple):
    """A tool call in a reply. `arguments`: JSON in one form, or code or a query with whitespace made single spaces."""

    tool: str
    arguments: str


def find_calls(text: str) -> list[Call]:
    """The closed tool calls of a reply, in order, up to the first `<result>` in it.

    Read are ARPO's `<python>` and `<search>`, `<tool_call>` around JSON or any other form, and JSON objects that have
    a name and arguments (or parameters), as Mistral's and Llama's templates write them.
    """
    text = text.partition("<result>")[0]
    calls: list[Call] = []
    at = 0
    while found := _CALL.search(text, at):
        start, at = found.start(), found.end()
        if not (tag := found[1]):
            call, at = _json_call(text, start, or_else=at)
            calls += [call] if call else []
            continue
        end = text.find(f"</{tag}>", at)
        if end < 0:
            break  # what is not closed calls nothing, nor does what stands in it
        inside, at = text[at:end], end
        if tag == "tool_call":
            calls += find_calls(inside) or [_call_in_another_form(inside)]
        else:
            calls.append(Call(tag, " ".join(inside.split())))
    return calls


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
    if isinstance(arguments, str):
        try:
            arguments = _DECODER.decode(arguments)
        except (ValueError, RecursionError):
            arguments = " ".join(arguments.split())
    return Call(value["name"], json.dumps(arguments, sort_keys=True)), end


def _call_in_another_form(text: str) -> Call:
    """Qwen3-Coder writes `<function=name>`, GLM the name on a line of its own; broken JSON may still hold a name."""
    name = re.search(r'"name"\s*:\s*"([^"]*)"', text) or re.match(r"\s*(?:<function=)?([\w.-]+)", text)
    return Call(name[1] if name else "", " ".join(text.split()))


def _float(digits: str) -> int | float:
    """1.0 is the number 1, in JSON as in the tool that reads it."""
    number = float(digits)
    return int(number) if number.is_integer() else number


_DECODER = json.JSONDecoder(parse_float=_float)


def is_well_formed(text: str, label: str = "") -> bool:
    """Whether there are tags, and each opens and closes before the next one opens.

    A tag that the label closes and does not open (a thought, opened by the generation prompt) is open at the start.
    """
    first = TAG.search(label)
    inside = first[2] if first and first[1] else ""
    tags = TAG.findall(text)
    for closes, name in tags:
        if inside != (name if closes else ""):
            return False
        inside = "" if closes else name
    return bool(tags) and not inside


def find_answer(text: str) -> str | None:
    r"""What the last `\boxed{...}` holds, or without one the last `<answer>`; None without either."""
    start = text.rfind("\\boxed{")
    if start >= 0:
        depth = 0
        for at in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if not depth:
                return text[start + len("\\boxed{") : at]
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end] if start >= 0 else None


def normal_answer(text: str) -> str:
    """The answer without what only sets it in print: dollars, spaces at its ends and doubled, a full stop."""
    return " ".join(text.replace("$", "").split()).removesuffix(".")


def to_number(answer: str) -> Fraction | None:
    r"""The number that an answer is, exactly: `1,234.50`, `-3/4`, `\frac{3}{4}`, `12%`, `1e-3`; None if it is none."""
    text = normal_answer(answer).replace("\u2212", "-").replace("\\%", "%").lower()
    if fraction := _FRACTION.fullmatch(text):
        over, under = fraction[1] or fraction[3], fraction[2] or fraction[4]
        return Fraction(int(over), int(under)) if int(under) else None
    if decimal := _DECIMAL.fullmatch(text):
        number = Fraction(decimal[1].replace(",", "") + (decimal[2] or ""))
        return number / 100 if decimal[3] else number
    return None


# --- one function a score: True, False, or None where the label has nothing to compare ---


def stopped(reply: Reply) -> bool:
    return reply.stopped


def well_formed(reply: Reply) -> bool | None:
    if not is_well_formed(reply.label, reply.label):  # no tags, or prose about tags
        return None
    return is_well_formed(reply.predict, reply.label)


def tool_called(reply: Reply) -> bool | None:
    return bool(find_calls(reply.predict)) if find_calls(reply.label) else None


def right_tool(reply: Reply) -> bool | None:
    wanted = [call.tool for call in find_calls(reply.label)]
    return [call.tool for call in find_calls(reply.predict)] == wanted if wanted else None


def right_arguments(reply: Reply) -> bool | None:
    wanted = find_calls(reply.label)
    return find_calls(reply.predict) == wanted if wanted else None


def answer_as_text(reply: Reply) -> bool | None:
    wanted, found = find_answer(reply.label), find_answer(reply.predict)
    if wanted is None:
        return None
    return found is not None and normal_answer(found) == normal_answer(wanted)


def answer_as_number(reply: Reply) -> bool | None:
    wanted, found = to_number(find_answer(reply.label) or ""), find_answer(reply.predict)
    if wanted is None:
        return None
    return found is not None and to_number(found) == wanted


def exact_match(reply: Reply) -> bool:
    return reply.predict.strip() == reply.label.strip()


_ALL = (stopped, well_formed, tool_called, right_tool, right_arguments, answer_as_text, answer_as_number, exact_match)
SCORES: dict[str, Callable[[Reply], bool | None]] = {score.__name__: score for score in _ALL}


def score_replies(replies: Sequence[Reply]) -> dict[str, float]:
    """Each score's share and `<score>_of`, the number of replies that it is of; the mean lengths in tokens.

    A score that no label has anything for is left out.
    """
    found: dict[str, float] = {"replies": len(replies)}
    for name, score in SCORES.items():
        judged = [right for reply in replies if (right := score(reply)) is not None]
        if judged:
            found |= {name: sum(judged) / len(judged), f"{name}_of": len(judged)}
    if replies:
        found["tokens"] = sum(reply.tokens for reply in replies) / len(replies)
        found["label_tokens"] = sum(reply.label_tokens for reply in replies) / len(replies)
    return found


# --- for people ---


def describe_scores(columns: dict[str, dict[str, float]]) -> list[str]:
    """A table of scores: a line a score, a column for each model (or step) by its name."""
    rows = {
        name.replace("_", " "): [_share(scores, name) for scores in columns.values()]
        for name in SCORES
        if any(name in scores for scores in columns.values())
    }
    label = next((scores["label_tokens"] for scores in columns.values() if "label_tokens" in scores), None)
    if label is not None:
        lengths = [f"{scores['tokens']:.0f}" if "tokens" in scores else "-" for scores in columns.values()]
        rows[f"tokens (labels: {label:.0f})"] = lengths
    table: str = pandas.DataFrame.from_dict(rows, orient="index", columns=list(columns)).to_string()
    return table.splitlines()


def _share(scores: dict[str, float], name: str) -> str:
    if name not in scores:
        return "-"
    of = int(scores[f"{name}_of"])
    return f"{round(scores[name] * of)} of {of}"
