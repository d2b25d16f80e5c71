"""A recipe's file and overrides -> each key's value and location. YAML only: what a key means is `keys`'s."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..errors import RecipeError

LARGEST_FILE = 1_000_000  # bytes
MOST_VALUES = 10_000  # in one key, aliases expanded


class Given(NamedTuple):
    value: Any
    location: str  # "line 14" or "override"
    text: str | None = None  # a number as it is written: run_name: 007


Problems = list[tuple[str, str]]  # where, and what


def read_file(path: Path, problems: Problems) -> dict[str, Given]:
    """The keys of a recipe file with their lines; duplicates, tags and odd keys become problems."""
    try:
        if path.is_fifo() and path.parts[1:2] not in (("dev",), ("proc",)):  # a shell's <(...) has an end
            raise RecipeError(f"{path}: is a pipe; expected a file")
        with path.open("rb") as file:  # no more than a recipe can be: a device or a pipe has no end
            text = file.read(LARGEST_FILE + 1)
        if len(text) > LARGEST_FILE:
            raise RecipeError(f"{path}: expected a recipe, found more than {LARGEST_FILE:,} bytes")
        loader = _Loader(text.decode("utf-8"))
        root = loader.get_single_node()
    except RecursionError:
        raise RecipeError(f"{path}: not read (its values are nested too deeply)") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{path}:{line}: not YAML ({error.problem or error.context})") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: not YAML text in UTF-8 ({str(error).splitlines()[0]})") from None
    except ValueError as error:  # a NUL in the path
        raise RecipeError(f"{path}: no path ({error})") from None
    except OSError as error:
        folders = dict.fromkeys((path if is_dir(path) else path.parent, Path("recipes"), Path()))
        found = dict.fromkeys(str(recipe) for folder in folders for recipe in find_recipes(folder))
        there = f"there are {', '.join(found)}" if found else "no recipe is near; recipes are .yaml files"
        raise RecipeError(f"{path}: {error.strerror}; {there}") from None
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError(f"{path}: expected lines of key: value, found {'nothing' if root is None else 'no key'}")
    given: dict[str, Given] = {}
    first_lines: dict[str, str] = {}
    for key_node, value_node in root.value:
        location = f"line {key_node.start_mark.line + 1}"
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
        if key in first_lines:
            problems.append((location, f"{key}: already on {first_lines[key]}; keep one"))
            continue
        first_lines[key] = location
        value, odd = _construct(loader, value_node)
        if odd:
            problems.append((location, f"{key}: {odd}"))
        else:
            number = value_node.tag.endswith((":int", ":float")) and isinstance(value_node, yaml.ScalarNode)
            given[key] = Given(value, location, value_node.value if number else None)
    return given


def is_dir(path: str | Path) -> bool:
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):  # longer than a path can be, or no text
        return False


def is_file(path: str | Path) -> bool:
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def _construct(loader: _Loader, node: yaml.Node) -> tuple[Any, str | None]:
    """The value of a node, or what is odd in it: a tag, which could run code; a key twice; aliases that multiply."""
    seen: set[int] = set()
    waiting = [node]
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if part.tag not in _TAGS:
            return (
                None,
                f"the tag {part.tag.replace('tag:yaml.org,2002:', '!!')} is not read here; write a plain value",
            )
        if isinstance(part, yaml.ScalarNode) and (found := _NO_TEXT.search(part.value)):
            return None, f"holds {found[0]!r}, which is no character of a text"
        if isinstance(part, yaml.SequenceNode):
            waiting += part.value
        elif isinstance(part, yaml.MappingNode):
            names = [str(name.value) for name, _ in part.value]
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                return None, f"{twice[0]} is there twice; keep one"
            waiting += [value for _, value in part.value]
    try:
        if _count(node, {}) > MOST_VALUES:
            return None, f"expected a plain value, found more than {MOST_VALUES:,} (its aliases multiply)"
        return loader.construct_object(node, deep=True), None
    except RecursionError:  # a value that holds itself is one too
        return None, "expected a plain value"
    except (yaml.YAMLError, ValueError, KeyError):
        return None, "expected a plain value"


def _count(node: yaml.Node, counted: dict[int, int]) -> int:
    """The values in a node, each alias counted as often as it is used."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in counted:
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        counted[id(node)] = 1 + sum(_count(part, counted) for part in parts)
    return counted[id(node)]


def read_overrides(overrides: Sequence[str], is_text: Callable[[str], bool], problems: Problems) -> dict[str, Given]:
    """The values of `key=value`, of which the last one of a key wins.

    Args:
        overrides: As they stand on the command line.
        is_text: Whether a key takes text alone; such a value is not YAML unless it is quoted.
        problems: What is wrong is added here.
    """
    given = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            problems.append(("override", f"{override}: expected key=value"))
            continue
        value, odd = _read_text(text) if is_text(key) else _read_yaml(text)
        if odd:
            problems.append(("override", f"{key}: {odd}"))
        else:
            given[key] = Given(value, "override", text.strip())
    return given


def _read_text(text: str) -> tuple[Any, str | None]:
    if text.strip() in ("", "~", "null") or text.strip()[0] in "'\"":
        value, odd = _read_yaml(text)
        if not odd:
            return value, None
    if found := _NO_TEXT.search(text):
        return None, f"holds {found[0]!r}, which is no character of a text"
    return text, None


def _read_yaml(text: str) -> tuple[Any, str | None]:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except (yaml.YAMLError, RecursionError):
        return None, f"{shorten(text)} is not YAML; quote it"
    return _construct(loader, node) if node else (None, None)


def shorten(value: Any) -> str:
    """A value as Python writes it, in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def find_recipes(folder: Path) -> list[Path]:
    """The YAML files in a folder that name a model."""
    files = sorted(folder.glob("*.yaml")) if folder.is_dir() else []
    names_a_model = re.compile(r"^model_name_or_path:", re.MULTILINE)
    return [file for file in files if names_a_model.search(file.read_text(encoding="utf-8", errors="replace"))]


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: 7e-6 is a number; no, on and 2024-01-01 are text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (a class variable that PyYAML annotates so)


for _tag, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9][0-9_]*",
    "float": r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), None)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value.replace("_", "")))
_NO_TEXT = re.compile("[\x00\ud800-\udfff]")
_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in "null bool int float str seq map".split()}
