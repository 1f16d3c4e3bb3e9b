"""Shard files and byte counting: the one place where the data tools spell out the format.

A shard is 256 little-endian int32 header words (magic, version, token count, eight words with the SHA-256 of the
tokenizer's .model file, zeros) and then uint16 token ids, so its size is exactly 1024 + 2 * count bytes. The official
reader looks at the first three words only; in official shards the hash is zero, that is, unknown. Documents start with
BOS and run on across shard borders.

Usage:
    count = read_header(path).count              # raises ShardError for anything but a complete shard
    tokens = read_tokens(path)                   # read-only memory map of uint16
    with ShardWriter(folder, "train", 100_000_000, sha256_of_the_model) as writer:
        writer.add(ids)
    table = byte_table(sentencepiece_processor)
    text_bytes = table.count(ids)
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_BYTES = 1024
TOKEN_BYTES = 2
BOS_ID = 1
SHARD_NAME = re.compile(r"fineweb_(train|val|val_bytes)_(\d{6})\.bin")
LIKE_A_SHARD = re.compile(r"(?!\.).*fineweb_(train|val).*\.bin", re.IGNORECASE)
SOURCE_FILE = ".source"
TOKENIZER_FILE = ".tokenizer.sha256"
UNKNOWN_TOKENIZER = bytes(32)


class ShardError(ValueError):
    """A file that is not a complete shard, or a folder whose shards do not belong together."""


class Header(NamedTuple):
    """What a shard says of itself: tokens, and SHA-256 of the tokenizer's .model (zeros: unknown)."""

    count: int
    tokenizer_sha256: bytes


def shard_name(split: str, index: int) -> str:
    """File name of one shard; split is train, val or val_bytes (the CaseOps byte sidecar)."""
    return f"fineweb_{split}_{index:06d}.bin"


def find_shards(folder: Path, split: str) -> list[Path]:
    """Shards of one split, sorted, some of which may be missing still. fineweb_val_* would match byte sidecars too."""
    if not folder.is_dir():
        return []
    matches = ((SHARD_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted(path for match, path in matches if match and match.group(1) == split)


def list_shards(folder: Path, split: str) -> list[Path]:
    """Shards of one split, sorted; ShardError if one is missing, or a copy or remnant of one lies beside them."""
    found = find_shards(folder, split)
    for index, path in enumerate(found):
        if path.name != shard_name(split, index):
            raise ShardError(f"{folder}: {shard_name(split, index)} is missing, but {path.name} is there; fetch or "
                             "build the shards again")
    for path in sorted(folder.iterdir() if folder.is_dir() else ()):
        if LIKE_A_SHARD.fullmatch(path.name) and not SHARD_NAME.fullmatch(path.name):
            raise ShardError(f"{path} looks like a shard, but is not named like one ({shard_name(split, 0)}); readers "
                             "with a looser pattern would count it: remove it or move it elsewhere")
    return found


def pack_header(count: int, tokenizer_sha256: bytes) -> bytes:
    """The 1,024 header bytes of a shard with `count` tokens."""
    return (struct.pack("<3i", MAGIC, VERSION, count) + tokenizer_sha256).ljust(HEADER_BYTES, b"\0")


def read_header(path: Path) -> Header:
    """Check magic, version and size; return the rest."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    if len(head) < HEADER_BYTES:
        raise ShardError(f"{path}: {size} bytes, shorter than the {HEADER_BYTES} byte header")
    magic, version, count = struct.unpack_from("<3i", head)
    if magic != MAGIC or version != VERSION:
        raise ShardError(f"{path}: magic {magic} version {version}, expected {MAGIC} version {VERSION}")
    expected = HEADER_BYTES + TOKEN_BYTES * count
    if count < 0 or size != expected:
        raise ShardError(f"{path}: {size} bytes, but its header promises {count} tokens = {expected} bytes")
    return Header(count, head[12:44])


def read_tokens(path: Path) -> np.ndarray:
    """Token ids of one checked shard, uint16 [count], mapped rather than loaded."""
    count = read_header(path).count
    if count == 0:  # an empty range cannot be mapped
        return np.zeros(0, dtype="<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))


def count_documents(paths: list[Path], bos_id: int = BOS_ID) -> int:
    """Number of BOS tokens over the given shards, which is the number of documents."""
    return sum(int(np.count_nonzero(read_tokens(path) == bos_id)) for path in paths)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary neighbour of `path` for writing; it takes the final name only if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON in one step."""
    with replacing(path) as file:
        # A file name that is not utf-8 holds surrogates, which become escapes that JSON reads back.
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


def claim_folder(folder: Path, source: str) -> None:
    """Record where the shards of a folder come from; refuse to mix two sources, whose val and train may overlap."""
    marker = folder / SOURCE_FILE
    known = marker.read_text(encoding="utf-8").strip() if marker.exists() else source
    has_shards = any(find_shards(folder, split) for split in ("train", "val"))
    if known != source and has_shards:
        raise ShardError(
            f"{folder} holds shards from {known}, not from {source}; mixing them could put validation documents "
            "into the training set. Remove the folder or choose another one."
        )
    with replacing(marker) as file:
        file.write((source + "\n").encode())


def record_tokenizer(folder: Path, model: Path) -> None:
    """Say in TOKENIZER_FILE, as `sha256sum` would, which tokenizer the downloaded shards of a folder belong to.

    ShardError if they came with another one, by that file or by their own headers.
    """
    marker, digest = folder / TOKENIZER_FILE, hashlib.sha256(model.read_bytes()).hexdigest()
    paths = [path for split in ("train", "val", "val_bytes") for path in find_shards(folder, split)]
    known = {read_header(path).tokenizer_sha256 for path in paths} - {UNKNOWN_TOKENIZER}
    others = {value.hex() for value in known} - {digest}
    if marker.exists():
        others |= set(marker.read_text(encoding="utf-8").split()[:1]) - {digest}
    if others:
        raise ShardError(f"{folder} holds shards of the tokenizer with SHA-256 {min(others)}, but that of {model} is "
                         f"{digest}; remove the folder and fetch it again")
    with replacing(marker) as file:
        file.write(f"{digest}  {os.path.relpath(model, folder)}\n".encode("utf-8", "surrogateescape"))


class ShardWriter:
    """Stream token ids into numbered shards; a shard gets its final name only when it is complete."""

    def __init__(self, folder: Path, split: str, shard_tokens: int, tokenizer_sha256: bytes) -> None:
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.tokenizer_sha256 = tokenizer_sha256
        self.files = self.tokens = 0
        self._pending = 0
        self._file: BinaryIO | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        if kind is None:
            self._finish()
        else:
            self._stack.__exit__(kind, *details)

    def add(self, ids: np.ndarray) -> None:
        """Append ids, opening and finishing shards as they fill up."""
        while len(ids):
            if self._file is None:
                self._file = self._stack.enter_context(
                    replacing(self.folder / shard_name(self.split, self.files))
                )
                self._file.write(pack_header(0, self.tokenizer_sha256))
            part, ids = np.split(ids, [self.shard_tokens - self._pending])
            self._file.write(part.astype("<u2").tobytes())
            self._pending += len(part)
            if self._pending == self.shard_tokens:
                self._finish()

    def _finish(self) -> None:
        """Write the final header, which needs the count, and let the shard take its name."""
        if self._file is None:
            return
        self._file.seek(0)
        self._file.write(pack_header(self._pending, self.tokenizer_sha256))
        self._stack.close()
        self.files += 1
        self.tokens += self._pending
        self._file, self._pending = None, 0


@dataclasses.dataclass(frozen=True)
class ByteTable:
    """Text bytes per token: base bytes, plus one for a leading space unless the token before is a boundary.

    base: int32 [vocab]; has_space, is_boundary: bool [vocab]. The space is not part of base: counting it in both
    places inflates the byte count by a sixth and flatters bits per byte.
    """

    base: np.ndarray
    has_space: np.ndarray
    is_boundary: np.ndarray

    def count(self, ids: np.ndarray) -> int:
        """Text bytes of ids [n]; the token before the first one counts as a boundary."""
        before = np.concatenate(([True], self.is_boundary[ids[:-1]]))
        return int(self.base[ids].sum()) + int(np.count_nonzero(self.has_space[ids] & ~before))


def byte_table(processor: Any) -> ByteTable:
    """Byte table of a sentencepiece.SentencePieceProcessor."""
    size = processor.vocab_size()
    base = np.zeros(size, dtype=np.int32)
    has_space, is_boundary = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    for index in range(size):
        if processor.is_control(index) or processor.is_unknown(index) or processor.is_unused(index):
            is_boundary[index] = True
        elif processor.is_byte(index):
            base[index] = 1
        else:
            piece = processor.id_to_piece(index)
            has_space[index] = piece.startswith("\u2581")
            # A "▁" inside a piece also decodes to a one-byte space.
            base[index] = len(piece[int(has_space[index]):].replace("\u2581", " ").encode())
    return ByteTable(base, has_space, is_boundary)
