"""Compare our tokens and labels with LLaMA-Factory's own, row by row.

python scripts/compare_golden.py GOLDEN_DIR DATA_DIR TOKENIZER_DIR [yours]

GOLDEN_DIR holds one JSON list a data set, `[input_ids, trained]` a row. The template is the shipped `qwen`, or with
`yours` the tokenizer's own. Exit code 1 if a row differs.
"""

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from arpo_trl.encoder import Encoder, encode_rows
from arpo_trl.encoding import IGNORED
from arpo_trl.recipe import Recipe
from arpo_trl.registry import read_registry
from arpo_trl.rows import read_rows
from arpo_trl.template import find_template, load_tokenizer

SETS = {"alpaca": "alpaca_en_demo", "identity": "identity", "glaive": "glaive_toolcall_en_demo"}


def compare(golden_dir: Path, data_dir: Path, recipe: Recipe) -> tuple[int, int]:
    """Rows equal, rows in all; each row that differs is printed with its first differing token."""
    template = find_template(load_tokenizer(recipe))
    registry, equal, total = read_registry(data_dir), 0, 0
    for golden_name, name in SETS.items():
        golden = json.loads((golden_dir / f"{golden_name}.json").read_text(encoding="utf-8"))
        info = registry[name]
        assert info.path is not None
        rows = list(islice(read_rows(info.path), len(golden)))
        ours: dict[str, Any] = {}
        for batch in encode_rows(rows, Encoder(info, recipe, template)):
            ours |= {row["source"]: row for row in batch.encoded.to_pylist()}
            for finding in batch.findings:
                print(f"{finding['place']}: {finding['outcome']} ({finding['reason']})")
        for row, (input_ids, trained) in zip(rows, golden):
            total += 1
            found = ours.get(row.place, {"input_ids": [], "labels": []})
            if found["input_ids"] == input_ids and [int(label != IGNORED) for label in found["labels"]] == trained:
                equal += 1
            else:
                at = next((at for at, (a, b) in enumerate(zip(found["input_ids"], input_ids)) if a != b), "none")
                print(
                    f"{row.place}: {len(found['input_ids'])} tokens, {len(input_ids)} expected; first to differ: {at}"
                )
    return equal, total


def main(golden_dir: str, data_dir: str, tokenizer_dir: str, whose: str = "qwen") -> int:
    recipe = Recipe(
        model_name_or_path=tokenizer_dir,
        template=None if whose == "yours" else "qwen",
        cutoff_len=4096,
        truncation_mode="llamafactory",
        output_dir="",
    )
    equal, total = compare(Path(golden_dir), Path(data_dir), recipe)
    print(f"{equal:,} of {total:,} rows equal")
    return int(equal != total)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) if len(sys.argv) in (4, 5) else __doc__)
