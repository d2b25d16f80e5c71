"""`arpo-trl select FOLDER`: rows for SFT and preference pairs, from the trajectories of a rollout."""

import json
from collections import defaultdict
from collections.abc import Sequence
from itertools import cycle, product
from pathlib import Path

from ..data.messages import Fields
from ..errors import RecipeError
from ..run_folder import read_lines, to_lines, write_json, write_text
from .rollout_files import ROLLOUTS, messages_column, registry_entry
from .rollout_scores import Line


def select(folder: Path, max_per_question: int, max_pairs_per_question: int) -> list[str]:
    """Write selected.jsonl, pairs.jsonl and dataset_info.json next to rollouts.jsonl, and return lines for people.

    Raises:
        RecipeError: there are no finished rollouts, or they are of held-out questions.
    """
    lines = read_lines(folder / ROLLOUTS)
    if not lines:
        raise RecipeError(f"{folder / ROLLOUTS}: missing. Use the output_dir of a finished rollout")
    if any(line["split"] == "eval" for line in lines):
        raise RecipeError(
            f"{folder / ROLLOUTS}: its rows answer held-out questions, which must not be trained on. Roll out again with rollout_on: train"
        )
    questions: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in lines:
        questions[line["dataset"], line["source"]].append(line)
    groups = [usable(group) for group in questions.values()]
    selected = [
        _row(line) | {"source": line["source"], "sample": line["sample"], "scores": _scores(line)}
        for group in groups
        for line in best(group)[:max_per_question]
    ]
    pairs = [
        to_pair(chosen, rejected) for group in groups for chosen, rejected in pair_up(group)[:max_pairs_per_question]
    ]
    formatting = lines[0]["formatting"]
    entries = {}
    for name, rows in (("selected", selected), ("pairs", pairs)):
        write_text(folder / f"{name}.jsonl", to_lines(rows))
        if rows:
            entries[name] = registry_entry(f"{name}.jsonl", rows, formatting, ranking=name == "pairs")
    write_json(folder / "dataset_info.json", entries)
    used = [sum(1 for group in groups if chosen(group)) for chosen in (best, pair_up)]
    return [
        f"selected {len(selected):,} rows of {used[0]:,} questions: {folder / 'selected.jsonl'}",
        f"pairs    {len(pairs):,} pairs of {used[1]:,} questions: {folder / 'pairs.jsonl'}",
        f"         {len(questions) - used[0]:,} of {len(questions):,} questions without a right, well-formed trajectory",
    ]


def usable(lines: Sequence[Line]) -> list[Line]:
    """Return the trajectories that ended by themselves and have a score, identical ones once, the shortest first.

    One that a limit cut would teach DPO to avoid the end of turn.
    """
    ended = [line for line in lines if line["end"] == "stop" and line["score"] is not None]
    unique = {_text(line): line for line in reversed(ended)}
    return sorted(unique.values(), key=lambda line: (len(line["calls"]), line["tokens"], line["sample"]))


def best(lines: Sequence[Line]) -> list[Line]:
    """Return those that are right, well formed and without a tool error."""
    return [
        line
        for line in lines
        if line["right"] and line["well_formed"] and not any(call["error"] for call in line["calls"])
    ]


def pair_up(lines: Sequence[Line]) -> list[tuple[Line, Line]]:
    """Return pairs of chosen and rejected, the most useful first: right against wrong, then fewer calls against more.

    Every wrong trajectory is used once before any is used twice, and so is every right one.
    """
    right = best(lines)
    wrong = [line for line in lines if not line["right"]]
    crossed = [*zip(cycle(right), wrong), *product(right, wrong)]
    shorter = [pair for pair in product(right, reversed(right)) if len(pair[0]["calls"]) < len(pair[1]["calls"])]
    unique: dict[tuple[str, str], tuple[Line, Line]] = {}
    for chosen, rejected in crossed + shorter:
        last = rejected[messages_column(rejected["formatting"])][-1]
        if last.get("value") or last.get("content") or last.get("tool_calls"):  # else training would drop the pair
            unique.setdefault((_text(chosen), _text(rejected)), (chosen, rejected))
    return list(unique.values())


def _text(line: Line) -> str:
    return json.dumps(line[messages_column(line["formatting"])])


def to_pair(chosen: Line, rejected: Line) -> Fields:
    """Return a ranking row: the prompt, and both sides as a turn, or as a list of turns that continue it."""
    column = messages_column(chosen["formatting"])
    start = chosen["prompt_messages"]
    row = _row(chosen)
    row[column] = row[column][:start]
    sides = [line[column][start:] for line in (chosen, rejected)]
    row |= {key: side[0] if len(side) == 1 else side for key, side in zip(("chosen", "rejected"), sides)}
    samples = [chosen["sample"], rejected["sample"]]
    return row | {"source": chosen["source"], "sample": samples, "scores": [_scores(chosen), _scores(rejected)]}


def _row(line: Line) -> Fields:
    return {key: line[key] for key in (messages_column(line["formatting"]), "system", "tools") if key in line}


def _scores(line: Line) -> Fields:
    return {"score": line["score"], "calls": len(line["calls"]), "tokens": line["tokens"]}
