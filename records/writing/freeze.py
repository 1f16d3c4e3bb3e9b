"""Bake a resolved configuration into a copy of train_gpt.py, so that its run command holds only paths and SEED.

Only the first argument of `opt(DEFAULT, ...)` in the fields of Config is replaced; every other byte stays.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from records import ToolError
from records.reading.script import IDENTITY, Resolved, differences, named, resolve


def default_nodes(text: str) -> dict[str, ast.expr]:
    """Field of Config -> the expression of its default."""
    config = next((node for node in ast.parse(text).body if isinstance(node, ast.ClassDef) and node.name == "Config"),
                  None)
    if config is None:
        raise ToolError("the script has no class Config; is it packed already? Freeze first, then pack")
    return {node.target.id: node.value.args[0] for node in config.body
            if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call) and node.value.args
            and ast.unparse(node.value.func) == "opt"}


def literal(value: Any) -> str:
    """A configuration value as Python source; JSON's lists are tuples there."""
    return repr(tuple(value) if isinstance(value, list) else value)


def bake(text: str, values: Mapping[str, Any]) -> str:
    """`text` with these values as defaults; fields whose default is that value already keep their spelling."""
    lines = [line.encode() for line in text.splitlines(keepends=True)]
    starts = [sum(map(len, lines[:i])) for i in range(len(lines))]
    source = b"".join(lines)
    nodes = default_nodes(text)
    unknown = sorted(set(values) - set(nodes) - set(IDENTITY))
    if unknown:
        raise ToolError(f"no default of Config to replace for {', '.join(unknown)}")
    for name, node in sorted(nodes.items(), key=lambda item: (item[1].lineno, item[1].col_offset), reverse=True):
        if name in IDENTITY or name not in values or same(node, values[name]):
            continue
        begin, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        source = source[:begin] + literal(values[name]).encode() + source[end:]
    return source.decode()


def same(node: ast.expr, value: Any) -> bool:
    """Whether a default's expression is this value already, type included."""
    try:
        return literal(ast.literal_eval(node)) == literal(value)
    except ValueError:
        return False


def prove(script: Path, resolved: Resolved) -> None:
    """Ask the frozen (and perhaps packed) script for its defaults, which must be the configuration."""
    if wrong := differences(resolve(script, {}).values, resolved.values):
        raise ToolError(f"{script}: the frozen defaults are not the run's: {named(wrong)}")
