"""Why a server's prompt is not the one that was trained: a cause is named only where applying it removes the difference.

`Change` is a setting that is applied to the request or to the template; the rest compares two texts. What nothing explains is
reported as unknown, with the first difference.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from importlib.util import find_spec
from itertools import chain, pairwise, permutations
from pathlib import Path
from typing import TypeVar, cast

import jinja2
from jinja2 import TemplateError, meta
from transformers import PreTrainedTokenizerBase

from ..recipe.llamafactory import SHIPPED
from .messages import REASONING_KEYS, Fields, Message
from .segments import count_shared
from .serving_rows import Ask, ServingRow, render
from .template import KEEP_REASONING, REASONING
from .template_probe import SET_DEFAULT, find_template, named_templates
from .tokenizer import shipped_template

Prompt = TypeVar("Prompt", str, list[int])
UNKNOWN = "cause unknown"
OWN_TEMPLATE = "Save the chat template of training in the model's folder, and restart the server with it."
DATE = re.compile(r"\d{1,2} [A-Z][a-z]{2,8} \d{4}|\d{4}-\d\d-\d\d|[A-Z][a-z]{2,8} \d{1,2}, \d{4}")
EMPTY_REASONING = re.compile(r"<think>\s*</think>\s*\Z")
GENERATION = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")  # a block of transformers' own
# What transformers gives every chat template; any other name that one reads is a switch.
GIVEN = frozenset(
    """
    messages tools documents add_generation_prompt continue_final_message strftime_now raise_exception bos_token eos_token
    pad_token unk_token sep_token cls_token mask_token additional_special_tokens range namespace dict lipsum cycler joiner
    """.split()
)


@dataclass
class Difference:
    """One cause, and the sources of the rows in which it was found."""

    cause: str
    found: str
    fix: str
    rows: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        where = f" ({len(self.rows)} rows, first {self.rows[0]})" if self.rows else ""
        return f"{self.cause}: {self.found}{where}." + f" {self.fix}" * bool(self.fix)


def add(differences: list[Difference], difference: Difference, source: str) -> None:
    """Count the row under its difference; of unknown causes, the first difference stands for all."""
    for known in differences:
        if (known.cause, known.fix) == (difference.cause, difference.fix):
            known.rows.append(source)
            return
    differences.append(replace(difference, rows=[source]))


@dataclass(frozen=True)
class Change:
    """A setting that may differ between training and a server.

    Attributes:
        cause: Its name in a report.
        what: The setting, as in "the server renders with ...".
        send: The fix where training had the setting.
        undo: The fix where only the server has it.
        apply: Return the request with the setting; the same request where it has no effect on this row.
    """

    cause: str
    what: str
    send: str
    undo: str
    apply: Callable[[Ask, ServingRow], Ask]


def explain(
    row: ServingRow, served: str, plain: Ask, tokenizer: PreTrainedTokenizerBase, changes: list[Change]
) -> Difference:
    """Explain why a prompt as `served` is not the row's text, which was trained.

    `plain` is the row's request, `tokenizer` the saved folder's, and `changes` are those of `list_changes`.
    """
    settings = [change for change in changes if not change.what.startswith("the template ")]
    combinations = chain(((change,) for change in changes), permutations(settings, 2))
    return (
        _explain_head(row, served, tokenizer)
        or _find_missing(row, served)
        or explain_together([(row, served, plain)], tokenizer, combinations)
        or _explain_reasoning(row.text, served)
        or _compare_skeletons(row, served)
        or Difference(UNKNOWN, f"first difference: {first_difference(row.text, served)}", "")
    )


def explain_together(
    prompts: Sequence[tuple[ServingRow, str, Ask]],
    tokenizer: PreTrainedTokenizerBase,
    combinations: Iterable[Sequence[Change]],
) -> Difference | None:
    """Explain prompts, each with its row and its request as for `explain`, by the changes that give them all."""
    is_own = all(served == render(plain, tokenizer) for _, served, plain in prompts)
    for changes in combinations:
        for row, served, plain in prompts:
            asked = plain
            for change in changes:
                asked = change.apply(asked, row)
            if asked == plain or render(asked, tokenizer) != (row.text if is_own else served):
                break
        else:
            return _explained(changes, is_own)
    return None


def explain_counts(
    rows: list[tuple[ServingRow, Ask, int]], tokenizer: PreTrainedTokenizerBase, changes: list[Change]
) -> Difference | None:
    """Explain numbers of tokens, for a server that does not tell its prompts: one change has to give each row's number."""

    def count(ask: Ask) -> int:
        text = render(ask, tokenizer)
        return -1 if text is None else len(tokenizer(text, add_special_tokens=False)["input_ids"])

    for change in changes:
        if all(count(change.apply(plain, row)) == tokens for row, plain, tokens in rows):
            return _explained([change], False)
    return None


def explain_bos(trained: Prompt, served: Prompt, bos: Prompt, name: object) -> Difference | None:
    """Explain texts, or tokens, that differ in one BOS before them."""
    fix = "Let the tokenizer or the template add it."
    # Two in the prompt are named whatever else differs: the day that a template writes, for example.
    if bos and served[: 2 * len(bos)] == bos + bos != trained[: 2 * len(bos)]:
        return Difference("BOS twice", f"the prompt begins with {name} twice", fix)
    if bos and served == bos + trained:
        return Difference("BOS added", f"the prompt begins with {name}, and that of training does not", fix)
    if bos and trained == bos + served:
        return Difference("BOS missing", f"the prompt does not begin with {name}", "Use the folder's own tokenizer.")
    return None


def _explained(changes: Sequence[Change], is_sent: bool) -> Difference:
    what = " and ".join(change.what for change in changes)
    text = (
        f"training rendered with {what}, this folder's template renders without"
        if is_sent
        else f"the server renders with {what}"
    )
    fixes = dict.fromkeys(change.send if is_sent else change.undo for change in changes)
    causes = dict.fromkeys(change.cause for change in changes)
    return Difference(" and ".join(causes), text, " ".join(filter(None, fixes)))


def first_difference(trained: str, served: str) -> str:
    """Both texts around the first character that differs."""
    return f"{_around(trained, served, 20)}, at character {count_shared(trained, served):,}"


def _around(trained: str, served: str, before: int) -> str:
    at = count_shared(trained, served)
    start = max(at - before, 0)
    return f"{trained[start : at + 30]!r} trained, {served[start : at + 30]!r} served"


# --- settings ---


def list_changes(tokenizer: PreTrainedTokenizerBase) -> list[Change]:
    """List what may differ between training and a server that uses this tokenizer's chat template."""
    switches = switches_of(tokenizer)
    return [
        *_switches(switches),
        *_reasoning(tokenizer, switches),
        *_messages(),
        *_other_templates(tokenizer),
    ]


def switches_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """List the names of the settings that a tokenizer's chat templates read, such as enable_thinking."""
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    names: set[str] = set()
    for jinja in named_templates(tokenizer).values():
        text = GENERATION.sub("", SET_DEFAULT.sub("", jinja))
        try:
            names |= meta.find_undeclared_variables(environment.parse(text))
        except TemplateError:
            names |= {name for name in (*KEEP_REASONING, "enable_thinking") if name in text}
    return sorted(names - GIVEN)


def _switch(cause: str, switches: dict[str, object]) -> Change:
    text = json.dumps(switches)
    return Change(
        cause,
        f"chat_template_kwargs {text}",
        f"Send chat_template_kwargs {text} with each request, or start the server with it.",
        "Start the server without it, or send the values of training in chat_template_kwargs.",
        lambda ask, row: ask._replace(switches={**ask.switches, **switches}),
    )


def _switches(names: list[str]) -> Iterator[Change]:
    for name in dict.fromkeys(["enable_thinking", *names]):
        cause = "thinking switch" if "think" in name or "reason" in name else f"template switch {name}"
        if name not in KEEP_REASONING:
            yield from (_switch(cause, {name: value}) for value in (False, True))


def _reasoning(tokenizer: PreTrainedTokenizerBase, names: list[str]) -> Iterator[Change]:
    """Yield the template's switches for the reasoning of earlier turns, then TRL's training form."""
    cause = "reasoning of earlier turns"
    if known := {name: value for name, value in KEEP_REASONING.items() if name in names}:
        yield _switch(cause, dict(known))
        yield _switch(cause, {name: not value for name, value in known.items()})

    def in_training(ask: Ask, row: ServingRow) -> Ask:
        if all(message["role"] != "assistant" for message in ask.messages):
            return ask
        form = find_template(tokenizer, date.fromisoformat(row.day))
        return ask._replace(chat_template=form.jinja, switches={**ask.switches, **KEEP_REASONING})

    if find_template(tokenizer).jinja not in named_templates(tokenizer).values():
        fix = "The template has no switch for it: set mask_history: true in the recipe, to train only the last reply of each row, after turns without reasoning."
        yield Change(cause, "the reasoning of earlier turns", fix, "", in_training)


def _messages() -> Iterator[Change]:
    """Yield what servers do to messages and tools, and the recipe's default_system."""

    def default_system(ask: Ask, row: ServingRow) -> Ask:
        system: Message = {"role": "system", "content": row.default_system or ""}
        return ask if row.default_system is None else ask._replace(messages=[system, *ask.messages])

    def without_system(ask: Ask, row: ServingRow) -> Ask:
        return ask._replace(messages=[message for message in ask.messages if message["role"] != "system"])

    def without_tools(ask: Ask, row: ServingRow) -> Ask:
        return ask._replace(tools=None)

    def bare_tools(ask: Ask, row: ServingRow) -> Ask:
        return ask._replace(tools=ask.tools and [tool["function"] for tool in ask.tools])

    def each(change: Callable[[Message], Fields]) -> Callable[[Ask, ServingRow], Ask]:
        return lambda ask, row: ask._replace(messages=cast(list[Message], list(map(change, ask.messages))))

    def text_arguments(message: Message) -> Fields:
        calls = [
            {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
            for call in message.get("tool_calls", ())
        ]
        return {**message, "tool_calls": calls} if calls else {**message}

    def parts(message: Message) -> Fields:
        return {**message, "content": [{"type": "text", "text": message["content"]}]}

    def no_text(message: Message) -> Fields:
        return {**message, "content": ""} if message.get("tool_calls") else {**message}

    def no_reasoning(message: Message) -> Fields:
        return {key: value for key, value in message.items() if key not in REASONING_KEYS}

    undo = "Start the server with the tool format of training."
    send = "Send default_system as the system message of each request; the chat template does not hold it."
    dropped = "The server drops it from messages with tool_calls; use another server for rows that have both."
    reasoning = (
        "The server does not pass it to the chat template; use another server, or write reasoning into the content."
    )
    drops = "server drops fields"
    yield Change("default system prompt", "the recipe's default_system", send, "", default_system)
    leaves_out = "a template that leaves out the system message"
    yield Change("chat template", leaves_out, OWN_TEMPLATE, OWN_TEMPLATE, without_system)
    yield Change("tools", "no tools", "", OWN_TEMPLATE, without_tools)
    yield Change("tools format", "tools that are not wrapped in {type: function}", "", undo, bare_tools)
    yield Change("tools format", "the arguments of calls as JSON text", "", undo, each(text_arguments))
    string = "For vLLM: --chat-template-content-format string."
    yield Change("content format", "messages whose content is a list of parts", "", string, each(parts))
    yield Change(drops, "no text next to tool calls", "", dropped, each(no_text))
    yield Change(drops, "no reasoning_content", "", reasoning, each(no_reasoning))


def _other_templates(tokenizer: PreTrainedTokenizerBase) -> Iterator[Change]:
    """Every shipped template, TRL's, and those of a tokenizer that has several."""
    own = tokenizer.chat_template
    trl = find_spec("trl")
    files = sorted(Path(str(trl and trl.origin)).with_name("chat_templates").glob("*.jinja"))
    named = {f"of this tokenizer named {name}": jinja for name, jinja in own.items()} if isinstance(own, dict) else {}
    named |= {f"{name} of LLaMA-Factory's names": shipped_template(name) for name in sorted(SHIPPED)}
    named |= {path.name: path.read_text("utf-8") for path in files}
    for name, jinja in named.items():
        with_template = partial(_with_template, jinja)
        yield Change("chat template", f"the template {name}", OWN_TEMPLATE, OWN_TEMPLATE, with_template)


def _with_template(jinja: str, ask: Ask, row: ServingRow) -> Ask:
    return ask._replace(chat_template=jinja)


# --- texts ---


def _explain_head(row: ServingRow, served: str, tokenizer: PreTrainedTokenizerBase) -> Difference | None:
    """Explain a difference of what stands before the messages: BOS, the day, a system prompt that the row does not have."""
    trained, bos = row.text, str(tokenizer.bos_token or "")
    if explanation := explain_bos(trained, served, bos, bos):
        return explanation
    if DATE.sub("", trained) == DATE.sub("", served):
        dates = [match[0] for text in (trained, served) for match in DATE.finditer(text)]
        switch = next((name for name in switches_of(tokenizer) if "date" in name), None)
        fix = f'Send chat_template_kwargs {{"{switch}": "{dates[0]}"}}.' if switch else ""
        return Difference(
            "date", f"the chat template writes a date, which was {dates[0]} in training and is {dates[-1]} served", fix
        )
    if row.default_system is not None or any(message["role"] == "system" for message in row.messages):
        return None
    question = row.messages[0]["content"].strip() or trained
    (ours, *rest), (theirs, *other_rest) = trained.partition(question), served.partition(question)
    own, other = (" ".join(re.sub(r"<[^<>]*>", " ", text).split()) for text in (ours, theirs))
    if rest == other_rest and len(max(own, other, key=len).split()) > 3:
        found = f"the row has no system message: {_around(own, other, 20)}"
        fix = "Use the chat template of training, or send the system message of training."
        return Difference("default system prompt", found, fix)
    return None


def _find_missing(row: ServingRow, served: str) -> Difference | None:
    """Name a message or a tool that training rendered and the server does not."""
    served_words = " ".join(served.lower().split())  # templates may change case and spacing
    for message in row.messages:
        content = message["content"].strip()
        is_served = " ".join(content.lower().split()) in served_words
        if message["role"] != "assistant" and content in row.text and not is_served:
            found = f"the training prompt has a {message['role']} message that the served prompt lacks"
            return Difference("chat template", found, OWN_TEMPLATE)
    for before, after in pairwise(row.messages):
        joined = rf"{re.escape(before['content'].strip())}\s+{re.escape(after['content'].strip())}"
        if before["role"] == "system" and re.search(joined, served) and not re.search(joined, row.text):
            found = f"the system message is part of the {after['role']} message, where training had a separate turn"
            return Difference("chat template", found, OWN_TEMPLATE)
    names = [tool["function"]["name"] for tool in row.tools or ()]
    if any(name in row.text and name not in served for name in names):
        return Difference("tools", "the training prompt has tools that the served prompt lacks", OWN_TEMPLATE)
    return None


def _explain_reasoning(trained: str, served: str) -> Difference | None:
    """Explain texts that differ in their reasoning blocks alone: at the end the switch, earlier what the template drops."""
    numbers = [len(REASONING.findall(text)) for text in (trained, served)]
    bare, other_bare = ("".join(REASONING.sub("", text).split()) for text in (trained, served))
    if numbers[0] == numbers[1] or bare != other_bare:
        return None
    ends, other_ends = (bool(EMPTY_REASONING.search(text)) for text in (trained, served))
    if ends != other_ends:
        found = (
            f"the generation prompt {'has' if ends else 'has no'} empty reasoning in training, and the reverse served"
        )
        fix = f'Send chat_template_kwargs {{"enable_thinking": {"false" if ends else "true"}}}, or start the server with it.'
        return Difference("thinking switch", found, fix)
    cause = "reasoning of earlier turns"
    if numbers[0] < numbers[1]:
        return Difference(cause, "training drops it, the server keeps it", "")
    fix = "Use a chat template that treats it as training did, or set mask_history: true in the recipe."
    return Difference(cause, "training keeps it, the server drops it", fix)


def _compare_skeletons(row: ServingRow, served: str) -> Difference | None:
    """Explain a difference by the text between the messages, which only a chat template writes."""
    contents = [message["content"].strip() for message in row.messages]
    in_both = [content for content in contents if content and content in row.text and content in served]
    trained_pieces, served_pieces = (_between(in_both, text) for text in (row.text, served))
    if len(trained_pieces) != len(served_pieces) or len(trained_pieces) == 1:
        return None
    for trained, other in zip(trained_pieces, served_pieces):
        if trained != other and not _words(trained + other) & _words(" ".join(contents)):
            found = f"the text around the messages is another: {_around(trained, other, 10)}"
            return Difference("chat template", found, OWN_TEMPLATE)
    return None


def _between(contents: Iterable[str], text: str) -> list[str]:
    """Return the text before, between and after the messages that are in it."""
    pieces = []
    for content in contents:
        if content in text:
            before, _, text = text.partition(content)
            pieces.append(before)
    return [*pieces, text]


def _words(text: str) -> set[str]:
    """Return the words that tell a message from a template's own text."""
    return {*re.findall(r"\w{3,}", text.lower())} - {"system", "user", "assistant", "tool"}
