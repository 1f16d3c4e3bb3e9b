"""`python -m records pack train_gpt.py [-o OUT]`: the self-extracting form of a script, for the bytes that count.

Comments, docstrings and blank lines go; every other line stays as it was written, annotations included, because
torch.library.custom_op reads them. The result is one short file that needs nothing but the standard library. When it
starts it registers its source with linecache under its own path, so that @triton.jit, inspect, pdb and tracebacks
find every line, and runs that source as itself: `__name__`, `__file__` (the packed file, whose bytes and digest the
log must show), pickled classes and torch.compile are those of an ordinary script.
"""

from __future__ import annotations

import argparse
import ast
import base64
import io
import lzma
import re
import tokenize
from pathlib import Path

from records import ToolError

# The source starts with as many blank lines as the packed file has lines of its own: a line number then means one
# place, and a traceback through both never shows the text of the wrong one.
STUB = """\
# Packed by `python -m records pack`; `python -m records pack --unpack FILE` shows the source.
__packed__=__import__("lzma").decompress(__import__("base64").b85decode("{payload}")).decode()
__import__("linecache").cache[__file__]=len(__packed__),None,[_+"\\n"for _ in __packed__.split("\\n")],__file__
if __name__=="__main__":__import__("sys").excepthook=__import__("traceback").print_exception
exec(compile(__packed__,__file__,"exec"))
"""
STUB_LINES = STUB.count("\n")
PAYLOAD = re.compile(
    r'^__packed__=__import__\("lzma"\)\.decompress\(__import__\("base64"\)\.b85decode\("([^"\n]*)"\)\)', re.MULTILINE)


# ---------------------------------------------------------------------------------------
# Stripping
# ---------------------------------------------------------------------------------------

def parse(source: str) -> ast.Module:
    """Syntax tree of a script; ToolError where Python cannot read it."""
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise ToolError(f"not a Python script this interpreter understands: {error}") from None


def documented(tree: ast.Module) -> list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Everything with a docstring; nothing in a script that reads `__doc__` somewhere, where they are data."""
    nodes = list(ast.walk(tree))
    if any("__doc__" in (getattr(node, "id", ""), getattr(node, "attr", "")) for node in nodes):
        return []
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    return [node for node in nodes if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None]


def without_docstrings(source: str) -> ast.Module:
    """The tree that stripping must leave: docstrings gone, `pass` where nothing else would be left."""
    tree = parse(source)
    for node in documented(tree):
        node.body = node.body[1:] or ([] if isinstance(node, ast.Module) else [ast.Pass()])
    return tree


def same_code(a: ast.AST, b: ast.AST) -> bool:
    """Equal up to positions."""
    return ast.dump(a) == ast.dump(b)


def cut_docstrings(source: str) -> str:
    """The source with docstrings replaced by nothing (or by `pass`); the number of lines stays."""
    tree = parse(source)
    lines = source.encode().split(b"\n")  # offsets of the syntax tree count bytes
    for node in documented(tree):
        text, alone = node.body[0], len(node.body) == 1 and not isinstance(node, ast.Module)
        first, last = text.lineno - 1, text.end_lineno - 1
        head, tail = lines[first][: text.col_offset], lines[last][text.end_col_offset :]
        if not alone:
            tail = re.sub(rb"^\s*;?\s*", b"", tail)
        lines[first : last + 1] = [head + (b"pass" if alone else b"") + tail, *[b""] * (last - first)]
    return b"\n".join(lines).decode()


def cut_comments(source: str) -> str:
    """The source without comments and blank lines; the lines inside a string are left as they are."""
    lines = source.split("\n")
    inside: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        row, column = token.start
        inside.update(range(row - 1, token.end[0]) if token.end[0] > row else ())
        if token.type == tokenize.COMMENT:
            lines[row - 1] = lines[row - 1][:column].rstrip()
    return "\n".join(line for i, line in enumerate(lines) if i in inside or line.strip()) + "\n"


def strip(source: str) -> str:
    """The same program without comments, docstrings and blank lines; ToolError if it would not be the same."""
    source = re.sub(r"\r\n?", "\n", source.removeprefix("\ufeff"))
    stripped = cut_comments(cut_docstrings(source))
    if not same_code(parse(stripped), without_docstrings(source)):
        raise ToolError("stripping comments and docstrings changed the program: please report the script")
    return stripped


# ---------------------------------------------------------------------------------------
# Packing
# ---------------------------------------------------------------------------------------

def compress(data: bytes) -> bytes:
    """Smallest LZMA form over the number of literal context bits; the 13-byte header spares the stub its settings."""
    settings = {"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "lp": 0, "pb": 0}
    forms = (lzma.compress(data, lzma.FORMAT_ALONE, filters=[{**settings, "lc": bits}]) for bits in range(5))
    return min(forms, key=len)


def pack(source: str) -> str:
    """The self-extracting form of a script."""
    if PAYLOAD.search(source):
        raise ToolError("already packed; give the script it was packed from")
    program = "\n" * STUB_LINES + strip(source)
    return STUB.format(payload=base64.b85encode(compress(program.encode())).decode())


def unpack(packed: str) -> str:
    """The program inside a packed script, without running it; its line numbers are those of tracebacks."""
    match = PAYLOAD.search(packed)
    if match is None:
        raise ToolError("not packed by `python -m records pack`")
    try:
        return lzma.decompress(base64.b85decode(match[1])).decode()
    except (ValueError, lzma.LZMAError) as error:
        raise ToolError(f"packed, but damaged ({error}): pack it again") from None


# ---------------------------------------------------------------------------------------
# Command
# ---------------------------------------------------------------------------------------

def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `pack` takes."""
    parser.add_argument("script", type=Path, help="script to pack, as train_gpt.py")
    parser.add_argument("-o", "--out", type=Path, help="file to write (default: <script>_packed.py beside it)")
    parser.add_argument("--unpack", action="store_true", help="print the source of a packed script (or write OUT)")


def read(path: Path) -> str:
    """A script as text; ToolError says why not."""
    try:
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ToolError(f"{path}: cannot be read as a script ({error})") from None


def write(path: Path, text: str) -> None:
    """The same bytes on every platform."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    except OSError as error:
        raise ToolError(f"{path}: cannot be written ({error})") from None


def run(args: argparse.Namespace) -> int:
    """Pack (or unpack) one script and say what it weighs."""
    source = read(args.script)
    if args.unpack and args.out is None:
        print(unpack(source), end="")
        return 0
    out = args.out or args.script.with_name(f"{args.script.stem}_packed.py")
    if out.resolve() == args.script.resolve():
        raise ToolError(f"{out}: would replace the script itself; name another file with -o")
    result = unpack(source) if args.unpack else pack(source)
    write(out, result)
    if args.unpack:
        print(f"{out}: unpacked")
        return 0
    raw, packed = len(source.encode()), len(result.encode())
    print(f"{out}: raw {raw:,} bytes, stripped {len(strip(source).encode()):,}, packed {packed:,} "
          f"({100 * packed / raw:.1f}%); run and ship this file: its bytes are the ones that count")
    return 0
