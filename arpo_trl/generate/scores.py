"""Compare a generated reply with its label: form, tool calls, answer. Pure functions over literal text.

Each score is a share and a count: the share of right replies among those whose label has something to compare.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import pandas

from .tags import Call, find_calls, is_well_formed

_FRACTION = re.compile(r"\\[dt]?frac\{(-?\d{1,50})\}\{(\d{1,50})\}|(-?\d{1,50})\s*/\s*(\d{1,50})")
_DECIMAL = re.compile(
    r"([+-]?(?:\d{1,3}(?:,\d{3}){1,20}|\d{1,50})(?:\.\d{0,50})?|[+-]?\.\d{1,50})(e[+-]?\d{1,2})?(%?)"
)


@dataclass(frozen=True)
class Reply:
    """A generated reply and its label, both up to the end of the turn. Lengths are in tokens, end-of-turn included.

    `stopped`: the reply ends with an end-of-turn token, not at max_new_tokens.
    """

    predict: str
    label: str
    stopped: bool
    tokens: int
    label_tokens: int


def find_answer(text: str) -> str | None:
    r"""Return the content of the last `\boxed{...}`, else of the last `<answer>`, else None."""
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
    """Return the answer without typesetting: dollar signs, extra spaces and a final period are removed."""
    return " ".join(text.replace("$", "").split()).removesuffix(".")


def to_number(answer: str) -> Fraction | None:
    r"""Return the exact value of an answer such as `1,234.50`, `-3/4`, `\frac{3}{4}`, `12%` or `1e-3`, else None."""
    text = normal_answer(answer).replace("\u2212", "-").replace("\\%", "%").lower()
    if fraction := _FRACTION.fullmatch(text):
        over, under = fraction[1] or fraction[3], fraction[2] or fraction[4]
        return Fraction(int(over), int(under)) if int(under) else None
    if decimal := _DECIMAL.fullmatch(text):
        number = Fraction(decimal[1].replace(",", "") + (decimal[2] or ""))
        return number / 100 if decimal[3] else number
    return None


def same_text(answer: str | None, expected: str) -> bool:
    return answer is not None and normal_answer(answer) == normal_answer(expected)


def same_number(answer: str | None, expected: str) -> bool | None:
    """Return whether both are the same number, or None if the expected answer is no number."""
    number = to_number(expected)
    return None if number is None else answer is not None and to_number(answer) == number


# --- one function per score: True, False, or None where the label has nothing to compare ---


def stopped(reply: Reply) -> bool:
    return reply.stopped


def well_formed(reply: Reply) -> bool | None:
    if not is_well_formed(reply.label, reply.label):  # no tags, or a text about tags
        return None
    return is_well_formed(reply.predict, reply.label)


def tool_called(reply: Reply) -> bool | None:
    return bool(find_calls(reply.predict)) if find_calls(reply.label) else None


def right_tool(reply: Reply) -> bool | None:
    expected = [call.tool for call in find_calls(reply.label)]
    return [call.tool for call in find_calls(reply.predict)] == expected if expected else None


def right_arguments(reply: Reply) -> bool | None:
    expected = _normal_calls(reply.label)
    return _normal_calls(reply.predict) == expected if expected else None


def _normal_calls(text: str) -> list[Call]:
    """Return the calls with runs of whitespace as single spaces, so that only the words are compared."""
    return [Call(call.tool, " ".join(call.arguments.split())) for call in find_calls(text)]


def answer_as_text(reply: Reply) -> bool | None:
    expected = find_answer(reply.label)
    return None if expected is None else same_text(find_answer(reply.predict), expected)


def answer_as_number(reply: Reply) -> bool | None:
    expected = find_answer(reply.label)
    return None if expected is None else same_number(find_answer(reply.predict), expected)


def exact_match(reply: Reply) -> bool:
    return reply.predict.strip() == reply.label.strip()


_ALL = (stopped, well_formed, tool_called, right_tool, right_arguments, answer_as_text, answer_as_number, exact_match)
SCORES: dict[str, Callable[[Reply], bool | None]] = {score.__name__: score for score in _ALL}


def score_replies(replies: Sequence[Reply]) -> dict[str, float]:
    """Return each score's share, its number of replies as `<score>_of`, and the mean lengths in tokens.

    A score is omitted if no label has anything to compare.
    """
    scores: dict[str, float] = {"replies": len(replies)}
    for name, score in SCORES.items():
        judged = [right for reply in replies if (right := score(reply)) is not None]
        if judged:
            scores |= {name: sum(judged) / len(judged), f"{name}_of": len(judged)}
    if replies:
        scores["tokens"] = sum(reply.tokens for reply in replies) / len(replies)
        scores["label_tokens"] = sum(reply.label_tokens for reply in replies) / len(replies)
    return scores


# --- for people ---


def describe_scores(columns: dict[str, dict[str, float]]) -> list[str]:
    """Return a table with one line per score and one column per model or step."""
    rows = {
        name.replace("_", " "): [_share(scores, name) for scores in columns.values()]
        for name in SCORES
        if any(name in scores for scores in columns.values())
    }
    label = next((scores["label_tokens"] for scores in columns.values() if "label_tokens" in scores), None)
    if label is not None:
        lengths = [f"{scores['tokens']:.0f}" if "tokens" in scores else "-" for scores in columns.values()]
        rows[f"tokens (labels: {label:.0f})"] = lengths
    return to_table(rows, columns)


def to_table(rows: Mapping[str, Sequence[str]], columns: Iterable[str]) -> list[str]:
    """Return the lines of a table of named rows."""
    table: str = pandas.DataFrame.from_dict(rows, orient="index", columns=list(columns)).to_string()
    return table.splitlines()


def _share(scores: dict[str, float], name: str) -> str:
    if name not in scores:
        return "-"
    of = int(scores[f"{name}_of"])
    return f"{round(scores[name] * of)} of {of}"
