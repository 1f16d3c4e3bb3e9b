"""What every check of a submission folder says, and the numbers of the competition that several checks use."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple


class CheckResult(NamedTuple):
    """The outcome of one check: status is "pass", "fail" (message holds the remedy) or "skip" (message says why)."""

    name: str
    status: str
    message: str


LIMIT_BYTES = 16_000_000  # decimal: 16 MB, not 16 MiB
LIMIT_SECONDS = 600.0  # training with calibration, and again evaluation
TRACKS = ("10min_16mb", "non_record_16mb")
OFFICIAL_DOCUMENTS = 50_000
LEAKY_SHARDS = 1499  # train shards of 10M tokens: a preparation script that left most of validation in train

# Validation tokens as published logs print them, whole sequences only -> the data they belong to.
KNOWN_VAL_TOKENS = {
    62_021_632: "sp1024", 63_779_840: "sp1024 of March 17", 45_508_608: "sp4096", 45_514_752: "sp4096",
    40_540_160: "sp8192", 40_538_112: "sp8192", 47_851_520: "sp8192 CaseOps", 151_130_112: "byte260",
    151_076_864: "raw bytes",
}  # fmt: skip
TAIL_TOKENS = 4096  # by so much may a count differ: logs cut the tail to whole sequences


def is_leaky(shards: int, tokens: int, dataset: str) -> bool:
    """Whether training shards are those of the preparation script that left most of validation in train.

    It made shards of 10M tokens; of the official data, small shards are enough to tell, however many were fetched.
    """
    small = 0 < tokens <= 10_000_000 * shards
    return shards == LEAKY_SHARDS or small and (shards > 1000 or shards > 1 and "fineweb10B" in dataset)


def known_data(val_tokens: int) -> str | None:
    """The official data with so many validation tokens, or None."""
    return next((name for count, name in KNOWN_VAL_TOKENS.items() if abs(val_tokens - count) <= TAIL_TOKENS), None)


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
