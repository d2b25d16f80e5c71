"""The text of `--help` and `--help KEY`."""

import textwrap
from collections.abc import Sequence

from ..errors import RecipeError, program
from ..terminal import terminal_width
from .keys import in_words, keys
from .llamafactory import IGNORED, NOT_SUPPORTED, RENAMED, SHIPPED, TOKENIZERS_OWN
from .read import nearest

_MAIN_KEYS = """model_name_or_path finetuning_type dataset dataset_dir template cutoff_len max_samples output_dir
    overwrite_output_dir resume_from_checkpoint per_device_train_batch_size gradient_accumulation_steps learning_rate
    num_train_epochs lr_scheduler_type warmup_ratio bf16 save_steps logging_steps report_to"""


def usage() -> str:
    """Return one screen: the commands, the main keys, the exit codes."""
    commands = {
        "train RECIPE.yaml [key=value ...]": "train (the word train may be left out)",
        "--check RECIPE.yaml [key=value ...]": "report rows, steps, memory and disk without training (-v: more)",
        "--preview RECIPE.yaml [N]": "show N rows as tokens, with the loss mask",
        "--help [KEY ... | GROUP | all]": "explain keys, or list the keys of a group or of all groups",
        "--init FOLDER": "write a first recipe, its data and the Accelerate configs",
        "--version, --env": "print the version, or the environment for a bug report",
        "chat MODEL": "chat with a trained model",
        "merge ADAPTER OUTPUT": "merge an adapter into its base model",
        "check-serving MODEL --url URL": "compare a running server with what was trained",
        "rollout RECIPE.yaml [key=value ...]": "sample trajectories with real tools, score and select them",
        "select FOLDER": "select rows and pairs of a rollout again, with other limits",
    }
    lines = [
        *(_row(f"{program()} {command:<36} ", action) for command, action in commands.items()),
        f"Groups of keys: {', '.join(_groups())}",
        "On GPUs: accelerate launch --config_file accelerate_configs/multi_gpu.yaml -m arpo_trl RECIPE.yaml",
        "",
        "Main keys (LLaMA-Factory's; fields of TRL's SFTConfig are keys too):",
        *map(_summary, _MAIN_KEYS.split()),
        "",
        "Exit codes: 0 done, 1 run failed, 2 configuration error, 130 Ctrl-C, 143 SIGTERM, 149 Ctrl-Break",
    ]
    return "\n".join(lines)


def _summary(name: str) -> str:
    known = keys()[name]
    default = _plain(known.default)
    help = textwrap.shorten(known.help.split(". ")[0].rstrip("."), max(20, 77 - len(default)), placeholder=" ...")
    return _row(f"  {name:<30} {default:<9} ", help)


def _row(head: str, text: str) -> str:
    """Return a row of a table, its text wrapped in its column if the terminal is narrow."""
    width = terminal_width() or 120
    wrapper = textwrap.TextWrapper(width, break_on_hyphens=False, break_long_words=False)
    wrapper.initial_indent, wrapper.subsequent_indent = head, " " * min(len(head), width - 24)
    return wrapper.fill(text) or head.rstrip()


def explain(words: Sequence[str]) -> str:
    """Explain each word: a key, a group of keys, or all of them.

    Raises:
        RecipeError: a word is neither.
    """
    parts = []
    for word in words:
        groups = [group for group in _groups() if word in (group, "all")]
        for group in groups:
            names = (name for name, key in keys().items() if key.group == group)
            parts.append("\n".join([f"{group}:", *map(_summary, names)]))
        if not groups or word in keys():  # `dataset` is a group and a key
            parts.append(explain_key(word))
    return "\n\n".join(parts)


def _groups() -> list[str]:
    return list(dict.fromkeys(key.group for key in keys().values()))


def explain_key(key: str) -> str:
    """Return the type, default, mapping and help of one key. Raises RecipeError naming the nearest key if unknown."""
    if key in RENAMED:
        return f"{key}: alias of {RENAMED[key]}\n\n{explain_key(RENAMED[key])}"
    if key in IGNORED:
        return f"{key}: ignored; {IGNORED[key]}"
    if key in NOT_SUPPORTED:
        return f"{key}: not supported; {NOT_SUPPORTED[key]}"
    if key not in keys():
        raise RecipeError(f"{key}: {nearest(key)}")
    group, schema, default, mapping, help = keys()[key]
    mapping = {"same": "the field of that name in TRL's SFTConfig", "ours": "arpo_trl's own"}.get(mapping, mapping)
    lines = [
        f"{key}  ({group})",
        f"  type     {in_words(schema)}",
        f"  default  {_plain(default)}",
        f"  mapping  {mapping}",
        f"  {help}",
    ]
    if key == "template":
        for kind, names in (("shipped", SHIPPED), ("the tokenizer's own template is used", TOKENIZERS_OWN)):
            width = min(111, (terminal_width() or 120) - 4)
            listed = textwrap.wrap(", ".join(sorted(names)), width, break_on_hyphens=False)
            lines += [f"  {kind}:", *(f"    {line}" for line in listed)]
    return "\n".join(lines)


def _plain(default: object) -> str:
    if default is ...:
        return "required"
    if default is None or default == []:
        return "none"
    if isinstance(default, list | dict):
        return ", ".join(default)
    return str(default).lower() if isinstance(default, bool) else str(default)
