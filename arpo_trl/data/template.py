"""The chat template in training: which one renders, and what it writes around a reply.

A tokenizer's own template can't always be trained with: one that writes earlier turns differently once later ones
follow (Qwen3 strips its thinking) can't be learnt from as it stands; TRL has a training form of the common ones.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from datetime import date
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, cast

from jinja2 import TemplateError

from ..errors import RecipeError, RowError
from ..processes import on_main_process
from ..recipe.keys import Recipe
from ..run_folder import MANIFEST, read_json
from .messages import THOUGHT_KEYS, Conversation, Fields, Message
from .segments import shared_start, to_segments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ChatTemplate = str | dict[str, str]  # one, or several by name
ASK: Message = {"role": "user", "content": "a question"}
REPLY: Message = {"role": "assistant", "content": "an answer"}
CALL: Fields = {"type": "function", "function": {"name": "search", "arguments": {"query": "a word"}}}
CALLS: Message = {"role": "assistant", "content": "", "tool_calls": [CALL]}
FOUND: Message = {"role": "tool", "content": "found"}
TOOL = {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}
THINKING: Message = {"role": "assistant", "content": "<think>\na thought\n</think>\n\nan answer"}
PROBES: tuple[list[Message], ...] = (
    [ASK, REPLY, ASK, REPLY],
    [ASK, THINKING],
    [ASK, THINKING, ASK, REPLY],
    [ASK, {**REPLY, "tool_calls": [CALL]}, FOUND, REPLY, ASK, REPLY],
)
# Stands in front of the template that a run with enable_thinking: false saves: the model is asked as it was trained.
WITHOUT_THOUGHT = "{%- set enable_thinking = enable_thinking | default(false) %}"
THOUGHT = re.compile(r"\s*<think>\n*(.*?)\n*</think>\n*", re.DOTALL)
# What templates call their switch for the thoughts of earlier turns (Nemotron 3, GLM-4.7, Qwen3.6 and LFM2.5). A row of
# several turns teaches each of its replies, so none may lose its thought once another follows.
KEEP_THOUGHTS = {"truncate_history_thinking": False, "clear_thinking": False, "preserve_thinking": True}


@dataclass(frozen=True)
class Template:
    """How rows are rendered for training; `find_template` finds it. `jinja` may be TRL's training form.

    `tool_jinja` renders rows with tools or calls where the tokenizer has a template for them (`tool_use`).
    `day` is the date that it writes where it asks for today's (`strftime_now`).

    `generation_prompt` opens a reply; `after_reply` is what follows its text, and `end_of_turn` the first special token there.
    `call_end` is the token that ends a reply with calls, where it is another one (gpt-oss, GLM). `begins_next`: these two
    are what the template writes as the first token of the next turn (GLM), which the model writes to stop.
    `empty_thought` stands before a reply that has no thought. `epilogue` is written after whatever does not go on; no row
    needs it.

    Attributes:
        thinks: Whether it knows thoughts; if not, `enable_thinking` and `last_thought_only` have no effect.
        enable_thinking: LLaMA-Factory's. True: an empty thought carries loss. None: it is context. False: context, and the
            thoughts of the rows are left out.
        last_thought_only: Only the last reply is trained (mask_history), so earlier ones come without their thoughts, as
            they do when the model is used.
        split_thoughts: Whether a `<think>` in a reply's text has to be moved into `reasoning_content`.
        thought_key: The key of a message from which it writes a thought; without one, `<think>` goes into the text.
        call_id: The form of the ids that it writes for calls; if `any_call_id`, those of the rows need not have 9 letters.
    """

    tokenizer: PreTrainedTokenizerBase
    jinja: str
    day: date
    tool_jinja: str | None = None
    enable_thinking: bool | None = True
    last_thought_only: bool = False
    generation_prompt: str = ""
    after_reply: str = ""
    end_of_turn: str | None = None
    call_end: str | None = None
    begins_next: bool = False
    empty_thought: str = ""
    epilogue: str = ""
    thinks: bool = False
    split_thoughts: bool = False
    thought_key: str | None = None
    call_id: str | None = None
    any_call_id: bool = True

    @property
    def hash(self) -> str:
        """Of all that decides its text beside the rows: the Jinja, its date in it, and the special tokens it may write."""
        special_tokens = self.tokenizer.special_tokens_map
        parts = [self.jinja, self.tool_jinja, special_tokens, self.enable_thinking, self.last_thought_only]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def turn_ends(self) -> list[str]:
        """The tokens that end a reply."""
        return [end for end in (self.end_of_turn, self.call_end) if end]

    def ends(self, reply: str) -> bool:
        """Whether a token that ends a turn is in the reply."""
        return any(end in reply for end in self.turn_ends)

    def without_end(self, reply: str) -> str:
        """What of a reply stands before the token that ends it."""
        at = max((reply.rfind(end) for end in self.turn_ends), default=-1)
        return reply if at < 0 else reply[:at]

    def fit(self, conversation: Conversation) -> Conversation:
        """The conversation as the template takes it: thoughts kept, moved or left out, and ids for calls."""
        messages, tools, last = list(conversation.messages), conversation.tools, conversation.replies[-1]
        for position in conversation.replies:
            reply = messages[position]
            if self.thinks:
                reply = self._fit_thought(reply, position == last)
            if thought := reply.get("reasoning_content"):
                reply = self._move_thought(reply, thought)
            messages[position] = reply
        if self.tool_jinja and any(message.get("tool_calls") for message in messages):
            tools = tools or []  # Its calls ask for the template with tools, also where the row lists none.
        return Conversation(_with_ids(messages, self) if self.call_id else messages, tools, conversation.unread)

    def _fit_thought(self, reply: Message, is_last: bool) -> Message:
        if self.last_thought_only and not is_last:
            return {**_without_thought(reply), "reasoning_content": ""}
        if self.enable_thinking is False:
            return _without_thought(reply)
        if self.split_thoughts and (thought := THOUGHT.match(reply["content"])):
            return {**reply, "content": reply["content"][thought.end() :], "reasoning_content": thought[1]}
        return reply

    def _move_thought(self, reply: Message, thought: str) -> Message:
        """The reply with its thought where the template looks for it."""
        if self.thought_key:
            return cast(Message, {**reply, self.thought_key: thought})
        return {**reply, "content": f"<think>\n{thought}\n</think>\n\n{reply['content']}", "reasoning_content": ""}

    def render(self, messages: list[Message], tools: list[Fields] | None, prompt: bool) -> str:
        """The template's text for these messages, with the generation prompt after it or not.

        Raises:
            RowError: if the template refuses them.
        """
        variables = {} if self.last_thought_only else dict(KEEP_THOUGHTS)
        if self.enable_thinking is False:
            variables["enable_thinking"] = False
        jinja = self.jinja if tools is None or self.tool_jinja is None else self.tool_jinja
        apply: Callable[..., object] = self.tokenizer.apply_chat_template
        try:
            rendered = apply(
                messages, tools=tools, chat_template=jinja, add_generation_prompt=prompt, tokenize=False, **variables
            )
        except (TemplateError, TypeError, ValueError, RecursionError) as error:
            raise RowError(f"the template refuses it: {error}") from None
        text = str(rendered)
        if prompt:
            return text
        if self.begins_next and messages[-1]["role"] == "assistant":
            return text + ((messages[-1].get("tool_calls") and self.call_end) or self.end_of_turn or "")
        return text.removesuffix(self.epilogue)


def _without_thought(reply: Message) -> Message:
    """As LLaMA-Factory removes it: the newlines at the beginning of what is left go, too."""
    content = re.sub(r"<think>.*?</think>(?:\n\n)?", "", reply["content"], flags=re.DOTALL).lstrip("\n")
    kept = {key: value for key, value in reply.items() if key != "reasoning_content"}
    return cast(Message, kept | {"content": content})


def _with_ids(messages: list[Message], template: Template) -> list[Message]:
    """An id for each call, the row's own if the template takes it, and the same for its result."""
    form, numbers, found = template.call_id or "", count(), []
    waiting: list[tuple[str, str]] = []  # of each call without a result: the row's id or "", and its id here
    for message in messages:
        if calls := message.get("tool_calls"):
            waiting = []
            for call, number in zip(calls, numbers):
                own, name = call.get("id", ""), call["function"]["name"]
                fits = own and (template.any_call_id or len(own) == 9) and ("{name}" not in form or name in own)
                waiting.append((own, own if fits else form.format(name=name, number=number)))
            message = {**message, "tool_calls": [{**call, "id": one} for call, (_, one) in zip(calls, waiting)]}
        elif message["role"] == "tool" and waiting:
            named = [pair for pair in waiting if pair[0] and pair[0] == message.get("tool_call_id")]
            answered = (named or waiting)[0]
            waiting.remove(answered)
            message = {**message, "tool_call_id": answered[1]}
        found.append(message)
    return found


def template_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Template:
    """`find_template` for a recipe: what it writes is the same for a run and its resume, on all processes."""
    last_thought_only = recipe.mask_history and not recipe.preserve_thinking
    return find_template(tokenizer, on_main_process(lambda: _day(recipe)), recipe.enable_thinking, last_thought_only)


def _day(recipe: Recipe) -> date:
    """The day on which the run in `output_dir` began, if it goes on; else today."""
    resumed = recipe.resume_from_checkpoint
    if recipe.overwrite_output_dir and not resumed:
        return date.today()
    folder = Path(resumed).parent if isinstance(resumed, str) else Path(recipe.output_dir)
    manifest = read_json(folder / MANIFEST)
    try:
        return date.fromisoformat(manifest["day"])
    except (KeyError, TypeError, ValueError):
        return date.today()


def find_template(
    tokenizer: PreTrainedTokenizerBase,
    day: date | None = None,
    enable_thinking: bool | None = True,
    last_thought_only: bool = False,
) -> Template:
    """The template to render with in training: the tokenizer's own, or TRL's training form if that one rewrites turns.

    Args are attributes of `Template`; `day` is today where omitted.

    Raises:
        RecipeError: if it can't be rendered at all.
    """
    named = {name: jinja.removeprefix(WITHOUT_THOUGHT) for name, jinja in _named(tokenizer.chat_template).items()}
    if "default" not in named:
        raise RecipeError(f"template: the tokenizer has templates named {', '.join(named)} and none named default")
    day = day or date.today()
    tool_jinja = _dated(named["tool_use"], day) if "tool_use" in named else None
    bare = Template(tokenizer, _dated(named["default"], day), day, tool_jinja, enable_thinking, last_thought_only)
    own = _describe(bare)
    if not _faults(own):
        return own
    from trl.chat_template_utils import get_training_chat_template

    plain = copy(tokenizer)
    plain.chat_template = named["default"]
    try:
        training = get_training_chat_template(plain)
    except ValueError:  # TRL knows no training form of it
        return own
    form = _describe(replace(bare, jinja=_dated(training, day))) if training else own
    return form if _faults(form) < _faults(own) else own


def without_thought_by_default(chat_template: ChatTemplate, wanted: bool) -> ChatTemplate:
    """A tokenizer's templates, which answer without a thought unless they are asked for one; or as they were before that."""
    first = WITHOUT_THOUGHT if wanted else ""
    named = {name: first + jinja.removeprefix(WITHOUT_THOUGHT) for name, jinja in _named(chat_template).items()}
    return named if isinstance(chat_template, dict) else named["default"]


def _named(chat_template: ChatTemplate) -> dict[str, str]:
    return chat_template if isinstance(chat_template, dict) else {"default": chat_template}


def _dated(jinja: str, day: date) -> str:
    """The template with this day in place of today. transformers 5 hands a template data alone, and no clock of ours."""
    return re.sub(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""", lambda call: json.dumps(day.strftime(call[2])), jinja)


# What a template writes, found by rendering


def _describe(template: Template) -> Template:
    """The template with what it writes around a reply."""
    tokenizer = template.tokenizer
    eos = str(tokenizer.eos_token or "\0")
    try:
        with_prompt, without = template.render([ASK], None, True), template.render([ASK], None, False)
        answered = template.render([ASK, REPLY], None, False)
    except RowError as error:
        raise RecipeError(f"template: cannot be rendered ({error})") from None
    # Phi-3 ends whatever does not go on with the eos token. No reply ends in it, so no row needs it.
    epilogue = eos if not with_prompt.startswith(without) and without.endswith(eos) else ""
    header = shared_start(with_prompt, answered)
    before_reply, _, after_reply = answered[len(header) :].rpartition(REPLY["content"])
    template = replace(
        template,
        generation_prompt=header[len(without.removesuffix(epilogue)) :],
        after_reply=after_reply,
        end_of_turn=next(iter(_special_tokens(tokenizer, after_reply)), None),
        empty_thought=before_reply if "think>" in before_reply else "",
        epilogue=epilogue,
    )
    return _find_call_ids(_find_thoughts(_find_ends(template), with_prompt[len(without) :] + before_reply))


def _write(template: Template, *messages: Message, tools: list[Fields] | None = None) -> str:
    """What it writes for the messages; nothing if it refuses them."""
    try:
        return template.render(list(messages), tools, False)
    except RowError:
        return ""


def _special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The special ones in a text; where there are none, those that were added as words."""
    added = tokenizer.added_tokens_decoder
    found = [added[token] for token in tokenizer(text, add_special_tokens=False)["input_ids"] if token in added]
    return [token.content for token in found if token.special or not any(other.special for other in found)]


def _find_ends(template: Template) -> Template:
    """The next turn's first token, if that is what ends a reply; and the token that ends calls, if it is another one."""

    def next_token(reply: Message, follows: Message) -> str | None:
        text = _write(template, ASK, reply, follows).removeprefix(_write(template, ASK, reply))
        first = next(iter(_special_tokens(template.tokenizer, text)), None)
        return first if first and text.startswith(first) else None

    if not template.after_reply.strip() and (end := next_token(REPLY, ASK)):
        after_reply = template.after_reply + end
        call_end = next_token(CALLS, FOUND) if _write(template, ASK, CALLS) else None
        return replace(template, end_of_turn=end, call_end=call_end, after_reply=after_reply, begins_next=True)
    text = _write(template, ASK, CALLS)
    ends = _special_tokens(template.tokenizer, text.rpartition("a word")[2])
    is_other = ends and template.end_of_turn not in ends and text.rstrip().endswith(ends[-1])
    return replace(template, call_end=ends[-1] if is_other else None)


def _find_thoughts(template: Template, around_reply: str) -> Template:
    """Where it looks for a thought, if anywhere, and whether it has its own way to write one (gpt-oss, Qwen3.8)."""
    beside = {key: _write(template, ASK, cast(Message, {**REPLY, key: "a thought"})) for key in THOUGHT_KEYS}
    key = next((key for key, text in beside.items() if "a thought" in text), None)
    inside = _write(template, ASK, THINKING)
    split_thoughts = bool(key and inside) and inside.count("</think>") != beside[key or ""].count("</think>")
    asks_to_think = {replace(template, enable_thinking=wanted).render([ASK], None, True) for wanted in (True, False)}
    thinks = "think>" in around_reply or len(asks_to_think) > 1 or split_thoughts
    return replace(template, thought_key=key, thinks=thinks, split_thoughts=split_thoughts)


def _find_call_ids(template: Template) -> Template:
    """Which ids of calls it writes."""

    def write(call_id: str) -> str:
        calls: Message = {**REPLY, "content": "", "tool_calls": [{"id": call_id, **CALL}]}
        return _write(template, ASK, calls, tools=[TOOL] if template.tool_jinja else None)

    nine, long = "a1B2c3D4e", "call_a1B2c3D4e5F6"
    written = write(nine)
    if nine not in written:
        return template
    form = "call{number:05}" if CALL["function"]["name"] in written else "functions.{name}:{number}"  # Kimi's
    return replace(template, call_id=form, any_call_id=long in write(long))


def _faults(template: Template) -> int:
    """How many probes can't be cut into segments though the template knows their kind; a reply without an end is one too."""
    faults = int(template.end_of_turn is None)
    for messages in PROBES:
        row = template.fit(Conversation(messages))
        if not _write(template, *row.messages):  # DeepSeek-V3's own can't write calls as they come; TRL's form can.
            faults += messages is PROBES[-1] and "tool_calls" in template.jinja
            continue
        try:
            to_segments(row, template)
        except RowError:
            faults += 1
    return faults
