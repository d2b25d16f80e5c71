"""The recipe's JSON Schema, which tells editors what `read_recipe` tells people."""

from __future__ import annotations

import json

from pydantic.json_schema import JsonSchemaValue

from .keys import keys
from .llamafactory import HARMLESS, NO_EFFECT, REFUSED, RENAMED

_LEFT_OUT = ("to", "unit", "title", "default", "description")  # set anew below, or of no use to an editor


def schema_json() -> str:
    """The schema as JSON: the recipes that `read_recipe` accepts, but for numbers and booleans in quotes.

    `errorMessage` and `deprecationMessage` are what yaml-language-server, in VS Code and others, shows for a refused
    key and for one without effect.
    """
    properties: dict[str, JsonSchemaValue] = {}
    for name, key in keys().items():
        schema = {part: value for part, value in key.schema.items() if part not in _LEFT_OUT}
        may_be_null = key.default is None or key.default is False or key.default == []
        if may_be_null and schema.get("type") != "null" and {"type": "null"} not in schema.get("anyOf", []):
            schema = {"anyOf": [schema, {"type": "null"}]}
        if key.default not in (..., None):
            schema["default"] = key.default
        properties[name] = {**schema, "description": key.help}
    for old, new in RENAMED.items():
        properties[old] = {**properties[new], "description": f"Another name for {new}.", "deprecated": True}
    for name, reason in NO_EFFECT.items():
        said = f"{name}: no effect; {reason}"
        properties[name] = {"description": said, "deprecated": True, "deprecationMessage": said}
    for name, reason in REFUSED.items():
        said = f"{name}: {reason}"
        harmless = [None, False, *([HARMLESS[name]] if name in HARMLESS else [])]
        properties[name] = {"description": said, "deprecated": True, "enum": harmless, "errorMessage": said}
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "arpo_trl recipe",
        "description": "Written by scripts/make_keys.py.",
        "type": "object",
        "properties": properties,
        "required": [name for name, key in keys().items() if key.default is ...],
        "additionalProperties": False,
    }
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"
