"""`--preview`: rows token by token, trained or not; and the short row that each run prints before step 1."""

from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from textwrap import shorten

import numpy as np
from datasets import Dataset
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..data.audit import Counts, missing_columns, token_lengths
from ..data.encode import EncodedRow, Encoder, encode_rows
from ..data.files import read_dataset
from ..data.labels import IGNORED
from ..data.pairs import SIDES
from ..data.registry import DatasetInfo
from ..data.sources import select_datasets
from ..data.tokenizer import decode, load_template
from ..errors import DatasetError, printable
from ..recipe.keys import Recipe
from ..terminal import to_terminal
from .manifest import run_day

# The kind of a token -> the margin of its lines, two alternating shades, and its name in the line below.
KINDS = {
    "context": ("  ", ("default", "dim"), "of context"),
    "trained": ("+ ", ("bold green", "green"), "trained"),
    "masked": ("- ", ("bold yellow", "yellow"), "masked by mask_spans"),
}

EXAMPLE_ROWS = 200
"""Rows of which `describe_example` shows the shortest."""
EXAMPLE_LINES = 4
EXAMPLE_WIDTH = 88


def preview(recipe: Recipe, rows: int) -> None:
    """Print the first rows token by token and turn by turn: `+` and green are trained, the rest is context.

    Raises:
        DatasetError: all rows of a dataset are dropped, and a column that the registry names is missing in all.
    """
    console = Console(highlight=False, soft_wrap=True)

    def say(line: str) -> None:
        console.print(Text(to_terminal(printable(line))))

    for notice in recipe.notices:
        say(notice)
    template = load_template(recipe, run_day(recipe))
    masked = ", - (yellow) is masked by mask_spans" if recipe.mask_spans else ""
    say(f"+ (green) is trained on{masked}, the rest is context; alternating shades show token boundaries")
    for info in select_datasets(recipe):
        read = list(islice(read_dataset(info, recipe.streaming), rows))
        encoded = list(encode_rows(read, Encoder(info, recipe, template)))
        plain = recipe.model_copy(update={"mask_spans": []})
        unmasked = encode_rows(read, Encoder(info, plain, template)) if recipe.mask_spans else encoded
        for row, other in zip(encoded, unmasked):
            if row["outcome"] != "intact":
                say(f"{row['source']}: {row['outcome']} ({row['reason']})")
            if row["outcome"] != "dropped":
                rows -= 1
                show_row(console, row, other, info, template.tokenizer)
        if all(row["outcome"] == "dropped" for row in encoded):
            fields = {field for row in encoded for field in row["fields"]}
            if problems := missing_columns(info, fields, len(encoded)):
                raise DatasetError(problems)
        if rows <= 0:
            return


def show_row(
    console: Console, row: EncodedRow, unmasked: EncodedRow, info: DatasetInfo, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Print one row; `unmasked` is the same row without mask_spans."""
    counts = Counts()
    counts.add(row, len(row["labels"]))
    title = f"{row['source']}: {counts.tokens:,} tokens, {counts.trained_tokens:,} trained"
    console.print(Text("\n" + printable(title), "bold"))
    for note in counts.describe_notes(info):
        console.print(Text(note, "italic"))
    kinds = [
        "trained" if label != IGNORED else "context" if other == IGNORED else "masked"
        for label, other in zip(row["labels"], unmasked["labels"], strict=True)
    ]
    tokens, at = list(zip(row["input_ids"], kinds)), 0
    for side, length in zip(SIDES, row["seq_lengths"]):
        console.print(Text(f"{side}: {length:,} tokens", "bold"))
        _show_tokens(console, tokens[at : at + length], tokenizer)
        at += length
    _show_tokens(console, tokens[at:], tokenizer)


def _show_tokens(console: Console, tokens: Sequence[tuple[int, str]], tokenizer: PreTrainedTokenizerBase) -> None:
    for kind, turn in groupby(tokens, lambda token: token[1]):
        ids = [token for token, _ in turn]
        margin, shades, name = KINDS[kind]
        text = Text()
        for number, piece in enumerate(_pieces(ids, tokenizer)):
            text.append(printable(piece), shades[number % 2])
        for line in text.split("\n"):
            console.print(Text.assemble((margin, shades[0]), line))
        console.print(Text(f"{margin}^ {len(ids):,} tokens {name}", "italic dim"))


def describe_example(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the shortest of the first rows, with `+` before trained lines; long turns are shortened in the middle."""
    if not len(rows):
        return []
    row = rows[int(np.argmin(token_lengths(rows.select(range(min(len(rows), EXAMPLE_ROWS))))))]
    tokens = list(zip(row["input_ids"], row["labels"], strict=True))
    trained = sum(label != IGNORED for _, label in tokens)
    lines = [f"example  {row['source']}: {len(tokens):,} tokens, {trained:,} trained (marked +)"]
    sides = row.get("seq_lengths") or [len(tokens)]
    for name, end, length in zip(SIDES if len(sides) > 1 else [""], np.cumsum(sides), sides):
        lines += [f"         {name}:"] * bool(name)
        for is_trained, turn in groupby(tokens[end - length : end], lambda token: token[1] != IGNORED):
            text = decode(tokenizer, [label if is_trained else token for token, label in turn])
            shown = [shorten(line, EXAMPLE_WIDTH, placeholder=" ...") for line in text.split("\n") if line.strip()]
            if len(shown) > EXAMPLE_LINES:
                shown = [*shown[: EXAMPLE_LINES - 2], "...", shown[-1]]
            lines += [f"       {'+' if is_trained else ' '} {line}" for line in shown]
    return lines


def _pieces(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield the text of each token; tokens that form one character together (Chinese, emoji) are joined."""
    waiting: list[int] = []
    for token in ids:
        waiting.append(token)
        text = decode(tokenizer, waiting)
        if not text.endswith("\ufffd") or len(waiting) == 8:
            yield text
            waiting = []
    if waiting:
        yield decode(tokenizer, waiting)
