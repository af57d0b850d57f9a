"""Edit similarity of a completed line, as LongBench's code tasks score it (arXiv 2308.14508)."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

_NOT_CODE = ("`", "#", "//")


def completed_line(text: str) -> str:
    """The first line of generated text that has no backquote, `#` or `//`; empty if every line has one.

    Line breaks at the beginning are left out.
    """
    lines = text.lstrip("\n").split("\n")
    return next((line for line in lines if not any(mark in line for mark in _NOT_CODE)), "")


def ratio(first: str, second: str) -> int:
    """The similarity of two texts in percent: 100 x 2 M / (length of both), rounded.

    M is the number of characters in the matching blocks of difflib's `SequenceMatcher`, which is the `fuzz.ratio` of
    fuzzywuzzy. The `fuzz.ratio` of rapidfuzz and of python-Levenshtein is another number: it uses the longest common
    subsequence. The order of the texts matters, and in a second text of 200 characters or more, characters that make up
    over 1 % of it begin no block.
    """
    return round(100 * SequenceMatcher(None, first, second).ratio())


def edit_similarity(text: str, references: Sequence[str]) -> float:
    """The similarity (0 to 1) of the completed line and the most similar reference."""
    line = completed_line(text)
    return max((ratio(line, reference) for reference in references), default=0) / 100 if line else 0.0
