"""The numbers of the competition: limits, official data sets, and what `compliance` promises of a configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

LIMIT_BYTES = 16_000_000  # decimal: 16 MB, not 16 MiB
LIMIT_SECONDS = 600.0  # training with calibration, and again evaluation
TRACKS = ("10min_16mb", "non_record_16mb")
OFFICIAL_DOCUMENTS = 50_000
LEAKY_SHARDS = 1000  # more are shards of 10M tokens, of a preparation script that left most of validation in train


class DataSet(NamedTuple):
    """A validation split that published logs name: its tokens as they count them, and their bytes and vocabulary."""

    name: str
    tokens: int
    bytes_per_token: float
    vocabulary: int


DATA_SETS = (
    DataSet("sp1024", 62_021_846, 2.43593, 1024), DataSet("sp1024 of March 17", 63_780_000, 2.44230, 1024),
    DataSet("sp4096", 45_508_608, 3.31967, 4096), DataSet("sp4096", 45_514_752, 3.31928, 4096),
    DataSet("sp8192", 40_540_803, 3.72664, 8192), DataSet("sp8192 CaseOps", 47_853_344, 3.15735, 8192),
    DataSet("byte260", 151_130_891, 0.99967, 260), DataSet("raw bytes", 151_080_891, 1.0, 256),
)  # fmt: skip
TAIL_TOKENS = 32_768  # by so much may a count be smaller: logs cut the tail to whole sequences
SAME_RATIO = 2e-4  # how far published scores lie from their set's bytes per token, relative, less their own rounding


def is_leaky(shards: int, tokens: int, dataset: str) -> bool:
    """Whether training shards are those of the preparation script that left most of validation in train.

    It made shards of 10M tokens; of the official data, small shards are enough to tell, however many were fetched.
    """
    small = 0 < tokens <= 10_000_000 * shards
    return shards > LEAKY_SHARDS and (small or not tokens) or small and shards > 1 and "fineweb10B" in dataset


def data_set(val_tokens: int) -> DataSet | None:
    """The official set with so many validation tokens, or None."""
    near = [known for known in DATA_SETS if -160 <= known.tokens - val_tokens <= TAIL_TOKENS]
    return min(near, key=lambda known: abs(known.tokens - val_tokens), default=None)


def known_data(val_tokens: int) -> str | None:
    """The name of the official data with so many validation tokens, or None."""
    found = data_set(val_tokens)
    return found.name if found else None


def last_digit(value: float) -> float:
    """Half of the last digit that a number shows, of at most eight decimals."""
    text = repr(float(value))
    return 0.5 * 10.0 ** -min(len(text.partition(".")[2]) if "e" not in text else 8, 8)


def bytes_per_token(loss: float, bpb: float) -> tuple[float, float]:
    """What a loss in nats per token and a score in bits per byte say of the text, and how exact that is, relative."""
    return loss / math.log(2) / bpb, last_digit(loss) / loss + last_digit(bpb) / bpb


def uses(values: Mapping[str, Any], feature: str) -> bool:
    """Whether hyperparameters switch a feature on: by its *_enabled where there is one, else by any value but 0.

    `feature` is a regular expression for the names that belong to it.
    """
    names = [name for name in values if re.search(feature, name)]
    switches = [name for name in names if name.endswith("enabled")]
    return any(values[name] for name in switches or names)


FORBIDDEN = {"no_ngram_cache": r"ngram", "no_pre_quant_ttt": r"pre_?quant_?ttt", "no_slot": r"(?:^|_)slot(?:_|$)",
             "no_etlb": r"(?:^|_)etlb(?:_|$)"}  # fmt: skip
TTT = r"^(?!pre_?quant)(?:\w+_)?ttt_"


def promises(values: Mapping[str, Any]) -> dict[str, bool]:
    """What hyperparameters say of the keys of `compliance` that name a technique; score_first_ttt only where it is on.

    An n-gram mixer over text that has been scored is legal if it is normalised (C2); `no_ngram_cache` says only that
    there is none.
    """
    found = {key: not uses(values, feature) for key, feature in FORBIDDEN.items()}
    return found | ({"score_first_ttt": found["no_pre_quant_ttt"]} if uses(values, TTT) else {})
