"""`arpo-trl chat MODEL`: a conversation with a trained model, with the loop and the tools of rollouts.

Its arguments are in arguments.py.
"""

import argparse
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from transformers import AutoTokenizer, TextStreamer
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from ..data.messages import Fields, Message
from ..data.template_probe import find_template
from ..errors import RecipeError, RowError, printable
from ..model.base import base_of, runs_code
from ..report.manifest import SHARED, Results, find_manifest
from ..terminal import to_terminal
from .engines import Sampling, TransformersEngine, load_for_generation
from .questions import TOOL_CALLS, Question, ResultForm, form_of
from .rollout import roll_out
from .sandbox import Limits as ToolLimits
from .sandbox import Outcome, describe_isolation, run_python
from .tags import Call
from .tools import PYTHON, to_code
from .trajectory import Limits, Writer

MAX_CALLS = 20  # per question
SHOWN = 60  # characters of the system message in the banner
NOT_TRAINED = "not in run.json: results are inserted as turns (--results inside: into the model's turn)"


class _NoResultError(Exception):
    """The user typed no result."""


@dataclass(frozen=True)
class ChatTools:
    """Runs python if `limits` are given; otherwise the user types the result. `ask`: None for a single prompt."""

    limits: ToolLimits | None
    ask: Callable[[str], str] | None

    def run(self, call: Call) -> Outcome:
        print()
        if call.tool == PYTHON and self.limits:
            outcome = run_python(to_code(call.arguments), self.limits)
            print(printable(f"[result of {call.tool}]\n{outcome}"))
            return outcome
        print(printable(f"[{call.tool} would be called here with: {call.arguments}]"))
        result = self.ask(f"result of {call.tool}: ") if self.ask else ""
        if not result:
            raise _NoResultError
        return Outcome(result, "", 0.0)


@dataclass(frozen=True)
class Chat:
    """A model, the form in which it gets results, the tools of its prompt, and the usual system message."""

    engine: TransformersEngine
    writer: Writer
    form: ResultForm
    tools: list[Fields] | None
    system: str

    def answer(self, messages: list[Message], tools: ChatTools) -> bool:
        """Let the model answer the last message, and append its replies and its tools' results to `messages`.

        Returns:
            False if the user typed no result.

        Raises:
            RecipeError: the template can't render the conversation.
        """
        try:
            trajectory = self.writer.start(Question("", "", messages, self.tools, None, self.form), 0)
            roll_out([trajectory], self.engine, self.writer, tools)
        except RowError as error:
            raise RecipeError(f"{self.engine.tokenizer.name_or_path}: {error}") from None
        except _NoResultError:
            return False
        if trajectory.end not in ("stop", None):
            print(f"\n[stopped: {trajectory.end}]")
        messages += trajectory.messages
        return True


class _Streamer(TextStreamer):  # type: ignore[misc, unused-ignore]
    """Prints the reply as it is written, and no line end in the middle of one."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(printable(text), end="", flush=True)


def load_chat(args: argparse.Namespace) -> Chat:
    """Load the model.

    Raises:
        RecipeError: its files can't be read, or it has no chat template.
    """
    model = load_for_generation(args.model, runs_code(args.model, base_of(args.model), args.trust_remote_code))
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    if not tokenizer.chat_template:
        raise RecipeError(f"{args.model}: the tokenizer has no chat template. Use the output_dir of a run of arpo_trl")
    manifest = find_manifest(args.model)
    results: Results | None = args.results or (manifest.results if manifest else None)
    of_rows = manifest.tools if manifest and args.tools is None else None
    tools = args.tools or of_rows or None
    form = TOOL_CALLS if args.tools or (of_rows and not args.results) else form_of(results)
    sampling = Sampling(do_sample=args.temperature > 0, temperature=args.temperature or 1.0, seed=torch.seed() % 2**32)
    engine = TransformersEngine(model, tokenizer, sampling)
    engine.streamer = cast(BaseStreamer, _Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True))
    limits = Limits(MAX_CALLS, args.max_new_tokens, engine.context)
    writer = Writer(find_template(tokenizer), engine.ends, limits, [])
    system = args.system if args.system is not None else (manifest.system if manifest else None)
    return Chat(engine, writer, form, tools, system or "")


def describe(chat: Chat, args: argparse.Namespace, limits: ToolLimits | None) -> list[str]:
    """Return the banner: the system message and tools, where results go, how python runs, and how to leave."""
    manifest = find_manifest(args.model)
    names = ", ".join(tool["function"]["name"] for tool in chat.tools or ())
    system, tools = textwrap.shorten(chat.system, SHOWN, placeholder=" ..."), textwrap.shorten(names, SHOWN)
    if args.system is None:
        change = "--system TEXT changes it" if system else "--system TEXT sets one"
        system = _with_origin(system, "system message", manifest.system_share if manifest else None, change)
    if args.tools is None:
        change = (
            "--tools FILE.json changes them, --tools none removes them" if tools else "--tools FILE.json offers some"
        )
        tools = _with_origin(tools, "tools", manifest.tools_share if manifest else None, change)
    is_known = args.results or chat.tools or (manifest and manifest.results)
    run = describe_isolation(limits) if limits else "not run, you type its results (--run-python runs it)"
    return [
        f"system   {system or 'none'}",
        f"tools    {tools or 'none'}",
        f"results  {chat.form if is_known else NOT_TRAINED}",
        f"python   {run}",
        *([] if args.prompt else ["leave    with an empty line"]),
    ]


def _with_origin(text: str, what: str, share: float | None, change: str) -> str:
    """Return a text with why it is used, or why there is none; `share`: of the rows with the most frequent one."""
    if share is None:
        origin = "run.json does not have the training rows'"
    elif text:
        origin = f"of {share:.0%} of the training rows"
    elif share < SHARED:
        origin = f"no {what} shared by half of the training rows"
    else:
        origin = f"{'the' if share == 1 else f'{share:.0%} of the'} training rows have no {what}"
    return f"{text or 'none'} ({origin}; {change})"


def ask(prompt: str) -> str:
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def chat_command(args: argparse.Namespace) -> None:
    """Ask and answer until the user types nothing. `args`: from `chat_arguments`.

    Raises:
        RecipeError: the model can't be loaded.
    """
    logging.disable_progress_bar()
    chat = load_chat(args)
    limits = ToolLimits(args.time_limit, args.memory_limit) if args.run_python else None
    print(*(to_terminal(printable(line)) for line in describe(chat, args, limits)), sep="\n")
    tools = ChatTools(limits, None if args.prompt else ask)
    messages: list[Message] = [{"role": "system", "content": chat.system}] if chat.system else []
    while text := args.prompt or ask("you: "):
        messages.append({"role": "user", "content": text})
        answered = chat.answer(messages, tools)
        print()
        if not answered or args.prompt:
            break
