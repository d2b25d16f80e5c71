"""The keys of `arpo-trl rollout` and `arpo-trl select`."""

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator

from .types import Count, Number, Whole, from_json, key
from .yaml_file import shorten


def _tools(value: object) -> object:
    """Read `python` as a mapping, too, and the JSON text of one."""
    value = from_json(value)
    if isinstance(value, str):
        value = {value: value}
    if not isinstance(value, dict) or not all(isinstance(part, str) for pair in value.items() for part in pair):
        raise ValueError(
            f"expected python, or a mapping with lines NAME: python or NAME: COMMAND, found {shorten(value)}"
        )
    if unknown := [name for name, tool in value.items() if name == tool != "python"]:
        raise ValueError(f"{unknown[0]} has no command (expected {unknown[0]}: COMMAND)")
    return value


Tools = Annotated[dict[str, str], BeforeValidator(_tools, json_schema_input_type=dict[str, str] | str)]


# One key per line.
# fmt: off
class RolloutKeys(BaseModel):
    rollout_on: Literal["eval", "train"] = key("eval", "Rows that give the questions. eval measures; train is for selecting rows and pairs")
    num_generations: Count = key(8, "Trajectories per question; 1 is greedy unless do_sample is set")
    max_tool_calls: Whole = key(10, "Tool calls per trajectory; one more call ends it", ge=0)
    tools: Tools = key({"python": "python"}, "Tools by name: python, or a command that reads the query on stdin and prints the result")
    tool_timeout: Number = key(20.0, "Time limit of a tool call, in seconds", gt=0)
    tool_memory: Count = key(1024, "Memory limit of a python call, in MB")
    max_tool_output: Count = key(10_000, "Longest result of a tool call, in characters; the rest is cut")
    server_url: str | None = key(None, "Generate on this OpenAI-compatible server (http://host:port/v1); if omitted, with transformers")
    server_requests: Count = key(64, "Requests in flight on server_url")
    judge: str | None = key(None, "Command that scores a trajectory: JSON with question, answer and trajectory on stdin, a number on stdout; 0.5 or more is right. If omitted, the final answer is compared with the reference")
    max_per_question: Count = key(1, "Selected trajectories per question")
    max_pairs_per_question: Count = key(1, "Preference pairs per question")
# fmt: on
