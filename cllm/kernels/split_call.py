"""The arguments that all split-KV decoding kernels take in the same order.

Shapes: B batch, S entries, H query heads, E channels of all value parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitCall:
    """Which columns a call sees, the factor on its scores, and the tensors that receive the results of its splits."""

    column: Tensor
    """(1,) int64, on the device: the column of the new token."""
    first: Tensor | None
    """(B,) int64: the first column that each row sees; None: 0."""
    length: int
    """S."""
    window: int
    """Number of columns that a token sees, at most S."""
    exclude_self: bool
    """The token does not see its own column. A constant of the kernels, EXCLUDE_SELF."""
    log2_scale: float
    """The factor on scores, times log2 e."""
    partial: Tensor
    """(B, H, splits, E) fp32: receives the result of each split; an empty split leaves it as it is."""
    log_sums: Tensor
    """(B, H, splits) fp32: receives their log-sum-exps to base 2; -inf for an empty split."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        """In the order of the kernels' parameters, for which `length` is S."""
        return self.column, self.first, self.partial, self.log_sums, self.length, self.window, self.log2_scale
