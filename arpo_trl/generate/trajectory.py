"""One trajectory: a question's tokens, the model's replies, the results of its tools, and what ends it.

The model's own ids stay as they were generated. Everything between them is rendered and tokenized as in training.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from ..data.labels import Tokenize
from ..data.messages import Conversation, Fields, Message
from ..data.segments import to_segments
from ..data.template import Template
from ..data.tokenizer import decode, make_tokenize
from ..errors import RowError
from .questions import Question
from .sandbox import Outcome
from .tags import TOOL_TAGS, Call, find_calls, json_or_text
from .tools import find_markers, to_plain_text

End: TypeAlias = Literal["stop", "max_tool_calls", "max_new_tokens", "context", "environment"]
"""Why a trajectory ended: by itself, at a limit, or because a tool or server failed."""
Encoding: TypeAlias = Literal["same", "other tokens", "other text"]
"""A trajectory encoded as a training row: the same ids, the same text in other tokens, or another text."""
REPLY: Message = {"role": "assistant", "content": "a reply"}


@dataclass(frozen=True)
class Limits:
    """`calls` and the model's `tokens` per reply; `context`: the tokens that the model can read."""

    calls: int
    tokens: int
    context: int


@dataclass
class Trajectory:
    """The state of one sample of a question.

    Attributes:
        ids: All tokens: the prompt, the model's, and the results'.
        messages: Finished messages after the question.
        reply_start: Where the current reply begins in `ids`.
        reply_tokens: Tokens that the model wrote in the current reply.
        tokens: Tokens that the model wrote in all replies.
        calls: The tool calls that were run: tool, arguments, result, error (why it failed, or "") and seconds.
        rerendered: Contexts in which the template changed earlier turns, so that not all of the model's ids were kept.
        number: Of the question, among those of a rollout.
    """

    question: Question
    sample: int
    ids: list[int]
    prompt_tokens: int = 0
    messages: list[Message] = field(default_factory=list)
    reply_start: int = 0
    reply_tokens: int = 0
    tokens: int = 0
    calls: list[Fields] = field(default_factory=list)
    rerendered: int = 0
    end: End | None = None
    number: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """Identify the trajectory in a rollout."""
        return self.number, self.sample


class Writer:
    """Advances trajectories of one model: what a reply means, and how a result follows it."""

    def __init__(self, template: Template, ends: Sequence[int], limits: Limits, tools: Iterable[str]) -> None:
        self.template, self.ends, self.limits = template, frozenset(ends), limits
        self.tags = list(dict.fromkeys([*TOOL_TAGS, *tools]))
        self.tokenizer = template.tokenizer
        self.tokenize: Tokenize = make_tokenize(self.tokenizer)
        self.markers = find_markers(self.tokenizer)
        self.reply_prefix = _reply_prefix(template)

    def start(self, question: Question, sample: int) -> Trajectory:
        """Begin a trajectory.

        Raises:
            RowError: the template can't render the question.
        """
        ids = self._encode(to_context(question.messages, question.tools, self.template))
        trajectory = Trajectory(question, sample, ids, prompt_tokens=len(ids), reply_start=len(ids))
        if len(ids) >= self.limits.context:
            trajectory.end = "context"
        return trajectory

    def tokens_left(self, trajectory: Trajectory) -> int:
        """Return how many tokens the model may write before the trajectory reaches a limit."""
        return min(self.limits.tokens - trajectory.reply_tokens, self.limits.context - len(trajectory.ids))

    def accept(self, trajectory: Trajectory, ids: Sequence[int]) -> list[Call]:
        """Append what the model wrote, and return the calls that have to be run before it can continue.

        Without calls, the trajectory has ended, or the reply continues (an end tag that ends no call).
        """
        trajectory.ids += ids
        trajectory.reply_tokens += len(ids)
        trajectory.tokens += len(ids)
        inside = trajectory.question.form.place == "inside"
        stopped = bool(ids) and ids[-1] in self.ends
        text = self.reply_text(trajectory)
        if inside:
            closed = None if stopped else self._closed_call(trajectory, text)
            calls = [closed[0]] if closed else []
        else:
            calls = find_calls(text, self.tags) if stopped else []
        if stopped and not calls:
            self._end(trajectory, "stop", text)
        elif not calls and self.tokens_left(trajectory) <= 0:
            in_context = self.limits.context > len(trajectory.ids)
            self._end(trajectory, "max_new_tokens" if in_context else "context", text)
        elif calls and len(trajectory.calls) + len(calls) > self.limits.calls:
            self._end(trajectory, "max_tool_calls", text)
            calls = []
        return calls

    def reply_text(self, trajectory: Trajectory) -> str:
        """Return the text of the current reply, without its end token, from the point where the message begins."""
        ids = trajectory.ids[trajectory.reply_start :]
        ids = ids[:-1] if ids and ids[-1] in self.ends else ids
        return self._opened(trajectory) + self.decode(ids)

    def _to_message(self, trajectory: Trajectory, text: str) -> Message:
        return to_message(text.removeprefix(self.reply_prefix), trajectory.question.form.calls)

    def add_results(self, trajectory: Trajectory, calls: Sequence[Call], outcomes: Sequence[Outcome]) -> None:
        """Append the results of the calls, and what precedes the next reply.

        Raises:
            RowError: the template can't render the conversation.
        """
        results = [to_plain_text(str(outcome), self.markers) for outcome in outcomes]
        trajectory.calls += [
            {**call._asdict(), "result": result, "error": outcome.error, "seconds": outcome.seconds}
            for call, result, outcome in zip(calls, results, outcomes, strict=True)
        ]
        if trajectory.question.form.place == "inside":
            self._continue_reply(trajectory, results)
        else:
            self._begin_reply(trajectory, calls, results)
        if trajectory.end is None and self.tokens_left(trajectory) <= 0:
            in_context = self.limits.context > len(trajectory.ids)
            text = self.reply_text(trajectory) if trajectory.question.form.place == "inside" else None
            self._end(trajectory, "max_new_tokens" if in_context else "context", text)

    def fail(self, trajectory: Trajectory) -> None:
        """End a trajectory because a tool or the server failed."""
        self._end(trajectory, "environment", self.reply_text(trajectory))

    def encoding(self, trajectory: Trajectory) -> Encoding:
        """Compare the trajectory's ids with those of the training row that has its messages."""
        messages = [*trajectory.question.messages, *trajectory.messages]
        conversation = self.template.fit(Conversation(messages, trajectory.question.tools))
        try:
            ids = self._encode([segment.text for segment in to_segments(conversation, self.template)])
        except RowError:
            return "other text"
        if ids[: len(trajectory.ids)] == trajectory.ids:
            return "same"
        return "other tokens" if self.decode(ids).startswith(self.decode(trajectory.ids)) else "other text"

    def decode(self, ids: Sequence[int]) -> str:
        return decode(self.tokenizer, ids)

    def _encode(self, pieces: Sequence[str], before: str = "") -> list[int]:
        return [token for piece in self.tokenize(list(pieces), [before, *pieces[:-1]]) for token in piece.ids]

    def _opened(self, trajectory: Trajectory) -> str:
        """Return the reasoning tag that the generation prompt opens: in a row, it is part of the reply."""
        prompt = self.decode(trajectory.ids[max(0, trajectory.reply_start - 8) : trajectory.reply_start])
        stripped = prompt.rstrip()
        return prompt[len(stripped) - len("<think>") :] if stripped.endswith("<think>") else ""

    def _closed_call(self, trajectory: Trajectory, text: str) -> tuple[Call, int] | None:
        before = self.decode(trajectory.ids[trajectory.reply_start : -1])
        return _find_last_call(text, len(self._opened(trajectory)) + len(before), self.tags)

    def _end(self, trajectory: Trajectory, end: End, text: str | None) -> None:
        trajectory.end = end
        if text is not None:
            trajectory.messages.append(self._to_message(trajectory, text))

    def _continue_reply(self, trajectory: Trajectory, results: Sequence[str]) -> None:
        """Append a result inside the reply.

        The token that closed the call may hold more than the tag: `>\\n` and `><` are single tokens in Qwen's tokenizer.
        The surplus counts as written if the result begins with it; otherwise that token is replaced by one that ends
        with the tag.
        """
        form = trajectory.question.form
        text = self.reply_text(trajectory)
        closed = self._closed_call(trajectory, text)
        surplus = text[closed[1] :] if closed else ""
        follows = "".join(f"{form.before}{result}{form.after}" for result in results)
        if follows.startswith(surplus):
            follows = follows[len(surplus) :]
        else:
            last = self.decode(trajectory.ids[-1:])
            trajectory.ids[-1:] = self._encode([last.removesuffix(surplus)], before="<")
        trajectory.ids += self._encode([follows], before=self.decode(trajectory.ids[-1:]))

    def _begin_reply(self, trajectory: Trajectory, calls: Sequence[Call], results: Sequence[str]) -> None:
        """End the reply, append the results as messages, and open the next reply."""
        form = trajectory.question.form
        trajectory.messages.append(self._to_message(trajectory, self.reply_text(trajectory)))
        wrapped = [f"{form.before}{result}{form.after}" for result in results]
        if form.calls:
            names = [call.tool for call in calls]
            trajectory.messages += [
                {"role": "tool", "content": text, "name": name} for name, text in zip(names, wrapped, strict=True)
            ]
        else:
            trajectory.messages.append({"role": form.place, "content": "\n".join(wrapped)})
        messages = [*trajectory.question.messages, *trajectory.messages]
        pieces = to_context(messages, trajectory.question.tools, self.template)
        if len(pieces) > 1 and not self._strips_reasoning(messages):
            end = pieces[-2].removeprefix(self.template.without_end(pieces[-2]))
            tail = next((end.removeprefix(token) for token in self.template.turn_ends if end.startswith(token)), "")
            trajectory.ids += self._encode(list(filter(None, (tail, pieces[-1]))), before=end.removesuffix(tail))
        else:
            trajectory.ids = self._encode(pieces)
            trajectory.rerendered += 1
        trajectory.reply_start, trajectory.reply_tokens = len(trajectory.ids), 0

    def _strips_reasoning(self, messages: list[Message]) -> bool:
        """Return whether the last reply is rendered without its reasoning once another one follows (mask_history)."""
        if not self.template.last_reasoning_only:
            return False
        last = self.template.fit(Conversation(messages)).messages
        return last != self.template.fit(Conversation([*messages, REPLY])).messages[:-1]


def _reply_prefix(template: Template) -> str:
    """Return what the template makes the model write before the text of a reply: a space, or empty reasoning."""
    messages: list[Message] = [{"role": "user", "content": "a question"}, REPLY]
    try:
        reply = to_segments(template.fit(Conversation(messages)), template)[-1].text
    except RowError:
        return ""
    return reply.partition(REPLY["content"])[0]


def to_context(messages: list[Message], tools: list[Fields] | None, template: Template) -> list[str]:
    """Return the conversation up to the next reply, in the segments that training tokenizes separately.

    One segment if the template changes earlier turns when a new one follows.

    Raises:
        RowError: the template can't render them.
    """
    fitted = template.fit(Conversation([*messages, REPLY], tools))
    conversation = Conversation(fitted.messages[:-1], fitted.tools)
    prompt = template.render(conversation.messages, conversation.tools, True)
    try:
        segments = to_segments(conversation, template) if conversation.replies else []
    except RowError:
        return [prompt]
    done = "".join(segment.text for segment in segments)
    return [*(segment.text for segment in segments), prompt[len(done) :]] if prompt.startswith(done) else [prompt]


def to_message(text: str, with_calls: bool) -> Message:
    """Return a reply as a message. `with_calls`: its calls become `tool_calls`, which the template renders."""
    calls = find_calls(text) if with_calls else []
    if not calls:
        return {"role": "assistant", "content": text}
    starts = [at for at in map(text.find, ("<tool_call>", "Action:", "{", "[")) if at >= 0]
    content = text[: min(starts)] if starts else text
    functions = [{"name": call.tool, "arguments": _to_object(call.arguments)} for call in calls]
    tool_calls = [{"type": "function", "function": function} for function in functions]
    return {"role": "assistant", "content": content.rstrip(), "tool_calls": tool_calls}


def _to_object(arguments: str) -> Fields:
    value = json_or_text(arguments)
    return value if isinstance(value, dict) else {"input": value}


def _find_last_call(text: str, before_last_token: int, tags: Sequence[str]) -> tuple[Call, int] | None:
    """Return the call that the last token closed, and where its end tag ends; None if it closed none."""
    for tag in tags:
        end = text.rfind(f"</{tag}>")
        start = text.rfind(f"<{tag}>", 0, max(end, 0))
        after = end + len(tag) + 3
        if end >= 0 and start >= 0 and after > before_last_token:
            return Call(tag, text[start + len(tag) + 2 : end].strip()), after
    return None
