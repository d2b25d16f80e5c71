"""Read a ranking row as two conversations with one prompt, and encode them as one row: chosen, then rejected.

A side is a text, a turn, or a list of turns that continues the prompt; two sides that begin with a system or user turn
are complete conversations, whose common beginning is the prompt. `Example.seq_lengths` holds the tokens of each side.

Tokens and labels follow LLaMA-Factory's pairwise processing: the prompt's tokens are those of the chosen side, replies in
the prompt are context, and `truncation_mode: llamafactory` cuts prompt and sides in proportion.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import NamedTuple

from ..errors import RowError
from .files import Row
from .labels import (
    IGNORED,
    Example,
    ExampleConfig,
    Tokenize,
    Tokens,
    add_segment,
    keep_start,
    proportional_cut,
)
from .messages import (
    Conversation,
    Fields,
    Message,
    Note,
    Turns,
    check_order,
    complete,
    read_alpaca_prompt,
    read_turns,
    to_conversation,
    to_fields,
)
from .registry import TAGS, DatasetInfo
from .segments import Segment
from .strict_json import excerpt, parse_json

SIDES = ("chosen", "rejected")


class PairSegments(NamedTuple):
    """The prompt up to the generation prompt, and the sides, each a reply that contexts and replies may follow."""

    prompt: list[Segment]
    chosen: list[Segment]
    rejected: list[Segment]


# --- a row ---


def to_pair(row: object, info: DatasetInfo, default_system: str | None = None) -> tuple[Conversation, Conversation]:
    """Read a ranking row as its chosen and its rejected conversation.

    Raises:
        RowError: if the row is malformed or holds no pair.
    """
    rest = to_fields(row, info)
    chosen, rejected = (_read_side(name, value, info) for name, value in _take_sides(rest, info))
    prompt = _read_prompt(rest, info)
    if any(side.messages[0]["role"] in ("system", "user") for side in (chosen, rejected)):  # complete conversations
        messages, sides = _split_conversations(prompt.messages, chosen.messages, rejected.messages)
    else:
        messages, sides = prompt.messages, [chosen.messages, rejected.messages]
    _check_pair(messages, sides)
    messages = [{**message, "trained": False} if message["role"] == "assistant" else message for message in messages]
    tools, unread = [], Counter[Note]()
    for turns in (prompt, chosen, rejected):
        tools += turns.tools
        unread += turns.unread
    chosen_row = complete(Turns([*messages, *sides[0]], tools, unread), rest, info, default_system)
    before = len(chosen_row.messages) - len(sides[0])
    other = [*chosen_row.messages[:before], *sides[1]]
    check_order(other)
    return replace(chosen_row, prompt=before), replace(chosen_row, messages=other, prompt=before, unread=Counter())


def read_sides(row: object, info: DatasetInfo, default_system: str | None = None) -> Sequence[Conversation]:
    """Read a row as one conversation, or a ranking row as two: chosen and rejected. Raises RowError if it is malformed."""
    args = row, info, default_system
    return to_pair(*args) if info.ranking else [to_conversation(*args)]


def split_answers(row: Row, info: DatasetInfo) -> Iterator[Row]:
    """Yield the row, or one row for each answer after the first where its response is a list of more than two."""
    column = info.columns.get("response", "")
    if not isinstance(row.value, dict) or _has_sides(row.value, info):
        yield row
        return
    answers = row.value.get(column)
    if not isinstance(answers, list) or len(answers) <= 2:
        yield row
        return
    for answer in answers[1:]:
        yield Row(row.place, {**row.value, column: [answers[0], answer]})


def _has_sides(row: Fields, info: DatasetInfo) -> bool:
    return any(name in row for name in _side_columns(info)) or not {*SIDES}.isdisjoint(info.named)


def _side_columns(info: DatasetInfo) -> list[str]:
    return [info.columns[side] for side in SIDES]


def _take_sides(rest: Fields, info: DatasetInfo) -> list[tuple[str, object]]:
    """Take both sides out of the row: the columns, or the first two of a list of answers (best first)."""
    if _has_sides(rest, info):
        return [(name, rest.pop(name, None)) for name in _side_columns(info)]
    column = info.columns.get("response", "")
    answers = rest.pop(column, None)
    if not isinstance(answers, list):
        names = " and ".join(map(repr, _side_columns(info))) + f", or a list of answers in {column!r}" * bool(column)
        raise RowError(f"not a pair: expected the columns {names}; name the row's columns in dataset_info.json")
    if len(answers) < 2:
        shown = f"{len(answers)} answer{'s' * (len(answers) != 1)}"
        raise RowError(f"not a pair: {column} has {shown}, expected at least 2")
    return [(f"{column}[{number}]", answer) for number, answer in enumerate(answers[:2])]


def _read_side(name: str, value: object, info: DatasetInfo) -> Turns:
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        raise RowError(f"not a pair: {name} is {'null' if value is None else 'empty'}")
    if isinstance(value, str):
        return Turns([{"role": "assistant", "content": value}], [], Counter())
    turns = [value] if isinstance(value, dict) else value
    side = read_turns(turns, name, _tags(turns, info))
    replies = [message for message in side.messages if message["role"] == "assistant"]
    if not replies or not any(message["content"].strip() or message.get("tool_calls") for message in replies):
        raise RowError(f"not a pair: {name} is empty" if replies else f"not a pair: {name} has no assistant turn")
    return side


def _read_prompt(rest: Fields, info: DatasetInfo) -> Turns:
    """Read what the columns other than the sides hold of the conversation; nothing where it is all in the sides."""
    column = info.columns.get("prompt" if info.formatting == "alpaca" else "messages", "")
    value = rest.get(column)
    if info.formatting != "alpaca" and isinstance(value, str) and value.lstrip().startswith("[{"):
        value = parse_json(value)
    if isinstance(value, list):
        rest.pop(column)
        return read_turns(value, column, _tags(value, info)) if value else Turns([], [], Counter())
    if info.formatting == "alpaca":
        messages = read_alpaca_prompt(rest, info.columns)
        return Turns([message for message in messages if message["content"]], [], Counter())
    rest.pop(column, None)
    if value is not None and not isinstance(value, str):
        raise RowError(f"wrong type: {column} holds {excerpt(value, 60)}, expected a list of messages or text")
    return Turns([{"role": "user", "content": value}] if value else [], [], Counter())


def _tags(turns: object, info: DatasetInfo) -> dict[str, str]:
    """Return the dataset's tags, or those of the format that the turns are in (TRL's `role` in a sharegpt file)."""
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    known = [tags for tags in (info.tags, TAGS["openai"], TAGS["sharegpt"]) if tags]
    return next((tags for tags in known if tags["role_tag"] in first), known[0])


def _split_conversations(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[list[Message]]]:
    """Return the prompt and the two sides of complete conversations; `prompt`: what the row's other columns hold."""
    turns, system = _without_system(prompt), _system_of(prompt)
    sides = [_without_system(side) for side in (chosen, rejected)]
    systems = [messages for messages in (_system_of(chosen), _system_of(rejected), system) if messages]
    if any(messages != systems[0] for messages in systems):
        raise RowError("not a pair: the system messages of prompt, chosen and rejected differ")
    if turns and not any(_count_shared(turns, side) == len(turns) for side in sides):
        raise RowError("not a pair: chosen and rejected must both start with the prompt")
    shared = _count_shared(*sides)
    while shared and sides[0][shared - 1]["role"] not in ("user", "tool"):
        shared -= 1
    if not shared:
        raise RowError("not a pair: chosen and rejected have no prompt in common")
    return [*systems[0], *sides[0][:shared]] if systems else sides[0][:shared], [side[shared:] for side in sides]


def _system_of(messages: list[Message]) -> list[Message]:
    return list(takewhile(lambda message: message["role"] == "system", messages))


def _without_system(messages: list[Message]) -> list[Message]:
    return messages[len(_system_of(messages)) :]


def _count_shared(messages: list[Message], other: list[Message]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(messages, other)))


def _check_pair(prompt: list[Message], sides: list[list[Message]]) -> None:
    if not _without_system(prompt):
        raise RowError("not a pair: the row has no prompt")
    if prompt[-1]["role"] not in ("user", "tool"):
        raise RowError(
            f"not a pair: the prompt ends with a turn of {prompt[-1]['role']!r}, expected 'user' or 'observation'"
        )
    for name, side in zip(SIDES, sides):
        if not side or side[0]["role"] != "assistant":
            role = side[0]["role"] if side else "no turn"
            raise RowError(
                f"not a pair: after the prompt, {name} starts with a turn of {role!r}, expected 'assistant'"
            )


# --- its tokens ---


def split_side(conversation: Conversation, segments: list[Segment]) -> tuple[list[Segment], list[Segment]]:
    """Split the segments of one side's conversation into the prompt and the side.

    Raises:
        RowError: if the template rewrites a turn of the side once later ones follow.
    """
    replies = sum(at >= (conversation.prompt or 0) for at in conversation.replies)
    start = len(segments) - 2 * replies + 1
    if start < 1:
        raise RowError(
            "the chat template renders an earlier turn of the chosen or rejected side differently once more turns "
            "follow; use a template that doesn't, or sides of one turn"
        )
    return segments[:start], segments[start:]


def to_pair_examples(
    pairs: Sequence[PairSegments], tokenize: Tokenize, config: ExampleConfig
) -> list[Example | RowError]:
    """Tokenize the segments of a batch of pairs in one call, cut and label each pair."""
    texts, before = [], []
    for prompt, chosen, rejected in pairs:
        for segments, start in ((prompt, ""), (chosen, prompt[-1].text), (rejected, prompt[-1].text)):
            texts += [segment.text for segment in segments]
            before += [start, *(segment.text for segment in segments[:-1])]
    tokens = iter(tokenize(texts, before))
    return [_to_example(pair, [[next(tokens) for _ in segments] for segments in pair], config) for pair in pairs]


def _to_example(pair: PairSegments, tokens: list[list[Tokens]], config: ExampleConfig) -> Example | RowError:
    lengths = [[len(ids) for ids, _ in part] for part in tokens]
    if sum(lengths[0]) >= config.cutoff_len and config.truncation_mode != "llamafactory":
        return RowError(
            f"the prompt alone has {sum(lengths[0]):,} tokens, and cutoff_len is {config.cutoff_len:,}; raise cutoff_len"
        )
    kept = _cut(lengths, config)
    example, sides = Example(), []
    for part in (1, 2):
        side = Example()
        for segments, number in ((pair.prompt, 0), (pair[part], part)):
            for at, (segment, encoding, length) in enumerate(zip(segments, tokens[number], kept[number], strict=True)):
                add_segment(side, segment, encoding, length, trained=number > 0 and at % 2 == 0 and not segment.masked)
        if all(label == IGNORED for label in side.labels[1:]):  # no token precedes the first
            return RowError(
                f"no trained token of {SIDES[part - 1]} is left at cutoff_len {config.cutoff_len:,}; raise cutoff_len"
            )
        sides.append(side)
        example.lost_answer = example.lost_answer or not kept[part][-1]
    if sides[0].input_ids == sides[1].input_ids:
        cut = f" once cut at cutoff_len ({config.cutoff_len:,})" if kept != lengths else ""
        return RowError(f"not a pair: chosen and rejected are identical{cut}")
    for side in sides:
        example.input_ids += side.input_ids
        example.labels += side.labels
        example.seq_lengths.append(len(side.input_ids))
        example.notes += side.notes
    example.cut = sum(map(sum, lengths)) - sum(map(sum, kept))
    example.notes["cut", "pairs without the generation prompt"] += sum(kept[0]) < sum(lengths[0])
    example.notes["cut", "sides without their end"] += sum(kept[part] != lengths[part] for part in (1, 2))
    example.notes = +example.notes
    return example


def _cut(lengths: list[list[int]], config: ExampleConfig) -> list[list[int]]:
    """Return how many tokens of each segment are kept, for the prompt and both sides."""
    prompt, *sides = lengths
    if config.truncation_mode == "llamafactory":
        source, target = proportional_cut([sum(prompt), max(map(sum, sides))], config.cutoff_len)
    else:
        source, target = sum(prompt), config.cutoff_len - sum(prompt)
    return [keep_start(prompt, source), *(keep_start(side, target) for side in sides)]
