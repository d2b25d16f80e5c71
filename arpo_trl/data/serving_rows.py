"""The contexts that a model was trained on, as a client sends them and as training tokenized them.

A run chooses some of its rows and keeps them in `serving_check.jsonl` next to the model, so that the saved folder, a merged
model and a running server can be compared with what was trained.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, islice, zip_longest
from pathlib import Path
from typing import NamedTuple, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import RecipeError, RowError
from ..recipe.keys import Recipe
from ..run_folder import to_lines, write_text
from .encode import Encoder
from .files import Row, read_dataset
from .labels import ExampleConfig, tokenize_segments, trained_segments
from .messages import REASONING_KEYS, Conversation, Fields, Message
from .pairs import read_sides
from .prepare import PreparedData, Rows
from .segments import Segment, to_segments
from .sources import select_datasets
from .template import Template
from .template import render as render_template
from .template_probe import ChatTemplate, find_template
from .tokenizer import make_tokenize

SERVING_ROWS = "serving_check.jsonl"
ROWS = 32
LOOKED_AT = 512  # encoded rows that may be chosen: some are cut


class Ask(NamedTuple):
    """A request as a server renders it. `chat_template`: the tokenizer's own if None."""

    messages: list[Message]
    tools: list[Fields] | None = None
    switches: dict[str, object] = {}  # noqa: RUF012 - never changed
    chat_template: ChatTemplate | None = None


@dataclass(frozen=True)
class ServingRow:
    """One context and its reply. `source`: "file:line", or the name of a built-in conversation.

    Attributes:
        messages: Those before the reply, in OpenAI's form; the arguments of calls are objects.
        tools: The row's tools.
        segments: The context's text in the pieces that training tokenized separately.
        ids: The context's tokens in training, its generation prompt included.
        reply: The reply's text, through its end-of-turn token.
        reply_ids: The reply's tokens, in the same way.
        calls: The calls that the reply holds.
        day: The date that the template wrote in training, ISO 8601.
        default_system: The recipe's default_system, where training gave it to this row.
    """

    source: str
    messages: list[Message]
    tools: list[Fields] | None
    segments: list[str]
    ids: list[int]
    reply: str
    reply_ids: list[int]
    calls: list[Fields]
    day: str
    default_system: str | None = None

    @property
    def text(self) -> str:
        return "".join(self.segments)

    @property
    def end(self) -> int:
        """The id of the token that ends the reply."""
        return self.reply_ids[-1]

    def ask(self, reasoning_key: str | None) -> Ask:
        """Return the request for the reply, with its reasoning under the key that the chat template reads."""
        names = {"reasoning_content": reasoning_key or "reasoning_content"}
        messages = [{names.get(name, name): value for name, value in message.items()} for message in self.messages]
        return Ask(cast(list[Message], messages), self.tools)


def choose_rows(recipe: Recipe, data: PreparedData, number: int = ROWS) -> list[ServingRow]:
    """Return contexts of held-out rows, then of training rows, that the cutoff left complete.

    Each row is encoded again from its file, and chosen only where that gives the very tokens that were trained on. Of the
    rows, in turn, the context of the last reply, of the first one with calls, and of the first; then what is left of these.
    """
    encoders = [Encoder(info, recipe, data.template) for info in select_datasets(recipe)]
    chosen: list[ServingRow] = []
    for stored in (list(data.eval.values()), [data.train]):
        if len(chosen) < number:
            chosen += _choose_of(stored, encoders, number - len(chosen))
    return chosen


def _choose_of(stored: list[Rows], encoders: list[Encoder], number: int) -> list[ServingRow]:
    """Choose from encoded datasets; from streams, whose encoded rows are not kept, what their files hold first."""
    expected: dict[str, list[int]] = {}
    for rows in stored:
        if isinstance(rows, Dataset):
            for row in islice(rows, LOOKED_AT):
                sides = row.get("seq_lengths")  # of a pair, the chosen side comes first
                expected[row["source"]] = list(row["input_ids"])[: sides[0] if sides else None]
    if not expected and all(isinstance(rows, Dataset) for rows in stored):
        return []
    by_row: list[list[ServingRow]] = []
    for encoder in encoders:
        in_file = read_dataset(encoder.info, encoder.recipe.streaming)
        trained = (row for row in in_file if not expected or row.place in expected)
        for source in islice(trained, len(expected) or LOOKED_AT):
            if candidates := _find_replies(source, encoder, expected.get(source.place)):
                first = len(by_row) % len(candidates)
                by_row.append(candidates[first:] + candidates[:first])
            if len(by_row) == number:
                break
    return [row for rank in zip_longest(*by_row) for row in rank if row][:number]


class _Encoded(NamedTuple):
    """A conversation as the row has it, as the template takes it, and its segments with the tokens of each."""

    plain: Conversation
    fitted: Conversation
    segments: list[Segment]
    pieces: list[list[int]]
    template: Template

    def position(self, at: int) -> int:
        """The position among the messages of the reply that is segment `at`."""
        replies = self.fitted.replies  # the first of them are context where only the last is trained
        return replies[len(replies) - len(self.segments) // 2 :][at // 2]


def _encode(plain: Conversation, fitted: Conversation, template: Template) -> _Encoded:
    """Raises RowError."""
    segments = to_segments(fitted, template)
    (pieces,) = tokenize_segments([segments], make_tokenize(template.tokenizer))
    return _Encoded(plain, fitted, segments, [tokens.ids for tokens in pieces], template)


def _find_replies(row: Row, encoder: Encoder, expected: list[int] | None) -> list[ServingRow]:
    """Return the last trained reply of a row with its context, the first one with calls, and the first."""
    recipe = encoder.recipe
    try:
        fitted = encoder.read_sides(row)[0]
        encoded = _encode(read_sides(row.value, encoder.info)[0], fitted, encoder.template)
    except RowError:
        return []
    ids = [token for piece in encoded.pieces for token in piece]
    kept = ids[: recipe.cutoff_len] if expected is None else expected
    if ids[: len(kept)] != kept:
        return []
    ends = list(accumulate(map(len, encoded.pieces)))
    messages = encoded.fitted.messages
    is_trained = trained_segments(encoded.segments, ExampleConfig(sys.maxsize, recipe.mask_history))
    trained = [at for at, trains in enumerate(is_trained) if trains and ends[at] <= len(kept)]
    with_calls = [at for at in trained if messages[encoded.position(at)].get("tool_calls")]
    default_system = recipe.default_system if len(messages) > len(encoded.plain.messages) else None
    positions = dict.fromkeys([*trained[-1:], *with_calls[:1], *trained[:1]])
    return list(filter(None, (_to_row(row.place, encoded, at, default_system) for at in positions)))


def _to_row(source: str, encoded: _Encoded, at: int, default_system: str | None = None) -> ServingRow | None:
    """Return the reply that is segment `at` with its context, None if it does not end in an end-of-turn token."""
    template, position, reply_ids = encoded.template, encoded.position(at), encoded.pieces[at]
    ends = {template.tokenizer.convert_tokens_to_ids(end) for end in template.turn_ends}
    last = next((at for at in reversed(range(len(reply_ids))) if reply_ids[at] in ends), None)
    if last is None:
        return None
    text = encoded.segments[at].text
    reply = template.without_end(text)
    return ServingRow(
        source=source,
        messages=_as_sent(encoded, position),
        tools=encoded.fitted.tools,
        segments=[segment.text for segment in encoded.segments[:at]],
        ids=[token for piece in encoded.pieces[:at] for token in piece],
        reply=reply + next(end for end in template.turn_ends if text[len(reply) :].startswith(end)),
        reply_ids=reply_ids[: last + 1],
        calls=encoded.fitted.messages[position].get("tool_calls", []),
        day=template.day.isoformat(),
        default_system=default_system,
    )


def _as_sent(encoded: _Encoded, until: int) -> list[Message]:
    """The messages before `until` as a client sends them: the row's own, without the recipe's default_system.

    Ids of calls are those of training. Reasoning stays in `reasoning_content` where the template reads a key for it, else
    it is in the text; a model that is trained to answer without reasoning has none in its history.
    """
    plain, fitted, template = encoded.plain, encoded.fitted, encoded.template
    added = len(fitted.messages) - len(plain.messages)
    sent = []
    for message, trained in zip(plain.messages, fitted.messages[added:][: until - added]):
        as_sent = dict(message)
        as_sent.pop("trained", None)
        if "reasoning_content" in as_sent and not template.reasoning_key:
            as_sent |= {"content": trained["content"]}
            del as_sent["reasoning_content"]
        if message["role"] == "assistant" and template.supports_thinking and template.enable_thinking is False:
            as_sent = {key: value for key, value in trained.items() if key not in ("trained", *REASONING_KEYS)}
        for key in ("tool_calls", "tool_call_id"):
            if key in trained:
                as_sent[key] = trained[key]
        sent.append(cast(Message, as_sent))
    return sent


def render(ask: Ask, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the prompt as a server renders it, None if the template raises an error."""
    with suppress(RowError):
        return render_template(tokenizer, ask.messages, ask.tools, ask.chat_template, ask.switches)
    return None


def write_rows(rows: list[ServingRow], folder: Path) -> None:
    write_text(folder / SERVING_ROWS, to_lines(map(asdict, rows)))


def read_rows(folder: Path) -> list[ServingRow]:
    """Read `serving_check.jsonl`; a folder without one has no rows. Raises RecipeError if no run wrote the file."""
    path = folder / SERVING_ROWS
    if not path.is_file():
        return []
    try:
        return [ServingRow(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(
            f"{path}: not a file that a run wrote ({error}). Remove it to check with built-in conversations."
        ) from None


# --- built-in conversations, for a folder that no run of ours wrote ---

_TOOLS: list[Fields] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Return the weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "The city's name"}},
                "required": ["city"],
            },
        },
    }
]
_QUESTIONS = (
    ("What is 17 * 23?", "17 * 23 is 391."),
    ("Write one line of Python that reverses a list.", "numbers[::-1]"),
    ("翻译成英文：今天天气很好。", "The weather is nice today."),
    ("List three primes.\n\nOne per line.", "2\n3\n5"),
    ('  Who wrote "Faust"? ', "Goethe wrote it, in two parts."),
    ("Sag etwas auf Deutsch – kurz!", "Guten Tag! Schön, dass du da bist."),
    ("Which is larger: 9.9 or 9.11?", "9.9 is larger."),
    ('Give me JSON with a key "a".', '{"a": 1}'),
)


def built_in_rows(tokenizer: PreTrainedTokenizerBase, number: int = ROWS) -> list[ServingRow]:
    """Return contexts of built-in conversations, as this tokenizer's own chat template renders them.

    Conversations that it does not render are left out: many templates have no tools, and some no system message.

    Raises:
        RecipeError: if the chat template cannot be rendered.
    """
    template = find_template(tokenizer, enable_thinking=None, last_reasoning_only=True)
    rows: list[ServingRow] = []
    for name, messages, tools in _conversations():
        plain = Conversation(messages, tools)
        with suppress(RowError):
            encoded = _encode(plain, template.fit(plain), template)
            row = _to_row(name, encoded, len(encoded.segments) - 1)
            if row and (context := render(row.ask(template.reasoning_key), tokenizer)) is not None:
                (tokens,) = make_tokenize(tokenizer)([context])
                rows.append(replace(row, segments=[context], ids=tokens.ids))
    return rows[:number]


def _conversations() -> Iterator[tuple[str, list[Message], list[Fields] | None]]:
    system: Message = {"role": "system", "content": "You answer briefly."}
    call: Fields = {"id": "a1B2c3D4e", "type": "function"}
    for number, (question, answer) in enumerate(_QUESTIONS):
        ask: Message = {"role": "user", "content": question}
        reply: Message = {"role": "assistant", "content": answer}
        first, second = _QUESTIONS[number - 1]
        earlier: list[Message] = [{"role": "user", "content": first}, {"role": "assistant", "content": second}]
        city = {"name": "get_weather", "arguments": {"city": ("Paris", "Zürich", "北京")[number % 3]}}
        calls: Message = {"role": "assistant", "content": "", "tool_calls": [{**call, "function": city}]}
        result: Message = {"role": "tool", "content": '{"degrees": 21}', "tool_call_id": "a1B2c3D4e"}
        name = f"built-in {number + 1}"
        yield f"{name}, one turn", [ask, reply], None
        yield f"{name}, system message", [system, ask, reply], None
        yield f"{name}, two turns", [system, *earlier, ask, reply], None
        yield f"{name}, tool", [system, ask, calls, result, reply], _TOOLS
        yield f"{name}, three turns", [*earlier, *earlier, ask, reply], None
