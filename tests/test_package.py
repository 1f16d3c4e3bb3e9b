"""records/: the layers that `records/__init__.py` names import downwards only, and no module imports itself in a circle."""

from __future__ import annotations

import ast
import graphlib
import importlib
from pathlib import Path

from records import RECORDS, REPOSITORY

LAYERS = {"records": 0, "records.reading": 1, "records.checking": 2, "records.writing": 2, "records.__main__": 3}
FILES = [path for path in sorted(RECORDS.rglob("*.py")) if not path.is_relative_to(RECORDS / "recipes")
         and not any(part.startswith("track_") for part in path.parts)]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in FILES}


def layer(module: str) -> str:
    """The package that a module belongs to; __main__ stands above all."""
    return module if module in LAYERS else module.rpartition(".")[0]


def imported(module: str) -> set[str]:
    """The modules of this package that a module imports, also inside its functions."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: imports name their package in full"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name.split(".")[0] == "records"}


GRAPH = {module: imported(module) for module in MODULES}


def test_every_module_has_a_layer() -> None:
    """No module lies beside the data but the package itself and its commands; all can be imported."""
    assert {layer(module) for module in MODULES} == set(LAYERS)
    assert {module for module in MODULES if layer(module) == "records"} == {"records"}
    for module in MODULES:
        importlib.import_module(module)


def test_layers_import_downwards() -> None:
    """A module imports its own layer or lower ones: what checks knows nothing of what writes, nor the other way."""
    wrong = [f"{module} imports {name}" for module, names in GRAPH.items() for name in names
             if layer(name) != layer(module) and LAYERS[layer(name)] >= LAYERS[layer(module)]]
    assert not wrong


def test_no_module_imports_itself_in_a_circle() -> None:
    """Of the whole graph, imports inside functions included; every edge leads to a module that exists."""
    assert set().union(*GRAPH.values()) <= set(MODULES)
    order = list(graphlib.TopologicalSorter(GRAPH).static_order())  # CycleError names the circle
    assert order[0] == "records" and order[-1] == "records.__main__"
