"""Rows of low-rank factors for later tokens, on a basis that stays: X ≈ A Bᵀ with B as it is stored.

    A = X B (Bᵀ B)⁻¹        the least ‖X - A Bᵀ‖

For the orthonormal B of a prompt this is A = X B, as for the prompt's own tokens. A basis fits later tokens worse the
less they are like the prompt; nothing else is lost, because no row of the prompt changes.

Shapes: B batch, n later tokens, C channels of a group, r rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cllm.posthoc.code import Code, Codes
from cllm.posthoc.grown import Joiner, first_of
from cllm.posthoc.lowrank import LowRank
from cllm.posthoc.mixed import MixedA, MixedLowRank
from cllm.posthoc.slots import SlotTensors


def rows_on(x: Tensor, b: Tensor, precision: torch.dtype) -> Tensor:
    """The rows A (B, n, r) fp32 of the least ‖X - A Bᵀ‖.

    Directions of B that are not larger than the rounding errors of the stored numbers are damped: their rows would be
    large, and as inexact as they are large.

    Args:
        x: X (B, n, C).
        b: B (B or 1, C, r). Columns of zeros get rows of 0.
        precision: the dtype in which X and B are stored.
    """
    wide = b.double()
    lengths = wide.norm(dim=1, keepdim=True).clamp(min=1e-300)
    unit = wide / lengths
    gram = unit.mT @ unit
    gram.diagonal(dim1=1, dim2=2).add_(torch.finfo(precision).eps ** 2)
    products = x.double() @ unit  # B, n, r
    factor = torch.linalg.cholesky_ex(gram).L.expand(len(x), -1, -1)
    return (torch.cholesky_solve(products.mT, factor).mT / lengths).float()


Extend = Callable[[Code, Tensor, torch.dtype], Code]
"""Puts rows (B, n, r) fp32 behind those of an A of a dtype."""


def extend_factors(
    codes: Sequence[LowRank | MixedLowRank], x: Sequence[Tensor], extend: Extend, dtype: torch.dtype
) -> list[LowRank | MixedLowRank]:
    """The codes of a group, whose tensors share A, with the rows of later tokens behind those of A.

    Args:
        codes: one for each tensor.
        x: the later tokens (B, n, C) of each tensor.
        extend: codes rows, unless A has columns of mixed width, which later rows get too.
        dtype: of the tensors as they are cached.
    """
    rows = rows_on(torch.cat(list(x), dim=-1), torch.cat([code.columns() for code in codes], dim=1), dtype)
    a, coded = codes[0].a, first_of(codes[0].a)
    a = Joiner().join(a, coded.of(rows)) if isinstance(coded, MixedA) else extend(a, rows, dtype)
    return [dataclasses.replace(code, a=a) for code in codes]


def absorb_factors(
    parts: Sequence[SlotTensors | None], codes: Sequence[Sequence[Code]], sizes: Sequence[int], extend: Extend
) -> tuple[Codes, Codes]:
    """`Compressor.absorb` for keys and values whose groups of slots share A. Other codes are None."""
    joined: tuple[Codes, Codes] = ([None] * len(codes[0]), [None] * len(codes[1]))
    for tensors, old, new, size in zip(parts, codes, joined, sizes, strict=True):
        for group in [] if tensors is None else tensors.groups(size):
            assert tensors is not None
            factored = [code for i in group if isinstance(code := old[i], LowRank | MixedLowRank)]
            if factored:
                found = extend_factors(factored, [tensors.flat(i) for i in group], extend, tensors.dtype)
                for i, code in zip(group, found, strict=True):
                    new[i] = code
    return joined
