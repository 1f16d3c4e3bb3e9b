"""Does the training data hold validation documents? Windows of 64 tokens of validation, looked up at every position of
samples of the training shards. Documents that are in both splits match wherever a window lies within them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from records.checking.result import CheckResult

if TYPE_CHECKING:
    import train_gpt

WINDOW = 64
SAMPLE_TOKENS = 4_000_000  # over all shards; half of it the very beginning, where a wrong split leaks first
ALLOWED_PERCENT = 1.0  # web text repeats boilerplate
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that the polynomial mixes all bits


def rolling_hashes(tokens: np.ndarray) -> np.ndarray:
    """Hash of the window that starts at each position, (n - 63,) uint64; equal windows have equal hashes."""
    count = len(tokens) - WINDOW + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    values = tokens.astype(np.uint64) + np.uint64(1)
    hashes = np.zeros(count, np.uint64)
    for offset in range(WINDOW):
        hashes *= FACTOR
        hashes += values[offset : offset + count]
    return hashes


def validation_hashes(tokens: np.ndarray, bos_id: int) -> np.ndarray:
    """Hashes of windows that lie side by side in the validation documents; none crosses a document's start."""
    starts = np.flatnonzero(tokens == bos_id)
    ends = np.append(starts[1:], len(tokens))
    places = [np.arange(start + 1, end - WINDOW + 1, WINDOW) for start, end in zip(starts, ends, strict=True)]
    chosen = np.concatenate(places) if places else np.zeros(0, np.int64)
    hashes = np.zeros(len(chosen), np.uint64)
    for offset in range(WINDOW):
        hashes = hashes * FACTOR + tokens[chosen + offset].astype(np.uint64) + np.uint64(1)
    return np.unique(hashes)


def samples(train: train_gpt.TokenStream) -> list[np.ndarray]:
    """Parts of the training stream: its beginning, and the beginning of every shard."""
    first = min(train.total, SAMPLE_TOKENS // 2)
    each = max(SAMPLE_TOKENS // 2 // len(train.shards), 4 * WINDOW)
    begins = [int(end) - shard.count for end, shard in zip(train.ends, train.shards, strict=True)]
    later = [train.read(begin, min(each, shard.count)) for begin, shard in zip(begins, train.shards, strict=True)
             if begin >= first]
    return [train.read(0, first), *later]


def overlap(train: train_gpt.TokenStream, val_tokens: np.ndarray, bos_id: int) -> CheckResult:
    """The share of sampled training text that is in validation."""
    wanted = validation_hashes(val_tokens, bos_id)
    parts = [rolling_hashes(part) for part in samples(train)]
    hits, places = sum(int(np.isin(part, wanted).sum()) for part in parts), sum(map(len, parts))
    # windows lie side by side, so a copied text matches at one position in 64
    percent = 100 * WINDOW * hits / max(places, 1)
    text = f"{percent:.2f}% of {places} sampled training positions are in validation ({len(wanted)} windows)"
    if percent > ALLOWED_PERCENT:
        return CheckResult("train/val overlap", "fail", f"{text}: validation documents are in the training split; "
                           "rebuild or fetch the data (a prepare script with --val-docs 10000 does this)")
    return CheckResult("train/val overlap", "pass", text)
