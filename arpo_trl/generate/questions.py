"""The questions of a rollout: what precedes the first reply of each row, the reference answer, and the tools' form."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NamedTuple

from ..data.files import Row, read_dataset
from ..data.messages import Conversation, Fields, Message, to_conversation
from ..data.prepare import prepare_datasets
from ..data.registry import DatasetInfo
from ..data.sources import select_datasets
from ..data.template import Template
from ..errors import RowError
from ..recipe.keys import Recipe
from ..report.manifest import Results
from .scores import find_answer
from .tags import RESULT, RESULT_END, TOOL_TAGS

SAMPLED_ROWS = 500  # rows of a dataset from which the form of its results is learned


class ResultForm(NamedTuple):
    """Where a tool's result is written and what surrounds it.

    `place`: inside the reply, or as a message from `user` or `tool`. `calls`: calls are `tool_calls` of a message.
    """

    place: Literal["inside", "user", "tool"] = "user"
    before: str = f"{RESULT}\n"
    after: str = f"\n{RESULT_END}"
    calls: bool = False

    def __str__(self) -> str:
        places = {"inside": "inside the reply", "user": "as user turns", "tool": "as tool messages"}
        return places[self.place] + (" after tool_calls" if self.calls else "")


INSIDE = ResultForm("inside", f" {RESULT}\n", f"\n{RESULT_END}")
TOOL_CALLS = ResultForm("tool", "", "", calls=True)


@dataclass(frozen=True)
class Question:
    """A question to roll out. `source`: "file:line". `answer`: the reference, or None. `formatting`: its dataset's."""

    dataset: str
    source: str
    messages: list[Message]
    tools: list[Fields] | None
    answer: str | None
    form: ResultForm
    formatting: str = "sharegpt"

    @property
    def digest(self) -> str:
        """Identify the question by its text, whatever row it is in."""
        users = [message["content"].strip() for message in self.messages if message["role"] == "user"]
        return hashlib.blake2b(json.dumps(users).encode(errors="replace"), digest_size=16).hexdigest()


def read_questions(recipe: Recipe, template: Template, default_form: ResultForm) -> tuple[list[Question], list[str]]:
    """Read the rows that `rollout_on` names.

    Rows held out by `val_size` are those that training held out, and no question to train on equals a held-out one.

    Args:
        default_form: The form of results if no row has any.

    Returns:
        The questions, in the order of the rows, and counts of what was skipped or ignored.

    Raises:
        RecipeError: there are no such rows.
    """
    names = recipe.dataset if recipe.rollout_on == "train" or recipe.val_size else recipe.eval_dataset
    if recipe.rollout_on == "eval" and not (recipe.eval_dataset or recipe.val_size):
        raise recipe.error(
            "rollout_on", "eval, but the recipe has no eval rows. Set eval_dataset, val_size or rollout_on: train"
        )
    if not names:
        raise recipe.error("dataset", f"missing (rollout_on: {recipe.rollout_on} needs it)")
    infos = {info.name: info for info in select_datasets(recipe)}
    split: dict[str, set[str]] = {}
    if recipe.val_size:  # the rows are encoded, or read from the cache
        data = prepare_datasets(recipe, template)
        split = {"train": set(data.train["source"]), "eval": set(data.eval["validation"]["source"])}
    questions: list[Question] = []
    notices: list[str] = []
    for name in names:
        items, counts = _read_dataset(infos[name], recipe, default_form, split.get(recipe.rollout_on))
        questions += items
        notices += counts
    if recipe.rollout_on == "train":
        digests = {
            question.digest
            for name in recipe.eval_dataset or (names if split else [])
            for question in _read_dataset(infos[name], recipe, default_form, split.get("eval"))[0]
        }
        kept = [question for question in questions if question.digest not in digests]
        if dropped := len(questions) - len(kept):
            notices.append(f"{dropped:,} questions skipped: they equal a held-out question")
        questions = kept
    if not questions:
        raise recipe.error("rollout_on", f"{recipe.rollout_on} has no questions ({'; '.join(notices)})")
    return questions, notices


def _read_dataset(
    info: DatasetInfo, recipe: Recipe, default_form: ResultForm, sources: set[str] | None
) -> tuple[list[Question], list[str]]:
    """Return the questions of a dataset, or of its rows in `sources`, and the counts of what they leave out."""
    limit = min(filter(None, (info.num_samples, recipe.max_samples)), default=None)
    rows = [(row, _read_row(row, info, recipe)) for row in islice(read_dataset(info, recipe.streaming), limit)]
    form = learn_form(conversation for _, conversation in rows[:SAMPLED_ROWS] if conversation) or default_form
    questions: list[Question] = []
    skipped: Counter[str] = Counter()
    for row, conversation in rows:
        if sources is not None and row.place not in sources:
            continue
        if conversation is None or not isinstance(row.value, dict):
            skipped["rows that can't be read"] += 1
            continue
        question, later_turns = to_question(row.place, row.value, conversation, info, form)
        skipped["later user turns, which are ignored"] += later_turns
        skipped["questions without a reference answer"] += question.answer is None
        questions.append(question)
    return questions, [f"{info.name}: {what}: {count:,}" for what, count in skipped.items() if count]


def _read_row(row: Row, info: DatasetInfo, recipe: Recipe) -> Conversation | None:
    """Return the conversation of a row, with an empty reply if it is only a question; None if it can't be read."""
    try:
        value = with_reply(row.value, info) if isinstance(row.value, dict) else row.value
        return to_conversation(value, info, recipe.default_system)
    except RowError:
        return None


def with_reply(row: Fields, info: DatasetInfo) -> Fields:
    """Return the row with an empty reply if it is only a question, so that it is read like a training row."""
    if info.formatting == "alpaca":
        column = info.columns["response"]
        return row if row.get(column) is not None else row | {column: ""}
    column, tags = info.columns["messages"], info.tags
    turns = row.get(column)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return row
    roles = [turn.get(tags["role_tag"]) for turn in turns]
    if tags["assistant_tag"] in roles or tags["function_tag"] in roles:
        return row
    return row | {column: [*turns, {tags["role_tag"]: tags["assistant_tag"], tags["content_tag"]: ""}]}


def to_question(
    place: str, row: Fields, conversation: Conversation, info: DatasetInfo, form: ResultForm
) -> tuple[Question, int]:
    """Return the question of a row, and the number of its later user turns that are no results of tools."""
    messages, first = conversation.messages, conversation.replies[0]
    later = [message for message in messages[first:] if message["role"] == "user" and RESULT not in message["content"]]
    answer: Any = row.get(info.columns.get("answer", ""))
    if answer is None:
        answer = find_answer(messages[conversation.replies[-1]]["content"])
    if conversation.tools or any(message.get("tool_calls") for message in messages):
        form = TOOL_CALLS
    question = messages[:first] or [Message(role="user", content="")]
    answer = None if answer is None else str(answer)
    return Question(info.name, place, question, conversation.tools, answer, form, info.formatting), len(later)


def form_of(results: Results | None) -> ResultForm:
    """Return the form that a run's manifest names."""
    return INSIDE if results == "inside" else ResultForm()


def learn_form(conversations: Iterable[Conversation]) -> ResultForm | None:
    """Return the most frequent form of results, with its whitespace, or None if there are no results."""
    forms = Counter(form for conversation in conversations for form in _forms_of(conversation))
    return forms.most_common(1)[0][0] if forms else None


_INSIDE = re.compile(
    rf"</(?:{'|'.join(TOOL_TAGS)})>(\s*{RESULT}\s*)(?:(?!{RESULT}).)*?(\s*{RESULT_END}\s*)", re.DOTALL
)
_TURN = re.compile(rf"(\s*{RESULT}\s*).*?(\s*{RESULT_END}\s*)\Z", re.DOTALL)


def _forms_of(conversation: Conversation) -> Iterator[ResultForm]:
    first = conversation.replies[0]
    for before, message in zip(conversation.messages[first:], conversation.messages[first + 1 :]):
        turn = _TURN.match(message["content"])
        if message["role"] == "tool":
            yield ResultForm("tool", turn[1] if turn else "", turn[2] if turn else "", bool(before.get("tool_calls")))
        elif message["role"] == "user" and turn:
            yield ResultForm("user", turn[1], turn[2])
    for position in conversation.replies:
        for before, after in _INSIDE.findall(conversation.messages[position]["content"]):
            yield ResultForm("inside", before, after)
