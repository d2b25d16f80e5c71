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

    def start(self, question: Question, sample: int, number: int = 0) -> Trajectory:
        """Begin a trajectory.

        Raises:
            RowError: the template can't render the question.
        """
        ids = self._encode(to_context(question.messages, question.tools, self.template))
        trajectory = Trajectory(question, sample, ids, prompt_tokens=len(ids), reply_start=len(ids), number=number)
        trajectory.end = self._limit_reached(trajectory)
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
        stopped = bool(ids) and ids[-1] in self.ends
        if trajectory.question.form.place == "inside":
            closed = None if stopped else self._closed_call(trajectory)
            calls = [closed[0]] if closed else []
        else:
            calls = find_calls(self.reply_text(trajectory), self.tags) if stopped else []
        if calls and len(trajectory.calls) + len(calls) <= self.limits.calls:
            return calls
        self._end(trajectory, "max_tool_calls" if calls else "stop" if stopped else self._limit_reached(trajectory))
        return []

    def reply_text(self, trajectory: Trajectory) -> str:
        """Return the text of the current reply, without its end token, from the point where the message begins."""
        ids = trajectory.ids[trajectory.reply_start :]
        ids = ids[:-1] if ids and ids[-1] in self.ends else ids
        return self._opened(trajectory) + self.decode(ids)

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
        form = trajectory.question.form
        wrapped = [f"{form.before}{result}{form.after}" for result in results]
        if form.place == "inside":
            self._continue_reply(trajectory, "".join(wrapped))
        else:
            self._begin_reply(trajectory, calls, wrapped)
        self._end(trajectory, self._limit_reached(trajectory))

    def fail(self, trajectory: Trajectory) -> None:
        """End a trajectory because a tool or the server failed."""
        self._end(trajectory, "environment")

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

    def _limit_reached(self, trajectory: Trajectory) -> End | None:
        """Return the limit that leaves the model no token to write."""
        if len(trajectory.ids) >= self.limits.context:
            return "context"
        return "max_new_tokens" if trajectory.reply_tokens >= self.limits.tokens else None

    def _closed_call(self, trajectory: Trajectory) -> tuple[Call, str] | None:
        """Return the call that the last token closed, and what this token has after it; None if it closed none."""
        text, last = self.reply_text(trajectory), self.decode(trajectory.ids[trajectory.reply_start : -1])
        before_last_token = len(self._opened(trajectory)) + len(last)
        for tag in self.tags:
            head, _, surplus = text.rpartition(f"</{tag}>")
            _, start, inside = head.rpartition(f"<{tag}>")
            if start and len(text) - len(surplus) > before_last_token:
                return Call(tag, inside.strip()), surplus
        return None

    def _end(self, trajectory: Trajectory, end: End | None) -> None:
        """End a trajectory, unless `end` is None, and the reply that it is in."""
        trajectory.end = end
        if end and len(trajectory.ids) > trajectory.reply_start:
            trajectory.messages.append(self._message(trajectory))

    def _message(self, trajectory: Trajectory) -> Message:
        """Return the current reply as a message; calls in the template's form become `tool_calls`, which it renders."""
        text = self.reply_text(trajectory).removeprefix(self.reply_prefix)
        calls = find_calls(text, self.tags) if trajectory.question.form.calls else []
        if not calls:
            return {"role": "assistant", "content": text}
        marks = [*(f"<{tag}>" for tag in (*self.tags, "tool_call")), "Action:", "{", "["]
        starts = [at for at in map(text.find, marks) if at >= 0]
        tool_calls: list[Fields] = []
        for call in calls:
            value = json_or_text(call.arguments)
            arguments = value if isinstance(value, dict) else {"input": value}
            tool_calls.append({"type": "function", "function": {"name": call.tool, "arguments": arguments}})
        content = text[: min(starts, default=None)].rstrip()
        return {"role": "assistant", "content": content, "tool_calls": tool_calls}

    def _continue_reply(self, trajectory: Trajectory, results: str) -> None:
        """Append results inside the reply.

        The token that closed the call may hold more than the tag: `>\\n` and `><` are single tokens in Qwen's tokenizer.
        The surplus counts as written if the result begins with it; otherwise that token is replaced by one that ends
        with the tag.
        """
        closed = self._closed_call(trajectory)
        surplus = closed[1] if closed else ""
        if not results.startswith(surplus):
            last = self.decode(trajectory.ids[-1:])
            trajectory.ids[-1:] = self._encode([last.removesuffix(surplus)], before="<")
            surplus = ""
        trajectory.ids += self._encode([results[len(surplus) :]], before=self.decode(trajectory.ids[-1:]))

    def _begin_reply(self, trajectory: Trajectory, calls: Sequence[Call], results: Sequence[str]) -> None:
        """End the reply, append the results as messages, and open the next reply."""
        form = trajectory.question.form
        new = [self._message(trajectory)]
        if form.calls:
            new += [
                {"role": "tool", "content": text, "name": call.tool} for call, text in zip(calls, results, strict=True)
            ]
        else:
            new.append({"role": form.place, "content": "\n".join(results)})
        messages = [*trajectory.question.messages, *trajectory.messages, *new]
        pieces = to_context(messages, trajectory.question.tools, self.template)
        if len(pieces) > 1 and not self._strips_reasoning(messages):
            end = pieces[-2].removeprefix(self.template.without_end(pieces[-2]))
            tail = next((end.removeprefix(token) for token in self.template.turn_ends if end.startswith(token)), "")
            trajectory.ids += self._encode(list(filter(None, (tail, pieces[-1]))), before=end.removesuffix(tail))
        else:
            trajectory.ids = self._encode(pieces)
            trajectory.rerendered += 1
        trajectory.messages += new
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
