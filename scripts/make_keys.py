"""Write recipes/KEYS.md, recipes/schema.json and arpo_trl/recipe/keys_of_trl.py from the code and the installed TRL.

python scripts/make_keys.py
"""

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import textwrap
import types
import typing
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from transformers.debug_utils import DebugOption
from transformers.utils import ExplicitEnum

from arpo_trl.recipe.keys import GROUPS, in_words, keys
from arpo_trl.recipe.llamafactory import IGNORED, NOT_SUPPORTED, RENAMED
from arpo_trl.recipe.starter import schema_json

HERE = Path(__file__).resolve().parent.parent
KEYS_OF_TRL = HERE / "arpo_trl" / "recipe" / "keys_of_trl.py"
_UNIONS = (types.UnionType, typing.Union)
TITLES = {"trl": "TRL's and transformers' own (every other field of SFTConfig)"}


def keys_md() -> str:
    """The table of all keys, by group, and after it the other names, the keys without effect and the refused ones."""
    known = keys()
    counts = f"{len(known)} keys with effect, {len(RENAMED)} other names, {len(IGNORED)} accepted without effect"
    lines = [
        "# Every key of a recipe",
        "",
        "Written by `python scripts/make_keys.py`; change the code, not this file.",
        f"{counts}, {len(NOT_SUPPORTED)} refused. `python -m arpo_trl --help KEY` explains one.",
        "",
        "- **same**: the field of that name in TRL's `SFTConfig`. **ours**: read by arpo_trl. Otherwise: what it becomes.",
        "- An omitted key means its default: LLaMA-Factory's where LLaMA-Factory has the key. So does null where that is none.",
    ]
    for group in dict.fromkeys(key.group for key in known.values()):
        lines += [
            "",
            f"## {TITLES.get(group, group)}",
            "",
            "| key | type | default | mapping | |",
            "|---|---|---|---|---|",
        ]
        for name, key in known.items():
            if key.group == group:
                kind = in_words(key.schema)
                cells = [f"`{name}`", kind, _default(key.default), key.mapping, key.help]
                lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    lines += ["", "## Other names", "", "| written | means |", "|---|---|"]
    lines += [f"| `{old}` | `{new}` |" for old, new in RENAMED.items()]
    lines += ["", "## Accepted without effect", "", "Said once when the run starts.", "", *_by_reason(IGNORED)]
    refused = "An error, unless the value is null, false or LLaMA-Factory's default, which ask for nothing."
    lines += ["", "## Refused", "", refused, "", *_by_reason(NOT_SUPPORTED)]
    return "\n".join(lines) + "\n"


def keys_of_trl_py() -> str:
    """The fields of the installed TRL's SFTConfig that have no key of ours, as a model that needs no import of TRL."""
    from trl.trainer.sft_config import SFTConfig

    ours = {name for group in GROUPS for name in group.model_fields}
    ours_too = [found.name for found in dataclasses.fields(SFTConfig) if found.name in ours]
    lines = [
        f'"""The fields of SFTConfig of TRL {version("trl")} and transformers {version("transformers")}: type, default, help.',
        "",
        "The recipe's other keys are in keys.py. Written by scripts/make_keys.py; importing TRL for them would take seconds.",
        '"""',
        "",
        "from typing import Literal",
        "",
        "from pydantic import BaseModel, Field",
        "",
        "from .types import Number, Seed, Settings, Whole, Words, Workers",
        "",
        'OURS_TOO = """',
        textwrap.fill(" ".join(ours_too), 119, initial_indent="    ", subsequent_indent="    "),
        '""".split()',
        "",
        "",
        "class SftKeys(BaseModel):",
    ]
    for found in dataclasses.fields(SFTConfig):
        if found.name not in ours | RENAMED.keys() | IGNORED.keys() | NOT_SUPPORTED.keys():
            default = [] if found.default is dataclasses.MISSING else getattr(found.default, "value", found.default)
            help = " ".join((found.metadata.get("help") or "").replace("%%", "%").split())
            lines.append(f"    {found.name}: {_type_of(found)} = Field(default={default!r}, description={help!r})")
    return "\n".join(lines) + "\n"


def without_words(table: str) -> list[str]:
    """The table's lines, but not the help and the versions, which change with every release of transformers."""
    return [re.sub(", description=.*", "", line) for line in table.splitlines()[1:]]


def _type_of(found: dataclasses.Field[Any]) -> str:
    """The type of a field in this package's types, as Python writes it."""
    parts = typing.get_args(found.type) if typing.get_origin(found.type) in _UNIONS else (found.type,)
    or_none = " | None" * (type(None) in parts)
    if found.name.endswith("seed"):
        return "Seed" + or_none
    own = {"dataloader_num_workers": "Workers", "fsdp": "Words"}
    if found.name in own or found.name.endswith("_kwargs"):
        return own.get(found.name, "Settings")
    enums = [part for part in parts if isinstance(part, type) and issubclass(part, ExplicitEnum)]
    choices = found.metadata.get("choices") or [choice.value for enum in enums for choice in enum]
    if choices:
        return f"Literal{list(choices)!r}{or_none}"
    ours = {int: "Whole", float: "Number", dict: "dict[str, object]", type(None): "None"}
    ours |= {list[DebugOption]: "list[str]", Literal[False]: "Literal[False]"}
    words = [
        ours.get(part) or (part.__name__ if isinstance(part, type) and not typing.get_args(part) else str(part))
        for part in parts
    ]
    return " | ".join(words).replace("typing.Any", "object")


def _by_reason(table: dict[str, str]) -> list[str]:
    return [
        f"- {', '.join(f'`{key}`' for key in table if table[key] == reason)}: {reason}"
        for reason in dict.fromkeys(table.values())
    ]


def _default(default: object) -> str:
    if default is ...:
        return "required"
    return "" if default in (None, []) else f"`{json.dumps(default)}`"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if they are out of date")
    check = parser.parse_args(argv).check
    table, old_table = keys_of_trl_py(), KEYS_OF_TRL.read_text(encoding="utf-8")
    stale = [str(KEYS_OF_TRL)] if without_words(table) != without_words(old_table) else []
    if table != old_table and not check:
        KEYS_OF_TRL.write_text(table, encoding="utf-8", newline="\n")
        return subprocess.run([sys.executable, __file__]).returncode  # this process has imported the old table
    for file, text in {"KEYS.md": keys_md(), "schema.json": schema_json()}.items():
        path = HERE / "recipes" / file
        if not check:
            path.write_text(text, encoding="utf-8", newline="\n")
        elif path.read_text(encoding="utf-8") != text:
            stale.append(str(path))
    if stale:
        print(f"out of date: {', '.join(stale)}; run python scripts/make_keys.py")
    elif not check:
        print(f"{len(keys())} keys, nothing unknown")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
