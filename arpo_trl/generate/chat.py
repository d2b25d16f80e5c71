"""`arpo-trl chat MODEL`: a conversation with a trained model, in which tools are called. Its words: arguments.py."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import cast

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    PreTrainedTokenizerBase,
    TextStreamer,
)
from transformers.utils import logging

from ..data.messages import Conversation, Fields, Message
from ..data.segments import to_segments
from ..data.template import Template
from ..data.template_probe import find_template
from ..data.tokenizer import make_tokenize
from ..errors import RecipeError, RowError, in_one_line
from ..report.manifest import Results, find_manifest
from .predict import Model, decode, generation_config
from .sandbox import Limits, describe_isolation, run_python
from .tags import TOOL_ENDS, TOOL_TAGS

CALL = re.compile(rf"<({'|'.join(TOOL_TAGS)}|tool_call)>((?:(?!<\1>).)*)</\1>\s*\Z", re.DOTALL)
MOST_CALLS = 20  # that one question may take with --run-python


@dataclass(frozen=True)
class Chat:
    """A model and how it is talked with. `results`: where a tool's result goes."""

    model: Model
    tokenizer: PreTrainedTokenizerBase
    template: Template
    tools: list[Fields] | None
    results: Results
    config: GenerationConfig

    def go_on(self, messages: list[Message], turn: str) -> str:
        """What the model writes after these messages and the beginning of its turn; shown as it is written.

        Raises:
            RecipeError: the template does not render them.
        """
        try:
            pieces = [*to_context(messages, self.tools, self.template), *([turn] if turn else [])]
        except RowError as error:
            raise RecipeError(f"{self.tokenizer.name_or_path}: {error}") from None
        tokens = make_tokenize(self.tokenizer)(pieces, ["", *pieces[:-1]])
        ids = torch.tensor([[token for piece in tokens for token in piece.ids]], device=self.model.device)
        output = cast(GenerationMixin, self.model).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=self.config,
            tokenizer=self.tokenizer,
            streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
        return decode(self.tokenizer, output[0, ids.shape[1] :].tolist(), skip_special_tokens=True)


def to_context(messages: list[Message], tools: list[Fields] | None, template: Template) -> list[str]:
    """The conversation up to the next reply, in the pieces that training tokenises each alone. Raises RowError."""
    prompt = template.render(messages, tools, True)
    conversation = Conversation(messages, tools)
    done = [segment.text for segment in to_segments(conversation, template)] if conversation.replies else []
    length = len("".join(done))
    return [*done, prompt[length:]] if prompt.startswith("".join(done)) else [prompt]


def find_call(reply: str) -> tuple[str, str] | None:
    """The tag and the text of the tool call that a reply ends with, if it does."""
    call = CALL.search(reply)
    return (call[1], call[2].strip()) if call else None


def as_message(tag: str, result: str) -> Message:
    """A tool's result as a turn: ARPO's form is a user turn, Qwen's a tool turn."""
    if tag == "tool_call":
        return {"role": "tool", "content": result}
    return {"role": "user", "content": f"<result>\n{result}\n</result>"}


def load_chat(args: argparse.Namespace) -> Chat:
    """Load the model.

    Raises:
        RecipeError: its files can't be read, or its template can't be rendered.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto", device_map=device)
    except (OSError, ValueError) as error:  # no weights yet, or an adapter whose base is elsewhere
        way_out = "give the output_dir of a finished run, from the folder where it was started"
        raise RecipeError(f"{args.model}: can't be loaded ({in_one_line(error)}); {way_out}") from None
    if not tokenizer.chat_template:
        raise RecipeError(
            f"{args.model}: its tokenizer has no chat template; give the output_dir of a run of arpo_trl"
        )
    manifest = find_manifest(args.model)
    results = args.results or (manifest and manifest.results)
    if results is None and args.run_python:
        print(
            "results  as turns: no run.json says where they go; --results inside puts them into the model's own turn"
        )
    config = generation_config(
        model,
        tokenizer,
        max_new_tokens=args.max_new_tokens,
        do_sample=args.temperature > 0,
        temperature=args.temperature or 1.0,
        stop_strings=TOOL_ENDS if results == "inside" else None,
    )
    return Chat(model.eval(), tokenizer, find_template(tokenizer), args.tools, results or "turn", config)


def ask(prompt: str) -> str:
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def answer(chat: Chat, messages: list[Message], limits: Limits | None, one_question: bool) -> bool:
    """Let the model answer the last message, with the results of what it calls; add its turns to `messages`.

    Returns:
        Whether the conversation goes on: not when a result was asked for and nothing was typed.
    """
    turn = ""
    for _ in range(MOST_CALLS):
        turn += chat.go_on(messages, turn)
        call = find_call(turn)
        if call is None:
            break
        tag, text = call
        if tag == "python" and limits:
            result = str(run_python(text, limits))
            print(f"[result of <python>]\n{result}")
        else:
            print(f"[{tag} would be called here with: {text}]")
            result = "" if one_question else ask(f"result of <{tag}>: ")
            if not result:
                messages.append({"role": "assistant", "content": turn})
                return False
        if chat.results == "inside" and tag != "tool_call":
            turn += f" <result>\n{result}\n</result>"
        else:
            messages += [{"role": "assistant", "content": turn}, as_message(tag, result)]
            turn = ""
    else:
        print(f"[stopped after {MOST_CALLS} calls]")
    messages.append({"role": "assistant", "content": turn})
    return True


def chat_command(args: argparse.Namespace) -> None:
    """Ask and answer, until nothing is typed. `args`: of `chat_arguments`.

    Raises:
        RecipeError: the model can't be loaded.
    """
    logging.disable_progress_bar()
    chat = load_chat(args)
    limits = Limits(args.time_limit, args.memory_limit) if args.run_python else None
    if limits:
        print(f"python   {describe_isolation(limits)}")
    messages: list[Message] = [{"role": "system", "content": args.system}] if args.system else []
    while text := args.prompt or ask("you: "):
        messages.append({"role": "user", "content": text})
        if not answer(chat, messages, limits, bool(args.prompt)) or args.prompt:
            break
