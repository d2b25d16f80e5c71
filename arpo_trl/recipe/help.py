"""What `--help`, `--help KEY` and `--list` print."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from itertools import dropwhile, takewhile
from pathlib import Path

from ..errors import RecipeError, program
from .keys import in_words, keys
from .llamafactory import NO_EFFECT, REFUSED, RENAMED
from .read import nearest
from .template_names import SHIPPED, THE_TOKENIZERS_OWN
from .yaml_file import find_recipes

_MAIN_KEYS = """model_name_or_path finetuning_type dataset dataset_dir template cutoff_len max_samples output_dir
    overwrite_output_dir resume_from_checkpoint per_device_train_batch_size gradient_accumulation_steps learning_rate
    num_train_epochs lr_scheduler_type warmup_ratio bf16 save_steps logging_steps report_to"""


def usage() -> str:
    """One screen: how to call it, the main keys, the exit codes."""
    calls = [
        ("RECIPE.yaml [key=value ...]", "train"),
        ("--check RECIPE.yaml [key=value ...]", "rows, steps, memory and disk; trains nothing (-v: all)"),
        ("--preview RECIPE.yaml [N]", "show N rows as tokens, with what is trained"),
        ("--help [KEY ... | GROUP | all]", "explain keys, or list those of a group or of all"),
        ("--list", "list recipes and datasets found"),
        ("--init FOLDER", "write a recipe, its data and accelerate's configs to start from"),
        ("--version, --env", "the version; what a bug report needs"),
        ("chat MODEL", "talk with a trained model"),
        ("merge ADAPTER OUTPUT", "write an adapter and its base as one model"),
    ]
    lines = [
        *(f"{program()} {call:<36} {said}" for call, said in calls),
        f"Groups of keys: {', '.join(_groups())}",
        "On GPUs: accelerate launch --config_file accelerate_configs/multi_gpu.yaml -m arpo_trl RECIPE.yaml",
        "",
        "The main keys (LLaMA-Factory's; every field of TRL's SFTConfig is a key too):",
        *map(_in_a_line, _MAIN_KEYS.split()),
        "",
        "Exit codes: 0 done, 1 the run failed, 2 you can mend it before training, 130 Ctrl-C, 143 SIGTERM",
    ]
    return "\n".join(lines)


def _in_a_line(name: str) -> str:
    known = keys()[name]
    default = "required" if known.default is ... else _plain(known.default)
    said = textwrap.shorten(known.help.split(". ")[0].rstrip("."), max(20, 77 - len(default)), placeholder=" ...")
    return f"  {name:<30} {default:<9} {said}".rstrip()


def explain(words: Sequence[str]) -> str:
    """What `--help` says of each word: a key, a group of keys, or all of them.

    Raises:
        RecipeError: a word is neither.
    """
    shown = []
    for word in words:
        groups = [group for group in _groups() if word in (group, "all")]
        for group in groups:
            names = (name for name, key in keys().items() if key.group == group)
            shown.append("\n".join([f"{group}:", *map(_in_a_line, names)]))
        if not groups:
            shown.append(explain_key(word))
    return "\n\n".join(shown)


def _groups() -> list[str]:
    return list(dict.fromkeys(key.group for key in keys().values()))


def explain_key(key: str) -> str:
    """Type, default, mapping and help of one key. Raises RecipeError naming the nearest if there is no such key."""
    if key in RENAMED:
        return f"{key}: another name for {RENAMED[key]}\n\n{explain_key(RENAMED[key])}"
    if key in NO_EFFECT:
        return f"{key}: accepted, no effect; {NO_EFFECT[key]}"
    if key in REFUSED:
        return f"{key}: refused; {REFUSED[key]}"
    if key not in keys():
        raise RecipeError(f"{key}: {nearest(key)}")
    group, schema, default, mapping, help = keys()[key]
    mapping = {"same": "the field of that name in TRL's SFTConfig", "ours": "arpo_trl's own"}.get(mapping, mapping)
    lines = [
        f"{key}  ({group})",
        f"  type     {in_words(schema, bounds=True)}",
        f"  default  {'required' if default is ... else _plain(default)}",
        f"  mapping  {mapping}",
        f"  {help}",
    ]
    if key == "template":
        kinds = {"shipped, as LLaMA-Factory writes them": SHIPPED, "the tokenizer's own template": THE_TOKENIZERS_OWN}
        for said, names in kinds.items():
            listed = textwrap.wrap(", ".join(sorted(names)), 111, break_on_hyphens=False)
            lines += [f"  {said}:", *(f"    {line}" for line in listed)]
    return "\n".join(lines)


def list_text(folder: Path = Path()) -> str:
    """The recipes under `folder` and `folder/recipes`, and the datasets that dataset_info.json files there name."""
    lines = []
    for recipe in dict.fromkeys([*find_recipes(folder / "recipes"), *find_recipes(folder)]):
        lines.append(f"{recipe}  {_title(recipe)}".rstrip())
    for info in (folder / location / "dataset_info.json" for location in ("recipes", "data", ".")):
        try:
            lines.append(f"{info}  {', '.join(json.loads(info.read_text(encoding='utf-8')))}")
        except (OSError, ValueError):
            continue  # --check says what is wrong with it
    return "\n".join(lines) or f"no recipe and no dataset_info.json in {folder.resolve()}"


def _title(recipe: Path) -> str:
    """The first sentence of a recipe's header, which may go on over several lines."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    header = [line.lstrip("#").strip() for line in takewhile(lambda line: line.startswith("#"), lines)]
    words = takewhile(bool, dropwhile(lambda line: not line or "$schema" in line, header))
    sentence, dot, _ = " ".join(words).partition(". ")
    return sentence + dot.strip()


def _plain(default: object) -> str:
    if default is None or default == []:
        return "none"
    if isinstance(default, list):
        return ", ".join(default)
    return str(default).lower() if isinstance(default, bool) else str(default)
