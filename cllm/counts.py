"""Large numbers as text: `50M` to read and to write, `50 M` to look at."""

from __future__ import annotations

import re
from typing import Any

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(value: Any) -> int:
    """A number of tokens: `50M`, `1.5B`, `300k`, or a whole number.

    Raises:
        ValueError: for anything else, and for numbers below 1.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kMBT]?)", value) if isinstance(value, str) else None
    count = float(match[1]) * _UNITS[match[2]] if match else 0
    if count < 1 or count != round(count):
        raise ValueError(f"is {value!r}; allowed: a number of tokens such as 300k, 50M or 1.5B")
    return round(count)


def count_text(count: float) -> str:
    """`50M`: the shortest form that `parse_count` reads, exact if it has at most four digits."""
    for unit in ("T", "B", "M", "k"):
        if count >= _UNITS[unit]:
            return f"{count / _UNITS[unit]:.4g}{unit}"
    return f"{count:.0f}"


def rounded_count(count: float) -> str:
    """`1.23 M`: three digits and a unit."""
    for unit in ("T", "B", "M", "k"):
        scale = _UNITS[unit]
        if count >= 0.9995 * scale:
            return f"{count / scale:.3g} {unit}" if count < 999.5 * scale else f"{count / scale:.0f} {unit}"
    return f"{count:.0f}"
