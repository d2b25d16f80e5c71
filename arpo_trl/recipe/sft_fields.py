"""The fields of TRL's SFTConfig, read from the installed sources: importing them would cost seconds."""

import ast
import functools
import importlib.util
import re
from pathlib import Path
from typing import Any, NamedTuple


class SftField(NamedTuple):
    annotation: str
    default: Any
    help: str
    choices: tuple[str, ...]


@functools.cache
def sft_fields() -> dict[str, SftField]:
    """Every field of SFTConfig, by name, in the order of transformers' documentation."""
    sources = [_source("transformers", "trainer_utils.py"), _source("transformers", "training_args.py")]
    sources += [_source("trl", "trainer/base_config.py"), _source("trl", "trainer/sft_config.py")]
    classes = [node for source in sources for node in source.body if isinstance(node, ast.ClassDef)]
    enums = {
        node.name: tuple(ast.literal_eval(line.value) for line in node.body if isinstance(line, ast.Assign))
        for node in classes
        if any(isinstance(base, ast.Name) and base.id == "ExplicitEnum" for base in node.bases)
    }
    fields: dict[str, SftField] = {}
    for node in classes:
        if node.name not in ("TrainingArguments", "_BaseConfig", "SFTConfig"):
            continue
        for line in node.body:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                annotation = ast.unparse(line.annotation)
                words = re.findall(r"\w+", annotation)
                call = {k.arg: k.value for k in line.value.keywords} if isinstance(line.value, ast.Call) else {}
                about = call.get("metadata")
                metadata = (
                    {_literal(k): _literal(v) for k, v in zip(about.keys, about.values, strict=True)}
                    if isinstance(about, ast.Dict)
                    else {}
                )
                choices = metadata.get("choices") or next((enums[word] for word in words if word in enums), ())
                help = (metadata.get("help") or "").replace("%%", "%")
                default = _literal(call["default"]) if "default" in call else []  # default_factory=list
                fields[line.target.id] = SftField(annotation, default, help, tuple(choices))
    return fields


def _source(package: str, file: str) -> ast.Module:
    spec = importlib.util.find_spec(package)  # of a top-level package: finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"{package} is not installed; pip install {package}")
    return ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8"))


def _literal(node: ast.expr | None) -> Any:
    try:
        return ast.literal_eval(node) if node else None
    except ValueError:
        return None  # computed when transformers is imported
