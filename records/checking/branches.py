"""What no small run on a CPU reaches, read off a script of this trainer: branches for ranks, GPUs or long trainings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

MAKES = "produce_artifact"  # from here on everything must follow from the training text
SCORES = ("score_windows", "scores", "evaluate", "evaluate_online", "score_documents", "evaluate_documents",
          "ttt_document_batch", "log_score")  # fmt: skip
READS = ("tokens", "token_bytes", "batch")  # of a validation set: its text
UNMET = re.compile(r"\bworld|\brank|cuda|device|\.type\b|environ|getenv|numel|time\.|perf_counter|hostname|platform")

Definition = ast.FunctionDef | ast.ClassDef


def reached(known: dict[str, Definition], start: str, stop: tuple[str, ...]) -> dict[str, Definition]:
    """Functions and classes that one of them can lead to by their names, without those where it may end."""
    found, waiting = {}, [start]
    while waiting:
        name = waiting.pop()
        if name in found or name not in known or name in stop:
            continue
        found[name] = known[name]
        waiting += [node.id for node in ast.walk(known[name]) if isinstance(node, ast.Name)]
    return found


def reads_validation(node: Definition) -> bool:
    """Whether a definition takes the text of something that is called validation."""
    return any(isinstance(part, ast.Attribute) and part.attr in READS
               and ast.unparse(part.value).rsplit(".")[-1] in ("validation", "val") for part in ast.walk(node))


def changes_itself(statement: ast.stmt) -> Iterator[str]:
    """Names that an assignment gives another value made of the one before."""
    if isinstance(statement, ast.AugAssign):
        yield ast.unparse(statement.target)
    elif isinstance(statement, ast.Assign):
        used = {ast.unparse(node) for node in ast.walk(statement.value) if isinstance(node, ast.Name | ast.Attribute)}
        yield from (name for target in statement.targets if (name := ast.unparse(target)) in used)


def fault(tree: ast.Module) -> str:
    """What is wrong in a branch that no test reaches; empty if nothing is seen."""
    known = {node.name: node for node in tree.body if isinstance(node, Definition)}
    for name, node in reached(known, MAKES, (*SCORES, "ValidationSet", "load_validation")).items():
        if reads_validation(node):
            return (f"{MAKES} leads to {name}, which reads the validation text: the artifact must follow from the "
                    "training text alone, under every condition")
    for name in SCORES:
        branches = [node for node in ast.walk(known[name]) if isinstance(node, ast.If)] if name in known else []
        for branch in branches:
            test = ast.unparse(branch.test)
            changed = [found for part in branch.body for node in ast.walk(part) if isinstance(node, ast.stmt)
                       for found in changes_itself(node)]
            if UNMET.search(test) and changed:
                return (f"{name} changes {changed[0]} where `{test}`: a score must not depend on the machine that "
                        "gives it")
    return ""
