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
    return elements_left(name, ratio, keys, total, keys.incompressible_elements, "(windows, states, sinks)")


def elements_left(name: str, ratio: float, keys: SlotTensors, total: float, fixed: float, what: str) -> float:
    """Numbers that are left for codes at a `ratio`, of `total` numbers of which `fixed` are stored in any case.

    Raises:
        UserError: naming the method, and `what` is stored in any case, if that exceeds the ratio.
    """
    if fixed * ratio >= total:
        raise UserError(
            f"{name}: ratio={ratio:g}: at {keys.tokens} tokens {fixed / total:.0%} of the cache stay as they are "
            f"{what}; allowed: below {total / fixed:.2f}"
        )
    return total / ratio - fixed


def check_all_sinks(name: str, ratio: float | None, sinks: int, tokens: int, *, allowed: str = "ratio=1, ") -> None:
    """Raise `UserError`, naming the method, if a ratio is wanted of `tokens` tokens that are all sinks.

    Args:
        allowed: ratios of the method that keep everything, for the message.
    """
    if ratio is not None and ratio > 1:
        raise UserError(
            f"{name}: ratio={ratio:g}: at {tokens} tokens sinks={sinks} leave nothing to compress; allowed: {allowed}"
            "fewer sinks, or more tokens"
        )


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
