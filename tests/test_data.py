"""Shards, the two loaders, and the bytes that tokens stand for."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch

import train_gpt as t
from conftest import VOCAB, tiny_config, write_shard

CPU = torch.device("cpu")
LENGTH = 32


def stream_folder(folder: Path, *sizes: int, split: str = "train") -> np.ndarray:
    """Shards of `sizes` whose tokens are all below VOCAB and tell positions apart; returns all tokens."""
    total = sum(sizes)
    tokens = np.random.default_rng(total).integers(4, VOCAB, total)
    for number, part in enumerate(np.split(tokens, np.cumsum(sizes)[:-1])):
        write_shard(folder / f"fineweb_{split}_{number:06d}.bin", part)
    return tokens


def stream(folder: Path, split: str = "train") -> t.TokenStream:
    return t.TokenStream(tiny_config(DATA_PATH=folder), split)


def loader(folder: Path, rank: int = 0, world: int = 1, **changes: Any) -> t.Loader:
    """A Loader of one of `world` ranks that exist only here."""
    cfg = tiny_config(DATA_PATH=folder, **changes)
    return t.Loader(t.Runtime(cfg, t.Ranks(rank, world, CPU), t.Log(cfg, enabled=False), []))


def with_config(run: t.Runtime, **changes: Any) -> t.Runtime:
    """The same runtime under a changed configuration."""
    return dataclasses.replace(run, cfg=dataclasses.replace(run.cfg, **changes))


# --- shards -------------------------------------------------------------------------------------


def shard_bytes(magic: int = t.SHARD_MAGIC, version: int = 1, promised: int = 10, present: int = 10) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, promised
    return header.tobytes() + np.full(present, 5, "<u2").tobytes()


BROKEN = {
    "empty file": b"",
    "cut in the header": shard_bytes()[:100],
    "header only": shard_bytes(present=0),
    "truncated": shard_bytes(present=9),
    "half a token": shard_bytes()[:-1],
    "longer than promised": shard_bytes(present=11),
    "wrong magic": shard_bytes(magic=20240521),
    "wrong version": shard_bytes(version=2),
    "no tokens": shard_bytes(promised=0, present=0),
    "negative count": shard_bytes(promised=-5, present=0),
    "text": b"<html>429 too many requests</html>" * 100,
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_broken_shards_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    """One bad shard among good ones stops the run at once and is named, whatever is wrong with it."""
    stream_folder(tmp_path, 100, 100)
    bad = tmp_path / "fineweb_train_000001.bin"
    bad.write_bytes(content)
    with pytest.raises(t.UserError, match=bad.name):
        stream(tmp_path)


def test_a_good_shard_is_read_exactly(tmp_path: Path) -> None:
    tokens = np.array([0, 1, 65_535, 7])
    write_shard(tmp_path / "x.bin", tokens)
    assert t.Shard(tmp_path / "x.bin").read(0, len(tokens)).tolist() == tokens.tolist()


def test_a_token_outside_the_vocabulary_names_its_shard(tmp_path: Path) -> None:
    """VOCAB_SIZE itself is the first token that does not exist; one below is the last that does."""
    stream_folder(tmp_path, 50)
    write_shard(tmp_path / "fineweb_train_000001.bin", np.array([5, VOCAB - 1, 6, VOCAB, 7]))
    tokens = stream(tmp_path)
    assert tokens.read(50, 3).tolist() == [5, VOCAB - 1, 6]
    with pytest.raises(t.UserError, match=rf"fineweb_train_000001.*{VOCAB}"):
        tokens.read(48, 7)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_folder_names_the_command(tmp_path: Path, split: str) -> None:
    with pytest.raises(t.UserError, match=r"(?s)nowhere.*cached_challenge_fineweb\.py --variant sp512"):
        stream(tmp_path / "nowhere", split)


def test_byte_sidecars_are_not_taken_for_tokens(tmp_path: Path) -> None:
    """fineweb_val_bytes_* match the pattern of validation shards and sort after some of them."""
    tokens = stream_folder(tmp_path, 30, 20, split="val")
    write_shard(tmp_path / "fineweb_val_bytes_000000.bin", np.full(50, 3))
    assert [s.path.name for s in stream(tmp_path, "val").shards] == ["fineweb_val_000000.bin", "fineweb_val_000001.bin"]
    assert stream(tmp_path, "val").read(0, 50).tolist() == tokens.tolist()


@pytest.mark.parametrize(
    ("start", "count"),
    [(0, 5), (8, 5), (10, 3), (9, 1), (10, 1), (0, 40), (39, 2), (35, 15), (0, 100), (79, 2), (400, 4)],
)
def test_reading_crosses_shards_and_wraps(tmp_path: Path, start: int, count: int) -> None:
    """`read` equals indexing into the endlessly repeated concatenation; int64 for embeddings."""
    tokens = stream_folder(tmp_path, 10, 1, 29)
    got = stream(tmp_path).read(start, count)
    assert got.tolist() == [int(tokens[i % 40]) for i in range(start, start + count)] and got.dtype == np.int64


# --- sequential loader --------------------------------------------------------------------------


class OfficialLoader:
    """The challenge's own loader, written down again: every call takes one span of local tokens + 1 per rank."""

    def __init__(self, shards: list[np.ndarray], world: int) -> None:
        self.shards, self.world, self.file, self.position = shards, world, 0, 0

    def take(self, count: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < count:
            if self.position == len(self.shards[self.file]):
                self.file, self.position = (self.file + 1) % len(self.shards), 0
            taken.append(int(self.shards[self.file][self.position]))
            self.position += 1
        return taken

    def next_batch(self, local_tokens: int) -> list[list[int]]:
        """The span of each rank."""
        chunk = self.take((local_tokens + 1) * self.world)
        return [chunk[r * (local_tokens + 1) : (r + 1) * (local_tokens + 1)] for r in range(self.world)]


@pytest.mark.parametrize(("world", "accum"), [(1, 1), (1, 4), (2, 2), (4, 1), (8, 1)])
def test_sequential_loader_is_the_official_order(tmp_path: Path, world: int, accum: int) -> None:
    """Several steps on every rank, across shard borders and the end of the data."""
    tokens = stream_folder(tmp_path, 500, 333, 400)
    official = OfficialLoader([tokens[:500], tokens[500:833], tokens[833:]], world)
    settings = {"LOADER": "sequential", "GRAD_ACCUM_STEPS": accum}
    loaders = [loader(tmp_path, rank, world, **settings) for rank in range(world)]
    for number in range(7 * accum):
        for one, span in zip(loaders, official.next_batch(256 // (world * accum)), strict=True):
            inputs, targets = one.batch(number)
            assert inputs.flatten().tolist() == span[:-1] and targets.flatten().tolist() == span[1:]
            assert inputs.shape[1] == LENGTH


# --- shuffled loader ----------------------------------------------------------------------------


def starts_of(one: t.Loader, windows: Iterable[int]) -> list[int]:
    return [one.window_start(index) for index in windows]


@pytest.mark.parametrize("sizes", [(1000,), (300, 711), (64,), (65,), (95,)])
def test_every_window_comes_once_per_epoch(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """Windows of an epoch do not overlap, stay inside the stream, and leave less than two windows unread."""
    stream_folder(tmp_path, *sizes)
    one, total = loader(tmp_path), sum(sizes)
    for epoch in range(3):
        starts = sorted(starts_of(one, range(epoch * one.windows, (epoch + 1) * one.windows)))
        assert np.all(np.diff(starts) == LENGTH) and 0 <= starts[0] < LENGTH
        assert starts[-1] + LENGTH + 1 <= total and one.windows >= total // LENGTH - 1


def test_epochs_and_seeds_differ_and_repeat(tmp_path: Path) -> None:
    """Another order and another phase per epoch and per seed; the same seed gives the same order in any sequence."""
    stream_folder(tmp_path, 4000)
    one, other = loader(tmp_path), loader(tmp_path, SEED=1)
    epochs = [starts_of(one, range(e * one.windows, (e + 1) * one.windows)) for e in range(4)]
    assert len({tuple(epoch) for epoch in epochs}) == 4 and len({min(epoch) for epoch in epochs}) > 1
    assert starts_of(other, range(other.windows)) != epochs[0] and epochs[0] != sorted(epochs[0])
    again = loader(tmp_path)
    assert starts_of(again, reversed(range(4 * one.windows))) == sum(epochs, [])[::-1]


def test_a_shuffled_row_is_a_span_of_the_stream(tmp_path: Path) -> None:
    """Targets are the inputs moved by one, both from the window's start, across the shard border too."""
    tokens = stream_folder(tmp_path, 150, 150)
    one = loader(tmp_path)
    inputs, targets = one.batch(0)
    assert inputs.shape == targets.shape == (8, LENGTH) and inputs.dtype == targets.dtype == torch.int64
    for row, start in enumerate(starts_of(one, range(8))):
        assert inputs[row].tolist() == tokens[start : start + LENGTH].tolist()
        assert targets[row].tolist() == tokens[start + 1 : start + LENGTH + 1].tolist()


def step_rows(folder: Path, world: int, step: int) -> Counter[tuple[int, ...]]:
    """All input rows of an optimizer step over all ranks and micro-steps."""
    rows: Counter[tuple[int, ...]] = Counter()
    for rank in range(world):
        one = loader(folder, rank, world, TRAIN_BATCH_TOKENS=24 * LENGTH)
        for micro in range(one.shape.accum):
            rows.update(tuple(row) for row in one.batch(step * one.shape.accum + micro)[0].tolist())
    return rows


@pytest.mark.parametrize("step", [0, 1, 5])
def test_a_step_covers_the_same_tokens_for_any_number_of_ranks(tmp_path: Path, step: int) -> None:
    """24 sequences over 1, 2, 3, 4 and 8 ranks; step 5 lies in the second epoch."""
    stream_folder(tmp_path, 2000, 1500)
    alone = step_rows(tmp_path, 1, step)
    assert alone.total() == 24
    assert all(step_rows(tmp_path, world, step) == alone for world in (2, 3, 4, 8))


@pytest.mark.parametrize("kind", ["shuffled", "sequential"])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_no_target_is_read_twice_or_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, kind: str
) -> None:
    """Over the steps that one pass of the data allows: every target once, but for what no whole window or step holds."""
    stream_folder(tmp_path, 2900, 2101)
    monkeypatch.setattr(t, "MICRO_BATCH_TOKENS", 4 * LENGTH)  # several micro-steps, of different sizes
    loaders = [loader(tmp_path, rank, world, TRAIN_BATCH_TOKENS=24 * LENGTH, LOADER=kind) for rank in range(world)]
    read, places = [], Counter()
    for one in loaders:
        plain = one.stream.read
        monkeypatch.setattr(one.stream, "read", lambda at, count, plain=plain: read.append((at, count)) or plain(at, count))
    steps = (loaders[0].windows if kind == "shuffled" else 5001 // (LENGTH + 1)) // 24
    for number in range(steps * loaders[0].shape.accum):
        for one in loaders:
            one.batch(number)
    for at, count in read:
        places.update(range(at + 1, at + count))  # the first token of a span is no target
    assert set(places.values()) == {1} and places.total() == 24 * LENGTH * steps
    if kind == "sequential":  # a gap of one token between the spans of micro-batches, as in the official script
        assert max(places) - min(places) + 1 - len(places) == len(read) // loaders[0].shape.sequences - 1


def test_micro_steps_do_not_change_what_a_step_covers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller micro-batch means more micro-steps over the same sequences."""
    stream_folder(tmp_path, 3500)
    whole = step_rows(tmp_path, 2, 1)
    monkeypatch.setattr(t.Loader.__init__, "__defaults__", (4 * LENGTH,))
    assert loader(tmp_path, 0, 2, TRAIN_BATCH_TOKENS=24 * LENGTH).shape == (3, 4)
    assert step_rows(tmp_path, 2, 1) == whole


@pytest.mark.parametrize("kind", ["shuffled", "sequential"])
def test_fetch_equals_batch_in_any_order(tmp_path: Path, kind: str) -> None:
    """Reading ahead never hands out the wrong batch: forwards, backwards, repeated and with jumps."""
    stream_folder(tmp_path, 700, 300)
    plain, ahead = loader(tmp_path, LOADER=kind), loader(tmp_path, LOADER=kind)
    for number in [0, 1, 2, 3, 3, 2, 9, 10, 0, 40, 41, 5]:
        assert all(torch.equal(a, b) for a, b in zip(ahead.fetch(number), plain.batch(number), strict=True))
    assert ahead.request.cache_info().currsize == ahead.shape.accum + 1 and ahead.epoch_starts.cache_info().currsize <= 2


def test_an_error_while_reading_ahead_reaches_the_caller(tmp_path: Path) -> None:
    write_shard(tmp_path / "fineweb_train_000000.bin", np.full(300, VOCAB))
    with pytest.raises(t.UserError, match="fineweb_train_000000"):
        loader(tmp_path).fetch(0)


def test_too_few_training_tokens_are_refused(tmp_path: Path) -> None:
    stream_folder(tmp_path, 2 * LENGTH - 1)
    with pytest.raises(t.UserError, match=f"TRAIN_SEQ_LEN={LENGTH}"):
        loader(tmp_path)


# --- bytes --------------------------------------------------------------------------------------

LINES = [
    "the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs",
    "a b c d e f g h i j k l m",
    "how vexingly quick daft zebras jump", "n o p q r s t u v w x y z", "the five boxing wizards jump quickly",
]  # fmt: skip


def train_tokenizer(path: Path, **options: Any) -> Path:
    """A SentencePiece BPE model trained on LINES; returns its file."""
    settings = {
        "model_type": "bpe", "vocab_size": 320, "byte_fallback": True, "add_dummy_prefix": False, "pad_id": 0,
        "bos_id": 1, "eos_id": 2, "unk_id": 3, "hard_vocab_limit": False, "minloglevel": 2, "character_coverage": 1.0,
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 20), model_prefix=str(path), **{**settings, **options}
    )
    return path.with_suffix(".model")


def table_of(corpus: dict[str, str]) -> t.ByteTable:
    return t.ByteTable(Path(corpus["TOKENIZER_PATH"]), VOCAB)


def test_counts_equal_the_text_on_the_corpus(corpus: dict[str, str]) -> None:
    """Sum over the table == utf-8 length of each whole document's text, decoded independently."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=corpus["TOKENIZER_PATH"])
    tokens = t.TokenStream(tiny_config(**corpus), "train").read(0, 60_000)
    documents = np.split(tokens, np.flatnonzero(tokens == 1)[1:])[:-1]
    table = table_of(corpus)
    lengths = [len(pieces.decode(document[1:].tolist()).encode()) for document in documents]
    assert len(documents) > 5 and [int(table.count(document).sum()) for document in documents] == lengths
    assert f"on {len(documents)} documents" in table.self_test(np.concatenate([*documents, [1]]), None)


TEXTS = [
    "plain words", "naïve café", "emoji 🎉🎉 and 👩‍👩‍👧‍👦!", "日本語のテキスト", "tabs    spaces   ",
    "x", "Ω≈ç√ 12,345.67 «q»",
    "🎉",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_counts_equal_the_text_with_byte_fallback(corpus: dict[str, str], text: str) -> None:
    """Characters outside the vocabulary become byte pieces, which count one byte each, not three."""
    table = table_of(corpus)
    document = [1, *table.pieces.encode(text)]
    assert int(table.count(np.array(document)).sum()) == len(table.pieces.decode(document[1:]).encode())
    if text == "🎉":
        assert len(document) > 4 and int(table.count(np.array(document)).sum()) in (4, 5)


def test_a_concatenation_counts_the_sum_of_its_documents(corpus: dict[str, str]) -> None:
    """BOS counts nothing, and a leading space after it is not text; the first token is never a target."""
    table = table_of(corpus)
    documents = [[1, *table.pieces.encode(text)] for text in TEXTS]
    counts = table.count(np.array(sum(documents, [])))
    assert int(counts.sum()) == sum(len(table.pieces.decode(d[1:]).encode()) for d in documents)
    assert table.count(np.array(documents[0][1:]))[0] == 0


@pytest.mark.parametrize("dummy_prefix", [False, True])
def test_both_kinds_of_space_prefix_count_exactly(tmp_path: Path, dummy_prefix: bool) -> None:
    """With add_dummy_prefix every document begins with a space piece that decoding drops."""
    path = train_tokenizer(tmp_path / "tok", add_dummy_prefix=dummy_prefix)
    table = t.ByteTable(path, 320)
    tokens = np.array([token for line in [*LINES, "ünïcode 🎉"] for token in [1, *table.pieces.encode(line)]] + [1])
    assert f"on {len(LINES) + 1} documents" in table.self_test(tokens, None)


def test_self_test_refuses_a_wrong_table(corpus: dict[str, str]) -> None:
    """The published mistakes: the space counted twice, byte pieces counted as their names, boundaries ignored."""
    tokens = np.array([token for text in TEXTS for token in [1, *table_of(corpus).pieces.encode(text)]] + [1])
    spaces, names, one_off = table_of(corpus), table_of(corpus), table_of(corpus)
    spaces.base += spaces.has_space
    names.base[[i for i in range(names.pieces.vocab_size()) if names.pieces.is_byte(i)]] = 3
    one_off.base[tokens[3]] += 1
    for table in (spaces, names, one_off):
        with pytest.raises(t.UserError, match=r"tokenizer\.model"):
            table.self_test(tokens, None)
    assert f"on {len(TEXTS)} documents" in table_of(corpus).self_test(tokens, None)


def test_self_test_refuses_another_tokenizer(corpus: dict[str, str], tmp_path: Path) -> None:
    """Shards of one tokenizer under another whose special pieces lie elsewhere do not decode to what is counted."""
    other = train_tokenizer(tmp_path / "tok", bos_id=1, pad_id=-1, unk_id=0, eos_id=2)
    tokens = np.array([token for text in TEXTS for token in [1, *table_of(corpus).pieces.encode(text)]] + [1])
    with pytest.raises(t.UserError, match=r"tok\.model"):
        t.ByteTable(other, VOCAB).self_test(tokens, None)


def test_a_tokenizer_without_a_space_piece_is_refused(tmp_path: Path) -> None:
    path = train_tokenizer(tmp_path / "tok", model_type="word", byte_fallback=False, vocab_size=60)
    with pytest.raises(t.UserError, match=r"tok\.model.*space"):
        t.ByteTable(path, VOCAB)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(corpus: dict[str, str]) -> None:
    with pytest.raises(t.UserError, match=r"tokenizer\.model.*VOCAB_SIZE=256"):
        t.ByteTable(Path(corpus["TOKENIZER_PATH"]), 256)


@pytest.mark.parametrize("content", [None, b"not a model"])
def test_a_missing_or_broken_tokenizer_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "tok.model"
    if content:
        path.write_bytes(content)
    with pytest.raises(t.UserError, match=r"TOKENIZER_PATH=.*tok\.model"):
        t.ByteTable(path, VOCAB)


# --- validation ---------------------------------------------------------------------------------


def test_validation_logs_bos_and_byte_counts(run: t.Runtime, corpus: dict[str, str], in_tmp: Path) -> None:
    """Tokens, bytes and the number of documents are in the log: the fingerprint that shows a wrong split."""
    validation = t.load_validation(run)
    tokens = validation.tokens.numpy()
    assert len(tokens) == 4003 and validation.targets == 4002 and validation.bos_id == 1
    line = re.search(r"val_tokens: (\d+) val_documents: (\d+) val_bytes: (\d+)", (in_tmp / "logs/tiny.txt").read_text())
    counted = int(table_of(corpus).count(tokens)[1:].sum())
    assert [int(n) for n in line.groups()] == [4003, int((tokens == 1).sum()), counted]
    assert int(validation.token_bytes[1:].sum()) == counted


def validation_run(run: t.Runtime, folder: Path, tokens: np.ndarray, sidecar: np.ndarray | None = None) -> t.Runtime:
    """The runtime with another validation split."""
    folder.mkdir()
    write_shard(folder / "fineweb_val_000000.bin", tokens)
    if sidecar is not None:
        write_shard(folder / "fineweb_val_bytes_000000.bin", sidecar)
    return with_config(run, data_path=str(folder))


def corpus_tokens(corpus: dict[str, str], count: int) -> np.ndarray:
    return t.TokenStream(tiny_config(**corpus), "val").read(0, count)


def test_a_sidecar_gives_the_byte_counts(run: t.Runtime, corpus: dict[str, str], tmp_path: Path) -> None:
    """Where shards bring their byte counts, those count, not the table's."""
    tokens = corpus_tokens(corpus, 100)
    counts = t.ByteTable(Path(corpus["TOKENIZER_PATH"]), VOCAB).count(tokens)
    counts[50:52] = counts[50:52][::-1] + [1, -1]  # the same sum, other bytes
    validation = t.load_validation(validation_run(run, tmp_path / "v", tokens, counts))
    assert validation.token_bytes.tolist() == counts.tolist() and len(validation.tokens) == 100


def test_a_sidecar_that_counts_other_text_is_refused(run: t.Runtime, corpus: dict[str, str], tmp_path: Path) -> None:
    """Twice the bytes would halve the score."""
    tokens = corpus_tokens(corpus, 1000)
    counts = 2 * t.ByteTable(Path(corpus["TOKENIZER_PATH"]), VOCAB).count(tokens)
    with pytest.raises(t.UserError, match=r"sidecar counts \d+ bytes where the text has \d+"):
        t.load_validation(validation_run(run, tmp_path / "v", tokens, counts))


def test_a_sidecar_of_another_length_is_refused(run: t.Runtime, corpus: dict[str, str], tmp_path: Path) -> None:
    broken = validation_run(run, tmp_path / "v", corpus_tokens(corpus, 100), np.ones(99))
    with pytest.raises(t.UserError, match=r"fineweb_val_bytes_000000\.bin"):
        t.load_validation(broken)


@pytest.mark.parametrize("count", [2, LENGTH])
def test_validation_shorter_than_a_window_is_refused(
    run: t.Runtime, corpus: dict[str, str], tmp_path: Path, count: int
) -> None:
    """A window needs one token more than its length: the last target."""
    with pytest.raises(t.UserError, match=f"{count} .*{LENGTH}"):
        t.load_validation(validation_run(run, tmp_path / "v", corpus_tokens(corpus, count)))
    whole = validation_run(run, tmp_path / "w", corpus_tokens(corpus, LENGTH + 1))
    assert t.load_validation(whole).targets == LENGTH


def test_validation_tokens_that_the_tokenizer_lacks_are_refused(
    run: t.Runtime, corpus: dict[str, str], tmp_path: Path
) -> None:
    """Shards of a larger vocabulary under a smaller tokenizer: the missing pieces would count 0 bytes each."""
    tokens = corpus_tokens(corpus, 1000)
    tokens[::7] = np.where(tokens[::7] == 1, 1, VOCAB + 100)
    wrong = with_config(validation_run(run, tmp_path / "v", tokens), vocab_size=2 * VOCAB)
    with pytest.raises(t.UserError, match="tokenizer"):
        t.load_validation(wrong)


def test_validation_without_any_bos_is_refused(run: t.Runtime, corpus: dict[str, str], tmp_path: Path) -> None:
    """Without document starts nothing is compared with decoded text and nothing stops at a document's start."""
    tokens = corpus_tokens(corpus, 1000)
    with pytest.raises(t.UserError, match="BOS|document"):
        t.load_validation(validation_run(run, tmp_path / "v", tokens[tokens != 1]))
