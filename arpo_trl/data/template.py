"""How a chat template is used in training: messages fitted to it, and their rendered text.

`template_probe.py` finds the template to train with and what it writes around a reply.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from itertools import count
from typing import cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..errors import RowError
from .messages import REASONING_KEYS, Conversation, Fields, Message

REASONING = re.compile(r"\s*<think>\n*(.*?)\n*</think>\n*", re.DOTALL)
MARKS = ("\ufdd0", "\ufdd1")  # around reasoning that is inserted after rendering; Unicode reserves them for such uses
# The switches with which templates keep the reasoning of earlier turns (Nemotron 3, GLM-4.7, Qwen3.6, LFM2.5, DeepSeek
# V4). Every reply of a row is trained, so none may lose its reasoning once another follows.
KEEP_REASONING = {
    "truncate_history_thinking": False,
    "clear_thinking": False,
    "preserve_thinking": True,
    "keep_past_thinking": True,
    "drop_thinking": False,
}


@dataclass(frozen=True)
class Template:
    """The chat template that renders rows for training. `find_template` fills the fields below `last_reasoning_only`.

    Attributes:
        tokenizer: Renders the template.
        jinja: The template's text; may be TRL's training form of the tokenizer's own.
        day: The date that a dated template (`strftime_now`) writes.
        tool_jinja: Renders rows with tools or calls, if the tokenizer has a separate template for them (`tool_use`).
        enable_thinking: LLaMA-Factory's key. True: empty reasoning is trained. None: it is context. False: it is context,
            and the reasoning of the rows is left out.
        last_reasoning_only: Only the last reply is trained (mask_history), or the sides of a pair, so earlier replies lose
            their reasoning, as they do at inference.
        generation_prompt: Opens a reply.
        after_reply: Follows the text of a reply.
        end_of_turn: The last special token in `after_reply` that occurs nowhere else in the reply.
        call_end: The token that ends a reply with calls, if it is another one (gpt-oss, GLM).
        stops: The end tokens of the base's generation config, which are saved with the model, too.
        begins_next: Replies end with the first token of the next turn (GLM), which the model writes to stop.
        empty_reasoning: Precedes a reply without reasoning.
        epilogue: Ends any text without a generation prompt (Phi-3); removed.
        supports_thinking: If False, `enable_thinking` and `last_reasoning_only` have no effect.
        split_reasoning: Move a `<think>` block at the start of a reply into `reasoning_content`.
        reasoning_key: The message key from which the template writes reasoning. If this and the next are unset, it goes
            into the text as `<think>`.
        reasoning_block: What surrounds the reasoning of a reply. Without `reasoning_key`, the template doesn't write it in
            every reply, opens it only (Kimi K2 Thinking, Gemma 4, DeepSeek R1), or writes it from a chunk of the content
            (Mistral): then it is inserted before the reply's text, and replaces an empty or opened block there.
        thinking_switch: The variable that makes the template write reasoning or prompt for it (DeepSeek V3.2, Gemma 4);
            true by default in the saved template if a row has reasoning.
        call_id: The format of the call ids that the template writes.
        any_call_id: If False, the template accepts only ids of 9 characters (Mistral).
    """

    tokenizer: PreTrainedTokenizerBase
    jinja: str
    day: date
    tool_jinja: str | None = None
    enable_thinking: bool | None = True
    last_reasoning_only: bool = False
    generation_prompt: str = ""
    after_reply: str = ""
    end_of_turn: str | None = None
    call_end: str | None = None
    stops: tuple[str, ...] = ()
    begins_next: bool = False
    empty_reasoning: str = ""
    epilogue: str = ""
    supports_thinking: bool = False
    split_reasoning: bool = False
    reasoning_key: str | None = None
    reasoning_block: tuple[str, str] | None = None
    thinking_switch: str | None = None
    call_id: str | None = None
    any_call_id: bool = True

    @property
    def hash(self) -> str:
        """Hash everything besides the row that decides the text: the Jinja with its date, and the special tokens."""
        special_tokens = self.tokenizer.special_tokens_map
        parts = [
            self.jinja,
            self.tool_jinja,
            special_tokens,
            self.enable_thinking,
            self.last_reasoning_only,
            self.stops,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def turn_ends(self) -> list[str]:
        """The tokens that end a reply."""
        return [end for end in (self.end_of_turn, self.call_end) if end]

    def find_early_end(self, reply: str) -> str | None:
        """Return the end token at which the model would stop before the reply's end, or None.

        A template may write several end tokens in a row (Apriel 1.5, Apertus).
        """
        pattern = "|".join(map(re.escape, sorted({*self.turn_ends, *self.stops}, key=len, reverse=True)))
        most, ends = len(re.findall(pattern, self.after_reply)), list(re.finditer(pattern, reply))
        rest, written = re.sub(pattern, "", reply[ends[0].end() :]), Counter(end[0] for end in ends)
        return ends[0][0] if rest.strip() or max(written.values()) > max(1, most) else None

    def find_end(self, text: str) -> int | None:
        """Return the id of a token in the text at which the model stops, or None."""
        end = next((end for end in (*self.turn_ends, *self.stops) if end in text), None)
        return None if end is None else cast(int, self.tokenizer.convert_tokens_to_ids(end))

    def without_end(self, reply: str) -> str:
        """Return the reply up to its end-of-turn token."""
        at = max((reply.rfind(end) for end in self.turn_ends), default=-1)
        return reply if at < 0 else reply[:at]

    def of_row(self, conversation: Conversation) -> Template:
        """Return the template with which a row is rendered: without `thinking_switch` if no reply has reasoning."""
        reasons = any(has_reasoning(conversation.messages[at]) for at in conversation.replies)
        return self if reasons else replace(self, thinking_switch=None)

    def fit(self, conversation: Conversation) -> Conversation:
        """Adapt a conversation to the template: reasoning kept, moved or removed, and ids for calls."""
        messages, tools, last = list(conversation.messages), conversation.tools, conversation.replies[-1]
        is_pair, prompt = conversation.prompt is not None, conversation.prompt or 0
        for position in conversation.replies:
            reply, is_earlier = messages[position], position < prompt if is_pair else position != last
            if self.supports_thinking and not (is_pair and is_earlier and not self.last_reasoning_only):
                reply = self._fit_reasoning(reply, is_earlier)
            if self.supports_thinking and is_pair and position != last and "</think>" not in reply["content"]:
                reply = cast(Message, {"reasoning_content": "", **reply})  # only the last reply gets an empty block
            if reasoning := reply.get("reasoning_content"):
                reply = self._place_reasoning(reply, reasoning)
            messages[position] = reply
        if self.tool_jinja and any(message.get("tool_calls") for message in messages):
            tools = tools or []  # Calls need the template with tools, even if the row lists none.
        messages = _with_ids(messages, self) if self.call_id else messages
        return replace(conversation, messages=messages, tools=tools)

    def _fit_reasoning(self, reply: Message, is_earlier: bool) -> Message:
        if self.last_reasoning_only and is_earlier:
            return {**_without_reasoning(reply), "reasoning_content": ""}
        if self.enable_thinking is False:
            return _without_reasoning(reply)
        if self.split_reasoning and (reasoning := REASONING.match(reply["content"])):
            return {**reply, "content": reply["content"][reasoning.end() :], "reasoning_content": reasoning[1]}
        return reply

    def _place_reasoning(self, reply: Message, reasoning: str) -> Message:
        """Put the reasoning where the template looks for it; `render` inserts blocks."""
        if self.inserts_reasoning:
            return {**reply, "reasoning_content": reasoning}
        if self.reasoning_key:
            return cast(Message, {**reply, self.reasoning_key: reasoning})
        return {**reply, "content": f"<think>\n{reasoning}\n</think>\n\n{reply['content']}", "reasoning_content": ""}

    def render(self, messages: list[Message], tools: list[Fields] | None, prompt: bool) -> str:
        """Render the messages, and the generation prompt if `prompt`. Raises RowError if the template raises an error."""
        variables = {} if self.last_reasoning_only else dict(KEEP_REASONING)
        if self.enable_thinking is False:
            variables["enable_thinking"] = False
        if self.thinking_switch:
            variables[self.thinking_switch] = True
        jinja = self.jinja if tools is None or self.tool_jinja is None else self.tool_jinja
        rendered = render(self.tokenizer, self._mark_reasoning(messages), tools, jinja, variables, prompt)
        text = self._insert_reasoning(rendered)
        if prompt:
            return text
        if self.begins_next and messages[-1]["role"] == "assistant":
            return text + ((messages[-1].get("tool_calls") and self.call_end) or self.end_of_turn or "")
        return text.removesuffix(self.epilogue)

    def _mark_reasoning(self, messages: list[Message]) -> list[Message]:
        """Put reasoning that the template has no key for into the content, between two marks."""
        if not self.inserts_reasoning:
            return messages
        marked: list[Message] = []
        for message in messages:
            if message["role"] == "assistant":
                reasoning, needs_block = message.get("reasoning_content", ""), self._needs_empty_block(message)
                message = cast(Message, {key: value for key, value in message.items() if key != "reasoning_content"})
                if reasoning or needs_block:
                    message["content"] = f"{MARKS[0]}{reasoning}{MARKS[1]}{message['content']}"
            marked.append(message)
        return marked

    def _insert_reasoning(self, text: str) -> str:
        """Replace each mark, and an empty or opened block before it, with the block of its reasoning."""
        if not self.reasoning_block or not self.inserts_reasoning:
            return text
        opening, closing = (re.escape(tag.strip()) for tag in self.reasoning_block)
        block = rf"(?:{opening}\s*)?(?:{closing}\s*)?{MARKS[0]}(.*?){MARKS[1]}"
        before, after = self.reasoning_block
        return re.sub(block, lambda match: f"{before}{match[1]}{after}", text, flags=re.DOTALL)

    @property
    def inserts_reasoning(self) -> bool:
        """Return whether reasoning is inserted into the rendered text."""
        return self.reasoning_block is not None and self.reasoning_key is None

    def _needs_empty_block(self, message: Message) -> bool:
        """Return whether the template opens a block in the last reply only (Nemotron Nano v2)."""
        opens = self.reasoning_block and self.generation_prompt.endswith(self.reasoning_block[0])
        return bool(opens and message["content"] and "reasoning_content" not in message)

    def close_reasoning(self, prompt: str, reply: str) -> str:
        """Return the end of the empty reasoning that a generation prompt opens and the reply does not close."""
        opening, closing = self.reasoning_block or ("", "")
        opens = opening and prompt.rstrip().endswith(opening.strip())
        return closing if opens and closing.strip() not in reply else ""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    tools: list[Fields] | None,
    chat_template: str | dict[str, str] | None,
    switches: Mapping[str, object],
    prompt: bool = True,
) -> str:
    """Render with any chat template; the tokenizer's own if None. Raises RowError if the template raises an error."""
    apply: Callable[..., object] = tokenizer.apply_chat_template
    arguments = {"tools": tools, "chat_template": chat_template, "add_generation_prompt": prompt, **switches}
    try:
        return str(apply(messages, tokenize=False, **arguments))
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise RowError(f"the chat template raised an error: {error}") from None


def has_reasoning(reply: Message) -> bool:
    return bool(REASONING.match(reply["content"])) or any(reply.get(key) for key in REASONING_KEYS)


def _without_reasoning(reply: Message) -> Message:
    """Remove the reasoning as LLaMA-Factory does, with the newlines before the rest of the text."""
    content = re.sub(r"<think>.*?</think>(?:\n\n)?", "", reply["content"], flags=re.DOTALL).lstrip("\n")
    kept = {key: value for key, value in reply.items() if key != "reasoning_content"}
    return cast(Message, kept | {"content": content})


def _with_ids(messages: list[Message], template: Template) -> list[Message]:
    """Give each call an id, the row's own if the template accepts it, and its result the same id."""
    form, numbers, fitted = template.call_id or "", count(), []
    waiting: list[tuple[str, str]] = []  # for each call without a result: the row's id or "", and the id given here
    for message in messages:
        if calls := message.get("tool_calls"):
            waiting = []
            for call, number in zip(calls, numbers):
                own, name = call.get("id", ""), call["function"]["name"]
                fits = own and (template.any_call_id or len(own) == 9) and ("{name}" not in form or name in own)
                waiting.append((own, own if fits else form.format(name=name, number=number)))
            ids = [call_id for _, call_id in waiting]
            message = {**message, "tool_calls": [{**call, "id": call_id} for call, call_id in zip(calls, ids)]}
        elif message["role"] == "tool" and waiting:
            named = [pair for pair in waiting if pair[0] and pair[0] == message.get("tool_call_id")]
            answered = (named or waiting)[0]
            waiting.remove(answered)
            message = {**message, "tool_call_id": answered[1]}
        fitted.append(message)
    return fitted
