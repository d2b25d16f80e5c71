"""Compare tokens and labels with LLaMA-Factory's, row by row.

    python scripts/compare_golden.py GOLDEN DATA TOKENIZER

GOLDEN contains a NAME.json for each dataset: a list of `[input_ids, trained]` in the order of its rows, where `trained[i]`
is 1 if token i is trained and 0 if its label is -100. NAME is a key of DATA/dataset_info.json
(alpaca and glaive stand for LLaMA-Factory's alpaca_en_demo and glaive_toolcall_en_demo). tests/golden is an example.

To make NAME.json where LLaMA-Factory is installed: train with `stage: sft`, `template: qwen`, `cutoff_len: 4096`,
`dataset: NAME` and `tokenized_path: FOLDER`, which writes FOLDER before the first step; then

    from datasets import load_from_disk
    rows = load_from_disk("FOLDER")["train"]
    json.dump([[row["input_ids"], [int(label != -100) for label in row["labels"]]] for row in rows], open("NAME.json", "w"))

Exit code 0 if all rows are equal, 1 if one differs, 2 if they can't be compared.
"""

import argparse
import json
import sys
from itertools import islice, zip_longest
from pathlib import Path

from arpo_trl.data.encode import Encoder, encode_rows
from arpo_trl.data.files import read_rows
from arpo_trl.data.labels import IGNORED
from arpo_trl.data.registry import read_registry
from arpo_trl.data.tokenizer import load_template
from arpo_trl.errors import DatasetError, RecipeError
from arpo_trl.recipe import Recipe

SHORT_NAMES = {"alpaca": "alpaca_en_demo", "glaive": "glaive_toolcall_en_demo"}


def compare(golden_dir: Path, data_dir: Path, recipe: Recipe) -> tuple[int, int]:
    """Return the number of equal rows and of all rows; print the first difference of each other row.

    Raises:
        RecipeError: there is nothing to compare, or a file can't be read.
    """
    template = load_template(recipe)
    pair_recipe = recipe.model_copy(update={"stage": "dpo"})
    registry, equal, total = read_registry(data_dir), 0, 0
    paths = sorted(path for path in golden_dir.glob("*.json") if path.name != "templates.json")  # texts, not tokens
    if not paths:
        raise DatasetError(f"{golden_dir}: no .json files, expected one for each dataset")
    for path in paths:
        golden = read_golden(path)
        name = SHORT_NAMES.get(path.stem, path.stem)
        info = registry.get(name)
        if info is None or info.path is None:
            raise DatasetError(f"{path}: no dataset {name!r} in {data_dir}/dataset_info.json with a file_name")
        encoder = Encoder(info, recipe, template)
        if info.ranking:  # two entries a row: chosen, rejected
            golden = [(one[0] + two[0], one[1] + two[1]) for one, two in zip(golden[::2], golden[1::2])]
            encoder = Encoder(info, pair_recipe, load_template(pair_recipe))
        rows = list(islice(read_rows(info.path), len(golden)))
        total += len(golden)
        for encoded, (input_ids, trained) in zip(encode_rows(rows, encoder), golden):
            if encoded["outcome"] != "intact":
                print(f"{encoded['source']}: {encoded['outcome']} ({encoded['reason']})")
            tokens = [(token, int(label != IGNORED)) for token, label in zip(encoded["input_ids"], encoded["labels"])]
            expected = list(zip_longest(input_ids, trained))
            if tokens == expected:
                equal += 1
            else:
                at = next(at for at, (a, b) in enumerate(zip_longest(tokens, expected)) if a != b)
                print(
                    f"{encoded['source']}: expected {len(expected)} tokens, found {len(tokens)}; the first difference is at {at}"
                )
        if len(rows) != len(golden):
            print(f"{path}: {len(golden)} entries, {len(rows)} rows in {info.path}")
    return equal, total


def read_golden(path: Path) -> list[tuple[list[int], list[int]]]:
    try:
        return [(input_ids, trained) for input_ids, trained in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, TypeError, ValueError) as error:
        raise DatasetError(f"{path}: expected a list of [input_ids, trained] ({error})") from None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golden", type=Path, help="folder with LLaMA-Factory's tokens, NAME.json")
    parser.add_argument("data", type=Path, help="folder with the rows and their dataset_info.json")
    parser.add_argument("tokenizer", help="folder with the tokenizer that LLaMA-Factory used")
    parser.add_argument(
        "--own-template", action="store_true", help="the tokenizer's own chat template, not the shipped qwen"
    )
    options = parser.parse_args(argv)
    recipe = Recipe(
        model_name_or_path=options.tokenizer,
        template=None if options.own_template else "qwen",
        cutoff_len=4096,
        truncation_mode="llamafactory",
        output_dir="unused",
    )
    try:
        equal, total = compare(options.golden, options.data, recipe)
    except RecipeError as error:
        parser.error(str(error))
    print(f"{equal:,} of {total:,} rows equal")
    return int(equal != total)


if __name__ == "__main__":
    sys.exit(main())
