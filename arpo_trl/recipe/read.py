"""Recipe file and overrides -> a checked `Recipe`, or all of its problems at once.

    recipe = read_recipe("recipes/qwen_toy.yaml", ["learning_rate=1e-5"])

Imports no torch, so a typo is reported in well under a second.
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from ..errors import RecipeError
from .keys import COMMAND_LINE, Recipe, in_words, keys
from .llamafactory import IGNORED, NO_OP, NOT_SUPPORTED, RENAMED, larger_batch, recognize
from .preference import read_old_stage
from .rules import conflicts, resolve
from .yaml_file import Problems, Setting, read_file, read_overrides, shorten


def read_recipe(
    path: str | Path | Mapping[str, object] | None, overrides: Sequence[str] = (), rollout: bool = False
) -> Recipe:
    """Read a recipe file, or a mapping of its keys, and `key=value` overrides; without either, the overrides are the recipe.

    A recipe for a `rollout` needs nothing to train, evaluate or predict.

    Raises:
        RecipeError: lists all problems, each with its line.
    """
    problems: Problems = []
    if isinstance(path, Mapping):
        texts = {key: str(value) if isinstance(value, Path) else value for key, value in path.items()}
        settings = {key: Setting(value, "recipe") for key, value in texts.items()}
        path = "recipe"  # in messages
    else:
        settings = read_file(Path(path), takes_text, problems) if path is not None else {}
    settings |= read_overrides(overrides, takes_text, problems)
    path, all_read = COMMAND_LINE if path is None else Path(path), not problems
    values = {key: setting.value for key, setting in settings.items()}
    if other_format := recognize(values):
        raise RecipeError(f"{path}: {other_format}")
    larger, old_stage = larger_batch(values), read_old_stage(settings)
    ignored = _keep_known_keys(settings, problems)
    recipe = _validate(settings, problems)
    if recipe:
        locations = {key: setting.location for key, setting in settings.items()}
        lines = {key: int(location[5:]) for key, location in locations.items() if location.startswith("line ")}
        notices = [f"{path}: {', '.join(names)}: ignored; {why}" for why, names in ignored.items()]
        notices += [f"{path}: {line}" for line in (larger, old_stage) if line]
        recipe = recipe.model_copy(update={"path": path, "lines": lines, "notices": notices})
        if all_read:  # a value that could not be read might resolve a conflict
            problems += [(locations.get(key, "missing"), f"{key}: {why}") for key, why in conflicts(recipe, rollout)]
    if problems or not recipe:
        # by line number ("line 9" before "line 10"), then the problems without a line: "missing", "override"
        problems.sort(key=lambda problem: (problem[0][:4] != "line", len(problem[0]), problem[0]))
        width = max(len(location) for location, _ in problems)
        header = f"{path}: {len(problems)} problem{'s' * (len(problems) > 1)}"
        raise RecipeError([header, *(f"  {location:<{width}}  {text}" for location, text in problems)])
    return resolve(recipe, rollout)


def _keep_known_keys(settings: dict[str, Setting], problems: Problems) -> dict[str, list[str]]:
    """Rename aliases in `settings` and remove all other keys that a Recipe does not have.

    Unsupported and unknown keys are added to `problems`. Returns the ignored keys by reason.
    """
    ignored: dict[str, list[str]] = {}
    for key, (value, location) in list(settings.items()):
        if key in keys():
            continue
        del settings[key]
        if key in RENAMED:
            if value is None:
                continue
            if RENAMED[key] in settings and settings[RENAMED[key]].value != value:
                problems.append((location, f"{key}: an alias of {RENAMED[key]}, which is also set; keep one"))
            settings.setdefault(RENAMED[key], Setting(value, location))
        elif key in IGNORED:
            ignored.setdefault(IGNORED[key], []).append(key)
        elif key not in NOT_SUPPORTED:
            problems.append((location, f"{key}: {nearest(key)}"))
        elif value is not None and value is not False and value != NO_OP.get(key):
            problems.append((location, f"{key}: not supported; {NOT_SUPPORTED[key]}"))
        elif key == "max_length" and value:  # LLaMA-Factory's and TRL's default, which requests nothing
            ignored[NOT_SUPPORTED[key]] = [key]
    return ignored


def _validate(settings: dict[str, Setting], problems: Problems) -> Recipe | None:
    """Return the recipe with these values if each has its type; otherwise add to `problems`."""
    values: dict[str, object] = {}
    for key, (value, location) in settings.items():
        known = keys()[key]
        if value is None and known.may_be_null:
            continue
        if isinstance(value, str) and value.lower() in ("true", "false") and "boolean" in str(known.schema):
            value = value.lower() == "true"  # quoted, even if the key takes text as well
        if isinstance(value, str) and "${" in value:
            fix = f"write the value, or pass {key}=... on the command line"
            problems.append((location, f"{key}: ${{...}} interpolation is not supported; {fix}"))
        else:
            values[key] = value
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        for key, wrong in {str(wrong["loc"][0]): wrong for wrong in error.errors()}.items():
            if key in values:
                problems.append((settings[key].location, f"{key}: {_describe(key, values[key], wrong)}"))
            elif not any(text.startswith(f"{key}: ") for _, text in problems):
                problems.append(("missing", f"{key}: required. {keys()[key].help}"))
        return None


def takes_text(key: str) -> bool:
    """Return whether the key's value is always text, so that 007 keeps its zeros."""
    key = RENAMED.get(key, key)
    schema = keys()[key].schema if key in keys() else {}
    kinds = [part.get("type") for part in schema.get("anyOf", [schema]) if "enum" not in part]
    return "string" in kinds and set(kinds) <= {"string", "null"}


def _describe(key: str, value: object, wrong: ErrorDetails) -> str:
    if message := str(wrong.get("ctx", {}).get("error", "")):  # raised by a validator in types.py
        return message
    actual = "null" if value is None else str(value).lower() if isinstance(value, bool) else shorten(value)
    return f"expected {in_words(keys()[key].schema)}, found {actual}"


def nearest(key: str) -> str:
    near = difflib.get_close_matches(key, [*keys(), *RENAMED], n=1)
    return f"unknown key; did you mean {near[0]}?" if near else "unknown key; --help all lists all keys"
