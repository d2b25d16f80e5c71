"""Write recipes/KEYS.md and recipes/schema.json from the code.

python scripts/make_keys.py
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from arpo_trl.recipe.keys import in_words, keys
from arpo_trl.recipe.llamafactory import NO_EFFECT, REFUSED, RENAMED
from arpo_trl.recipe.sft_fields import sft_fields

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
TITLES = {"trl": "TRL's and transformers' own (every other field of SFTConfig)"}


def keys_md() -> str:
    """The table of all keys, by group, and after it the other names, the keys without effect and the refused ones."""
    known = keys()
    counts = f"{len(known)} keys with effect, {len(RENAMED)} other names, {len(NO_EFFECT)} accepted without effect"
    lines = [
        "# Every key of a recipe",
        "",
        "Written by `python scripts/make_keys.py`; change the code, not this file.",
        f"{counts}, {len(REFUSED)} refused. `python -m arpo_trl --help KEY` explains one.",
        "",
        "- **same**: the field of that name in TRL's `SFTConfig`. **ours**: read by arpo_trl. Otherwise: what it becomes.",
        "- An omitted key means its default: LLaMA-Factory's where LLaMA-Factory has the key. So does null where that is none.",
    ]
    for group in dict.fromkeys(key.group for key in known.values()):
        lines += [
            "",
            f"## {TITLES.get(group, group)}",
            "",
            "| key | type | default | fate | |",
            "|---|---|---|---|---|",
        ]
        for name, key in known.items():
            if key.group == group:
                kind = in_words(key.schema, bounds=True)
                cells = [f"`{name}`", kind, _default(key.default), key.fate, key.help]
                lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    lines += ["", "## Other names", "", "| written | means |", "|---|---|"]
    lines += [f"| `{old}` | `{new}` |" for old, new in RENAMED.items()]
    lines += ["", "## Accepted without effect", "", "Said once when the run starts.", "", *_by_reason(NO_EFFECT)]
    refused = "An error, unless the value is null, false or LLaMA-Factory's default, which ask for nothing."
    lines += ["", "## Refused", "", refused, "", *_by_reason(REFUSED)]
    return "\n".join(lines) + "\n"


def schema_json() -> str:
    """A JSON Schema for editors: what `read_recipe` takes without a problem, unquoted."""
    properties: dict[str, Any] = {}
    for name, key in keys().items():
        schema = {k: v for k, v in key.schema.items() if k not in ("to", "unit", "title", "default", "description")}
        if key.default is None and schema.get("type") != "null" and {"type": "null"} not in schema.get("anyOf", []):
            schema = {"anyOf": [schema, {"type": "null"}]}
        if key.default not in (..., None):
            schema["default"] = key.default
        properties[name] = {**schema, "description": key.help}
    for old, new in RENAMED.items():
        properties[old] = {**properties[new], "description": f"Another name for {new}.", "deprecated": True}
    for name, reason in NO_EFFECT.items():
        properties[name] = {"description": f"No effect; {reason}.", "deprecated": True}
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "arpo_trl recipe",
        "description": "Written by scripts/make_keys.py.",
        "type": "object",
        "properties": properties,
        "required": [name for name, key in keys().items() if key.default is ...],
        "additionalProperties": False,
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


def _by_reason(table: dict[str, str]) -> list[str]:
    return [
        f"- {', '.join(f'`{key}`' for key in table if table[key] == reason)}: {reason}"
        for reason in dict.fromkeys(table.values())
    ]


def _default(default: Any) -> str:
    if default is ...:
        return "required"
    return "" if default in (None, []) else f"`{json.dumps(default)}`"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if they are out of date")
    check = parser.parse_args(argv).check
    stale = []
    for file, text in {"KEYS.md": keys_md(), "schema.json": schema_json()}.items():
        path = RECIPES / file
        if not check:
            path.write_text(text, encoding="utf-8", newline="\n")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(str(path))
    if stale:
        print(f"out of date: {', '.join(stale)}; run python scripts/make_keys.py")
    elif not check:
        fields = len(sft_fields())
        print(f"{len(keys())} keys, {fields} fields of SFTConfig, nothing unknown")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
