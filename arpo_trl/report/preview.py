"""`--preview`: rows as their tokens, each shown as trained or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, islice

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..data.encode import EncodedRow, Encoder, encode_rows
from ..data.files import read_dataset
from ..data.labels import IGNORED
from ..data.registry import select_datasets
from ..data.template import template_of
from ..data.tokenizer import load_tokenizer
from ..recipe.keys import Recipe

TRAINED, MASKED = ("bold green", "green"), ("default", "dim")


def preview(recipe: Recipe, rows: int) -> None:
    """The first rows token by token, turn by turn: `+` and green are trained, the rest is context."""
    console = Console(highlight=False, soft_wrap=True)
    for notice in recipe.notices:
        console.print(notice, markup=False)
    tokenizer = load_tokenizer(recipe)
    console.print("+ (green) is trained, the rest is context; each token is shaded other than its neighbours")
    template = template_of(recipe, tokenizer)
    for info in select_datasets(recipe):
        read = islice(read_dataset(info, recipe.streaming)[1], rows)
        for row in encode_rows(read, Encoder(info, recipe, template)):
            if row["outcome"] != "kept":
                console.print(f"{row['source']}: {row['outcome']} ({row['reason']})", markup=False)
            if row["outcome"] != "dropped":
                rows -= 1
                show_row(console, row, tokenizer)
        if rows <= 0:
            return


def show_row(console: Console, row: EncodedRow, tokenizer: PreTrainedTokenizerBase) -> None:
    trained = sum(label != IGNORED for label in row["labels"])
    console.rule(f"{row['source']}: {len(row['labels']):,} tokens, {trained:,} trained", align="left")
    pairs = zip(row["input_ids"], row["labels"])
    for is_trained, turn in groupby(pairs, lambda pair: pair[1] != IGNORED):
        ids = [token for token, _ in turn]
        margin, shades = ("+ ", TRAINED) if is_trained else ("  ", MASKED)
        text = Text()
        for number, piece in enumerate(_pieces(ids, tokenizer)):
            text.append(piece, shades[number % 2])
        lines = text.split("\n")
        for line in lines:
            console.print(Text(margin, shades[0]) + line)
        console.print(Text(f"{margin}^ {len(ids):,} tokens {'trained' if is_trained else 'of context'}", "italic dim"))


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
        yield str(tokenizer.decode(waiting))
