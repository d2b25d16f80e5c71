"""Rows with one program each, and a tiny model that learns them by heart: it really calls python in a rollout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import small_run

SYSTEM = "Use <python> </python>; results come in <result> </result>."
SUMS = [(1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7)]
CALL, ANSWER = "<python>print({0} + {1})</python>", "<answer>\\boxed{{{2}}}</answer>"
FORMS = {
    "turns": [("gpt", CALL), ("human", "<result>\n{2}\n</result>"), ("gpt", ANSWER)],
    "inside": [("gpt", CALL + "\n<result>\n{2}\n</result>\n" + ANSWER)],
    "tools": [
        ("function_call", '{{"name": "python", "arguments": {{"code": "print({0} + {1})"}}}}'),
        ("observation", "{2}"),
        ("gpt", ANSWER),
    ],
}
TOOLS = json.dumps(
    [
        {
            "name": "python",
            "description": "run",
            "parameters": {"type": "object", "properties": {"code": {"type": "string"}}},
        }
    ]
)


def write_rows(folder: Path, form: str) -> None:
    rows = []
    for a, b in SUMS[:2] if form == "tools" else SUMS:
        turns = [("human", f"sum {a} {b}"), *FORMS[form]]
        row: dict[str, Any] = {
            "conversations": [{"from": who, "value": text.format(a, b, a + b)} for who, text in turns]
        }
        rows.append(row | ({"tools": TOOLS} if form == "tools" else {"system": SYSTEM}))
    (folder / "sums.json").write_text(json.dumps(rows), encoding="utf-8")
    columns = {"messages": "conversations", "tools": "tools", "system": "system"}
    columns.pop("system" if form == "tools" else "tools")
    info = {"sums": {"file_name": "sums.json", "formatting": "sharegpt", "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def train(folder: Path, model: Path, form: str) -> Path:
    write_rows(folder, form)
    keys = {"dataset": "sums", "eval_dataset": "sums", "dataset_dir": str(folder), "tokenized_path": None}
    keys |= {
        "max_steps": 300,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 6,
        "save_strategy": "no",
        "plot_loss": False,
    }
    keys |= {
        "lr_scheduler_type": "cosine",
        "preflight": False,
        "mask_spans": "result" if form == "inside" else None,
        "max_new_tokens": 80,
    }
    small_run.run(folder, model, **keys)
    return folder


def without_seconds(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line | {"calls": [call | {"seconds": 0} for call in line["calls"]]} for line in lines]
