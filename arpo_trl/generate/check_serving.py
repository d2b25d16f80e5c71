"""`arpo-trl check-serving MODEL --url URL`: what a server serves is what was trained, or what differs and why.

Three things are compared one by one, so that a difference has one cause: the prompts that the server renders; the replies after
the tokens of training, which no chat template touches; and the chat, with its end of turn and its tool calls.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.saved_folder import PromptCheck, PromptComparison, check_saved
from ..data.serving_causes import (
    OWN_TEMPLATE,
    UNKNOWN,
    Difference,
    add,
    explain_counts,
    first_difference,
)
from ..data.serving_rows import Ask, ServingRow, built_in_rows, read_rows
from ..data.template_probe import find_template
from ..errors import RecipeError, in_one_line
from ..report.serving_flags import call_mark, serving_flags
from ..run_folder import write_json
from ..terminal import to_terminal
from .reference import load_reference
from .reply_check import REPLY_TOKENS, ReplyCheck, check_replies, overflow
from .server_protocols import Chat, Rendered, Reply, Server, ServerError, TransformersServe, connect
from .tags import json_or_text

REQUESTS = 4  # in flight
CHATS = 8
CHAT_TOKENS = 256
PARSER = "tool-call parser"


@dataclass
class ServingReport:
    """What was compared, and each difference."""

    model: str
    url: str
    server: dict[str, Any]
    rows: int
    prompts: str = ""
    replies: str = ""
    chats: str = ""
    notes: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    def add(self, differences: list[Difference]) -> None:
        """Add differences whose cause is not known yet."""
        known = {difference.cause for difference in self.differences} - {"server error"}
        if known & {"end-of-turn token", "merge rounding"}:
            known |= {"chat"}  # such a reply is another one each time
        self.differences += [difference for difference in differences if difference.cause not in known]

    def lines(self) -> list[str]:
        """The report for people."""
        facts = ", ".join(f"{name} {value}" for name, value in self.server.items() if value)
        parts = {"server": facts, "prompts": self.prompts, "replies": self.replies, "chat": self.chats}
        lines = [f"{name:9}{text}" for name, text in parts.items() if text]
        lines += [f"note     {note}" for note in self.notes]
        lines += [f"differs  {difference}" for difference in self.differences]
        count = len(self.differences)
        result = f"{count} difference{'s' * (count != 1)}" if count else "what is served is what was trained"
        return [*lines, f"serving check  {result}"]


def check_serving_command(args: argparse.Namespace) -> int:
    """Run the check and print its report. `args`: of `check_serving_arguments`.

    Returns:
        The exit code: 1 if something differs.

    Raises:
        RecipeError: the folder is no model with a chat template.
        RunFailed: no server answers.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    report = check_serving(args.model, args.url, args.rows, args.served_model, args.dtype)
    print(to_terminal("\n".join(report.lines())))
    if args.json:
        write_json(args.json, asdict(report) | {"passed": not report.differences})
    return 1 if report.differences else 0


def check_serving(
    folder: Path, url: str, number: int = 32, served_model: str | None = None, dtype: str | None = None
) -> ServingReport:
    """Compare a running server with a folder.

    Args:
        folder: The output_dir of a run, a merged model, or any model folder; one that no run wrote is compared on
            built-in conversations.
        number: Rows to compare.
        served_model: The name of the served model, where the server has several.
        dtype: What the server computes in; found out by comparison if None.
    """
    tokenizer = _load_tokenizer(folder)
    of_run = read_rows(folder) or read_rows(folder.parent)
    rows = (of_run or built_in_rows(tokenizer))[:number]
    if not rows:
        raise RecipeError(
            f"{folder}: its chat template renders no built-in conversation. Use the output_dir of a run."
        )
    compare = PromptComparison(tokenizer)
    rows = list(map(compare.of_today, rows))
    server = connect(url, served_model, folder, tokenizer)
    report = ServingReport(str(folder), url, {"kind": server.kind, **server.facts}, len(rows))
    if not of_run:
        report.notes.append(
            "no serving_check.jsonl: built-in conversations are compared with the folder's own template"
        )
    if compare.is_dated:
        report.notes.append(
            "date: the chat template writes today's date, and training wrote its own: prompts are compared as of today"
        )
    report.add(check_saved(folder, rows).differences)
    same = _check_prompts(server, rows, compare, report)
    reference = load_reference(folder)
    check = ReplyCheck(server, reference, tokenizer, dtype)
    try:
        check_replies(check, rows)
        report.replies = check.summary()
        report.notes += check.notes
        report.add(check.differences)
        _check_chats(server, same, tokenizer, report)
    except ServerError as error:
        report.differences.append(
            overflow(reference, str(error)) or Difference("server error", str(error), "See the server's log.")
        )
    return report


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{folder}: no tokenizer could be loaded ({in_one_line(error)}). Use a model folder."
        ) from None
    if not tokenizer.chat_template:
        raise RecipeError(f"{folder}: the chat template is missing. Save the tokenizer of training again.")
    return tokenizer


# --- prompts ---


def _check_prompts(
    server: Server, rows: Sequence[ServingRow], compare: PromptComparison, report: ServingReport
) -> list[ServingRow]:
    """Compare the prompts that the server renders with those of training, and return the rows where they are equal."""

    def ask(row: ServingRow) -> Rendered | ServerError:
        try:
            return server.render(row)
        except ServerError as error:
            return error

    with ThreadPoolExecutor(REQUESTS) as pool:
        answers = list(zip(rows, pool.map(ask, rows)))
    served = [(row, answer) for row, answer in answers if isinstance(answer, Rendered)]
    is_counted = bool(served) and all(answer.ids is None for _, answer in served)
    texts_here = _texts_of_folder(server, served) if is_counted else []
    check, tokenizer, same = PromptCheck(), compare.tokenizer, list[ServingRow]()
    for row, error in answers:  # first: without an answer, nothing else can be compared
        if isinstance(error, ServerError):
            check.rows += 1
            add(check.differences, _explain_error(error, tokenizer), row.source)
    counted: list[tuple[ServingRow, Ask, int]] = []
    for (row, answer), text in zip(served, texts_here or [answer.text for _, answer in served]):
        if text is not None:
            if not compare.add(check, row, text, answer.ids):
                same.append(row)
            continue
        check.rows += 1
        if answer.tokens == len(row.ids):
            check.identical += 1
            same.append(row)
        else:
            counted.append((row, compare.ask(row), answer.tokens))
    if counted:
        explanation = explain_counts(counted, tokenizer, compare.changes) or _try_template(server, counted, tokenizer)
        for row, _, tokens in counted:
            other = Difference(UNKNOWN, f"{tokens:,} tokens where training had {len(row.ids):,}", "")
            add(check.differences, explanation or other, row.source)
    compare.unite(check)
    _try_switches(server, served, check.differences, compare)
    report.prompts = check.summary()
    if is_counted:
        report.prompts += f" in {'the text of the served folder and ' * bool(texts_here)}their number of tokens"
    report.add(check.differences)
    return same


def _texts_of_folder(server: Server, served: list[tuple[ServingRow, Rendered]]) -> list[str | None]:
    """Render prompts with a served folder on this machine, if they have the server's numbers of tokens."""
    if server.folder is None:
        return []
    tokenizer = AutoTokenizer.from_pretrained(server.folder)
    compare = PromptComparison(tokenizer)
    texts = [compare.render(row) for row, _ in served]
    counts = [len(tokenizer(text or "", add_special_tokens=False)["input_ids"]) for text in texts]
    return texts if counts == [answer.tokens for _, answer in served] else []


def _explain_error(error: ServerError, tokenizer: PreTrainedTokenizerBase) -> Difference:
    text = str(error)
    if "tool" in text.lower() and ("choice" in text.lower() or "--jinja" in text):
        return _parser_is_off(text, tokenizer)
    if "context" in text.lower() or "max_model_len" in text:
        return Difference("context length", text, "Start the server with a longer context.")
    return Difference("server error", text, "See the server's log.")


def _try_template(
    server: Server, counted: list[tuple[ServingRow, Ask, int]], tokenizer: PreTrainedTokenizerBase
) -> Difference | None:
    """Send the folder's own template with the request: if the prompts become those of training, the server's is another."""
    if not isinstance(server, TransformersServe):
        return None
    if not _renders_trained(server, [row for row, *_ in counted], {"chat_template": tokenizer.chat_template}):
        return None
    row, _, tokens = counted[0]
    numbers = (
        f"{tokens:,} tokens where training had {len(row.ids):,}; with the folder's template the numbers are equal"
    )
    return Difference("chat template", f"the server's is another: {numbers}", OWN_TEMPLATE)


def _try_switches(
    server: Server, served: list[tuple[ServingRow, Rendered]], differences: list[Difference], compare: PromptComparison
) -> None:
    """Ask the server itself with other switches where no cause was found: the one that gives the prompts of training is it."""
    for difference in differences:
        rows = [
            row
            for row, prompt in served
            if row.source in difference.rows and (prompt.ids is not None or prompt.tokens != len(row.ids))
        ]
        if not rows or difference.cause not in (UNKNOWN, "chat template"):
            continue
        for change in compare.changes:
            asked = change.apply(Ask([], None), rows[0])
            if asked.switches and not asked.chat_template and _renders_trained(server, rows, asked.switches):
                text = json.dumps(asked.switches)
                difference.cause = change.cause
                difference.found = f"with chat_template_kwargs {text} the server renders the prompt of training"
                difference.fix = "Start the server with these chat_template_kwargs, or send them with each request."
                break


def _renders_trained(server: Server, rows: Sequence[ServingRow], switches: dict[str, Any]) -> bool:
    """Return whether the server renders the prompts of training with these chat_template_kwargs."""
    try:
        asked = [(row, server.render(row, switches)) for row in rows[:4]]
    except ServerError:
        return False
    return all(len(row.ids) == prompt.tokens if prompt.ids is None else row.ids == prompt.ids for row, prompt in asked)


# --- chats ---


def _check_chats(
    server: Server, rows: Sequence[ServingRow], tokenizer: PreTrainedTokenizerBase, report: ServingReport
) -> None:
    """Compare answers to chat requests with the same replies as text: the end of the turn, and parsed tool calls."""
    template = find_template(tokenizer)
    mark = call_mark(template)
    chosen = sorted(rows, key=lambda row: not row.calls)[:CHATS]
    with_calls = sum(bool(row.calls) for row in chosen)
    differences: list[Difference] = []
    malformed = 0
    for row in chosen:
        limit = min(max(len(row.reply_ids) + 8, REPLY_TOKENS), CHAT_TOKENS)
        reply = server.complete(row.ids, limit)
        text = reply.text if reply else ""
        if reply and reply.ids is not None:  # with its special tokens
            text = str(tokenizer.decode(reply.ids, clean_up_tokenization_spaces=False))
        try:
            chat = server.chat(row, limit)
            explained = _compare_chat(row, chat, reply, text, mark, tokenizer) if reply else None
        except ServerError as error:
            if mark and mark in text and not _holds_json(text):
                malformed += 1  # transformers 5.24 fails where other servers return the text
                continue
            explained = _explain_error(error, tokenizer)
        if explained:
            add(differences, explained, row.source)
    if isinstance(server, TransformersServe) and any(difference.cause == PARSER for difference in differences):
        differences = [difference for difference in differences if difference.cause != PARSER]
        report.notes.append("transformers serve does not parse this template's tool calls: clients get them as text")
    if malformed:
        report.notes.append(
            f"the model's calls are malformed in {malformed} of {len(chosen)} replies; the server fails on them"
        )
    right = len(chosen) - sum(len(difference.rows) for difference in differences)
    if chosen:
        report.chats = f"{right} of {len(chosen)} answers as generated"
        report.chats += f", {with_calls} of them asked for tool calls" * bool(with_calls)
    report.add(differences)


def _compare_chat(
    row: ServingRow, chat: Chat, reply: Reply, text: str, mark: str, tokenizer: PreTrainedTokenizerBase
) -> Difference | None:
    """Compare the answer to a chat request with the reply as text. `text`: with its special tokens."""
    if mark and mark in text and row.tools:
        return _compare_calls(row, chat, text, tokenizer)
    shown, text = (_visible(each, tokenizer) for each in (chat.reasoning + chat.content, text))
    if _bare(shown) != _bare(text) and not chat.calls:
        return Difference("chat", f"the answer is not the reply: {first_difference(text, shown)}", "")
    if reply.stopped and chat.finish == "length":
        return Difference(
            "end-of-turn token", "the chat does not stop where the reply ends", "Compare the server's stop tokens."
        )
    return None


def _visible(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text without special tokens, which vLLM leaves in answers to requests that have tools."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _bare(text: str) -> str:
    """The text without what parsers take away: tags of reasoning, white space, characters that a limit cut."""
    return "".join(re.sub("</?think>|\ufffd", "", text).split())


def _compare_calls(row: ServingRow, chat: Chat, text: str, tokenizer: PreTrainedTokenizerBase) -> Difference | None:
    """Compare parsed calls with those of the row where the reply is the trained one, else look whether there are any."""
    is_trained = _bare(text) == _bare(row.reply)
    if not chat.calls:
        has_call = bool(row.calls) if is_trained else _holds_json(text)
        return _parser_is_off("the reply holds a call, and the answer has none", tokenizer) if has_call else None
    expected = [(call["function"]["name"], call["function"]["arguments"]) for call in row.calls]
    parsed = [(call["name"], json_or_text(call["arguments"])) for call in chat.calls]
    if is_trained and parsed != expected:
        return Difference(PARSER, f"parsed {parsed} where the reply has {expected}", "")
    return None


def _holds_json(text: str) -> bool:
    try:
        value, _ = json.JSONDecoder().raw_decode(text, text.index("{"))
    except ValueError:
        return False
    return isinstance(value, dict) and "name" in value


def _parser_is_off(difference: str, tokenizer: PreTrainedTokenizerBase) -> Difference:
    flags = serving_flags(find_template(tokenizer))
    fix = f"Start vLLM with {flags.vllm}" if flags.vllm else "Start the server with a parser for this template's calls"
    fix += f", SGLang with {flags.sglang}" if flags.sglang else ""
    return Difference(PARSER, difference, f"{fix}; llama.cpp with --jinja.")
