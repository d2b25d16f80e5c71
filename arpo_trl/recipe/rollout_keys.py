"""The keys of `arpo-trl rollout` and `arpo-trl select`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from .types import Count, Number, Whole, from_json
from .yaml_file import shorten


def _key(default: Any, help: str, unit: str = "", **limits: Any) -> Any:
    return Field(default, description=help, json_schema_extra={"to": "", "unit": unit}, **limits)


def _tools(value: object) -> object:
    """Read `python` as a mapping, too, and the JSON text of one."""
    value = from_json(value)
    if isinstance(value, str):
        value = {value: value}
    if not isinstance(value, dict) or not all(isinstance(part, str) for pair in value.items() for part in pair):
        raise ValueError(f"expected python, or a mapping of names to python or a command, found {shorten(value)}")
    if unknown := [name for name, tool in value.items() if name == tool != "python"]:
        raise ValueError(f"{unknown[0]} has no command (expected {unknown[0]}: COMMAND)")
    return value


Tools = Annotated[dict[str, str], BeforeValidator(_tools, json_schema_input_type=dict[str, str] | str)]


class RolloutKeys(BaseModel):
    rollout_on: Literal["eval", "train"] = _key(
        "eval", "Rows that give the questions. eval measures; train is for selecting rows and pairs."
    )
    num_generations: Count = _key(8, "Trajectories per question; 1 is greedy unless do_sample is set.")
    max_tool_calls: Whole = _key(10, "Tool calls per trajectory; one more call ends it.", ge=0)
    tools: Tools = _key(
        {"python": "python"},
        "Tools by name: python, or a command that reads the query on stdin and prints the result.",
    )
    tool_timeout: Number = _key(20.0, "Time limit of a tool call.", "seconds", gt=0)
    tool_memory: Count = _key(1024, "Memory limit of a python call.", "MB")
    max_tool_output: Count = _key(10_000, "Longest result of a tool call; the rest is cut.", "characters")
    server_url: str | None = _key(
        None, "Generate on this OpenAI-compatible server (http://host:port/v1); if omitted, with transformers."
    )
    server_requests: Count = _key(64, "Requests in flight on server_url.", "requests")
    judge: str | None = _key(
        None,
        "Command that scores a trajectory: JSON with question, answer and trajectory on stdin, a number on stdout; "
        "0.5 or more is right. If omitted, the final answer is compared with the reference.",
    )
    max_per_question: Count = _key(1, "Selected trajectories per question.")
    max_pairs_per_question: Count = _key(1, "Preference pairs per question.")
