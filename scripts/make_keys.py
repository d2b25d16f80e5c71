"""Write recipes/KEYS.md, recipes/schema.json and arpo_trl/recipe/sft_fields.py from the code and the installed TRL.

python scripts/make_keys.py
"""

import argparse
import dataclasses
import json
import sys
import types
import typing
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from accelerate import ParallelismConfig
from transformers.debug_utils import DebugOption
from transformers.utils import ExplicitEnum

from arpo_trl.recipe.keys import in_words, keys
from arpo_trl.recipe.llamafactory import NO_EFFECT, REFUSED, RENAMED
from arpo_trl.recipe.schema import schema_json
from arpo_trl.recipe.sft_fields import sft_fields

HERE = Path(__file__).resolve().parent.parent
_UNIONS = (types.UnionType, typing.Union)
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
            "| key | type | default | mapping | |",
            "|---|---|---|---|---|",
        ]
        for name, key in known.items():
            if key.group == group:
                kind = in_words(key.schema, bounds=True)
                cells = [f"`{name}`", kind, _default(key.default), key.mapping, key.help]
                lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    lines += ["", "## Other names", "", "| written | means |", "|---|---|"]
    lines += [f"| `{old}` | `{new}` |" for old, new in RENAMED.items()]
    lines += ["", "## Accepted without effect", "", "Said once when the run starts.", "", *_by_reason(NO_EFFECT)]
    refused = "An error, unless the value is null, false or LLaMA-Factory's default, which ask for nothing."
    lines += ["", "## Refused", "", refused, "", *_by_reason(REFUSED)]
    return "\n".join(lines) + "\n"


def sft_fields_py() -> str:
    """The fields of the installed TRL's SFTConfig as a table that needs no import of TRL, which takes seconds."""
    from trl.trainer.sft_config import SFTConfig

    lines = [
        f'"""The fields of SFTConfig of TRL {version("trl")} and transformers {version("transformers")}: type, default, help.',
        "",
        "Written by scripts/make_keys.py; importing TRL for them would take seconds.",
        '"""',
        "",
        "from typing import Any, Literal, NamedTuple",
        "",
        "from .types import Number, Seed, Settings, Whole, Words, Workers",
        "",
        "",
        "class SftField(NamedTuple):",
        "    type: Any",
        "    default: Any",
        "    help: str",
        "",
        "",
        "sft_fields: dict[str, SftField] = {",
    ]
    for found in dataclasses.fields(SFTConfig):
        default = [] if found.default is dataclasses.MISSING else getattr(found.default, "value", found.default)
        help = " ".join((found.metadata.get("help") or "").replace("%%", "%").split())
        lines.append(f"    {found.name!r}: SftField({_type_of(found)}, {default!r}, {help!r}),")
    return "\n".join([*lines, "}"]) + "\n"


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
    ours = {int: "Whole", float: "Number", dict: "dict[str, Any]", type(None): "None", ParallelismConfig: "Any"}
    ours |= {list[DebugOption]: "list[str]", Literal[False]: "Literal[False]"}
    words = [
        ours.get(part) or (part.__name__ if isinstance(part, type) and not typing.get_args(part) else str(part))
        for part in parts
    ]
    return " | ".join(words).replace("typing.", "")


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
    written = {
        "arpo_trl/recipe/sft_fields.py": sft_fields_py,
        "recipes/KEYS.md": keys_md,
        "recipes/schema.json": schema_json,
    }
    for file, write in written.items():
        path, text = HERE / file, write()
        if not check:
            path.write_text(text, encoding="utf-8", newline="\n")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(str(path))
    if stale:
        print(f"out of date: {', '.join(stale)}; run python scripts/make_keys.py")
    elif not check:
        fields = len(sft_fields)
        print(f"{len(keys())} keys, {fields} fields of SFTConfig, nothing unknown")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
