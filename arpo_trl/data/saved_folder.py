"""The serving check of a saved folder: its tokenizer, loaded again, renders prompts to the text and the tokens of training.

Cheap (no weights are read), so that every run and every merge ends with it. A running server is `generate/check_serving.py`'s.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from difflib import SequenceMatcher
from functools import cached_property
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..errors import RecipeError, RowError, in_one_line
from ..recipe.keys import Recipe
from ..run_folder import read_json
from . import serving_causes
from .prepare import PreparedData
from .registry import saved_by_llamafactory
from .segments import count_shared
from .serving_causes import OWN_TEMPLATE, Change, Difference
from .serving_rows import SERVING_ROWS, Ask, ServingRow, choose_rows, read_rows, render, write_rows
from .template_probe import date_formats, find_template
from .tokenizer import make_tokenize

BORDER_SHARE = 0.05
"""Share of a check's tokens that may differ because training tokenizes each segment separately, and a server all at once."""


@dataclass
class PromptCheck:
    """A comparison of prompts with those of training.

    `borders`: prompts with the text of training and, at the borders of segments, other tokens: `border_tokens` of `tokens`.
    `is_dated`: whether they are compared as training would have rendered them today.
    """

    rows: int = 0
    identical: int = 0
    borders: int = 0
    border_tokens: int = 0
    tokens: int = 0
    is_dated: bool = False
    differences: list[Difference] = field(default_factory=list)

    def summary(self) -> str:
        """The check in one line, without its differences."""
        borders = f", {self.borders} more with the same text and other tokens at segment borders" * bool(self.borders)
        dated = ", except for today's date, which the chat template writes" * self.is_dated
        return f"{self.identical} of {self.rows} prompts identical{borders}{dated}"


def check_run(recipe: Recipe, data: PreparedData, folder: Path) -> list[str]:
    """Choose rows of a finished run, keep them in its folder, and check the folder with them.

    Returns:
        Lines to print. A check that cannot be made says why, and fails no run.
    """
    if saved_by_llamafactory(recipe):
        return ["serving check  skipped: tokenized_path was saved by LLaMA-Factory, without the rows' messages"]
    try:
        rows = choose_rows(recipe, data)
        if not rows:
            return ["serving check  skipped: every row is truncated at cutoff_len, or could not be read again"]
        write_rows(rows, folder)
        return check_folder(folder)
    except (RecipeError, RowError, OSError, ValueError, KeyError) as error:
        return [f"serving check  skipped: {in_one_line(error)}"]


def check_folder(folder: Path) -> list[str]:
    """Check a saved folder with the rows in it: a line to print, and one for each difference."""
    rows = read_rows(folder)
    if not rows:
        return [f"serving check  skipped: {folder} has no {SERVING_ROWS}, which a run writes"]
    check = check_saved(folder, rows)
    if not check.differences:
        return [f"serving check  {check.summary()}"]
    first, *more = check.differences
    return [f"serving check  {check.summary()}; {first}", *(f"               {difference}" for difference in more)]


def check_saved(folder: Path, rows: Sequence[ServingRow]) -> PromptCheck:
    """Render each row's messages with the folder's own tokenizer and compare text and tokens with those of training."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.chat_template:
        sources = [row.source for row in rows]
        lacks = Difference("chat template", "missing in the folder", OWN_TEMPLATE, sources)
        return PromptCheck(len(rows), differences=[lacks])
    check, compare = PromptCheck(), PromptComparison(tokenizer)
    for row in map(compare.of_today, rows):
        compare.add(check, row, compare.render(row), None)
    compare.unite(check)
    check.is_dated = compare.is_dated
    _check_borders(check)
    check.differences += _missing_ends(folder, rows, tokenizer)
    return check


class PromptComparison:
    """Compares prompts with those of training, with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.tokenize = make_tokenize(tokenizer)
        self.reasoning_key = find_template(tokenizer).reasoning_key
        self.others: list[tuple[ServingRow, str, Ask]] = []
        self.date_formats = date_formats(tokenizer)
        self.is_dated = False

    def of_today(self, row: ServingRow) -> ServingRow:
        """Return a row as training would have rendered it today, where the chat template writes the day."""
        day, today = date.fromisoformat(row.day), date.today()
        segments = row.segments
        for format in self.date_formats:
            written = day.strftime(format)
            at = next((at for at, segment in enumerate(segments) if written in segment), None)
            if at is not None:
                dated = segments[at].replace(written, today.strftime(format), 1)
                segments = [*segments[:at], dated, *segments[at + 1 :]]
        if segments == row.segments:
            return row
        self.is_dated = True
        return replace(row, segments=segments, ids=self._in_segments(segments), day=today.isoformat())

    def ask(self, row: ServingRow) -> Ask:
        """Return a row's request as the chat template takes it."""
        return row.ask(self.reasoning_key)

    def render(self, row: ServingRow) -> str | None:
        """Render a row's request, None if the chat template raises an error."""
        return render(self.ask(row), self.tokenizer)

    def add(self, check: PromptCheck, row: ServingRow, served: str | None, served_ids: list[int] | None) -> str:
        """Count a row, with its difference if there is one; `served_ids` are those of the text if None.

        Returns:
            The cause of the difference, "" if the prompt has the text of training.
        """
        check.rows += 1
        check.tokens += len(row.ids)
        (encoding,) = self.tokenize([row.text])
        ids = encoding.ids if served_ids is None else served_ids
        if served is None:
            difference = Difference("chat template", "raises an error for messages of training", OWN_TEMPLATE)
        elif served != row.text and served_ids != row.ids:
            plain = self.ask(row)
            difference = serving_causes.explain(row, served, plain, self.tokenizer, self.changes)
            self.others.append((row, served, plain))
        elif ids == row.ids:
            check.identical += 1
            return ""
        elif ids == encoding.ids and self._in_segments(row.segments) == row.ids:
            check.borders += 1
            blocks = SequenceMatcher(None, row.ids, ids, autojunk=False).get_matching_blocks()
            check.border_tokens += max(len(row.ids), len(ids)) - sum(block.size for block in blocks)
            return ""
        else:
            difference = _explain_ids(row, ids, self.tokenizer)
        serving_causes.add(check.differences, difference, row.source)
        return difference.cause

    def unite(self, check: PromptCheck) -> None:
        """Report one cause in place of several if it alone explains every prompt with another text."""
        sources = [source for difference in check.differences for source in difference.rows]
        if len(check.differences) < 2 or len(sources) != len(self.others):
            return
        alone = [(change,) for change in self.changes]
        if difference := serving_causes.explain_together(self.others, self.tokenizer, alone):
            check.differences = [replace(difference, rows=sources)]

    @cached_property
    def changes(self) -> list[Change]:
        """Return what may explain a difference, listed once a row differs."""
        return serving_causes.list_changes(self.tokenizer)

    def _in_segments(self, segments: list[str]) -> list[int]:
        pieces = self.tokenize(segments, ["", *segments[:-1]])
        return [token for piece in pieces for token in piece.ids]


def _explain_ids(row: ServingRow, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Difference:
    """Explain a prompt with the text of training and other tokens."""
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if difference := serving_causes.explain_bos(row.ids, ids, bos, tokenizer.bos_token):
        return difference
    at = count_shared(row.ids, ids)
    return Difference(
        "tokenizer",
        f"the same text has other tokens: token {at:,} is {row.ids[at : at + 3]} in training, {ids[at : at + 3]} served",
        "Serve the folder's own tokenizer; a converted one (GGUF) may split text in another way.",
    )


def _check_borders(check: PromptCheck) -> None:
    if check.border_tokens > BORDER_SHARE * max(check.tokens, 1):
        share = check.border_tokens / check.tokens
        check.differences.append(
            Difference(
                "segment borders",
                f"{share:.1%} of the tokens differ from those of training (at most {BORDER_SHARE:.0%} expected)",
                "Use a template whose replies begin and end at special tokens.",
            )
        )


def _missing_ends(folder: Path, rows: Sequence[ServingRow], tokenizer: PreTrainedTokenizerBase) -> list[Difference]:
    """Report tokens that end replies of training and that the folder does not stop at."""
    known = end_ids(folder)
    missing = Counter(row.end for row in rows if row.end not in known)
    return [
        Difference(
            "end-of-turn token",
            f"{tokenizer.convert_ids_to_tokens(end)!r} ({end}), which ends {count} of {len(rows)} replies, is not in "
            f"generation_config.json (found {sorted(known) or 'nothing'})",
            f'Write "eos_token_id": {sorted([end, *known])} there.',
        )
        for end, count in missing.items()
    ]


def end_ids(folder: Path) -> set[int]:
    """Return the ids that a folder's generation_config.json stops at; without the file, config.json's."""
    for name in ("generation_config.json", "config.json"):
        values = read_json(folder / name)
        if isinstance(values, dict):
            ends = values.get("eos_token_id")
            return {*(ends if isinstance(ends, list) else [] if ends is None else [ends])}
    return set()
