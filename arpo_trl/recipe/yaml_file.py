"""Recipe file and overrides -> the value and location of each key. The meaning of a key is defined in keys.py."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Hashable, Sequence
from os.path import isdir
from pathlib import Path
from typing import ClassVar, NamedTuple, NoReturn

import yaml

from ..errors import RecipeError

LARGEST_FILE = 1_000_000  # bytes
BACKSLASHES = (
    "in double quotes, a backslash starts an escape such as \\n or \\t; write single quotes, or / instead of \\"
)
MOST_VALUES = 10_000  # in one key, aliases expanded


class Setting(NamedTuple):
    value: object
    location: str  # "line 14", "override" or "recipe"


Problems = list[tuple[str, str]]  # location and message


def read_file(path: Path, is_text: Callable[[str], bool], problems: Problems) -> dict[str, Setting]:
    """Return the keys of a recipe file with their lines; duplicates, tags and invalid values become problems.

    `is_text`: whether a key takes only text; such a number is text as written: run_name: 007.
    """
    loader, root = _parse(path)
    if not isinstance(root, yaml.MappingNode):
        actual = "an empty file" if root is None else "no keys"
        raise RecipeError(f"{path}: expected lines such as learning_rate: 1e-5, found {actual}")
    settings: dict[str, Setting] = {}
    first_lines: dict[str, str] = {}
    for key_node, value_node in root.value:
        location = f"line {key_node.start_mark.line + 1}"
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
        if key in first_lines:
            problems.append((location, f"{key}: duplicate of {first_lines[key]}; keep one"))
            continue
        first_lines[key] = location
        if isinstance(value_node, yaml.ScalarNode) and value_node.tag.endswith((":int", ":float")) and is_text(key):
            value_node = yaml.ScalarNode("tag:yaml.org,2002:str", value_node.value)
        try:
            settings[key] = Setting(_construct(loader, value_node), location)
        except _InvalidValueError as invalid:
            problems.append((location, f"{key}: {invalid}"))
    return settings


def _parse(path: Path) -> tuple[_Loader, yaml.Node | None]:
    try:
        if path.is_fifo() and path.parts[1:2] not in (("dev",), ("proc",)):  # a shell's <(...) is fine
            raise RecipeError(f"{path}: expected a file, found a pipe")
        with path.open("rb") as file:  # bounded, because a device or a pipe has no end
            text = file.read(LARGEST_FILE + 1)
        if len(text) > LARGEST_FILE:
            raise RecipeError(f"{path}: expected a recipe, found more than {LARGEST_FILE:,} bytes")
        loader = _Loader(text.decode("utf-8"))
        return loader, loader.get_single_node()
    except RecursionError:
        raise RecipeError(f"{path}: values are nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        context = error.context or ""  # an open quote or a missing colon is detected lines later
        mark = error.context_mark if context.startswith("while scanning a ") else error.problem_mark
        problem = "expected key: value, with a space after the colon" if context.endswith("key") else error.problem
        if problem in ("second occurrence", "but found another document"):  # the rest of a sentence
            problem = f"{context}, {problem}"
        is_escape = context == "while scanning a double-quoted scalar" and "escape" in str(problem)
        fix = f"; {BACKSLASHES}" if is_escape else ""
        raise RecipeError(f"{path}:{mark.line + 1 if mark else 1}: invalid YAML ({problem or context}){fix}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: invalid YAML or not UTF-8 ({str(error).splitlines()[0]})") from None
    except ValueError as error:  # a NUL in the path
        raise RecipeError(f"{path}: invalid path ({error})") from None
    except OSError as error:
        folders = dict.fromkeys((path if isdir(path) else path.parent, Path("recipes"), Path()))
        recipes = ", ".join(dict.fromkeys(str(recipe) for folder in folders for recipe in find_recipes(folder)))
        raise RecipeError(f"{path}: {error.strerror}; recipes nearby: {recipes or 'none'}") from None


def _construct(loader: _Loader, node: yaml.Node) -> object:
    try:
        if _count(node, {}) <= MOST_VALUES:
            return loader.construct_object(node, deep=True)
    except (yaml.YAMLError, RecursionError, ValueError, KeyError):  # a value that contains itself, !!int [], !!bool x
        raise _InvalidValueError(
            "invalid YAML value (an alias that contains itself, or a tag such as !!int that does not fit); write a plain value"
        ) from None
    raise _InvalidValueError(f"expected a plain value, found more than {MOST_VALUES:,} values after expanding aliases")


def _count(node: yaml.Node, counted: dict[int, int]) -> int:
    """Count the values in a node, and those of an alias each time it is used."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in counted:
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        counted[id(node)] = 1 + sum(_count(part, counted) for part in parts)
    return counted[id(node)]


def read_overrides(overrides: Sequence[str], is_text: Callable[[str], bool], problems: Problems) -> dict[str, Setting]:
    """Return the values of `key=value` overrides, and add to `problems`; the last one of a key wins.

    `is_text`: whether a key takes only text; such a value is read as YAML only if it is quoted.
    """
    settings = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            problems.append(("override", f"{override}: expected key=value"))
            continue
        try:
            settings[key] = Setting(_read_text(text) if is_text(key) else _read_yaml(text), "override")
        except _InvalidValueError as invalid:
            problems.append(("override", f"{key}: {invalid}"))
    return settings


def _read_text(text: str) -> object:
    if text.strip() in ("", "~", "null") or text.strip()[0] in "'\"":
        with contextlib.suppress(_InvalidValueError):
            return _read_yaml(text)
    return _checked(text)


def _read_yaml(text: str) -> object:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except (yaml.YAMLError, RecursionError):
        raise _InvalidValueError(f"invalid YAML {shorten(text)}; quote it") from None
    return _construct(loader, node) if node else None


def _checked(text: str) -> str:
    if match := re.search("[\x00\ud800-\udfff]", text):
        raise _InvalidValueError(f"contains {match[0]!r}, which is not a valid character")
    return text


def shorten(value: object) -> str:
    """Return the value's repr in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def find_recipes(folder: Path) -> list[Path]:
    """Return the YAML files in a folder that set a model."""
    files = sorted(folder.glob("*.yaml")) if folder.is_dir() else []
    return [file for file in files if "\nmodel_name_or_path:" in "\n" + file.read_text("utf-8", errors="replace")]


class _InvalidValueError(Exception):
    """An invalid value: a tag (which could run code), a duplicate key, or text with an invalid character."""


class _Loader(yaml.SafeLoader):
    """Loader for plain values as in YAML 1.2: 7e-6 is a number; no, on and 2024-01-01 are text."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  (PyYAML's annotation)
    yaml_constructors: ClassVar[dict[str | None, Callable[[_Loader, yaml.Node], object]]] = {}

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        return _checked(super().construct_scalar(node))

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node).replace("_", ""))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        names = [str(name.value) for name, _ in node.value]
        if duplicates := [name for name in names if names.count(name) > 1]:
            raise _InvalidValueError(f"duplicate key {duplicates[0]}; keep one")
        return super().construct_mapping(node, deep)

    def construct_undefined(self, node: yaml.Node) -> NoReturn:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        raise _InvalidValueError(f"YAML tag {tag} is not supported; write a plain value")


for _kind, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9][0-9_]*",
    "float": r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), None)
for _kind in ("null", "bool", "int", "float", "str", "seq", "map"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", getattr(_Loader, f"construct_yaml_{_kind}"))
_Loader.add_constructor(None, _Loader.construct_undefined)
