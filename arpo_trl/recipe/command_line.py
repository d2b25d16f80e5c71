"""The words after `arpo-trl` -> this program's own options, the recipe files, and `key=value` overrides.

LLaMA-Factory's flags mean what the same lines of a recipe mean: `--key value`, `--key=value`, and `--key` for true.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import RecipeError
from .keys import keys
from .llamafactory import NO_EFFECT, REFUSED, RENAMED
from .yaml_file import is_file

OPTIONS = ("check", "verbose", "preview", "help", "list", "init", "env", "version")


@dataclass
class CommandLine:
    """`options`: those of `OPTIONS` that are there. `words`: recipe files, and what belongs to an option."""

    options: set[str]
    words: list[str] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)


def read_command_line(argv: Sequence[str]) -> CommandLine:
    """Sort the words of a command line.

    Raises:
        RecipeError: an option of this program is given a value.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    for option in OPTIONS:
        parser.add_argument(f"--{option}", action="store_true")
    parser.add_argument("-h", dest="help", action="store_true")
    parser.add_argument("-v", dest="verbose", action="store_true")
    own, rest = parser.parse_known_args(argv)
    found = CommandLine({option for option in OPTIONS if getattr(own, option)})
    if rest[:1] == ["train"] and not is_file("train"):  # as in `llamafactory-cli train RECIPE`
        del rest[0]
    while rest:
        word = rest.pop(0)
        if flag := _FLAG.match(word):
            found.overrides.append(_flag_to_override(flag["key"].replace("-", "_"), flag["value"], rest))
        elif "=" in word and not is_file(word):
            found.overrides.append(word)
        else:
            found.words.append(word)
    return found


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        option = re.search(r"--\w+", message)
        if option is None:
            raise RecipeError(message)
        raise RecipeError(f"{option[0]}: is an option of arpo_trl and takes no value; no key has that name")


_FLAG = re.compile(r"--(?P<key>[A-Za-z_][\w-]*)(=(?P<value>.*))?$", re.DOTALL)
_KEY_IS = re.compile(r"(\w+)=")


def _flag_to_override(key: str, value: str | None, rest: list[str]) -> str:
    """`key=value`; a value that is a word of its own is taken from `rest`."""
    positive = key.removeprefix("no_")
    if value is None and positive != key and not _is_known(key) and _is_bool(positive):
        return f"{positive}=false"
    if value is None:
        value = rest.pop(0) if rest and _is_value(key, rest[0]) else "true"
        while rest and "array" in _schema(key) and _is_value(key, rest[0]) and value != "true":
            value = f"{value},{rest.pop(0)}"  # --lora_target q_proj v_proj
    return f"{key}={value}"


def _is_value(key: str, word: str) -> bool:
    """Whether the word after a flag is its value, not the next flag, an override or the recipe."""
    override = _KEY_IS.match(word)
    if _FLAG.match(word) or (override and _is_known(override[1])):
        return False
    is_recipe = word.endswith((".yaml", ".yml")) and is_file(word)
    return not (is_recipe and (_is_bool(key) or "array" in _schema(key)))


def _schema(key: str) -> str:
    key = RENAMED.get(key, key)
    return str(keys()[key].schema) if key in keys() else ""


def _is_bool(key: str) -> bool:
    return "boolean" in _schema(key) or not _schema(key)


def _is_known(key: str) -> bool:
    return any(key in table for table in (keys(), RENAMED, NO_EFFECT, REFUSED))
