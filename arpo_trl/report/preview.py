"""`--preview`: rows as their tokens, each shown as trained or not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby, islice

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..data.audit import describe_also, missing_columns
from ..data.encode import EncodedRow, Encoder, encode_rows
from ..data.files import read_dataset
from ..data.labels import IGNORED
from ..data.registry import select_datasets
from ..data.template import template_of
from ..data.tokenizer import load_tokenizer
from ..errors import DatasetError, printable
from ..recipe.keys import Recipe

# By what a token is: the margin of its lines, two shades that alternate, and its name in the line below.
KINDS = {
    "context": ("  ", ("default", "dim"), "of context"),
    "trained": ("+ ", ("bold green", "green"), "trained"),
    "masked": ("- ", ("bold yellow", "yellow"), "masked by mask_spans"),
}


def preview(recipe: Recipe, rows: int) -> None:
    """The first rows token by token, turn by turn: `+` and green are trained, the rest is context.

    Raises:
        DatasetError: if a column that the registry names is in none of them, and all are dropped.
    """
    console = Console(highlight=False, soft_wrap=True)

    def say(line: str) -> None:
        console.print(Text(printable(line)))

    for notice in recipe.notices:
        say(notice)
    tokenizer = load_tokenizer(recipe)
    masked = ", - (yellow) is masked by mask_spans" if recipe.mask_spans else ""
    say(f"+ (green) is trained{masked}, the rest is context; each token is shaded other than its neighbours")
    template = template_of(recipe, tokenizer)
    for info in select_datasets(recipe):
        read = list(islice(read_dataset(info, recipe.streaming), rows))
        found = list(encode_rows(read, Encoder(info, recipe, template)))
        plain = recipe.model_copy(update={"mask_spans": []})
        unmasked = encode_rows(read, Encoder(info, plain, template)) if recipe.mask_spans else found
        for row, other in zip(found, unmasked):
            if row["outcome"] != "kept":
                say(f"{row['source']}: {row['outcome']} ({row['reason']})")
            if row["outcome"] != "dropped":
                rows -= 1
                show_row(console, row, other, tokenizer)
        if all(row["outcome"] == "dropped" for row in found):
            fields = {field for row in found for field in row["fields"]}
            if problems := missing_columns(info, fields, len(found)):
                raise DatasetError(problems)
        if rows <= 0:
            return


def show_row(console: Console, row: EncodedRow, unmasked: EncodedRow, tokenizer: PreTrainedTokenizerBase) -> None:
    """One row; `unmasked` is the same without mask_spans."""
    trained = sum(label != IGNORED for label in row["labels"])
    title = f"{row['source']}: {len(row['labels']):,} tokens, {trained:,} trained"
    console.print(Text("\n" + printable(title), "bold"))
    for counted in describe_also(json.loads(row["also"] or "{}")):
        console.print(Text(counted, "italic"))
    kinds = [
        "trained" if label != IGNORED else "context" if other == IGNORED else "masked"
        for label, other in zip(row["labels"], unmasked["labels"], strict=True)
    ]
    for kind, turn in groupby(zip(row["input_ids"], kinds), lambda pair: pair[1]):
        ids = [token for token, _ in turn]
        margin, shades, name = KINDS[kind]
        text = Text()
        for number, piece in enumerate(_pieces(ids, tokenizer)):
            text.append(printable(piece), shades[number % 2])
        for line in text.split("\n"):
            console.print(Text.assemble((margin, shades[0]), line))
        console.print(Text(f"{margin}^ {len(ids):,} tokens {name}", "italic dim"))


def _pieces(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Each token's text; tokens that only together make a character (Chinese, emoji) come as one."""
    waiting: list[int] = []
    for token in ids:
        waiting.append(token)
        text = str(tokenizer.decode(waiting, clean_up_tokenization_spaces=False))
        if not text.endswith("\ufffd") or len(waiting) == 8:
            yield text
            waiting = []
    if waiting:
        yield str(tokenizer.decode(waiting, clean_up_tokenization_spaces=False))
