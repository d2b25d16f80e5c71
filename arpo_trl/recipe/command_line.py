"""Command line -> options, recipe files, and `key=value` overrides.

LLaMA-Factory's flags mean the same as the lines of a recipe: `--key value`, `--key=value`, and `--key` for true.
argparse is no help: it would take the recipe in `--bf16 recipe.yaml` or the override in `--bf16 seed=7` for the flag's
value.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from os.path import isfile

from ..errors import RecipeError
from .keys import keys
from .llamafactory import IGNORED, NOT_SUPPORTED, RENAMED

OPTIONS = ("check", "verbose", "preview", "help", "init", "env", "version")
_OPTIONS = {f"--{option}": option for option in OPTIONS} | {"-h": "help", "-v": "verbose"}


@dataclass
class CommandLine:
    """`options`: those of `OPTIONS` that are set. `words`: recipe files and arguments of options."""

    options: set[str] = field(default_factory=set)
    words: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)


def read_command_line(argv: Sequence[str]) -> CommandLine:
    """Sort the words of a command line.

    Raises:
        RecipeError: an option has a value, or a key that needs one has none.
    """
    line, rest = CommandLine(), list(argv)
    while rest:
        word = rest.pop(0)
        if word in _OPTIONS:
            line.options.add(_OPTIONS[word])
        elif flag := _FLAG.match(word):
            if flag["key"] in OPTIONS:
                raise RecipeError(f"--{flag['key']}: an option, not a key; it takes no value")
            line.overrides.append(_flag_to_override(flag["key"].replace("-", "_"), flag["value"], rest))
        elif "=" in word and not isfile(word):
            line.overrides.append(word)
        else:
            line.words.append(word)
    if line.words[:1] == ["train"] and not isfile("train"):  # as in `llamafactory-cli train RECIPE`
        del line.words[0]
    return line


_FLAG = re.compile(r"--(?P<key>[A-Za-z_][\w-]*)(=(?P<value>.*))?$", re.DOTALL)


def _flag_to_override(key: str, value: str | None, rest: list[str]) -> str:
    """Return `key=value`, taking the value from `rest` if it is a separate word."""
    if value is not None:
        return f"{key}={value}"
    if key.startswith("no_") and not _is_known(key) and _is_bool(key[3:]):
        return f"{key[3:]}=false"
    values: list[str] = []
    while rest and _is_value(key, rest[0]) and (not values or "array" in _schema(key)):
        values.append(rest.pop(0))  # --lora_target q_proj v_proj
    if not values and "'string'" in _schema(key) and "'enum'" not in _schema(key) and not _is_bool(key):
        raise RecipeError(f"--{key}: expected a value")
    return f"{key}={','.join(values) or 'true'}"


def _is_value(key: str, word: str) -> bool:
    """Return whether the word after a flag is its value, not the next flag, an override or the recipe."""
    name, equals, _ = word.partition("=")
    if word in _OPTIONS or _FLAG.match(word) or (equals and _is_known(name)):
        return False
    is_recipe = word.endswith((".yaml", ".yml")) and isfile(word)
    return not (is_recipe and (_is_bool(key) or "array" in _schema(key)))


def _schema(key: str) -> str:
    key = RENAMED.get(key, key)
    return str(keys()[key].schema) if key in keys() else ""


def _is_bool(key: str) -> bool:
    return "boolean" in _schema(key) or not _schema(key)


def _is_known(key: str) -> bool:
    return any(key in table for table in (keys(), RENAMED, IGNORED, NOT_SUPPORTED))
