#!/usr/bin/env python3
"""Gather real English text from the local Python installation, for a demo run without any download.

Usage:
    python3 data/demo_corpus.py --out DIR [--max-mb 24]

Writes DIR/train.jsonl and DIR/val.jsonl, one {"text", "source"} object a line. Sources: the language reference of
pydoc, .rst/.md/.txt files, the long descriptions of installed packages, and docstrings, which are parsed out of the
.py files without importing them. One module or file is one document.

A paragraph is kept if it reads like English: at least 40 characters, of which 70% are ASCII letters or spaces, and at
least one word in eight is among the most common English words. A paragraph that has been seen before is dropped, so
that validation text does not recur in train. A document is kept if 200 characters remain.

The result depends only on the installation: files are ordered by the hash of their path within it, documents by the
hash of their text. The first documents in that order are the validation split, up to 2 MB or 4% of the text.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import dataclasses
import email
import hashlib
import itertools
import json
import os
import re
import sys
import sysconfig
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from pydoc_data import topics
from typing import BinaryIO

import console
import shards

COMMON_WORDS = frozenset(
    "a all also an and any are as at be been but by can do does for from has have how if in into is it its may more "
    "must no not of on one only or other same should so such than that the their them then there these they this to "
    "two used using was we when which will with you your".split()
)
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "test", "tests", "testing"})
LEGAL_NAMES = ("license", "licence", "copying", "notice", "authors", "copyright", "third")
MAX_FILE_BYTES = 1_000_000  # larger ones are tables or generated code
MAX_SOURCE_BYTES = 100_000_000  # of .py files parsed; bounds the time to about 20 s on two cores
CHUNK_FILES = 64
VAL_BYTES = 2_000_000
VAL_SHARE = 0.04


@dataclasses.dataclass(frozen=True)
class Document:
    """Paragraphs of one source; the source is a path within the installation, the same on each machine."""

    source: str
    paragraphs: list[str]

    @property
    def text(self) -> str:
        """The document as one string."""
        return "\n\n".join(self.paragraphs)


def digest(text: str) -> bytes:
    """Hash that orders and compares texts."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()


def is_english(paragraph: str) -> bool:
    """The rule of the module docstring."""
    plain = len(paragraph) - len(re.findall(r"[^A-Za-z\s]", paragraph))
    words = re.findall(r"[A-Za-z']+", paragraph.lower())
    common = sum(word in COMMON_WORDS for word in words)
    return len(paragraph) >= 40 and plain >= 0.7 * len(paragraph) and common * 8 >= len(words)


def paragraphs_of(text: str) -> list[str]:
    """English paragraphs of a text, without trailing spaces."""
    blocks = re.split(r"\n\s*\n", text.replace("\r\n", "\n").replace("\x00", " "))
    cleaned = ("\n".join(line.rstrip() for line in block.splitlines()).strip("\n") for block in blocks)
    return [block for block in cleaned if is_english(block)]


def docstrings(source: bytes) -> Iterator[str]:
    """Docstrings of a module, its classes and functions, in order of appearance."""
    if b'"""' not in source and b"'''" not in source:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""
        # Only blocks are followed: expressions hold no docstrings and are most of the tree.
        blocks = [getattr(node, field, []) for field in ("body", "handlers", "orelse", "finalbody")]
        pending.extend(reversed([child for block in blocks for child in block]))


def read_source(path: Path, name: str) -> Document:
    """The document of one file; without paragraphs if there is no English in it."""
    try:
        raw = path.read_bytes()
    except OSError:  # a file that this user may not read is no reason to stop
        return Document(name, [])
    if path.suffix == ".py":
        text = "\n\n".join(docstrings(raw))
    elif path.name == "METADATA":
        text = str(email.message_from_bytes(raw).get_payload())
    else:
        text = raw.decode("utf-8", errors="replace")
    text = text.encode("utf-8", errors="replace").decode("utf-8")  # escapes may spell half a surrogate pair
    return Document(name, [] if "\ufffd" in text else paragraphs_of(text))


def find_files() -> tuple[list[tuple[Path, str]], list[tuple[Path, str]]]:
    """(prose files, .py files), each as (path, name within the installation), in hash order of the name."""
    places = {"lib": "stdlib", "plat": "platlib", "site": "purelib"}  # the last two are mostly one folder
    roots = {sysconfig.get_path(key): label for label, key in places.items()}
    found = [(path, f"{label}/{path.relative_to(root).as_posix()}")
             for root, label in roots.items() for path in walk(Path(root))]
    found.sort(key=lambda item: digest(item[1]))
    is_code = [path.suffix == ".py" for path, _ in found]
    return list(itertools.compress(found, (not code for code in is_code))), list(itertools.compress(found, is_code))


def walk(root: Path) -> Iterator[Path]:
    """Files below root that may hold English text."""
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in SKIPPED_FOLDERS)
        for name in sorted(names):
            path = Path(folder, name)
            is_text = path.suffix in (".py", ".rst", ".md", ".txt") or name == "METADATA"
            is_wanted = is_text and not name.lower().startswith(LEGAL_NAMES) and not name.startswith("test_")
            if is_wanted and path.is_file() and path.stat().st_size <= MAX_FILE_BYTES:
                yield path


def chunks(files: list[tuple[Path, str]]) -> Iterator[list[tuple[Path, str]]]:
    """Groups of files, until MAX_SOURCE_BYTES are reached."""
    seen = 0
    for start in range(0, len(files), CHUNK_FILES):
        if seen >= MAX_SOURCE_BYTES:
            return
        chunk = files[start : start + CHUNK_FILES]
        seen += sum(path.stat().st_size for path, _ in chunk)
        yield chunk


def read_chunk(chunk: list[tuple[Path, str]]) -> list[Document]:
    """Task of a worker process."""
    return [read_source(path, name) for path, name in chunk]


def read_all(workers: int) -> Iterator[Document]:
    """Documents in a fixed order: language reference, prose, then modules."""
    yield from (Document(f"pydoc/{name}", paragraphs_of(text)) for name, text in sorted(topics.topics.items()))
    prose, code = find_files()
    pool = concurrent.futures.ProcessPoolExecutor(workers, initializer=console.follow_parent)
    try:
        for documents in pool.map(read_chunk, [*chunks(prose), *chunks(code)]):
            yield from documents
    finally:  # the caller stops reading when it has enough
        pool.shutdown(cancel_futures=True)


def unique(documents: Iterable[Document], max_bytes: int) -> list[Document]:
    """Documents without the paragraphs of earlier ones, up to max_bytes in all."""
    seen: set[bytes] = set()
    kept: list[Document] = []
    total = 0
    for document in documents:
        fresh: list[str] = []
        for paragraph in document.paragraphs:
            key = digest(" ".join(paragraph.split()))
            if key not in seen:
                fresh.append(paragraph)
            seen.add(key)
        trimmed = Document(document.source, fresh)
        size = len(trimmed.text.encode("utf-8"))
        if len(trimmed.text) >= 200 and total + size <= max_bytes:
            kept.append(trimmed)
            total += size
        if total >= 0.99 * max_bytes:
            break
    return kept


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """(train, val), whole documents, in hash order of their text."""
    ordered = sorted(documents, key=lambda document: digest(document.text))
    sizes = [len(document.text.encode("utf-8")) for document in ordered]
    limit = min(VAL_BYTES, VAL_SHARE * sum(sizes))
    train: list[Document] = []
    val: list[Document] = []
    used = 0
    for document, size in zip(ordered, sizes):
        is_val = len(train) == 0 and used + size <= limit
        (val if is_val else train).append(document)
        used += size
    return train, val


def write_jsonl(file: BinaryIO, path: Path, documents: list[Document]) -> None:
    """Write one split and print its size."""
    for document in documents:
        record = {"text": document.text, "source": document.source}
        file.write((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))
    size = sum(len(document.text.encode("utf-8")) for document in documents)
    console.say(f"{path}: {len(documents)} documents, {size} text bytes")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and val.jsonl")
    parser.add_argument("--max-mb", type=float, default=24.0, help="limit on the text, in 10**6 bytes (default 24)")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    args = parser.parse_args(arguments)
    if args.max_mb <= 0 or args.workers < 1:
        parser.error("--max-mb must be positive and --workers at least 1")
    try:
        return write_corpus(args)
    except OSError as error:
        console.warn(f"error: {error}; check space and rights of {args.out}")
        return 1
    except KeyboardInterrupt as stop:
        console.warn("interrupted")
        return console.exit_status(stop)


def write_corpus(args: argparse.Namespace) -> int:
    """Gather, split and write; returns the exit status."""
    started = time.monotonic()
    train, val = split(unique(read_all(args.workers), int(args.max_mb * 1e6)))
    if not train or not val:
        console.warn("error: too little English text in this installation; raise --max-mb")
        return 1
    train_path, val_path = args.out / "train.jsonl", args.out / "val.jsonl"
    with shards.replacing(train_path) as train_file, shards.replacing(val_path) as val_file:
        write_jsonl(train_file, train_path, train)  # both or neither: a new half beside an old one could overlap
        write_jsonl(val_file, val_path, val)
    console.say(f"{time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(console.run_tool(main))
