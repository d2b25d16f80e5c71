"""The chat template in training: which one renders, and what it writes around a reply.

A tokenizer's own template can't always be trained with: one that writes earlier turns differently once later ones
follow (Qwen3 strips its thinking) can't be learnt from as it stands; TRL has a training form of the common ones.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from copy import copy
from dataclasses import dataclass, replace
from datetime import date
from importlib.resources import files
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jinja2 import TemplateError

from ..errors import RecipeError, RowError
from ..recipe.keys import Recipe
from ..run_folder import read_json
from .messages import THOUGHT_KEYS, Conversation, Message
from .segments import shared_start, to_segments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ChatTemplate = str | dict[str, str]  # one, or several by name
ASK: Message = {"role": "user", "content": "a question"}
REPLY: Message = {"role": "assistant", "content": "an answer"}
CALL: dict[str, Any] = {"type": "function", "function": {"name": "search", "arguments": {"query": "a word"}}}
THINKING: Message = {"role": "assistant", "content": "<think>\na thought\n</think>\n\nan answer"}
PROBES: tuple[list[Message], ...] = (
    [ASK, REPLY, ASK, REPLY],
    [ASK, THINKING],
    [ASK, THINKING, ASK, REPLY],
    [ASK, {**REPLY, "tool_calls": [CALL]}, {"role": "tool", "content": "found"}, REPLY, ASK, REPLY],
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
        messages, last = list(conversation.messages), conversation.replies[-1]
        for position in conversation.replies if self.thinks else ():
            if self.last_thought_only and position < last:
                messages[position] = {**_without_thought(messages[position]), "reasoning_content": ""}
            elif self.enable_thinking is False:
                messages[position] = _without_thought(messages[position])
            elif self.split_thoughts and (thought := THOUGHT.match(messages[position]["content"])):
                content = messages[position]["content"][thought.end() :]
                messages[position] = {**messages[position], "content": content, "reasoning_content": thought[1]}
        messages = [
            self._with_thought(message) if message.get("reasoning_content") else message for message in messages
        ]
        tools = conversation.tools
        if self.tool_jinja and any(message.get("tool_calls") for message in messages):
            tools = tools or []  # Its calls ask for the template with tools, also where the row lists none.
        return Conversation(self._with_ids(messages) if self.call_id else messages, tools, conversation.unread)

    def _with_thought(self, reply: Message) -> Message:
        """A thought that stands beside the text, where the template looks for it."""
        thought = reply["reasoning_content"]
        if self.thought_key is None:
            content = f"<think>\n{thought}\n</think>\n\n{reply['content']}"
            return _without_key({**reply, "content": content}, "reasoning_content")
        return cast(Message, {**reply, self.thought_key: thought})

    def _with_ids(self, messages: list[Message]) -> list[Message]:
        """An id for each call, the row's own if the template takes it, and the same for its result."""
        form, numbers, found = self.call_id or "", count(), []
        waiting: list[tuple[str, str]] = []
        for message in messages:
            if calls := message.get("tool_calls"):
                waiting = []
                for call, number in zip(calls, numbers):
                    given, name = call.get("id", ""), call["function"]["name"]
                    fits = given and (self.any_call_id or len(given) == 9) and ("{name}" not in form or name in given)
                    waiting.append((given, given if fits else form.format(name=name, number=number)))
                message = {**message, "tool_calls": [{**call, "id": one} for call, (_, one) in zip(calls, waiting)]}
            elif message["role"] == "tool" and waiting:
                own = [pair for pair in waiting if pair[0] and pair[0] == message.get("tool_call_id")]
                answered = (own or waiting)[0]
                waiting.remove(answered)
                message = {**message, "tool_call_id": answered[1]}
            found.append(message)
        return found

    def render(self, messages: list[Message], tools: Any, prompt: bool) -> str:
        """The template's text for these messages, with the generation prompt after it or not.

        Raises:
            RowError: if the template refuses them.
        """
        jinja = self.jinja if tools is None or self.tool_jinja is None else self.tool_jinja
        variables: dict[str, Any] = {} if self.last_thought_only else KEEP_THOUGHTS
        if self.enable_thinking is False:
            variables = {**variables, "enable_thinking": False}
        try:
            given: list[Any] = list(messages)
            text = str(
                self.tokenizer.apply_chat_template(
                    given,
                    tools=tools,
                    chat_template=jinja,
                    add_generation_prompt=prompt,
                    tokenize=False,
                    **variables,
                )
            )
        except (TemplateError, TypeError, ValueError, RecursionError) as error:
            raise RowError(f"the template refuses it: {error}") from None
        if prompt:
            return text
        if self.begins_next and messages[-1]["role"] == "assistant":
            return text + ((messages[-1].get("tool_calls") and self.call_end) or self.end_of_turn or "")
        return text.removesuffix(self.epilogue)


def _without_thought(reply: Message) -> Message:
    """As LLaMA-Factory removes it: the newlines at the beginning of what is left go, too."""
    content = re.sub(r"<think>.*?</think>(?:\n\n)?", "", reply["content"], flags=re.DOTALL).lstrip("\n")
    return _without_key({**reply, "content": content}, "reasoning_content")


def _without_key(message: Message, key: str) -> Message:
    return cast(Message, {name: value for name, value in message.items() if name != key})


def find_template(
    tokenizer: PreTrainedTokenizerBase,
    day: date | None = None,
    enable_thinking: bool | None = True,
    last_thought_only: bool = False,
) -> Template:
    """The template to render with in training: the tokenizer's own, or TRL's training form if that one rewrites turns.

    Args:
        day: The date that a dated template writes; today's if omitted.
        enable_thinking: As the attribute of `Template`.
        last_thought_only: As the attribute of `Template`.

    Raises:
        RecipeError: if it can't be rendered at all.
    """
    named = {name: jinja.removeprefix(WITHOUT_THOUGHT) for name, jinja in _named(tokenizer.chat_template).items()}
    if "default" not in named:
        raise RecipeError(f"template: the tokenizer has templates named {', '.join(named)} and none named default")
    day = day or date.today()
    jinja, tool_jinja = (_dated(named[name], day) if name in named else None for name in ("default", "tool_use"))
    bare = Template(tokenizer, str(jinja), day, tool_jinja, enable_thinking, last_thought_only)
    own = _describe(bare)
    if not _faults(own):
        return own
    from trl.chat_template_utils import get_training_chat_template

    plain = copy(tokenizer)
    plain.chat_template = named["default"]
    try:
        jinja = get_training_chat_template(plain)
    except ValueError:  # TRL knows no training form of it
        return own
    form = _describe(replace(bare, jinja=_dated(jinja, day))) if jinja else own
    return form if _faults(form) < _faults(own) else own


def template_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Template:
    """`find_template` for a recipe: what it writes is the same for a run and its resume, on all processes.

    Raises:
        RecipeError: as `find_template`.
    """
    from ..processes import on_main_process

    last_thought_only = recipe.mask_history and not recipe.preserve_thinking
    return find_template(tokenizer, on_main_process(lambda: _day(recipe)), recipe.enable_thinking, last_thought_only)


def _day(recipe: Recipe) -> date:
    """The day on which the run in `output_dir` began, if it goes on; else today."""
    resumed, folder = recipe.resume_from_checkpoint, Path(recipe.output_dir)
    if recipe.overwrite_output_dir and not resumed:
        return date.today()
    manifest = read_json((Path(resumed).parent if isinstance(resumed, str) else folder) / "run.json")
    try:
        return date.fromisoformat(manifest["day"])
    except (KeyError, TypeError, ValueError):
        return date.today()


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


def _describe(template: Template) -> Template:
    """What it writes around a reply, found by rendering."""
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
    template = _find_ends(template)
    asks_to_think = {replace(template, enable_thinking=wanted).render([ASK], None, True) for wanted in (True, False)}
    template = replace(template, **_find_keys(template))
    split_thoughts = _splits_thoughts(template)
    thinks = "think>" in with_prompt[len(without) :] + before_reply or len(asks_to_think) > 1 or split_thoughts
    return replace(template, thinks=thinks, split_thoughts=split_thoughts)


def _find_keys(template: Template) -> dict[str, Any]:
    """Where it looks for a thought, and which ids of calls it writes, found by rendering."""

    tool = {"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}

    def write(more: dict[str, Any], tools: Any = None) -> str:
        try:
            return template.render([ASK, cast(Message, {**REPLY, **more})], tools, False)
        except RowError:
            return ""

    def write_call(call_id: str) -> str:
        calls = [{"id": call_id, **CALL}]
        return write({"content": "", "tool_calls": calls}, [tool] if template.tool_jinja else None)

    thought_key = next((key for key in THOUGHT_KEYS if "a thought" in write({key: "a thought"})), None)
    nine, long = "a1B2c3D4e", "call_a1B2c3D4e5F6"
    written = write_call(nine)
    if nine not in written:
        return {"thought_key": thought_key, "call_id": None}
    form = "call{number:05}" if CALL["function"]["name"] in written else "functions.{name}:{number}"  # Kimi's
    return {"thought_key": thought_key, "call_id": form, "any_call_id": long in write_call(long)}


def _special_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The special ones in a text; where there are none, those that were added as words."""
    added = tokenizer.added_tokens_decoder
    found = [added[token] for token in tokenizer(text, add_special_tokens=False)["input_ids"] if token in added]
    return [token.content for token in found if token.special or not any(other.special for other in found)]


def _find_ends(template: Template) -> Template:
    """The next turn's first token, if that is what ends a reply; and the token that ends calls, if it is another one."""
    called: Message = {**REPLY, "content": "", "tool_calls": [CALL]}

    def next_token(reply: Message, follows: Message) -> str | None:
        until_reply = template.render([ASK, reply], None, False)
        text = template.render([ASK, reply, follows], None, False).removeprefix(until_reply)
        first = next(iter(_special_tokens(template.tokenizer, text)), None)
        return first if first and text.startswith(first) else None

    try:
        if not template.after_reply.strip() and (end := next_token(REPLY, ASK)):
            call_end = next_token(called, {"role": "tool", "content": "found"})
            after_reply = template.after_reply + end
            return replace(template, end_of_turn=end, call_end=call_end, after_reply=after_reply, begins_next=True)
        text = template.render([ASK, called], None, False)
    except RowError:
        return template
    ends = _special_tokens(template.tokenizer, text.rpartition("a word")[2])
    is_other = ends and template.end_of_turn not in ends and text.rstrip().endswith(ends[-1])
    return replace(template, call_end=ends[-1] if is_other else None)


def _splits_thoughts(template: Template) -> bool:
    """Whether it writes thoughts in a way of its own, and not where the text of a reply has them (gpt-oss, Qwen3.8)."""
    try:
        inside = template.render([ASK, THINKING], None, False)
        thought = {template.thought_key or "reasoning_content": "a thought"}
        beside = template.render([ASK, cast(Message, {**REPLY, **thought})], None, False)
    except RowError:
        return False
    return "a thought" in beside and inside.count("</think>") != beside.count("</think>")


def _faults(template: Template) -> int:
    """How many probes can't be cut into segments though the template knows their kind; a reply without an end is one too."""
    faults = int(template.end_of_turn is None)
    for messages in PROBES:
        row = template.fit(Conversation(messages))
        try:
            template.render(row.messages, None, False)
        except RowError:  # DeepSeek-V3's own can't write calls as they come here, TRL's form of it can
            faults += messages is PROBES[-1] and "tool_calls" in template.jinja
            continue
        try:
            to_segments(row, template)
        except RowError:
            faults += 1
    return faults


def shipped_template(name: str) -> str:
    """The Jinja text of a template that is shipped under one of LLaMA-Factory's names: TRL's, or one put together.

    The pieces that templates/names.toml has for the name stand in front, then the file of their tools, then frame.jinja.
    Of TRL's files only Qwen2.5's is LLaMA-Factory's text; others (llama3.jinja, qwen3_instruct_2507.jinja) trim it, or
    write tools in another way.

    Raises:
        KeyError: if nothing is shipped under that name.
    """
    if name == "qwen":
        trl = find_spec("trl")  # not imported: that takes seconds
        return Path(str(trl and trl.origin)).with_name("chat_templates").joinpath("qwen2_5.jinja").read_text("utf-8")
    folder = files("arpo_trl.data").joinpath("templates")
    table = tomllib.loads(folder.joinpath("names.toml").read_text(encoding="utf-8"))
    pieces = table[name]
    pieces = table.get(pieces.get("like"), {}) | pieces
    default = {"begin": "", "default_system": "", "result_join": "", "system_inside": False, "tools": "react"}
    default |= {"thought": ["<think>\n", "\n</think>\n\n"], "reasons": "thought" in pieces}
    pieces = default | {"result": pieces["user"], "call": pieces["reply"]} | pieces
    lines = []
    for key, value in pieces.items():
        if isinstance(value, list):
            lines.append(f"{{%- set {key}_start, {key}_end = {_expression(value[0])}, {_expression(value[1])} %}}\n")
        elif key not in ("like", "tools"):
            lines.append(f"{{%- set {key} = {_expression(value)} %}}\n")
    parts = (f"tools_{pieces['tools']}.jinja", "frame.jinja")
    return "".join([*lines, *(folder.joinpath(part).read_text(encoding="utf-8") for part in parts)])


def _expression(piece: str | bool) -> str:
    """A piece as Jinja writes it."""
    text = json.dumps(piece, ensure_ascii=False)
    return text.replace("{bos}", '" ~ bos_token ~ "').replace("{eos}", '" ~ eos_token ~ "')
