"""Ten pairs that prefer letters to digits, for small runs of stage: dpo."""

from __future__ import annotations

import json
from pathlib import Path


def write_pairs(folder: Path, count: int = 10) -> Path:
    """Write `pairs`, the same under the names of LLaMA-Factory's and Tool-Star's examples, and the chosen sides: `rows`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "instruction": f"say {n}",
            "input": "",
            "chosen": "abc " * (1 + n % 4),
            "rejected": f"{n} 9 8 7 " * (1 + n % 3),
        }
        for n in range(count)
    ]
    (folder / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    entry = {"file_name": "pairs.json", "ranking": True}
    rows_entry = {"file_name": "pairs.json", "columns": {"prompt": "instruction", "response": "chosen"}}
    registry = dict.fromkeys(("pairs", "dpo_en_demo", "dpo_alpaca"), entry) | {"rows": rows_entry}
    (folder / "dataset_info.json").write_text(json.dumps(registry), encoding="utf-8")
    return folder
