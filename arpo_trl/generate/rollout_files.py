"""The files of a rollout: lines appended by each process, the sorted rollouts.jsonl, and rows in LLaMA-Factory's forms."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ..data.messages import Fields, Message
from ..data.registry import TAGS
from ..run_folder import read_json, read_lines, to_lines, write_json, write_text

ROLLOUTS, STATE = "rollouts.jsonl", "rollout.json"


def part_path(folder: Path, process: int) -> Path:
    return folder / f"rollouts-part-{process}.jsonl"


def append_lines(path: Path, lines: Sequence[Fields]) -> None:
    """Append lines in one write and flush them to disk: a killed process leaves complete lines, but for the last."""
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(to_lines(lines))
        file.flush()
        os.fsync(file.fileno())


def begin(folder: Path, settings: Fields) -> tuple[str, bool]:
    """Mark a rollout as running, and return what earlier files mean for it: a line for people, and if it is finished.

    Files of a rollout with other settings are renamed.
    """
    state = read_json(folder / STATE)
    same = isinstance(state, dict) and state.get("settings") == settings
    if same and state["status"] == "finished" and (folder / ROLLOUTS).is_file():
        return f"{folder / ROLLOUTS} is complete. Delete it to roll out again", True
    line = ""
    if not same and (old := [*sorted(folder.glob("rollouts-part-*.jsonl")), *folder.glob(ROLLOUTS)]):
        for path in old:
            path.replace(path.with_name(f"{path.name}.old"))
        line = f"renamed {', '.join(path.name for path in old)} to .old, because the settings differ"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / STATE, {"status": "running", "settings": settings})
    return line, False


def finish(folder: Path, settings: Fields, processes: int) -> None:
    """Merge the parts into rollouts.jsonl, in the order of the questions."""
    lines = [line for process in range(processes) for line in read_lines(part_path(folder, process))]
    unique = {(line["number"], line["sample"]): line for line in lines}
    write_text(folder / ROLLOUTS, to_lines(unique[key] for key in sorted(unique)))
    write_json(folder / STATE, {"status": "finished", "settings": settings})
    for process in range(processes):
        part_path(folder, process).unlink(missing_ok=True)


# --- rows ---


def to_openai(message: Message) -> Fields:
    """Return a message in OpenAI's form, in which the arguments of calls are JSON text."""
    turn: Fields = {key: value for key, value in message.items() if key != "trained"}
    if calls := message.get("tool_calls"):
        turn["tool_calls"] = [
            {"id": f"call_{number}", **call, "function": call["function"] | {"arguments": arguments}}
            for number, call in enumerate(calls)
            for arguments in [json.dumps(call["function"]["arguments"], ensure_ascii=False)]
        ]
    return turn


def _to_sharegpt(message: Message) -> Fields:
    """Return a message as a turn of ShareGPT's, in which calls are a turn from function_call."""
    speakers = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
    if calls := message.get("tool_calls"):
        functions = [call["function"] for call in calls]
        text = json.dumps(functions[0] if len(functions) == 1 else functions, ensure_ascii=False)
        content = message["content"]
        return {"from": "function_call", "value": f"{content}\n{text}" if content.strip() else text}
    return {"from": speakers[message["role"]], "value": message["content"]}


def to_row(messages: Sequence[Message], tools: list[Fields] | None, formatting: str) -> Fields:
    """Return a conversation as a row; the system message of a ShareGPT row is a column."""
    if formatting == "openai":
        row: Fields = {"messages": list(map(to_openai, messages))}
    else:
        system = messages[0]["content"] if messages and messages[0]["role"] == "system" else ""
        row = {"conversations": list(map(_to_sharegpt, messages[1:] if system else messages))}
        row |= {"system": system} if system else {}
    if tools:
        row["tools"] = json.dumps([tool.get("function", tool) for tool in tools], ensure_ascii=False)
    return row


def messages_column(formatting: str) -> str:
    return "messages" if formatting == "openai" else "conversations"


def registry_entry(file_name: str, lines: Sequence[Fields], formatting: str, ranking: bool = False) -> Fields:
    """Return the entry of dataset_info.json for a file of rows."""
    columns = {"messages": messages_column(formatting)}
    columns |= {key: key for key in ("system", "tools") if any(key in line for line in lines)}
    entry: Fields = {"file_name": file_name, "formatting": "sharegpt", "columns": columns}
    if ranking:
        columns |= {"chosen": "chosen", "rejected": "rejected"}
        entry["ranking"] = True
    if formatting == "openai":
        entry |= {"formatting": "openai", "tags": TAGS["openai"]}
    return entry
