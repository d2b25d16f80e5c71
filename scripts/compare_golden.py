"""Compare our tokens and labels with LLaMA-Factory's own, row by row.

python scripts/compare_golden.py GOLDEN_DIR DATA_DIR TOKENIZER_DIR [yours]

GOLDEN_DIR holds one JSON list a data set, `[input_ids, trained]` a row. The template is the shipped `qwen`, or with
`yours` the tokenizer's own. Exit code 1 if a row differs.
"""

import json
import sys
from pathlib import Path

from arpo_trl.dataset import encode_rows
from arpo_trl.encoding import IGNORED, Example
from arpo_trl.recipe import Recipe
from arpo_trl.registry import read_registry
from arpo_trl.rows import read_rows
from arpo_trl.template import find_template, load_tokenizer

SETS = {"alpaca": "alpaca_en_demo", "identity": "identity", "glaive": "glaive_toolcall_en_demo"}


def compare(golden_dir: Path, data_dir: Path, recipe: Recipe) -> tuple[int, int]:
    """Rows equal, rows in all; each row that differs is printed with its first differing token."""
    tokenizer = load_tokenizer(recipe)
    registry, equal, total = read_registry(data_dir), 0, 0
    for golden_name, name in SETS.items():
        golden = json.loads((golden_dir / f"{golden_name}.json").read_text(encoding="utf-8"))
        info = registry[name]
        assert info.path is not None
        batches = encode_rows(read_rows(info.path), info, recipe, tokenizer, find_template(tokenizer))
        ours = (found for batch in batches for found in batch)
        for (row, example), (input_ids, trained) in zip(ours, golden):
            total += 1
            if not isinstance(example, Example):
                print(f"{row.place}: dropped ({example})")
            elif example.input_ids == input_ids and [int(label != IGNORED) for label in example.labels] == trained:
                equal += 1
            else:
                pairs = zip(example.input_ids, input_ids)
                at = next((at for at, (a, b) in enumerate(pairs) if a != b), "none")
                print(
                    f"{row.place}: {len(example.input_ids)} tokens, {len(input_ids)} expected; first to differ: {at}"
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
    sys.exit(main(*sys.argv[1:]))
