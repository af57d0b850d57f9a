"""The conditions under which losses of one table were measured, because only losses under the same can be compared.

What a design or a compression costs depends on how long the model was trained: after 100 M tokens fusedkv_lite is 0.24
nats better than mha, after 490 M tokens 0.10. It depends on the text and the windows that are scored and on the model's
size too. So a table compares losses at one number of training tokens, on one text, with one length of windows and of
about one size.

Models of others do not say their training tokens. Losses of such a base model are compared with those of the same base
model only: one of the same name and of as many parameters.

A loss that says neither training tokens nor a base model, or no text, is compared with others of its source only. One
that does not say its windows or its size is compared with all, and named.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cllm.counts import count_text, rounded_count
from cllm.errors import UserError
from cllm.planner.table import LossChange

_EQUAL_TOKENS = 0.05
"""Training tokens that differ by at most this share are equal."""
_EQUAL_SIZES = 1.5
"""Models whose parameters differ by at most this factor are of one size; designs without K/V projections have fewer."""

Condition = Literal["base_model", "tokens", "text", "context", "parameters"]
"""A condition that losses of a table share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """Those of a table; None: no measurement says it, or all are compared."""

    tokens: float | None = None
    """Training tokens of the models."""
    context: int | None = None
    """Tokens of the windows that were scored."""
    parameters: float | None = None
    text: str | None = None
    """The text that was scored, as `LossChange.text_name`."""
    base_model: str | None = None
    """As `LossChange.model_name`; empty: models that their training tokens describe."""

    def first_other(self, m: LossChange) -> Condition | None:
        """The first condition that differs from that of `m`; None if all are equal, as far as `m` says them."""
        if self.base_model is not None and self.base_model != m.model_name:
            return "base_model"
        if self.tokens is not None and not self._has_equal_tokens(m):
            return "tokens"
        if self.text is not None and self.text != m.text_name:
            return "text"
        if None not in (self.context, m.context) and self.context != m.context:
            return "context"
        if self.parameters is not None and m.parameters is not None and not self._has_equal_size(m.parameters):
            return "parameters"
        return None

    def include(self, m: LossChange) -> bool:
        """Whether `m` was measured under these, as far as it says."""
        return self.first_other(m) is None

    def _has_equal_tokens(self, m: LossChange) -> bool:
        if self.base_model:  # the same model, so it had the same training
            return True
        return m.tokens is not None and self.tokens is not None and _same_tokens(self.tokens, m.tokens)

    def _has_equal_size(self, parameters: float) -> bool:
        assert self.parameters is not None
        return self.parameters == parameters if self.base_model else _same_size(self.parameters, parameters)

    @property
    def description(self) -> str:
        """`models of 47 M parameters after 490 M training tokens, windows of 4,096 tokens, text validation 592c65`."""
        size = f"of {rounded_count(self.parameters)} parameters " if self.parameters else "of unknown size "
        age = f"{rounded_count(self.tokens)} training tokens" if self.tokens else "an unknown number of training tokens"
        windows = f"windows of {self.context:,} tokens" if self.context else "windows of unknown length"
        named = f"{self.base_model} " if self.base_model else "models "
        text = f", {'' if self.text.startswith('text ') else 'text '}{self.text}" if self.text else ""
        return f"{named}{size}after {age}, {windows}{text}"


def _same_tokens(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_EQUAL_TOKENS)


def _same_size(one: float, other: float) -> bool:
    return max(one, other) <= _EQUAL_SIZES * min(one, other)


def choose_conditions(
    tables: Sequence[Sequence[LossChange]],
    *,
    tokens: float | None = None,
    context: int | None = None,
    text: str | None = None,
    base_model: str | None = None,
) -> Conditions:
    """The conditions that most measurements have; of equally many, the largest.

    The base model is chosen first, then the training tokens, the text, the windows and the size, each of the
    measurements that have those before it. Given ones come before; given windows come after the training tokens. Each
    is that of the first table that says it.

    Args:
        tables: measurements of the designs in question; the preferred ones first.
        tokens: the training tokens to take; None: as above.
        context: the windows to take; None: as above.
        text: the text to take, as `LossChange.text_name`; None: as above.
        base_model: the base model to take, as `LossChange.model_name`; None: as above.

    Raises:
        UserError: if there are no measurements with the given conditions.
    """
    chosen, everything = Conditions(), [m for table in tables for m in table]
    if base_model is not None:
        known = [m.model_name for m in everything]
        if base_model not in known:
            raise _not_measured("--base-model", base_model, filter(None, known), _quoted)
        chosen = dataclasses.replace(chosen, base_model=base_model)
    if tokens is not None:
        ages = [m.tokens for m in everything if chosen.include(m)]
        if not any(age is not None and _same_tokens(age, tokens) for age in ages):
            raise _not_measured("--tokens", tokens, ages, count_text)
        chosen = dataclasses.replace(chosen, tokens=tokens)
    if text is not None:
        texts = [m.text_name for m in everything if chosen.include(m)]
        if text not in texts:
            raise _not_measured("--text", text, texts, _quoted)
        chosen = dataclasses.replace(chosen, text=text)
    chosen = _with_common(chosen, "base_model", tables, lambda m: m.model_name, operator.eq)
    chosen = _with_common(chosen, "tokens", tables, lambda m: m.tokens, _same_tokens)
    if context is not None:
        windows = [m.context for m in everything if chosen.include(m)]
        if context not in windows:
            raise _not_measured("--window", context, windows, "{:,.0f}".format)
        chosen = dataclasses.replace(chosen, context=context)
    chosen = _with_common(chosen, "text", tables, lambda m: m.text_name, operator.eq)
    chosen = _with_common(chosen, "context", tables, lambda m: m.context, operator.eq)
    alike = operator.eq if chosen.base_model else _same_size
    return _with_common(chosen, "parameters", tables, lambda m: m.parameters, alike)


def _with_common(
    chosen: Conditions,
    name: Condition,
    tables: Sequence[Sequence[LossChange]],
    value: Callable[[LossChange], Any],
    same: Callable[[Any, Any], bool],
) -> Conditions:
    """`chosen` with the value that most measurements under it have, in the first table that has any."""
    if getattr(chosen, name) is not None:
        return chosen
    for table in tables:
        if known := [v for m in table if chosen.include(m) and (v := value(m)) is not None]:
            most = max(dict.fromkeys(known), key=lambda one: (sum(same(one, other) for other in known), one))
            return dataclasses.replace(chosen, **{name: most})
    return chosen


def _not_measured(option: str, value: Any, known: Iterable[Any], text: Callable[[Any], str]) -> UserError:
    counts = collections.Counter(one for one in known if one is not None)
    allowed = ", ".join(f"{text(one)} ({n})" for one, n in sorted(counts.items()))
    return UserError(f"{option} is {text(value)}; losses of these designs: {allowed or 'none'}")


def _quoted(text: str) -> str:
    return f'"{text}"'
