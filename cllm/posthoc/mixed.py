"""Low-rank factors in codes of mixed width: each column of A has 8, 4, 2, 1 or 0 bits a number.

The columns of A = X V are uncorrelated, and their energies σ² differ by orders of magnitude, so one width for all
wastes bits on the small ones. With b bits a column keeps an error of about d(b) σ², d(b) that of the best uniform
quantiser of a normal variable; with 0 bits the column is dropped, which is what a rank does. Minimising

    Σ_i d(b_i) σ_i² + λ Σ_i cost(b_i)

for each column separately, with λ such that all columns of all groups fit the budget, gives the widths (reverse
water-filling, as in transform coding; KVTC, arXiv 2511.01815, does so for caches at rest).

Code: for `GROUP` tokens of a column, x ≈ s (q - 2^(b-1) + 1/2) with q in 0 ... 2^b - 1. The step s is fitted to the
numbers by least squares, after rounding with the better of two first steps: that of a normal variable, and that which
reaches the largest number. B has 8 bits, with a step for every head of every column.

Shapes: B batch, n tokens or rows, r columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cllm.posthoc.code import Code
from cllm.posthoc.group import Group
from cllm.posthoc.products import multiply
from cllm.posthoc.quantize import Bits, pack, unpack
from cllm.posthoc.tensor_tree import TensorTree

GROUP = 64
"""Tokens of a column of A that share a step."""
WIDTHS: tuple[Bits, ...] = (8, 4, 2, 1)
_STEPS: dict[int, float] = {1: 1.5958, 2: 0.9957, 4: 0.3352, 8: 0.0308}
"""Steps of the best uniform quantiser of a standard normal variable (Max, 1960, table II)."""
_DISTORTION = {0: 1.0, 1: 0.3634, 2: 0.1188, 4: 0.01154, 8: 0.00012}
"""Its mean squared errors."""


@dataclass(frozen=True)
class Columns(TensorTree):
    """Columns (B, n, r) in codes of one width."""

    packed: Tensor
    """uint8 (B, bytes)."""
    step: Tensor
    """(B, ⌈n / size⌉, r)."""
    bits: Bits
    size: int
    """Rows that share a step."""
    rows: int
    """n."""

    def decode(self) -> Tensor:
        """(B, n, r) fp32."""
        groups, columns = self.step.shape[1:]
        codes = unpack(self.packed, self.bits, groups * self.size * columns).view(-1, groups, self.size, columns)
        levels = codes.float() - (2 ** (self.bits - 1) - 0.5)
        return (levels * self.step.float()[:, :, None]).flatten(1, 2)[:, : self.rows]


def code_columns(x: Tensor, bits: Bits, size: int, dtype: torch.dtype) -> Columns:
    """Code `x` (B, n, r) fp32, with steps in `dtype` for every `size` rows of a column."""
    groups = F.pad(x, (0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size))
    half = 2 ** (bits - 1)
    deviation, largest = groups.square().mean(2).sqrt(), groups.abs().amax(2)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for first in (deviation * _STEPS[bits], largest / (half - 0.5)):
        levels = (groups / first.clamp(min=1e-30)[:, :, None] - 0.5).round().clamp(-half, half - 1) + 0.5
        step = ((groups * levels).sum(2) / levels.square().sum(2)).to(dtype)
        error = (levels * step.float()[:, :, None] - groups).square().sum(2)
        if best is None:
            best = error, step, levels
        else:
            better = error < best[0]
            best = (
                torch.where(better, error, best[0]),
                torch.where(better, step, best[1]),
                torch.where(better[:, :, None], levels, best[2]),
            )
    assert best is not None
    codes = (best[2] + (half - 0.5)).round().to(torch.uint8)
    return Columns(pack(codes.flatten(1), bits), best[1], bits, size, x.shape[1])


@dataclass(frozen=True)
class MixedA(Code):
    """A (B, n, r), its columns ordered by width. The slots of a group share it."""

    wide: Columns | None
    """Columns of 8 bits."""
    four: Columns | None
    two: Columns | None
    one: Columns | None
    dtype: torch.dtype

    def of(self, rows: Tensor) -> MixedA:
        """The code of other rows (B, m, r) fp32, in the same widths."""
        parts = [c for c in (self.wide, self.four, self.two, self.one) if c is not None]
        return code_a(rows, [c.bits for c in parts for _ in range(c.step.shape[2])], self.dtype)

    def decode(self) -> Tensor:
        parts = [c.decode() for c in (self.wide, self.four, self.two, self.one) if c is not None]
        return torch.cat(parts, dim=-1).to(self.dtype)


@dataclass(frozen=True)
class MixedLowRank(Code):
    """One layer's part of A Bᵀ."""

    a: Code
    b: Columns
    """(B, width, r)."""
    width: tuple[int, ...]

    def decode(self) -> Tensor:
        a, b = self.factors()
        return (a @ b.mT).unflatten(-1, self.width)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.a.decode(), self.columns()

    @property
    def has_factors(self) -> bool:
        return True

    def columns(self) -> Tensor:
        """B (B, width, r)."""
        return self.b.decode().to(self.b.step.dtype)


def code_a(rows: Tensor, widths: Sequence[int], dtype: torch.dtype) -> MixedA:
    """Code A (B, n, r) fp32 with the width of each column, descending, none 0."""
    bounds = [sum(w > bits for w in widths) for bits in WIDTHS] + [len(widths)]
    wide, four, two, one = (
        code_columns(rows[..., first:last], bits, GROUP, dtype) if last > first else None
        for bits, first, last in zip(WIDTHS, bounds, bounds[1:], strict=False)
    )
    return MixedA(wide, four, two, one, dtype)


def code_b(b: Tensor, width: tuple[int, ...], dtype: torch.dtype) -> Columns:
    """Code B (B, width, r) fp32."""
    return code_columns(b, 8, width[-1], dtype)


def column_bits(tokens: int, layers: int, width: tuple[int, ...], itemsize: int) -> dict[int, int]:
    """For each width, the bits that a column of A and its part of the Bs take in a group of `layers` slots."""
    channels, steps = math.prod(width), math.prod(width[:-1])
    of_b = layers * (channels * 8 + steps * 8 * itemsize)
    groups = -(-tokens // GROUP)
    return {0: 0} | {bits: groups * (GROUP * bits + 8 * itemsize) + of_b for bits in WIDTHS}


def choose_widths(
    dropped: Sequence[Tensor], kept: Sequence[Tensor], costs: Sequence[dict[int, int]], budget: float
) -> list[Tensor] | None:
    """The width of each column of each group (r,) at which all columns take at most `budget` bits.

    Args:
        dropped: for each group the squared errors (r,) of dropping each column.
        kept: the energies (r,) that errors of coding are relative to.
        costs: of each width, as `column_bits` returns them.

    Returns:
        At least one column of each group has bits. None if one bit for the first column of every group exceeds the
        budget.
    """
    widths = torch.tensor(sorted(_DISTORTION), device=dropped[0].device)
    distortion = [
        torch.stack([d if b == 0 else k * _DISTORTION[int(b)] for b in widths.tolist()], dim=-1).double()
        for d, k in zip(dropped, kept, strict=True)
    ]
    prices = [torch.tensor([cost[int(b)] for b in widths.tolist()], device=widths.device) for cost in costs]

    def choose(price: float) -> tuple[list[Tensor], int]:
        chosen = [(d + price * p).argmin(-1) for d, p in zip(distortion, prices, strict=True)]
        for index in chosen:
            index[0] = index[0].clamp(min=1)
        return chosen, sum(int(p[i].sum()) for p, i in zip(prices, chosen, strict=True))

    top = max(float(d.max()) for d in distortion)
    low, high = math.log(max(top, 1e-300)) - 80, math.log(max(top, 1e-300)) + 1
    if choose(math.exp(high))[1] > budget:
        return None
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if choose(math.exp(middle))[1] <= budget else (middle, high)
    return [widths[i] for i in choose(math.exp(high))[0]]


def code_mixed(group: Group, rows: Callable[[Group], Tensor]) -> None:
    """Write the codes of the slots of `group`, in the widths chosen, for its weighted rows (B, n, C) fp32."""
    vectors, tensors = group.vectors, group.tensors
    assert vectors is not None
    assert group.widths is not None
    order = group.widths.argsort(descending=True, stable=True)[: int((group.widths > 0).sum())]
    vectors, group.vectors = vectors[..., order], None
    a = code_a(multiply(rows(group), vectors, "fp32"), group.widths[order].tolist(), tensors.dtype)
    width = tuple(tensors.data[group.slots[0]].shape[2:])
    for i, b in zip(group.slots, vectors.chunk(len(group.slots), dim=1), strict=True):
        b = group.weights[tensors.slots[i]].unweigh(b)
        group.codes[i] = MixedLowRank(a, code_b(b, width, tensors.dtype), width)
