"""The readability budget of train_gpt.py and the tools, as checks over the syntax tree.

One row of CHECKS per rule: a function from a Source to the places that break it, and
snippets that break it, so that each check is itself shown to act.
"""

from __future__ import annotations

import ast
import os
import re
import symtable
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_gpt.py"
PACKAGES = "records", "records/reading", "records/checking", "records/writing"  # not records/track_*: frozen once landed
TOOLS = sorted(path for place in (*PACKAGES, "data") for path in (ROOT / place).glob("*.py"))

FILE_LINES, FUNCTION_LINES, LINE_WIDTH, DEPTH, PARAMETERS, UNDOCUMENTED_LINES = 4950, 60, 120, 3, 6, 12
ENVIRON_READS = 2

Function = ast.FunctionDef | ast.AsyncFunctionDef
BLOCKS = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.Match)
SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


class Source:
    """A file's text and tree, with the lists that several checks walk over."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.lines = text.splitlines()
        self.tree = ast.parse(text)
        self.nodes = list(ast.walk(self.tree))
        self.functions = [node for node in self.nodes if isinstance(node, Function)]
        self.strings = strings_in(self.nodes)

    @cached_property
    def quoted_names(self) -> set[str]:
        """Names inside annotations that are written as strings."""
        found = [getattr(node, name, None) for node in self.nodes for name in ("annotation", "returns")]
        inside = strings_in(node for annotation in found if annotation for node in ast.walk(annotation))
        return {word for string in inside for word in re.findall(r"\w+", string)}


def strings_in(nodes: Iterable[ast.AST]) -> set[str]:
    """The string constants among `nodes`."""
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def at(node: ast.AST, what: str) -> str:
    """A place for the failure message."""
    return f"line {node.lineno}: {what}"


def is_kernel(function: Function) -> bool:
    """Triton kernels: an annotation there is a type for the compiler, and no object can group the pointers."""
    return any(ast.unparse(decorator).split(".")[-1] == "jit" for decorator in function.decorator_list)


def is_operator(function: Function) -> bool:
    """Operators of torch.library: a signature is flat, no object may group tensors with gradients."""
    return any(re.search(r"^(torch\.library\.custom_op\(|operator$)", ast.unparse(decorator))
               for decorator in function.decorator_list)  # fmt: skip


def parameters(function: Function) -> list[ast.arg]:
    """All parameters but self and cls."""
    args = function.args
    every = [*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg]
    return [arg for arg in every if arg is not None and arg.arg not in ("self", "cls")]


def depth(node: ast.AST, level: int = 0) -> int:
    """Deepest nesting of blocks below `node`; elif is no deeper than its if, inner functions count for themselves."""
    deepest = level
    for child in ast.iter_child_nodes(node):
        if isinstance(child, SCOPES):
            continue
        is_elif = isinstance(node, ast.If) and child in node.orelse and child.col_offset == node.col_offset
        deepest = max(deepest, depth(child, level + (isinstance(child, BLOCKS) and not is_elif)))
    return deepest


def file_length(source: Source) -> Iterator[str]:
    if len(source.lines) > FILE_LINES:
        yield f"{len(source.lines)} lines"


def line_width(source: Source) -> Iterator[str]:
    yield from (f"line {i}: {len(line)} characters" for i, line in enumerate(source.lines, 1) if len(line) > LINE_WIDTH)


def function_length(source: Source) -> Iterator[str]:
    for function in source.functions:
        if (length := function.end_lineno - function.lineno + 1) > FUNCTION_LINES:
            yield at(function, f"{function.name} has {length} lines")


def nesting(source: Source) -> Iterator[str]:
    yield from (at(function, f"{function.name} nests {depth(function)} deep")
                for function in source.functions if depth(function) > DEPTH)


def parameter_count(source: Source) -> Iterator[str]:
    for function in source.functions:
        is_flat = is_kernel(function) or is_operator(function)
        if (count := len(parameters(function))) > PARAMETERS and not is_flat:
            yield at(function, f"{function.name} takes {count} parameters")


def annotations(source: Source) -> Iterator[str]:
    for function in (function for function in source.functions if not is_kernel(function)):
        bare = [arg.arg for arg in parameters(function) if arg.annotation is None]
        bare += [] if function.returns is not None else ["return"]
        if bare:
            yield at(function, f"{function.name}: no annotation of {', '.join(bare)}")


def docstrings(source: Source) -> Iterator[str]:
    for node in source.nodes:
        is_long = isinstance(node, Function) and node.end_lineno - node.lineno + 1 > UNDOCUMENTED_LINES
        if (is_long or isinstance(node, ast.ClassDef)) and not ast.get_docstring(node):
            yield at(node, node.name)


def global_statement(source: Source) -> Iterator[str]:
    yield from (at(node, ", ".join(node.names)) for node in source.nodes if isinstance(node, ast.Global))


def broad_except(source: Source) -> Iterator[str]:
    for handler in (node for node in source.nodes if isinstance(node, ast.ExceptHandler)):
        caught = {name.id for name in ast.walk(handler.type) if isinstance(name, ast.Name)} if handler.type else {"*"}
        if caught & {"*", "Exception", "BaseException"}:
            yield at(handler, ast.unparse(handler).splitlines()[0])


def environ_reads(source: Source) -> Iterator[str]:
    names = ("environ", "getenv", "putenv")
    reads = [node for node in source.nodes if isinstance(node, ast.Attribute) and node.attr in names
             or isinstance(node, ast.Name) and node.id in names
             or isinstance(node, ast.alias) and node.name in names]
    yield from (at(node, "environment") for node in reads if len(reads) > ENVIRON_READS)


def lenient_strict(source: Source) -> Iterator[str]:
    for node in source.nodes:
        if isinstance(node, ast.keyword) and node.arg == "strict" and getattr(node.value, "value", None) is False:
            yield at(node.value, "strict=False")


def config_getattr(source: Source) -> Iterator[str]:
    for node in source.nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            if re.search(r"(^|\.)(cfg|config)$", ast.unparse(node.args[0])):
                yield at(node, ast.unparse(node))


def unused_imports(source: Source) -> Iterator[str]:
    used = {node.id for node in source.nodes if isinstance(node, ast.Name)} | source.quoted_names
    for node in source.nodes:
        if isinstance(node, ast.Import | ast.ImportFrom) and getattr(node, "module", "") != "__future__":
            bound = [alias.asname or alias.name.split(".")[0] for alias in node.names]
            yield from (at(node, name) for name in bound if name not in used)


def top_level_names(source: Source) -> Iterator[tuple[str, ast.stmt]]:
    """(name, statement) for every function, class and constant of the module."""
    for node in source.tree.body:
        if isinstance(node, Function | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
            yield from ((name.id, node) for name in names if isinstance(name.ctx, ast.Store))


def unreferenced(source: Source) -> Iterator[str]:
    loads = Counter(node.id for node in source.nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load))
    for name, node in top_level_names(source):
        own = sum(isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and n.id == name for n in ast.walk(node))
        registered = any(ast.unparse(d) == "rules" for d in getattr(node, "decorator_list", []))
        used = loads[name] != own or name in source.quoted_names or registered
        if not used and not re.fullmatch(r"_|__\w+__", name):
            yield at(node, name)


def unread_fields(source: Source) -> Iterator[str]:
    """Fields of Config that nothing reads; validate() alone does not make a field live."""
    config = next((node for node in source.tree.body if isinstance(node, ast.ClassDef) and node.name == "Config"), None)
    if config is None:
        yield "no class Config"
        return
    checks = [node for node in config.body if isinstance(node, Function) and node.name == "validate"]
    excluded = {id(node) for check in checks for node in ast.walk(check)}
    read = {node.attr for node in source.nodes
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and id(node) not in excluded}
    declared = [node for node in config.body if isinstance(node, ast.AnnAssign)]
    fields = [node for node in declared if "ClassVar" not in ast.unparse(node.annotation)]
    yield from (at(node, node.target.id) for node in fields if node.target.id not in read | source.strings)


def banners(source: Source) -> Iterator[str]:
    rule = r"# ?-{70,}\n"
    found = re.findall(rf"^{rule}# (\d+)\. (.+?) *\n{rule}", source.text + "\n", re.MULTILINE)
    contents = re.findall(r"^ {2,}(\d+)\. (.+?) *$", ast.get_docstring(source.tree, clean=False) or "", re.MULTILINE)
    if not contents or [int(number) for number, _ in contents] != list(range(1, len(contents) + 1)):
        yield f"the module docstring's contents list is not numbered from 1: {contents}"
    if found != contents:
        yield f"contents list {contents}\n  but banners   {found}"


def globals_of(scope: symtable.SymbolTable) -> set[str]:
    """Global names that a scope and those within it read."""
    own = {symbol.get_name() for symbol in scope.get_symbols() if symbol.is_global() and symbol.is_referenced()}
    return own.union(*map(globals_of, scope.get_children()))


def downward(source: Source) -> Iterator[str]:
    """Names that a section uses and a later one defines: a reader, and a change, goes one way."""
    begins = [number for number, line in enumerate(source.lines, 1) if re.match(r"# \d+\. ", line)]
    section = {name: sum(begin < node.lineno for begin in begins) for name, node in top_level_names(source)}
    for scope in symtable.symtable(source.text, "", "exec").get_children():
        here = sum(begin < scope.get_lineno() for begin in begins)
        late = sorted(name for name in globals_of(scope) if section.get(name, 0) > here)
        if late:
            yield f"line {scope.get_lineno()}: {scope.get_name()} uses {', '.join(late)}"


BAR = "# " + "-" * 70
Finder = Callable[[Source], Iterable[str]]
CHECKS: dict[Finder, tuple[str, ...]] = {  # rule -> snippets that break it
    file_length: ("x = 1\n" * (FILE_LINES + 1),),
    line_width: ("#" * (LINE_WIDTH + 1),),
    function_length: ("def f():\n" + "    x = 1\n" * FUNCTION_LINES,),
    nesting: ("def f():\n if a:\n  pass\n else:\n  if b:\n   for c in d:\n    with e:\n     pass",),
    parameter_count: ("def f(a, b, c, d, *e, f, g): pass", "class A:\n def f(self, a, b, c, d, e, f, g): pass",
                      "@f.register_autograd\ndef f(a, b, c, d, e, f, g): pass"),
    annotations: ("class A:\n def f(self, a: int, *b) -> None: pass", "def f(a: int): pass",
                  "@a.register_fake\ndef f(a): pass"),
    docstrings: ("def f():\n" + "    x = 1\n" * UNDOCUMENTED_LINES, "class A: pass"),
    global_statement: ("def f():\n global a",),
    downward: (f"{BAR}\n# 1. A\n{BAR}\ndef f():\n b()\n{BAR}\n# 2. B\n{BAR}\ndef b(): pass",),
    broad_except: ("try: pass\nexcept: pass", "try: pass\nexcept (OSError, Exception): pass"),
    environ_reads: ("import os\nos.environ, os.environ, os.getenv('A')", "from os import environ\nenviron, environ"),
    lenient_strict: ("model.load_state_dict(state, strict=False)",),
    config_getattr: ("getattr(self.cfg, name)", "getattr(config, 'a', 0)"),
    unused_imports: ("import a.b", "from c import d as e", "def f():\n import a"),
    unreferenced: ("def f(): f()", "class A: pass", "A = 1", "A: int = 1\n'see A'"),
    unread_fields: ("class Config:\n a: int", "class Config:\n a: int\n def validate(self): self.a", "x = 1"),
    banners: (f'"""\n    1. A\n"""\n{BAR}\n# 1. B\n{BAR}', f'"""\n    2. A\n"""\n{BAR}\n# 2. A\n{BAR}',
              f"{BAR}\n# 1. A\n{BAR}"),
}
TOOL_CHECKS = (function_length, line_width, broad_except)

CLEAN = f'''"""Title.

    1. Configuration
    2. main
"""
import os

{BAR}
# 1. Configuration
{BAR}

class Config:
    """Fields."""

    size: int

{BAR}
# 2. main
{BAR}

@triton.jit
def kernel(a, b, c, d, e, f, g):
    pass


@torch.library.custom_op("a::operator", mutates_args=())
def one(a: int, b: int, c: int, d: int, e: int, f: int, g: int) -> None:
    pass


@operator
def same(a: int, b: int, c: int, d: int, e: int, f: int, g: int) -> None:
    pass


def main(a: int, b: int, c: int, *, d: int, e: int, f: int) -> "Config":
    if a:
        pass
    elif b:
        pass
    elif c:
        for _ in (kernel, one, same):
            with d:
                return os.environ.size


main()
'''


needs_script = pytest.mark.skipif(not SCRIPT.exists(), reason="train_gpt.py is not written yet")


def assert_clean(path: Path, check: Finder) -> None:
    """Fail with every place in `path` that breaks the rule."""
    places = list(check(Source(path.read_text(encoding="utf-8"))))
    assert not places, f"{path.relative_to(ROOT)}, {check.__name__}:\n  " + "\n  ".join(places)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_checks_act(check: Finder) -> None:
    """Every check finds what is wrong with its snippets and nothing in CLEAN."""
    assert all(list(check(Source(snippet))) for snippet in CHECKS[check])
    assert list(check(Source(CLEAN))) == []


@needs_script
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_script(check: Finder) -> None:
    """train_gpt.py keeps the rule."""
    assert_clean(SCRIPT, check)


@pytest.mark.parametrize("check", TOOL_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("path", TOOLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_tools(path: Path, check: Finder) -> None:
    """The tools keep the rules that matter most to their readers."""
    assert_clean(path, check)


# What importing could leave behind, as name -> expression; evaluated before and after the import.
STATE = {
    "process group": "torch.distributed.is_initialized()",
    "CUDA context": "torch.cuda.is_initialized()",
    "threads": "threading.active_count()",
    "environment": "sorted(os.environ.items())",
    "torch settings": "[str(torch.get_default_dtype()), torch.get_float32_matmul_precision(), torch.initial_seed(), "
                      "torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled()]",
}
IMPORT = f"""
import json, os, sys, threading, numpy, torch, torch.distributed
state = lambda: {{name: eval(text) for name, text in {STATE!r}.items()}}
before = state()
import train_gpt
after = state()
print(json.dumps([name for name in before if before[name] != after[name]]))
"""


@needs_script
def test_import_has_no_side_effects(tmp_path: Path) -> None:
    """Importing train_gpt prints, writes, starts and changes nothing, and reads no variables (MATRX_LR is a typo)."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "MATRX_LR": "1", "SEED": "none"}
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=tmp_path, env=env, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (done.stdout, done.stderr) == ("[]\n", ""), "printed, or changed what is listed"
    assert list(tmp_path.iterdir()) == []
