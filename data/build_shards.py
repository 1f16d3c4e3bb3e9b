#!/usr/bin/env python3
"""Turn your own text into a tokenizer and challenge-format shards, and check that every byte is accounted for.

Usage:
    python3 data/build_shards.py --train docs.jsonl.zst --name fineweb10B_sp1024 --train-tokenizer 1024
    python3 data/build_shards.py --train a.parquet texts/ --val b.jsonl --name mine_sp4096 --tokenizer sp4096.model
    python3 data/build_shards.py --train docs.jsonl --name mine_caseops --train-tokenizer 8192 --caseops

Inputs: files or folders of .txt (one document each), .jsonl, .jsonl.gz, .jsonl.xz, .jsonl.zst (one JSON object a line)
and .parquet. Without --val the first --val-docs documents of --train are the validation split. Output under --out:
datasets/<name>/fineweb_{train,val}_%06d.bin, tokenizers/fineweb_<V>_bpe.{model,vocab} and manifest.json. The dataset
folder appears only when the build has succeeded. A tokenizer with case marks (caseops.py) gets marked text, and the
validation shards a sidecar, fineweb_val_bytes_%06d.bin, with the bytes of the original text for each token.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import sentencepiece

import caseops
import console
import shards

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.xz", ".jsonl.zst", ".parquet")
BATCH_BYTES = 1_000_000  # enough work for a worker to hide the cost of handing it over
MAX_VOCAB = 65_536  # ids are stored in 16 bits, and so are the bytes of a token


class BuildError(Exception):
    """A problem with the inputs or options; the message names file and line where there is one."""


@dataclasses.dataclass
class Totals:
    """Counts of one split. text_bytes: utf-8 of the input; token_bytes: what the tokens decode to; unknown: tokens."""

    docs: int = 0
    tokens: int = 0
    text_bytes: int = 0
    token_bytes: int = 0
    checked: int = 0
    unknown: int = 0
    files: int = 0

    def plus(self, other: Totals) -> Totals:
        """Sum of two counts."""
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other))
        return Totals(*(first + second for first, second in pairs))


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What a worker returns: ids uint16 [n] of a batch of documents, their sidecar uint16 [n] if asked, its counts."""

    ids: np.ndarray
    sidecar: np.ndarray
    totals: Totals


class Batch(NamedTuple):
    """What a worker gets: documents, how many of them to decode again, and whether a sidecar is wanted."""

    texts: list[str]
    check: int
    with_sidecar: bool


# ---------------------------------------------------------------------------------------------- reading documents


def input_files(paths: list[Path]) -> list[Path]:
    """Files to read, in order; folders are searched for known suffixes in sorted order."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += sorted(item for item in path.rglob("*") if item.is_file() and item.name.endswith(SUFFIXES))
        elif not path.exists():
            raise BuildError(f"{path}: no such file or folder")
        elif not path.name.endswith(SUFFIXES):
            raise BuildError(f"{path}: unknown kind of file; known are {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    if not files:
        raise BuildError(f"no input files in {', '.join(map(str, paths))}; known are {', '.join(SUFFIXES)}")
    return files


def open_lines(path: Path) -> BinaryIO:
    """Decompressed byte stream of a .jsonl file."""
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.endswith(".xz"):
        return lzma.open(path, "rb")
    if path.name.endswith(".zst"):
        try:
            import zstandard
        except ImportError as error:
            raise BuildError(f"{path}: reading it needs the zstandard package") from error
        reader = zstandard.ZstdDecompressor().stream_reader(open(path, "rb"), read_across_frames=True, closefd=True)
        return io.BufferedReader(reader)
    return open(path, "rb")


def read_jsonl(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """(place, text) of each line that is not blank."""
    with open_lines(path) as lines:
        # Splitting bytes at "\n" keeps U+2028 and "\r" inside a document where they belong.
        for number, line in enumerate(lines, 1):
            place = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise BuildError(f"{place}: not a line of JSON in utf-8 ({error})") from error
            text = record.get(field) if isinstance(record, dict) else None
            if not isinstance(text, str):
                keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise BuildError(f"{place}: no text field {field!r} (it has: {keys}); see --text-field")
            yield place, text


def read_parquet(path: Path, field: str) -> Iterator[tuple[str, str]]:
    """(place, text) of each row."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise BuildError(f"{path}: reading it needs the pyarrow package") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            if field not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names)
                raise BuildError(f"{path}: no text field {field!r} (it has: {names}); see --text-field")
            number = itertools.count(1)
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                yield from ((f"{path}: row {next(number)}", text) for text in batch.column(0).to_pylist())
    except pyarrow.ArrowException as error:
        raise BuildError(f"{path}: not a readable parquet file ({error})") from error


def read_text(path: Path) -> Iterator[tuple[str, str]]:
    """(place, text) of a .txt file: one document."""
    try:
        yield str(path), path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BuildError(f"{path}: not utf-8 ({error})") from error


def decode_errors() -> tuple[type[Exception], ...]:
    """What the decompressors raise on damaged or cut files."""
    with contextlib.suppress(ImportError):
        import zstandard
        return (EOFError, OSError, lzma.LZMAError, zstandard.ZstdError)
    return (EOFError, OSError, lzma.LZMAError)


def read_documents(files: list[Path], field: str) -> Iterator[str]:
    """Clean, non-empty documents of all files in order."""
    for path in files:
        if path.name.endswith(".txt"):
            rows = read_text(path)
        elif path.name.endswith(".parquet"):
            rows = read_parquet(path, field)
        else:
            rows = read_jsonl(path, field)
        try:
            yield from (text for place, raw in rows if (text := clean(place, raw)))
        except decode_errors() as error:
            raise BuildError(f"{path}: cannot be read or decompressed ({error or type(error).__name__})") from error


def clean(place: str, text: object) -> str:
    """The same preparation as the official export; empty documents come out as ''."""
    if not isinstance(text, str):
        raise BuildError(f"{place}: the text field holds {type(text).__name__}, not text")
    text = text.replace("\x00", " ").strip()
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BuildError(f"{place}: text holds half of a surrogate pair, which has no utf-8 form ({error})") from error
    return text


# ------------------------------------------------------------------------------------------------------ tokenizer


def train_tokenizer(documents: Iterable[str], vocab_size: int, max_bytes: int, marks: str = "") -> bytes:
    """Train a BPE model with the challenge's settings on the first max_bytes of text; returns the model file.

    marks: characters that are pieces of their own, right after the special ones.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=first_bytes(documents, max_bytes),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            pad_id=0,
            bos_id=shards.BOS_ID,
            eos_id=2,
            unk_id=3,
            user_defined_symbols=list(marks),
            hard_vocab_limit=False,
            max_sentence_length=2**30,  # a sentence is a whole document here; the default would drop long ones
            num_threads=1,  # the result must not depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        raise BuildError(f"tokenizer training failed: {error}; is the text enough for {vocab_size} pieces?") from error
    return model.getvalue()


def first_bytes(documents: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Documents until their utf-8 size reaches max_bytes."""
    seen = 0
    for text in documents:
        if seen >= max_bytes:
            return
        seen += len(text.encode())
        yield text


def load_processor(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    """Processor of a model that fits the shard format."""
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise BuildError(f"{name}: not a SentencePiece model ({error})") from error
    if processor.vocab_size() > MAX_VOCAB:
        raise BuildError(f"{name}: {processor.vocab_size()} pieces, but ids have 16 bits")
    if processor.bos_id() != shards.BOS_ID:
        raise BuildError(f"{name}: BOS id {processor.bos_id()}, the shard format needs {shards.BOS_ID}")
    if processor.piece_to_id("\u2581") == processor.unk_id():
        raise BuildError(f"{name}: no piece for a lone space; byte counts would be wrong by up to 20%")
    return processor


def tokenizer_path(model: bytes, folder: Path, overwrite: bool) -> Path:
    """Where the model belongs, under its official name; another one that is there already is an error."""
    processor = load_processor(model, "tokenizer")
    target = folder / f"fineweb_{processor.vocab_size()}_bpe{suffix_of(processor)}.model"
    if target.exists() and target.read_bytes() != model and not overwrite:
        raise BuildError(f"{target} is another tokenizer that other shards may need; see --overwrite, or another --out")
    return target


def suffix_of(processor: sentencepiece.SentencePieceProcessor) -> str:
    """What the names of tokenizers and datasets with case marks end with."""
    return f"_{caseops.TRANSFORM}_reserved" if caseops.knows_marks(processor) else ""


def save_tokenizer(model: bytes, target: Path) -> None:
    """Write .model and .vocab."""
    processor = load_processor(model, "tokenizer")
    with shards.replacing(target) as file:
        file.write(model)
    lines = (f"{processor.id_to_piece(i)}\t{processor.get_score(i):g}\n" for i in range(processor.vocab_size()))
    with shards.replacing(target.with_suffix(".vocab")) as file:
        file.write("".join(lines).encode())


# ------------------------------------------------------------------------------------------------------- encoding


class Encoder:
    """Documents to ids, with byte accounting."""

    def __init__(self, model: bytes) -> None:
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.table = shards.byte_table(self.processor)
        self.is_marked = caseops.knows_marks(self.processor)
        pieces = map(self.processor.id_to_piece, range(self.processor.vocab_size()))
        self.sizes = np.array([1 if self.processor.is_byte(i) else len(p.encode()) for i, p in enumerate(pieces)])
        # By default SentencePiece puts a space before each text and drops it again when it decodes.
        self.before, _, self.after = self.processor.normalize("a").partition("a")

    def encode(self, batch: Batch) -> Encoded:
        """BOS and ids of each text; the first `check` texts are decoded again and compared byte for byte."""
        texts = [self._marked(text) for text in batch.texts] if self.is_marked else batch.texts
        rows = self.processor.encode(texts, out_type=int, num_threads=1)
        ids = np.array([index for row in rows for index in (shards.BOS_ID, *row)], dtype=np.uint16)
        for text, row in zip(texts[:batch.check], rows):
            self._check(text, row)
        text_bytes, sidecar = sum(len(text.encode()) for text in batch.texts), ids[:0]
        if batch.with_sidecar and self.is_marked:
            sidecar = np.concatenate([self._original_bytes(text, row) for text, row in zip(texts, rows)])
            assert int(sidecar.sum()) == text_bytes, f"{sidecar.sum()} bytes in the sidecar, {text_bytes} in the text"
        # BOS is a boundary, so the sum over the batch equals the sum over its documents.
        counted = text_bytes if self.is_marked else self.table.count(ids)
        unknown = int(np.count_nonzero(ids == self.processor.unk_id()))
        checked = min(batch.check, len(texts))
        return Encoded(ids, sidecar, Totals(len(texts), len(ids), text_bytes, counted, checked, unknown))

    def _marked(self, text: str) -> str:
        """The text with case marks, from which it was restored."""
        marked = caseops.mark_case(text)
        if caseops.restore_case(marked) != text:
            raise BuildError(f"case marks do not give back the document that begins {text[:60]!r}; please report this")
        return marked

    def _original_bytes(self, marked: str, row: list[int]) -> np.ndarray:
        """Sidecar of a document, uint16: 0 for BOS, then the bytes of the text without marks for each token."""
        normalized, offsets = self.processor.normalize(marked, with_offsets=True)
        is_inner = (np.frombuffer(normalized.encode(), dtype=np.uint8) & 0xC0) == 0x80  # bytes within a character
        ends = np.cumsum(self.sizes[row]) if row else np.zeros(1, dtype=int)
        if not row or ends[-1] != len(is_inner):
            raise BuildError(f"the tokens do not spell the document that begins {marked[:60]!r}: {ends[-1]} bytes of "
                             f"{len(is_inner)} after normalisation; it cannot be counted, so leave it out")
        characters = np.concatenate(([0], np.cumsum(np.append(~is_inner[1:], True))))[ends]
        counts = caseops.original_bytes(marked, np.asarray(offsets)[characters])
        if counts.max() >= MAX_VOCAB:
            raise BuildError(f"a token stands for {counts.max()} bytes of the document that begins {marked[:60]!r}; "
                             f"the sidecar holds {MAX_VOCAB - 1} at most: shorten its white space")
        return np.concatenate(([0], counts)).astype(np.uint16)

    def _normalized(self, text: str) -> str:
        """What the ids of a text should decode to."""
        normalized = self.processor.normalize(text).removeprefix(self.before).removesuffix(self.after)
        return normalized.replace("\u2581", " ")

    def _check(self, text: str, row: list[int]) -> None:
        counted, unknown = self.table.count(np.array(row, dtype=np.uint16)), row.count(self.processor.unk_id())
        decoded = self.processor.decode(row)
        if unknown or counted != len(decoded.encode()) or decoded != self._normalized(text):
            raise BuildError(
                f"byte check failed: {len(decoded.encode())} bytes decoded, {counted} counted, {unknown} unknown "
                f"tokens in the document that begins {text[:60]!r}; a tokenizer needs byte fallback and must not add "
                "to the text or take from it"
            )


_worker: list[Encoder] = []  # one per worker process; building it for each batch would cost more than the batch


def start_worker(model: bytes) -> None:
    """Initializer of a worker process."""
    console.follow_parent()
    _worker.append(Encoder(model))


def encode_batch(batch: Batch) -> Encoded:
    """Task of a worker process."""
    return _worker[0].encode(batch)


def batches(documents: Iterable[str], check_docs: int, with_sidecar: bool) -> Iterator[Batch]:
    """Batches of about BATCH_BYTES; of all documents the first check_docs are decoded again."""
    batch: list[str] = []
    size = 0
    for text in documents:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield Batch(batch, min(check_docs, len(batch)), with_sidecar)
            check_docs -= min(check_docs, len(batch))
            batch, size = [], 0
    if batch:
        yield Batch(batch, min(check_docs, len(batch)), with_sidecar)


def encode_all(work: Iterable[Batch], model: bytes, workers: int) -> Iterator[Encoded]:
    """Encode batches in order. Only a few are in flight, so memory stays bounded however large the input is."""
    if workers == 1:
        encoder = Encoder(model)
        yield from map(encoder.encode, work)
        return
    pool = ProcessPoolExecutor(workers, initializer=start_worker, initargs=(model,))
    pending: deque[Future[Encoded]] = deque()
    try:
        for item in work:
            pending.append(pool.submit(encode_batch, item))
            if len(pending) >= 3 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise BuildError("a worker process died, probably for lack of memory; try fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def write_split(split: str, documents: Iterable[str], model: bytes, folder: Path, args: argparse.Namespace) -> Totals:
    """Encode and write one split; returns its counts. All validation documents are checked: scores are per byte."""
    totals, started = Totals(), time.monotonic()
    settings = args.shard_tokens, hashlib.sha256(model).digest()
    check_docs = sys.maxsize if split == "val" and args.check_docs else args.check_docs
    work = batches(documents, check_docs, with_sidecar=split == "val")
    with (shards.ShardWriter(folder, split, *settings) as writer,
          shards.ShardWriter(folder, f"{split}_bytes", *settings) as sidecar):
        for encoded in encode_all(work, model, args.workers):
            writer.add(encoded.ids)
            sidecar.add(encoded.sidecar)
            totals = totals.plus(encoded.totals)
            if writer.files > totals.files:
                totals.files = writer.files
                console.say(f"{split}: {writer.tokens} tokens written, {time.monotonic() - started:.1f} s")
    totals.files = writer.files
    if totals.docs:
        console.say(f"{split}: {totals.docs} docs, {totals.text_bytes} text bytes, {totals.token_bytes} bytes after "
                    f"normalisation, {totals.tokens} tokens, {totals.token_bytes / totals.tokens:.4f} bytes/token, "
                    f"{totals.files} shards, {totals.checked} docs checked byte for byte, "
                    f"{time.monotonic() - started:.1f} s")
    if sidecar.files:
        console.say(f"{split}: case marks undone in every document, {totals.text_bytes} text bytes in the sidecar")
    if totals.unknown:
        console.say(f"warning: {totals.unknown} unknown tokens in {split}: without byte fallback text is lost")
    return totals


# --------------------------------------------------------------------------------------------------------- splits


def digest(text: str) -> bytes:
    """Short hash of a document; with 10**7 documents a chance collision has odds of about 1 in 10**5."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


class Split:
    """Hands out validation documents and then train documents, and looks for those in both."""

    def __init__(self, on_overlap: str) -> None:
        self.on_overlap = on_overlap  # "error", "drop" or "allow"
        self.overlap = 0
        self.documents_sha256 = hashlib.sha256()
        self._val: set[bytes] = set()

    def val(self, documents: Iterable[str]) -> Iterator[str]:
        """Pass validation documents on and remember them."""
        for text in documents:
            self._val.add(digest(text))
            self.documents_sha256.update(text.encode() + b"\n")
            yield text

    def train(self, documents: Iterable[str]) -> Iterator[str]:
        """Pass train documents on; once an overlap makes the build fail, only go on counting."""
        for text in documents:
            if digest(text) in self._val:
                self.overlap += 1
                if self.on_overlap != "allow":
                    continue
            if self.overlap and self.on_overlap == "error":
                continue
            self.documents_sha256.update(text.encode() + b"\n")
            yield text


def open_splits(args: argparse.Namespace) -> tuple[Iterator[str], Iterator[str]]:
    """(val, train) documents. With one input they share an iterator: read val to its end first."""
    train = read_documents(input_files(args.train), args.text_field)
    if args.val:
        return read_documents(input_files(args.val), args.text_field), train
    return itertools.islice(train, args.val_docs), train


def tokenizer_documents(args: argparse.Namespace) -> Iterator[str]:
    """Train documents only: a tokenizer fitted to the validation text would flatter the score."""
    train = read_documents(input_files(args.train), args.text_field)
    return train if args.val else itertools.islice(train, args.val_docs, None)


# ------------------------------------------------------------------------------------------------------- manifest


def entry_of(items: list[dict[str, Any]], entry: dict[str, Any]) -> list[dict[str, Any]]:
    """Items with the entry added, or put in the place of the one with the same name."""
    return [item for item in items if item["name"] != entry["name"]] + [entry]


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest so far; empty if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise BuildError(f"{path}: not JSON ({error}); remove it or choose another --out") from error


def write_manifest(args: argparse.Namespace, built: Built) -> None:
    """Add this dataset and its tokenizer to <out>/manifest.json, in the layout of the hub's manifest."""
    stem = built.tokenizer.stem
    vocab_size = int(stem.split("_")[1])
    path = args.out / "manifest.json"
    manifest = read_manifest(path)
    val, train = built.totals["val"], built.totals["train"]
    suffix = stem.removeprefix(f"fineweb_{vocab_size}_bpe")
    ids = {"vocab_size": vocab_size, "bos_id": shards.BOS_ID, "eos_id": 2,
           "recommended_bigram_vocab_size": -(-vocab_size // 128) * 128 * 5}
    kind, folder = "sentencepiece_bpe", f"datasets/{args.name}"
    name, marks = f"sp_bpe_{vocab_size}{suffix}", {}
    if suffix:
        marks = {"text_transform": caseops.TRANSFORM, "reserve_text_transform_controls": True}
    tokenizer = {"name": name, "kind": kind, **ids, **marks,
                 "source_spec": {"name": name, "vocab_size": vocab_size, **marks},
                 "model_path": f"tokenizers/{stem}.model", "vocab_path": f"tokenizers/{stem}.vocab",
                 "tokenizer_sha256": built.tokenizer_sha256}
    stats = {}
    for unit in ("docs", "files", "tokens"):
        counts = {"val": getattr(val, unit), "train": getattr(train, unit)}
        stats.update({f"{unit}_total": sum(counts.values()), **{f"{unit}_{key}": n for key, n in counts.items()}})
    dataset = {"name": args.name, "tokenizer_name": tokenizer["name"], "tokenizer_kind": kind, "path": folder,
               "train_glob": f"{folder}/fineweb_train_*.bin", "val_glob": f"{folder}/fineweb_val_*.bin", **ids,
               "tokenizer_sha256": built.tokenizer_sha256, "stats": stats}
    if suffix:
        dataset["val_bytes_glob"] = f"{folder}/fineweb_val_bytes_*.bin"
    shards.write_json(path, {
        "version": "custom", "num_docs": stats["docs_total"], "num_val_docs": val.docs, "shuffle_seed": None,
        "shard_size": args.shard_tokens, "append_eos": False, "docs_jsonl": None,
        "docs_meta": {"remote_repo_id": None, "remote_root": None, "num_docs": stats["docs_total"],
                      "docs_sha256": None, "source_manifest": None, "source_sidecar": None,
                      "documents_sha256": built.documents_sha256,
                      "inputs": [str(item) for item in [*args.val, *args.train]]},
        "tokenizer_specs": entry_of(manifest.get("tokenizer_specs", []), tokenizer["source_spec"]),
        "tokenizers": entry_of(manifest.get("tokenizers", []), tokenizer),
        "datasets": entry_of(manifest.get("datasets", []), dataset),
    })


# ----------------------------------------------------------------------------------------------------------- main


def parse_args(arguments: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--train", type=Path, nargs="+", required=True, help="files or folders")
    add("--val", type=Path, nargs="+", default=[], help="files or folders of the validation split")
    add("--val-docs", type=int, help="without --val: the first N documents of --train are val (default 50000)")
    add("--out", type=Path, default=Path(__file__).resolve().parent, help="data folder (default: that of this script)")
    add("--name", required=True, help="dataset name, for example fineweb10B_sp1024")
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", type=Path, help="SentencePiece .model to use")
    tokenizer.add_argument("--train-tokenizer", type=int, metavar="V", help="train one with V pieces on train text")
    add("--caseops", action="store_true", help="case marks: train a tokenizer with them; one that has them uses them")
    add("--tokenizer-mb", type=float, default=256.0, help="text to train it on, in 10**6 bytes (default 256)")
    add("--shard-tokens", type=int, default=100_000_000, help="tokens a shard (default 100000000)")
    add("--text-field", default="text", help="JSON key or parquet column (default text)")
    add("--check-docs", type=int, default=1000, help="train documents to check byte for byte (1000; 0: nor val)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes; the result does not depend on it")
    overlap = parser.add_mutually_exclusive_group()
    overlap.add_argument("--allow-overlap", dest="on_overlap", action="store_const", const="allow", default="error",
                         help="keep train documents that are also in val")
    overlap.add_argument("--drop-overlap", dest="on_overlap", action="store_const", const="drop",
                         help="leave out train documents that are also in val")
    add("--overwrite", action="store_true", help="replace shards and tokenizer of the same name")
    args = parser.parse_args(arguments)
    if args.val and args.val_docs is not None:
        parser.error("--val and --val-docs exclude each other")
    args.val_docs = 50_000 if args.val_docs is None else args.val_docs
    if min(args.val_docs, args.shard_tokens, args.workers, args.tokenizer_mb) <= 0 or args.check_docs < 0:
        parser.error("--val-docs, --shard-tokens, --workers and --tokenizer-mb must be positive, --check-docs >= 0")
    if not args.name or args.name.startswith(".") or Path(args.name).name != args.name:
        parser.error("--name must be a plain folder name")
    return args


def get_model(args: argparse.Namespace) -> bytes:
    """The given tokenizer model, or a new one."""
    if args.tokenizer:
        if not args.tokenizer.is_file():
            raise BuildError(f"{args.tokenizer}: no such tokenizer")
        model = args.tokenizer.read_bytes()
        if args.caseops and not caseops.knows_marks(load_processor(model, str(args.tokenizer))):
            raise BuildError(f"{args.tokenizer}: no pieces for case marks; leave out --caseops or take another one")
        return model
    started = time.monotonic()
    documents = tokenizer_documents(args)
    first = next(documents, None)
    if first is None:
        raise BuildError("no train documents to train a tokenizer on" + too_few(args))
    documents, size = itertools.chain([first], documents), int(args.tokenizer_mb * 1e6)
    if args.caseops:
        model = train_tokenizer(map(caseops.mark_case, documents), args.train_tokenizer, size, caseops.MARKS)
    else:
        model = train_tokenizer(documents, args.train_tokenizer, size)
    console.say(f"tokenizer: {args.train_tokenizer} pieces trained, {time.monotonic() - started:.1f} s")
    return model


def too_few(args: argparse.Namespace) -> str:
    """Hint for an empty split."""
    return "" if args.val else f"; the input has no more than the {args.val_docs} documents of --val-docs"


@dataclasses.dataclass(frozen=True)
class Built:
    """What a build has made: path of the tokenizer, hashes in hex, and the counts by split."""

    tokenizer: Path
    tokenizer_sha256: str
    documents_sha256: str
    totals: dict[str, Totals]


def build(args: argparse.Namespace, staging: Path) -> Built:
    """Write shards to the staging folder, and the tokenizer once they are complete."""
    model = get_model(args)
    load_processor(model, str(args.tokenizer or "the new tokenizer"))
    tokenizer = tokenizer_path(model, args.out / "tokenizers", args.overwrite)
    val, train = open_splits(args)
    split = Split(args.on_overlap)
    streams = {"val": split.val(val), "train": split.train(train)}  # lazy, and val comes first
    totals = {name: write_split(name, texts, model, staging, args) for name, texts in streams.items()}
    if split.overlap:
        console.say(f"overlap: {split.overlap} train documents are also in val ({args.on_overlap})")
    if split.overlap and args.on_overlap == "error":
        raise BuildError(f"{split.overlap} train documents are also in val; see --drop-overlap and --allow-overlap")
    for name, counts in totals.items():
        if not counts.docs:
            raise BuildError(f"no documents in the {name} split" + (too_few(args) if name == "train" else ""))
    save_tokenizer(model, tokenizer)
    return Built(tokenizer, hashlib.sha256(model).hexdigest(), split.documents_sha256.hexdigest(), totals)


def settle(target: Path) -> Path:
    """Finish or undo what publish() may have left half done; returns the older dataset's other name."""
    older = target.with_name(f".{target.name}.older")
    if older.exists() and not target.exists():
        os.replace(older, target)
    shutil.rmtree(older, ignore_errors=True)
    return older


def publish(staging: Path, target: Path) -> None:
    """Let the finished dataset take the place of an older one, which is there until then."""
    shards.claim_folder(staging, "build_shards.py")
    if target.exists():
        os.replace(target, settle(target))
    os.replace(staging, target)


@contextlib.contextmanager
def staging_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside the target for this process alone; it is gone afterwards.

    The system drops the lock when a process dies, so that what a killed build left is known to be nobody's.
    """
    staging, lock = target.with_name(f".{target.name}.building"), target.with_name(f".{target.name}.lock")
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_owner = lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat())
        except BlockingIOError:
            is_owner = False
        except OSError as error:  # some network file systems have no locks
            console.warn(f"warning: cannot lock {lock} ({error.strerror}): run no other build of this name meanwhile")
            is_owner = True
        if not is_owner:
            raise BuildError(f"another build of {target} is running, or was until now")
        try:
            shutil.rmtree(staging, ignore_errors=True)
            settle(target)
            staging.mkdir()
            yield staging
        finally:
            settle(target)
            shutil.rmtree(staging, ignore_errors=True)
            lock.unlink(missing_ok=True)


def run(args: argparse.Namespace) -> None:
    """Build into a staging folder and publish it if all went well."""
    named = args.out / "datasets" / args.name
    target = named.resolve()  # a link to another disk stays one
    read_manifest(args.out / "manifest.json")  # a broken one is found before the work, not after it
    with staging_folder(target) as staging:
        if target.exists() and any(target.iterdir()) and not args.overwrite:
            raise BuildError(f"{target} is not empty; old and new shards must not mix, see --overwrite")
        built = build(args, staging)
        publish(staging, target)
    try:
        write_manifest(args, built)
    except OSError as error:
        raise BuildError(f"the shards are complete, but {args.out}/manifest.json cannot be written: {error}") from error
    val, train = built.totals["val"], built.totals["train"]
    console.say(f"fingerprint: train_shards: {train.files} val_tokens: {val.tokens} val_docs: {val.docs} "
                f"documents_sha256: {built.documents_sha256[:16]} tokenizer_sha256: {built.tokenizer_sha256[:16]}")
    console.say(f"DATA_PATH={named} TOKENIZER_PATH={built.tokenizer}")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    args = parse_args(arguments)
    try:
        run(args)
    except BuildError as error:
        console.warn(f"error: {error}")
        return 1
    except OSError as error:
        console.warn(f"error: {error}; check space and rights of {args.out}; older data is untouched")
        return 1
    except KeyboardInterrupt as stop:
        console.warn("interrupted; a dataset takes its place only when it is complete")
        return console.exit_status(stop)
    return 0


if __name__ == "__main__":
    sys.exit(console.run_tool(main))
