"""The tools that a model calls in a rollout or a chat: `python`, and commands of the user."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from ..shell import split_command
from .sandbox import Limits, Outcome, describe_isolation, run_command, run_python
from .tags import CALL_ENDS, RESULT, RESULT_END, Call, json_or_text

PYTHON = "python"


class Tools(Protocol):
    """Runs the calls of a model."""

    def run(self, call: Call) -> Outcome: ...


@dataclass(frozen=True)
class Toolbox:
    """Tools by name. The value is `python`, or a command that reads the query on stdin and prints the result."""

    tools: Mapping[str, str]
    limits: Limits = field(default_factory=Limits)

    def run(self, call: Call) -> Outcome:
        """Run one call. An unknown tool, a timeout and a failed command are results too: the model sees the error.

        Raises:
            OSError: the tool could not be started, so the model is not to blame.
        """
        command = self.tools.get(call.tool)
        if command is None:
            return Outcome("", f"no tool named {call.tool!r}. Tools: {', '.join(self.tools) or 'none'}", 0.0)
        if command == PYTHON:
            return run_python(to_code(call.arguments), self.limits)
        return run_command(split_command(command), call.arguments, self.limits)

    def describe(self) -> list[str]:
        """Return one line per tool: how it runs, and what contains it."""
        command = f"{self.limits.seconds:g} s limit, runs as you, without a sandbox"
        return [
            f"{name}: {describe_isolation(self.limits) if tool == PYTHON else f'{tool} ({command})'}"
            for name, tool in self.tools.items()
        ]

    def missing(self) -> list[str]:
        """Return a problem for each command that can't be started."""
        commands = {name: split_command(tool) for name, tool in self.tools.items() if tool != PYTHON}
        return [
            f"{name}: no such command (found {command[0] if command else 'nothing'}, expected a program)"
            for name, command in commands.items()
            if not command or not shutil.which(command[0])
        ]


def to_code(arguments: str) -> str:
    """Return the program of a call: the text itself, or the value of `code` or of the only argument in JSON."""
    value = json_or_text(arguments)
    if isinstance(value, dict):
        value = value.get("code", next(iter(value.values())) if len(value) == 1 else None)
    return value if isinstance(value, str) else arguments


def find_markers(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern for every text in a tool's output that a tokenizer or the loop would not read as plain text."""
    added = tokenizer.added_tokens_decoder.values()
    special = [token.content for token in added if token.special or re.fullmatch(r"<.+>|\[.+\]", token.content)]
    tags = [RESULT, RESULT_END, *CALL_ENDS, *(end.replace("/", "") for end in CALL_ENDS)]
    texts = sorted({text for text in (*special, *tags) if len(text) > 1 and text.strip()}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)))


def to_plain_text(output: str, markers: re.Pattern[str]) -> str:
    """Return the output with a space after the first character of each marker.

    `<|im_end|>` and `</result>` become `< |im_end|>` and `< /result>`: ordinary tokens here, in a server, and in a
    program that trains on the rollouts later.
    """
    while (changed := markers.sub(lambda match: f"{match[0][0]} {match[0][1:]}", output)) != output:
        output = changed
    return output
