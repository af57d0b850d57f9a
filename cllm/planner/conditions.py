"""The conditions under which losses of one table were measured, because only losses under the same can be compared.

What a design or a compression costs depends on how long the model was trained: after 100 M tokens fusedkv_lite is 0.24
nats better than mha, after 490 M tokens 0.10. It depends on the windows that are scored and on the model's size too. So
a table compares losses at one number of training tokens, one length of windows and about one size.

A measurement that does not say one of the three is compared with all, and named.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cllm.counts import count_text, rounded_count
from cllm.errors import UserError
from cllm.planner.table import LossChange

_EQUAL_TOKENS = 0.05
"""Training tokens that differ by at most this share are equal."""
_EQUAL_SIZES = 1.5
"""Models whose parameters differ by at most this factor are of one size; designs without K/V projections have fewer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """Those of a table; None: no measurement says it, or all are compared."""

    tokens: float | None = None
    """Training tokens of the models."""
    context: int | None = None
    """Tokens of the windows that were scored."""
    parameters: float | None = None

    def include(self, m: LossChange) -> bool:
        """Whether `m` was measured under these, as far as it says."""
        pairs = (self.tokens, m.tokens), (self.context, m.context), (self.parameters, m.parameters)
        tokens, context, parameters = (one is None or other is None for one, other in pairs)
        return (
            (tokens or _same_tokens(self.tokens or 0, m.tokens or 0))
            and (context or self.context == m.context)
            and (parameters or _same_size(self.parameters or 0, m.parameters or 0))
        )

    @property
    def text(self) -> str:
        """`models of 47 M parameters after 490 M training tokens, windows of 4,096 tokens`."""
        size = f"of {rounded_count(self.parameters)} parameters " if self.parameters else "of unknown size "
        age = f"{rounded_count(self.tokens)} training tokens" if self.tokens else "an unknown number of training tokens"
        windows = f"windows of {self.context:,} tokens" if self.context else "windows of unknown length"
        return f"models {size}after {age}, {windows}"


def _same_tokens(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_EQUAL_TOKENS)


def _same_size(one: float, other: float) -> bool:
    return max(one, other) <= _EQUAL_SIZES * min(one, other)


def choose_conditions(
    tables: Sequence[Sequence[LossChange]], *, tokens: float | None = None, context: int | None = None
) -> Conditions:
    """The conditions that most measurements have; of equally many, the largest.

    The training tokens are chosen first, then the windows of those measurements, then the size. Each is that of the
    first table that says it.

    Args:
        tables: measurements of the designs in question; the preferred ones first.
        tokens: the training tokens to take; None: as above.
        context: the windows to take; None: as above.

    Raises:
        UserError: if there are no measurements with `tokens` or, among them, with `context`.
    """
    chosen, everything = Conditions(), [m for table in tables for m in table]
    if tokens is not None and not any(m.tokens is not None and _same_tokens(m.tokens, tokens) for m in everything):
        raise _not_measured("--tokens", tokens, (m.tokens for m in everything), count_text)
    chosen = Conditions(tokens=_common(tables, chosen, lambda m: m.tokens, _same_tokens) if tokens is None else tokens)
    of_age = [m.context for m in everything if chosen.include(m)]
    if context is not None and context not in of_age:
        raise _not_measured("--window", context, of_age, "{:,.0f}".format)
    if context is None:
        common = _common(tables, chosen, lambda m: m.context, operator.eq)
        context = None if common is None else int(common)
    chosen = dataclasses.replace(chosen, context=context)
    return dataclasses.replace(chosen, parameters=_common(tables, chosen, lambda m: m.parameters, _same_size))


def _common(
    tables: Sequence[Sequence[LossChange]],
    chosen: Conditions,
    value: Callable[[LossChange], float | None],
    same: Callable[[float, float], bool],
) -> float | None:
    """The value that most measurements under `chosen` have, in the first table that has any."""
    for table in tables:
        if known := [v for m in table if chosen.include(m) and (v := value(m)) is not None]:
            return max(dict.fromkeys(known), key=lambda one: (sum(same(one, other) for other in known), one))
    return None


def _not_measured(option: str, value: float, known: Iterable[float | None], text: Callable[[float], str]) -> UserError:
    counts = collections.Counter(count for count in known if count is not None)
    allowed = ", ".join(f"{text(count)} ({n})" for count, n in sorted(counts.items()))
    return UserError(f"{option} is {text(value)}; losses of these designs: {allowed or 'none'}")
