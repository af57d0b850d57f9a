"""Layer numbers as text, and text as layer numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cllm.errors import PlanError
from cllm.plan.kinds import MAX_LAYERS


def ranges(layers: Sequence[int]) -> str:
    """Ascending layers in few characters: `0-3, 7`."""
    runs: list[list[int]] = []
    for i in layers:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def layer_range(text: str | int | Sequence[int], key: str = "layers") -> list[int]:
    """`"0-11"`, `3` or `[0, 2, 4]`, the value of `key`, as a list of layers.

    Raises `PlanError` for anything else, and for layers beyond `MAX_LAYERS`, before a list of them is made.
    """
    if isinstance(text, int):
        return [text]
    if not isinstance(text, str):
        return list(text)
    found = re.fullmatch(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?", text, flags=re.ASCII)
    if found is None:
        raise PlanError(f'{key}: {_shortened(text)!r} is not a range; write "0-11", 3 or [0, 2, 4]')
    digits = [group.lstrip("0") or "0" for group in found.groups(default=found[1])]
    if any(len(number) > len(str(MAX_LAYERS)) or int(number) >= MAX_LAYERS for number in digits):
        raise PlanError(f"{key}: {_shortened(text)!r} is out of range; allowed: layers 0 to {MAX_LAYERS - 1}")
    low, high = map(int, digits)
    if high < low:
        raise PlanError(f"{key}: {text!r} ends before it begins")
    return list(range(low, high + 1))


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
