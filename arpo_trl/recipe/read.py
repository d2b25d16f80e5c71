"""A recipe's file and overrides -> a checked `Recipe`, or all that is wrong with it, at once.

    recipe = read_recipe("recipes/qwen_toy.yaml", ["learning_rate=1e-5"])

torch is not imported: a typo is answered in well under a second.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ..errors import RecipeError
from .keys import COMMAND_LINE, Recipe, in_words, keys
from .llamafactory import HARMLESS, NO_EFFECT, REFUSED, RENAMED, batch_grows, recognise
from .rules import conflicts, resolve
from .yaml_file import Given, Problems, read_file, read_overrides, shorten


def read_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, and `key=value` overrides by the same rules; without a file, the overrides are the recipe.

    Raises:
        RecipeError: all problems at once, each with its line.
    """
    problems: Problems = []
    given = read_file(Path(path), problems) if path is not None else {}
    given |= read_overrides(overrides, takes_text, problems)
    path, all_read = COMMAND_LINE if path is None else Path(path), not problems
    if other_form := recognise(given):
        raise RecipeError(f"{path}: {other_form}")
    larger = batch_grows(given)
    no_effect = _keep_known_keys(given, problems)
    recipe = _typed(given, problems)
    if recipe:
        lines = {key: int(location[5:]) for key, (_, location, _) in given.items() if location.startswith("line ")}
        notices = [f"{path}: {', '.join(names)}: no effect; {why}" for why, names in no_effect.items()]
        notices += [f"{path}: {larger}"] if larger else []
        source = replace(recipe.source, path=path, lines=lines, notices=tuple(notices))
        recipe = recipe.model_copy(update={"source": source})
        if all_read:  # a value that was not read could settle a conflict
            problems += [(_location(key, given), f"{key}: {why}") for key, why in conflicts(recipe)]
    if problems or not recipe:
        # by line ("line 9" before "line 10"), and after them what no line holds: "missing", "override"
        problems.sort(key=lambda problem: (problem[0][:4] != "line", len(problem[0]), problem[0]))
        width = max(len(location) for location, _ in problems)
        header = f"{path}: {len(problems)} problem{'s' * (len(problems) > 1)}"
        raise RecipeError([header, *(f"  {location:<{width}}  {text}" for location, text in problems)])
    return resolve(recipe)


def _keep_known_keys(given: dict[str, Given], problems: Problems) -> dict[str, list[str]]:
    """What becomes of a key that is not one of ours: renamed, without effect, refused with its reason, or unknown.

    Such keys leave `given`; refused and unknown ones go into `problems`. Returns those without effect, by reason.
    """
    no_effect: dict[str, list[str]] = {}
    for key, (value, location, text) in list(given.items()):
        if key in keys():
            continue
        del given[key]
        if key in RENAMED:
            if value is None:
                continue
            if RENAMED[key] in given and given[RENAMED[key]].value != value:
                problems.append((location, f"{key}: means {RENAMED[key]}, which is there too; keep one"))
            given.setdefault(RENAMED[key], Given(value, location, text))
        elif key in NO_EFFECT:
            no_effect.setdefault(NO_EFFECT[key], []).append(key)
        elif key not in REFUSED:
            problems.append((location, f"{key}: {nearest(key)}"))
        elif value is not None and value is not False and value != HARMLESS.get(key):
            problems.append((location, f"{key}: {REFUSED[key]}"))
        elif key == "max_length" and value:  # its default in LLaMA-Factory, where it asks for nothing, and in TRL
            no_effect[f"{REFUSED[key]} for rows"] = [key]
    return no_effect


def _typed(given: dict[str, Given], problems: Problems) -> Recipe | None:
    """The recipe of these values, if each has its type."""
    values: dict[str, object] = {}
    for key, (value, location, text) in given.items():
        known = keys()[key]
        if value is None and (known.default in (None, []) or known.default is False):
            continue  # null is how LLaMA-Factory's recipes say nothing
        if isinstance(value, int | float) and text and takes_text(key):
            value = text
        elif isinstance(value, str) and value.lower() in ("true", "false") and "boolean" in str(known.schema):
            value = value.lower() == "true"  # quoted, also where text would do
        if isinstance(value, str) and "${" in value:
            way_out = f"write the value, or give {key}=... after the path"
            problems.append((location, f"{key}: ${{...}} is not filled in here; {way_out}"))
        else:
            values[key] = value
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        for key, wrong in {str(wrong["loc"][0]): wrong for wrong in error.errors()}.items():
            if key in values:
                problems.append((_location(key, given), _what_is_wrong(key, values[key], wrong)))
            elif (key not in given or given[key].value is None) and not any(
                f"{key}:" == text.split(" ")[0] for _, text in problems
            ):
                problems.append(("missing", f"{key}: every recipe needs it. {keys()[key].help}"))
        return None


def takes_text(key: str) -> bool:
    """Whether the key's value is text and nothing else, so that 007 keeps its zeros."""
    key = RENAMED.get(key, key)
    schema = keys()[key].schema if key in keys() else {}
    kinds = [part.get("type") for part in schema.get("anyOf", [schema]) if "enum" not in part]
    return "string" in kinds and set(kinds) <= {"string", "null"}


def _location(key: str, given: dict[str, Given]) -> str:
    return given[key].location if key in given else "missing"


def _what_is_wrong(key: str, value: object, wrong: ErrorDetails) -> str:
    if ours := str(wrong.get("ctx", {}).get("error", "")):  # what a validator of `types` says
        return f"{key}: {ours}"
    bounds = isinstance(value, int | float) and not isinstance(value, bool)
    found = "null" if value is None else str(value).lower() if isinstance(value, bool) else shorten(value)
    return f"{key}: expected {in_words(keys()[key].schema, bounds)}, found {found}"


def nearest(key: str) -> str:
    near = difflib.get_close_matches(key, [*keys(), *RENAMED], n=1)
    return f"no such key; the nearest is {near[0]}" if near else "no such key; --help all lists them"
