"""Why a server's prompt is not the one that was trained: a cause is named only where applying it removes the difference.

`Change` is a setting that is applied to the request or to the template; the rest compares two texts. What nothing explains is
reported as unknown, with the first difference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from itertools import pairwise, permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import jinja2
from jinja2 import TemplateError, meta

from ..recipe.llamafactory import SHIPPED
from .messages import Fields, Message
from .serving_rows import Ask, ServingRow, render, with_reasoning_key
from .template import KEEP_REASONING
from .template_probe import SET_DEFAULT, find_template
from .tokenizer import shipped_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DATE = re.compile(r"\d{1,2} [A-Z][a-z]{2,8} \d{4}|\d{4}-\d\d-\d\d|[A-Z][a-z]{2,8} \d{1,2}, \d{4}")
REASONING = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
# What transformers gives every chat template; any other name that one reads is a switch.
GIVEN = frozenset(
    """
    messages tools documents add_generation_prompt continue_final_message strftime_now raise_exception bos_token eos_token
    pad_token unk_token sep_token cls_token mask_token additional_special_tokens range namespace dict lipsum cycler joiner
    """.split()
)


@dataclass(frozen=True)
class Change:
    """A setting that may differ between training and a server.

    Attributes:
        cause: Its name in a report.
        what: The setting, as in "the server renders with ...".
        send: The fix where training had the setting.
        undo: The fix where only the server has it.
        apply: The request with the setting; None where it has no effect on this row.
    """

    cause: str
    what: str
    send: str
    undo: str
    apply: Callable[[Ask, ServingRow], Ask | None]


class Explanation(NamedTuple):
    cause: str
    found: str
    fix: str


UNKNOWN = "cause unknown"


@dataclass
class Difference:
    """One cause and the rows in which it was found."""

    cause: str
    found: str
    fix: str
    rows: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        where = f" ({len(self.rows)} rows, first {self.rows[0]})" if self.rows else ""
        return f"{self.cause}: {self.found}{where}." + f" {self.fix}" * bool(self.fix)


def add(differences: list[Difference], explanation: Explanation, source: str) -> None:
    """Count the row under its explanation."""
    for difference in differences:
        if (difference.cause, difference.fix) == (explanation.cause, explanation.fix) and explanation.cause != UNKNOWN:
            difference.rows.append(source)
            return
        if difference.cause == explanation.cause == UNKNOWN:  # the first difference stands for all
            difference.rows.append(source)
            return
    differences.append(Difference(*explanation, [source]))


def explain(row: ServingRow, served: str, tokenizer: PreTrainedTokenizerBase, changes: list[Change]) -> Explanation:
    """Explain why the server's prompt of a row is not the text that was trained.

    Args:
        row: Its text is what was trained.
        served: The text that the server renders.
        tokenizer: The saved folder's.
        changes: What may differ, of `list_changes`.
    """
    key = find_template(tokenizer).reasoning_key
    plain = Ask(with_reasoning_key(row.messages, key), row.tools)
    own = render(plain, tokenizer)
    if served == own:
        target, fix = row.text, "send"
    else:
        target, fix = served, "undo"
    if explanation := _explain_head(row, served, tokenizer) or _find_missing(row, served):
        return explanation
    for change in changes:
        if (asked := change.apply(plain, row)) and render(asked, tokenizer) == target:
            return _explained([change], fix)
    if REASONING.sub("", row.text) == REASONING.sub("", served):
        return _explain_reasoning(row.text, served)
    for first, second in permutations(
        [change for change in changes if not change.what.startswith("the template ")], 2
    ):
        asked = first.apply(plain, row)
        asked = second.apply(asked, row) if asked else None
        if asked and render(asked, tokenizer) == target:
            return _explained([first, second], fix)
    return _compare_skeletons(row, served) or Explanation(
        UNKNOWN, f"first difference: {first_difference(row.text, served)}", ""
    )


def explain_counts(
    rows: list[tuple[ServingRow, int]], tokenizer: PreTrainedTokenizerBase, changes: list[Change]
) -> Explanation | None:
    """Explain numbers of tokens, for a server that does not tell its prompts: one change has to give each row's number."""
    key = find_template(tokenizer).reasoning_key

    def count(ask: Ask | None) -> int:
        text = render(ask, tokenizer) if ask else None
        return -1 if text is None else len(tokenizer(text, add_special_tokens=False)["input_ids"])

    for change in changes:
        for row, tokens in rows:
            plain = Ask(with_reasoning_key(row.messages, key), row.tools)
            if count(change.apply(plain, row) or plain) != tokens:
                break
        else:
            return _explained([change], "undo")
    return None


def _explained(changes: list[Change], fix: str) -> Explanation:
    what = " and ".join(change.what for change in changes)
    sent = fix == "send"
    text = f"training rendered with {what}, and the folder does not" if sent else f"the server renders with {what}"
    fixes = list(dict.fromkeys(change.send if sent else change.undo for change in changes))
    return Explanation(
        " and ".join(dict.fromkeys(change.cause for change in changes)), text, " ".join(filter(None, fixes))
    )


def first_difference(trained: str, served: str) -> str:
    """Both texts around the first character that differs."""
    return f"{_around(trained, served, 20)}, at character {first_other(trained, served):,}"


def first_other(trained: Sequence[object], served: Sequence[object]) -> int:
    """Return the position of the first character or token that differs."""
    pairs = enumerate(zip(trained, served))
    return next((at for at, (ours, other) in pairs if ours != other), min(len(trained), len(served)))


def _around(trained: str, served: str, before: int) -> str:
    at = first_other(trained, served)
    start = max(at - before, 0)
    return f"{trained[start : at + 30]!r} trained, {served[start : at + 30]!r} served"


# --- settings ---


def list_changes(tokenizer: PreTrainedTokenizerBase) -> list[Change]:
    """List what may differ between training and a server that uses this tokenizer's chat template."""
    return [
        *_switches(tokenizer),
        *_reasoning(tokenizer),
        *_system(),
        *_tools_and_content(),
        *_other_templates(tokenizer),
    ]


def _templates(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    template = tokenizer.chat_template
    return list(template.values()) if isinstance(template, dict) else [str(template or "")]


def switches_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """List the names of the settings that a tokenizer's chat templates read, such as enable_thinking."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _Generation])
    names: set[str] = set()
    for jinja in _templates(tokenizer):
        text = SET_DEFAULT.sub("", jinja)
        try:
            names |= meta.find_undeclared_variables(environment.parse(text))
        except TemplateError:
            names |= {name for name in (*KEEP_REASONING, "enable_thinking") if name in text}
    return sorted(names - GIVEN)


class _Generation(jinja2.ext.Extension):
    """The block that marks replies in training forms of templates; transformers' own is not public."""

    tags: set[str] = {"generation"}  # noqa: RUF012 - as jinja2 types it

    def parse(self, parser: Any) -> Any:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _switch(cause: str, switches: dict[str, object]) -> Change:
    text = json.dumps(switches)
    return Change(
        cause,
        f"chat_template_kwargs {text}",
        f"Send chat_template_kwargs {text} with each request, or start the server with it.",
        "Start the server without it, or send the values of training in chat_template_kwargs.",
        lambda ask, row: ask._replace(switches={**ask.switches, **switches}),
    )


def _reasoning(tokenizer: PreTrainedTokenizerBase) -> Iterator[Change]:
    """Yield the template's switches for the reasoning of earlier turns, then TRL's training form."""
    if known := {name: value for name, value in KEEP_REASONING.items() if name in switches_of(tokenizer)}:
        yield _switch("reasoning of earlier turns", dict(known))
        yield _switch("reasoning of earlier turns", {name: not value for name, value in known.items()})
    training = find_template(tokenizer)
    if training.jinja not in _templates(tokenizer):

        def in_training(ask: Ask, row: ServingRow) -> Ask | None:
            if all(message["role"] != "assistant" for message in ask.messages):
                return None
            form = replace(find_template(tokenizer, date.fromisoformat(row.day)))
            return ask._replace(chat_template=form.jinja, switches={**ask.switches, **KEEP_REASONING})

        yield Change(
            "reasoning of earlier turns",
            "the reasoning of earlier turns",
            "This chat template has no switch that keeps it: set mask_history: true in the recipe, which trains the last "
            "reply after contexts without it.",
            "",
            in_training,
        )


def _switches(tokenizer: PreTrainedTokenizerBase) -> Iterator[Change]:
    for name in ["enable_thinking", *switches_of(tokenizer)]:
        for value in (False, True):
            cause = "thinking switch" if "think" in name or "reason" in name else f"template switch {name}"
            if name not in KEEP_REASONING:
                yield _switch(cause, {name: value})


def _system() -> Iterator[Change]:
    def default_system(ask: Ask, row: ServingRow) -> Ask | None:
        if row.default_system is None:
            return None
        system: Message = {"role": "system", "content": row.default_system}
        return ask._replace(messages=[system, *ask.messages])

    def without_system(ask: Ask, row: ServingRow) -> Ask | None:
        kept = [message for message in ask.messages if message["role"] != "system"]
        return ask._replace(messages=kept) if len(kept) < len(ask.messages) else None

    yield Change(
        "default system prompt",
        "the recipe's default_system",
        "Send default_system as the system message of each request; the chat template does not hold it.",
        "",
        default_system,
    )
    yield Change(
        "chat template",
        "a template that leaves out the system message",
        "Save the tokenizer again with the template of training.",
        "Start the server with the folder's own chat template.",
        without_system,
    )


def _tools_and_content() -> Iterator[Change]:
    def of_messages(change: Callable[[Message], Fields]) -> Callable[[Ask, ServingRow], Ask | None]:
        def apply(ask: Ask, row: ServingRow) -> Ask | None:
            changed = cast(list[Message], [change(message) for message in ask.messages])
            return ask._replace(messages=changed) if changed != ask.messages else None

        return apply

    def with_text_arguments(message: Message) -> Fields:
        calls = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in message.get("tool_calls", ())
        ]
        return {**message, "tool_calls": calls} if calls else dict(message)

    def without(*keys: str) -> Callable[[Message], Fields]:
        return lambda message: {key: value for key, value in message.items() if key not in keys}

    undo = "Start the server with the tool format of training."
    own = "Start the server with the folder's own chat template."
    yield Change("tools", "no tools", "", own, lambda ask, row: ask._replace(tools=None) if ask.tools else None)
    yield Change(
        "tools format",
        "tools that are not wrapped in {type: function}",
        "",
        undo,
        lambda ask, row: ask._replace(tools=[tool["function"] for tool in ask.tools]) if ask.tools else None,
    )
    yield Change("tools format", "the arguments of calls as JSON text", "", undo, of_messages(with_text_arguments))
    yield Change(
        "content format",
        "messages whose content is a list of parts",
        "",
        "For vLLM: --chat-template-content-format string.",
        of_messages(lambda message: {**message, "content": [{"type": "text", "text": message["content"]}]}),
    )
    yield Change(
        "server drops fields",
        "no text next to tool calls",
        "",
        "The server drops it from messages with tool_calls; use another server for rows that have both.",
        of_messages(lambda message: {**message, "content": ""} if message.get("tool_calls") else dict(message)),
    )
    yield Change(
        "server drops fields",
        "no reasoning_content",
        "",
        "The server does not pass it to the chat template; use another server, or write reasoning into the content.",
        of_messages(without("reasoning_content", "reasoning", "thinking")),
    )


def _other_templates(tokenizer: PreTrainedTokenizerBase) -> Iterator[Change]:
    """Every shipped template, TRL's, and those of a tokenizer that has several."""
    own = tokenizer.chat_template
    named = {f"of this tokenizer named {name}": jinja for name, jinja in own.items()} if isinstance(own, dict) else {}
    named |= {f"{name} of LLaMA-Factory's names": shipped_template(name) for name in sorted(SHIPPED)}
    named |= {path.name: path.read_text("utf-8") for path in sorted(_trl_templates().glob("*.jinja"))}
    for name, jinja in named.items():

        def with_template(ask: Ask, row: ServingRow, jinja: str = jinja) -> Ask:
            return ask._replace(chat_template=jinja)

        yield Change(
            "chat template",
            f"the template {name}",
            "Save the tokenizer again with the template of training.",
            "Start the server with the folder's own chat template.",
            with_template,
        )


def _trl_templates() -> Path:
    from importlib.util import find_spec

    trl = find_spec("trl")
    return Path(str(trl and trl.origin)).with_name("chat_templates")


# --- texts ---


def _explain_head(row: ServingRow, served: str, tokenizer: PreTrainedTokenizerBase) -> Explanation | None:
    """Explain a difference of what stands before the messages: BOS, the day, a system prompt that the row does not have."""
    trained, bos = row.text, str(tokenizer.bos_token or "")
    if bos and served == bos + trained:
        return Explanation(
            "BOS twice", f"the prompt begins with {bos}{bos}", "Let either the tokenizer or the chat template add it."
        )
    if bos and trained == bos + served:
        return Explanation("BOS missing", f"the prompt does not begin with {bos}", "Use the folder's own tokenizer.")
    if DATE.sub("", trained) == DATE.sub("", served):
        dates = [match[0] for text in (trained, served) for match in DATE.finditer(text)]
        switch = next((name for name in switches_of(tokenizer) if "date" in name), None)
        fix = f'Send chat_template_kwargs {{"{switch}": "{dates[0]}"}}.' if switch and dates else ""
        return Explanation(
            "date", f"the chat template writes the day: {dates[0]} in training, {dates[-1]} served", fix
        )
    has_system = row.default_system is not None or any(message["role"] == "system" for message in row.messages)
    if not has_system and row.messages:
        question = row.messages[0]["content"].strip()
        heads = [text.partition(question)[0] for text in (trained, served)]
        if question and all(question in text for text in (trained, served)):
            tails = [text[len(head) :] for text, head in zip((trained, served), heads)]
            system = re.sub(r"<[^<>]*>", " ", heads[len(heads[1]) > len(heads[0])]).split()
            if tails[0] == tails[1] and len(system) > 3:
                side = "the server adds one" if len(heads[1]) > len(heads[0]) else "training had one"
                text = " ".join(system)[:60]
                return Explanation(
                    "default system prompt",
                    f"{side} that the row does not have: {text!r}",
                    "Use the chat template of training, or send the system message of training.",
                )
    return None


def _explain_reasoning(trained: str, served: str) -> Explanation:
    """The two differ in their reasoning blocks alone: at the end the switch, earlier what the template drops."""
    ends = [text[-len(match[0]) :] if (match := _last_reasoning(text)) else "" for text in (trained, served)]
    if REASONING.sub("", ends[0]) == REASONING.sub("", ends[1]) and bool(ends[0]) != bool(ends[1]):
        switch = "false" if ends[0] else "true"
        return Explanation(
            "thinking switch",
            f"the generation prompt {'has' if ends[0] else 'has no'} empty reasoning in training, and the reverse served",
            f'Send chat_template_kwargs {{"enable_thinking": {switch}}}, or start the server with it.',
        )
    keeps = len(REASONING.findall(trained)) > len(REASONING.findall(served))
    difference = "training keeps it, the server drops it" if keeps else "training drops it, the server keeps it"
    return Explanation(
        "reasoning of earlier turns",
        difference,
        "Use a chat template that treats it as training did, or set mask_history: true in the recipe." * keeps,
    )


def _last_reasoning(text: str) -> re.Match[str] | None:
    return re.search(r"<think>\s*</think>\s*\Z", text)


def _find_missing(row: ServingRow, served: str) -> Explanation | None:
    """Name a message or a tool that training rendered and the server does not."""
    for message in row.messages:
        content = message["content"].strip()
        if message["role"] != "assistant" and content and content in row.text and not _is_in(content, served):
            return Explanation(
                "chat template",
                f"the prompt lacks the {message['role']} message, which training rendered",
                "Start the server with the folder's own chat template, as it was after training.",
            )
    for before, after in pairwise(row.messages):
        joined = rf"{re.escape(before['content'].strip())}\s+{re.escape(after['content'].strip())}"
        if before["role"] == "system" and re.search(joined, served) and not re.search(joined, row.text):
            return Explanation(
                "chat template",
                f"the system message is part of the {after['role']} message, where training had a separate turn",
                "Start the server with the folder's own chat template, as it was after training.",
            )
    for tool in row.tools or ():
        name = tool["function"]["name"]
        if name in row.text and name not in served:
            return Explanation(
                "tools", "the prompt lacks the tools, which training rendered", "Use the chat template of training."
            )
    return None


def _is_in(content: str, text: str) -> bool:
    """Return whether a message is in a text, ignoring case and spacing."""
    return " ".join(content.lower().split()) in " ".join(text.lower().split())


def _compare_skeletons(row: ServingRow, served: str) -> Explanation | None:
    """Explain a difference by the text between the messages, which only a chat template writes."""
    pieces: list[tuple[str, str]] = []
    starts = [0, 0]
    texts = (row.text, served)
    for message in row.messages:
        content = message["content"].strip()
        positions = [text.find(content, start) for text, start in zip(texts, starts)]
        if not content or min(positions) < 0:
            continue
        pieces.append((texts[0][starts[0] : positions[0]], texts[1][starts[1] : positions[1]]))
        starts = [at + len(content) for at in positions]
    pieces.append((texts[0][starts[0] :], texts[1][starts[1] :]))
    if not starts[0]:
        return None
    for trained, other in pieces:
        if trained != other and not any(_holds_content(text, row) for text in (trained, other)):
            return Explanation(
                "chat template",
                f"the text around the messages is another: {_around(trained, other, 10)}",
                "Start the server with the folder's own chat template, as it was after training.",
            )
    return None


def _holds_content(text: str, row: ServingRow) -> bool:
    """Return whether a message may be in the text, ignoring case: then more than the template's own text differs."""
    words = {word for message in row.messages for word in re.findall(r"\w{3,}", message["content"].lower())}
    return bool(words & {*re.findall(r"\w{3,}", text.lower())} - {"system", "user", "assistant", "tool"})
