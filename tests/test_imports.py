"""Modules import in one direction, without cycles, including imports in functions and under TYPE_CHECKING."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAZY = "arpo_trl"
"""The root only re-exports: its imports of the package are by name, when a public name is first used (PEP 562)."""

Graph = dict[str, set[str]]


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_imports(root: Path) -> Graph:
    """Return the modules of arpo_trl in `root`, each with those that any statement in it imports."""
    paths = {module_name(path, root): path for path in (root / "arpo_trl").rglob("*.py")}
    return {name: set(_imports_of(name, path, paths)) - {name} for name, path in paths.items()}


def _imports_of(name: str, path: Path, modules: dict[str, Path]) -> Iterator[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            for alias in node.names:
                full = f"{source}.{alias.name}"
                if full in modules or source in modules:
                    yield full if full in modules else source


def find_cycle(graph: Graph) -> list[str]:
    """Return the modules of a cycle, or an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def layer_of(module: str, layers: list[list[str]]) -> int:
    """Return the position of a module's layer, from the top."""
    return next(i for i, names in enumerate(layers) if any(f"{module}.".startswith(f"{name}.") for name in names))


def find_upward_imports(graph: Graph, layers: list[list[str]]) -> list[str]:
    return [
        f"{name} imports {imported}"
        for name, imports in graph.items()
        for imported in imports
        if layer_of(imported, layers) < layer_of(name, layers)
    ]


@pytest.fixture(scope="module")
def graph() -> Graph:
    imports = read_imports(ROOT)
    assert len(imports) > 60 and sum(map(len, imports.values())) > 200
    del imports[LAZY]
    return imports


def test_no_modules_import_each_other(graph: Graph) -> None:
    assert find_cycle(graph) == []


def test_no_module_imports_the_root(graph: Graph) -> None:
    """It would close a cycle over all that the root re-exports."""
    assert [name for name, imports in graph.items() if LAZY in imports] == []


def test_no_module_imports_one_of_a_higher_layer(graph: Graph) -> None:
    """The layers are those of import-linter, in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = project["tool"]["importlinter"]["contracts"]
    layers = [[name.strip() for name in layer.split("|")] for layer in contract["layers"]]
    assert find_upward_imports(graph, layers) == []


@pytest.mark.parametrize(
    "text",
    [
        "from .b import f\n",
        "from . import b\n",
        "import arpo_trl.b\n",
        "def g():\n    from .b import f\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .b import f\n",
    ],
    ids=["name", "module", "absolute", "in_a_function", "type_checking"],
)
def test_a_cycle_and_an_upward_import_are_found(text: str, tmp_path: Path) -> None:
    """The checks above can fail, for every kind of import."""
    folder = tmp_path / "arpo_trl"
    folder.mkdir()
    for name, content in {"__init__": "", "a": text, "b": "from .c import h\n", "c": "from .a import f\n"}.items():
        (folder / f"{name}.py").write_text(content, encoding="utf-8")
    graph = read_imports(tmp_path)
    assert set(find_cycle(graph)) == {"arpo_trl.a", "arpo_trl.b", "arpo_trl.c"}
    layers = [["arpo_trl.b"], ["arpo_trl.c", "arpo_trl.a"], ["arpo_trl"]]
    assert find_upward_imports(graph, layers) == ["arpo_trl.a imports arpo_trl.b"]
