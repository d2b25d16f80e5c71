"""Score trajectories: pass@1 with its interval, pass@k, form, tools. Pure functions over the lines of rollouts.jsonl."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, TypeAlias

from ..shell import split_command
from .sandbox import Limits, run_command
from .scores import find_answer, same_number, same_text, to_table
from .tags import RESULT_END, TAG, closes_tags
from .trajectory import Trajectory

Line: TypeAlias = dict[str, Any]
"""A line of rollouts.jsonl."""
RIGHT = 0.5
"""The score from which a trajectory is right. Without a judge, scores are 0 and 1."""
Z = 1.96


def score_answer(predicted: str | None, answer: str | None) -> float | None:
    """Return 1 if the final answer equals the reference as text or as a number, else 0; None without a reference."""
    if answer is None:
        return None
    return float(same_text(predicted, answer) or bool(same_number(predicted, answer)))


def judge(command: str, trajectory: Trajectory, limits: Limits) -> float | None:
    """Return the number that the user's command prints for a trajectory, or None if it fails."""
    about = {
        "question": trajectory.question.messages[-1]["content"],
        "answer": trajectory.question.answer,
        "trajectory": [*trajectory.question.messages, *trajectory.messages],
    }
    outcome = run_command(split_command(command), json.dumps(about, ensure_ascii=False), limits)
    try:
        score = float(outcome.text.split()[-1]) if not outcome.error else math.nan
    except (ValueError, IndexError):
        return None
    return score if math.isfinite(score) else None


def final_answer(trajectory: Trajectory) -> str | None:
    """Return the answer in the last reply, after the last tool result."""
    if not trajectory.messages:
        return None
    return find_answer(trajectory.messages[-1]["content"].rpartition(RESULT_END)[2])


def is_well_formed(trajectory: Trajectory) -> bool:
    """Return whether every tag of the replies closes before the next one opens, and ARPO's forms have tags at all."""
    replies = [message["content"] for message in trajectory.messages if message["role"] == "assistant"]
    has_form = trajectory.question.form.calls or any(map(TAG.search, replies))
    return has_form and all(map(closes_tags, replies))


# --- results of many trajectories ---


def summarize(lines: Sequence[Line]) -> dict[str, float]:
    """Return the figures of a set of trajectories, without those that failed through no fault of the model."""
    valid = [line for line in lines if line["end"] != "environment"]
    by_question: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for line in valid:
        if line["score"] is not None:
            by_question[line["dataset"], line["source"]].append(line["right"])
    figures: dict[str, float] = {
        "questions": len({(line["dataset"], line["source"]) for line in lines}),
        "trajectories": len(lines),
        "scored_questions": len(by_question),
        "failed": len(lines) - len(valid),
    }
    if by_question:
        figures["pass@1"], figures["pass@1_low"], figures["pass@1_high"] = pass_at_1(by_question.values())
        largest = max(map(len, by_question.values()))
        for k in (2**power for power in range(1, largest.bit_length())):
            figures[f"pass@{k}"] = fmean(
                pass_at_k(len(right), sum(right), k) for right in by_question.values() if len(right) >= k
            )
    if valid:
        calls = [call for line in valid for call in line["calls"]]
        figures |= {
            "answered": fmean(line["predicted"] is not None for line in valid),
            "well_formed": fmean(line["well_formed"] for line in valid),
            "stopped": fmean(line["end"] == "stop" for line in valid),
            "tool_calls": len(calls) / len(valid),
            "tool_errors": fmean(bool(call["error"]) for call in calls) if calls else 0.0,
            "tokens": fmean(line["tokens"] for line in valid),
            "same_encoding": fmean(line["encoding"] == "same" for line in valid),
        }
    return figures


def pass_at_1(questions: Iterable[Sequence[bool]]) -> tuple[float, float, float]:
    """Return the mean over questions, and its 95 % interval.

    Samples of one question are not independent, so the interval is that of the questions' means: normal, or Wilson's
    with one observation per question where they are all 0 or all 1.
    """
    means = [fmean(right) for right in questions]
    n, center = len(means), fmean(means)
    variance = sum((value - center) ** 2 for value in means) / (n - 1) if n > 1 else 0.0
    if variance:
        half = Z * math.sqrt(variance / n)
        return center, max(center - half, 0.0), min(center + half, 1.0)
    middle = (center + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(center * (1 - center) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return center, max(middle - half, 0.0), min(middle + half, 1.0)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Return the unbiased estimate of at least one right in k samples, from n (https://arxiv.org/abs/2107.03374)."""
    return 1.0 if n - right < k else 1.0 - math.comb(n - right, k) / math.comb(n, k)


def paired_difference(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[float, float, float]:
    """Return the mean difference of two models on the same questions, and its 95 % interval."""
    differences = [after[key] - before[key] for key in before if key in after]
    center, n = fmean(differences), len(differences)
    variance = sum((value - center) ** 2 for value in differences) / max(n - 1, 1)
    half = Z * math.sqrt(variance / n)
    return center, center - half, center + half


def describe(columns: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return a table with one line per figure and one column per dataset."""
    names = dict.fromkeys(name for figures in columns.values() for name in figures)
    rows = {
        name.replace("_", " "): [_cell(figures, name) for figures in columns.values()]
        for name in names
        if not name.endswith(("_low", "_high"))
    }
    return to_table(rows, columns)


def _cell(figures: Mapping[str, float], name: str) -> str:
    value = figures.get(name)
    if value is None:
        return "-"
    if name == "pass@1":
        return f"{value:.1%} ({figures['pass@1_low']:.1%} to {figures['pass@1_high']:.1%})"
    if name in ("questions", "trajectories", "scored_questions", "failed", "tokens"):
        return f"{value:,.0f}"
    return f"{value:.2f}" if name == "tool_calls" else f"{value:.1%}"
