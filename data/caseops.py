"""Case marks: text in lower case with marks for its capitals, from which the text comes back exactly (CaseOps).

This is the format `lossless_caps_caseops_v1` of PR #1729, over maximal runs of ASCII letters. A run in lower case
stays. Two or more capitals become ALLCAPS and the run in lower case; one capital, alone or before lower case, becomes
TITLE and the run in lower case. Any other run is written letter by letter, with TITLE before a capital that begins it
and CAPNEXT before each later one. A character of the text that is itself a mark comes after ESC. The marks are pieces
of the tokenizer, so that "The", "the" and "THE" share another. Bits per byte stay those of the text as it was: a mark
counts no bytes, every other character those of the original.

Usage:
    marked = mark_case(text)                      # restore_case(marked) == text for every text
    counts = original_bytes(marked, ends)         # utf-8 bytes of `text` for each piece of `marked`
    is_marked = knows_marks(processor)            # a tokenizer for marked text
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

TRANSFORM = "lossless_caps_caseops_v1"
TITLE, ALLCAPS, CAPNEXT, ESC = MARKS = "\ue001\ue002\ue003\ue004"

# Of a run of letters without a capital nothing is to be done, so it is not matched. The look-behind keeps the search
# from trying the middle of a run again, which would take time in the square of its length.
_CAPITALIZED = re.compile(f"(?<![A-Za-z])[a-z]*[A-Z][A-Za-z]*|[{MARKS}]")
_MARKED = re.compile(f"{ESC}([{MARKS}])|{ALLCAPS}([a-z]{{2,}})|[{TITLE}{CAPNEXT}]([a-z])")
_CAPITAL = re.compile("[A-Z]")


def _mark_run(match: re.Match[str]) -> str:
    run = match[0]
    if run in MARKS:
        return ESC + run
    lower = run.lower()
    if run[1:] == lower[1:]:
        return TITLE + lower
    if run.isupper():
        return ALLCAPS + lower
    start = TITLE + lower[0] if run[0] != lower[0] else run[0]
    return start + _CAPITAL.sub(lambda capital: CAPNEXT + capital[0].lower(), run[1:])


def _restore_run(match: re.Match[str]) -> str:
    literal, capitals, capital = match.groups()
    return literal or (capitals or capital).upper()


def mark_case(text: str) -> str:
    """The text with marks for its capitals."""
    return _CAPITALIZED.sub(_mark_run, text)


def restore_case(marked: str) -> str:
    """The text that mark_case() was given."""
    return _MARKED.sub(_restore_run, marked)


def original_bytes(marked: str, ends: np.ndarray) -> np.ndarray:
    """Bytes of the original text, int64 (n,), of pieces that end before the characters `ends` (n,) of the marked text.

    What normalisation drops belongs to the piece after it, or to the last one, so the sum is that of the whole text. A
    character that takes several pieces belongs to the last of them.
    """
    points = np.frombuffer(marked.encode("utf-32-le"), dtype="<u4")
    sizes = 1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000)
    sizes[(points >= ord(TITLE)) & (points <= ord(ESC))] = 0
    for escaped in re.finditer(f"{ESC}[{MARKS}]", marked):
        sizes[escaped.end() - 1] = len(ESC.encode())
    upto = np.concatenate(([0], np.cumsum(sizes)))[ends]
    upto[-1:] = sizes.sum()
    return np.diff(upto, prepend=0)


def knows_marks(processor: Any) -> bool:
    """Whether all marks are pieces of a sentencepiece.SentencePieceProcessor."""
    return all(processor.piece_to_id(mark) != processor.unk_id() for mark in MARKS)
