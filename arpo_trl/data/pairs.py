"""Read a ranking row as two conversations with one prompt, and encode them as one row: chosen, then rejected.

A side is a text, a turn, or a list of turns that continues the prompt; two sides that begin with a system or user turn
are complete conversations, whose common beginning is the prompt. `Example.seq_lengths` holds the tokens of each side.

Tokens and labels follow LLaMA-Factory's pairwise processing: the prompt's tokens are those of the chosen side, replies in
the prompt are context, and `truncation_mode: llamafactory` cuts prompt and sides in proportion.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count

from ..errors import RowError
from .files import Row
from .labels import (
    IGNORED,
    Example,
    ExampleConfig,
    Tokenize,
    Tokens,
    join,
    keep_start,
    proportional_cut,
    tokenize_segments,
)
from .messages import (
    Conversation,
    Fields,
    Message,
    check_order,
    complete,
    read_alpaca_prompt,
    read_turns,
    split_system,
    to_conversation,
    to_fields,
    unite_tools,
)
from .registry import TAGS, DatasetInfo
from .segments import Segment, count_shared
from .strict_json import excerpt, parse_json

SIDES = ("chosen", "rejected")
Rendered = tuple[Conversation, list[Segment]]


# --- a row ---


def to_pair(row: object, info: DatasetInfo, default_system: str | None = None) -> tuple[Conversation, Conversation]:
    """Read a ranking row as its chosen and its rejected conversation. Raises RowError if it is malformed, or no pair."""
    rest = to_fields(row, info)
    chosen, rejected = (_read_side(name, value, info) for name, value in _take_sides(rest, info))
    prompt = _read_prompt(rest, info)
    if any(side.messages[0]["role"] in ("system", "user") for side in (chosen, rejected)):  # complete conversations
        messages, sides = _split_conversations(prompt.messages, chosen.messages, rejected.messages)
    else:
        messages, sides = prompt.messages, [chosen.messages, rejected.messages]
    _check_pair(messages, sides)
    messages = [{**message, "trained": False} if message["role"] == "assistant" else message for message in messages]
    tools = unite_tools(part.tools for part in (prompt, chosen, rejected))
    unread = prompt.unread + chosen.unread + rejected.unread
    chosen_row = complete(Conversation([*messages, *sides[0]], tools, unread), rest, info, default_system)
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
    column, value = info.columns.get("response", ""), row.value
    answers = value.get(column) if isinstance(value, dict) and not _has_sides(value, info) else None
    if isinstance(value, dict) and isinstance(answers, list) and len(answers) > 2:
        for answer in answers[1:]:
            yield Row(row.place, {**value, column: [answers[0], answer]})
    else:
        yield row


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


def _read_side(name: str, value: object, info: DatasetInfo) -> Conversation:
    if value is None or value == [] or (isinstance(value, str) and not value.strip()):
        raise RowError(f"not a pair: {name} is {'null' if value is None else 'empty'}")
    if isinstance(value, str):
        return Conversation([{"role": "assistant", "content": value}])
    turns = [value] if isinstance(value, dict) else value
    side = read_turns(turns, name, _tags(turns, info))
    replies = [message for message in side.messages if message["role"] == "assistant"]
    if not replies or not any(message["content"].strip() or message.get("tool_calls") for message in replies):
        raise RowError(f"not a pair: {name} is empty" if replies else f"not a pair: {name} has no assistant turn")
    return side


def _read_prompt(rest: Fields, info: DatasetInfo) -> Conversation:
    """Read what the columns other than the sides hold of the conversation; nothing where it is all in the sides."""
    column = info.columns.get("prompt" if info.formatting == "alpaca" else "messages", "")
    value = rest.get(column)
    if info.formatting != "alpaca" and isinstance(value, str) and value.lstrip().startswith("[{"):
        value = parse_json(value)
    if isinstance(value, list):
        rest.pop(column)
        return read_turns(value, column, _tags(value, info)) if value else Conversation([])
    if info.formatting == "alpaca":
        messages = read_alpaca_prompt(rest, info.columns)
        return Conversation([message for message in messages if message["content"]])
    rest.pop(column, None)
    if value is not None and not isinstance(value, str):
        raise RowError(f"wrong type: {column} holds {excerpt(value, 60)}, expected a list of messages or text")
    return Conversation([{"role": "user", "content": value}] if value else [])


def _tags(turns: object, info: DatasetInfo) -> dict[str, str]:
    """Return the dataset's tags, or those of the format that the turns are in (TRL's `role` in a sharegpt file)."""
    first = turns[0] if isinstance(turns, list) and turns and isinstance(turns[0], dict) else {}
    known = [tags for tags in (info.tags, TAGS["openai"], TAGS["sharegpt"]) if tags]
    return next((tags for tags in known if tags["role_tag"] in first), known[0])


def _split_conversations(
    prompt: list[Message], chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[list[Message]]]:
    """Return the prompt and the two sides of complete conversations; `prompt`: what the row's other columns hold."""
    parts = [split_system(messages) for messages in (prompt, chosen, rejected)]
    systems, (turns, *sides) = [system for system, _ in parts if system], [others for _, others in parts]
    if any(messages != systems[0] for messages in systems):
        raise RowError("not a pair: the system messages of prompt, chosen and rejected differ")
    if turns and not any(count_shared(turns, side) == len(turns) for side in sides):
        raise RowError("not a pair: chosen and rejected must both start with the prompt")
    shared = count_shared(*sides)
    while shared and sides[0][shared - 1]["role"] not in ("user", "tool"):
        shared -= 1
    if not shared:
        raise RowError("not a pair: chosen and rejected have no prompt in common")
    return [*systems[0], *sides[0][:shared]] if systems else sides[0][:shared], [side[shared:] for side in sides]


def _check_pair(prompt: list[Message], sides: list[list[Message]]) -> None:
    if all(message["role"] == "system" for message in prompt):
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


def side_start(conversation: Conversation, segments: list[Segment]) -> int:
    """Return the position of the first segment of one side's conversation that follows the prompt, a reply.

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
    return start


def to_pair_examples(
    pairs: Sequence[Sequence[Rendered]], tokenize: Tokenize, config: ExampleConfig
) -> list[Example | RowError]:
    """Tokenize both sides of a batch of pairs in one call, cut and label each pair."""
    starts, sides = [], []
    for chosen, rejected in pairs:
        starts.append(side_start(*chosen))
        prompt = chosen[1][: starts[-1]]
        sides += [chosen[1], [*prompt, *rejected[1][side_start(*rejected) :]]]
    tokens = tokenize_segments(sides, tokenize)
    return [
        _to_example(start, sides[at : at + 2], tokens[at : at + 2], config) for at, start in zip(count(0, 2), starts)
    ]


def _to_example(
    start: int, sides: list[list[Segment]], tokens: list[list[Tokens]], config: ExampleConfig
) -> Example | RowError:
    """Join both sides, each with the prompt, which is the segments before `start`."""
    lengths = [[len(ids) for ids, _ in side] for side in tokens]
    prompt = sum(lengths[0][:start])
    source, target = prompt, config.cutoff_len - prompt
    if config.truncation_mode == "llamafactory":
        source, target = proportional_cut([prompt, max(sum(side[start:]) for side in lengths)], config.cutoff_len)
    elif target <= 0:
        return RowError(
            f"the prompt alone has {prompt:,} tokens, and cutoff_len is {config.cutoff_len:,}; raise cutoff_len"
        )
    kept = [keep_start(side[:start], source) + keep_start(side[start:], target) for side in lengths]
    chosen, rejected = examples = [join(*side, config) for side in zip(sides, tokens, kept)]
    for name, example in zip(SIDES, examples):
        if all(label == IGNORED for label in example.labels[1:]):  # no token precedes the first
            return RowError(
                f"no trained token of {name} is left at cutoff_len {config.cutoff_len:,}; raise cutoff_len"
            )
    if chosen.input_ids == rejected.input_ids:
        cut = f" once cut at cutoff_len ({config.cutoff_len:,})" if kept != lengths else ""
        return RowError(f"not a pair: chosen and rejected are identical{cut}")
    cut_of_prompt = prompt - min(prompt, source)
    notes = chosen.notes + rejected.notes
    notes["cut", "pairs without the generation prompt"] += cut_of_prompt > 0
    notes["cut", "sides without their end"] += sum(example.cut > cut_of_prompt for example in examples)
    return Example(
        chosen.input_ids + rejected.input_ids,
        chosen.labels + rejected.labels,
        cut=chosen.cut + rejected.cut - cut_of_prompt,
        lost_answer=chosen.lost_answer or rejected.lost_answer,
        notes=+notes,
        seq_lengths=[len(example.input_ids) for example in examples],
    )
