"""The numbers that a method may store for a `ratio` of bytes."""

from __future__ import annotations

from collections.abc import Callable

from cllm.errors import UserError
from cllm.posthoc.slots import SlotTensors


def elements_for_ratio(name: str, ratio: float, keys: SlotTensors, values: SlotTensors) -> float:
    """Numbers of the cache's dtype per sequence that the codes of all keys and values may have.

    Raises:
        UserError: naming the method, if what stays uncompressed exceeds the ratio.
    """
    total = keys.uncompressed_elements
    if total is None:
        total = sum(x[0].numel() for tensors in (keys, values) for x in tensors.data)
    fixed = keys.incompressible_elements
    if fixed * ratio >= total:
        raise UserError(
            f"{name}: ratio={ratio:g}: at {keys.tokens} tokens {fixed / total:.0%} of the cache stay as they are "
            f"(windows, states, sinks); allowed: below {total / fixed:.2f}"
        )
    return total / ratio - fixed


def largest(cost: Callable[[float], float], budget: float, top: float) -> float | None:
    """The largest number from 0 to `top` whose cost, which grows with it, is at most `budget`; None: 0 costs more."""
    if cost(0.0) > budget:
        return None
    if cost(top) <= budget:
        return top
    low, high = 0.0, top
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return low
