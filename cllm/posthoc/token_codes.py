"""Tokens quantised one by one, and the Hadamard matrix that prepares them (Palu, arXiv 2407.21118).

For the numbers h of a token in one group of columns, and b bits

    z = min h        s = (max h - min h) / (2^b - 1)        q = round((h - z) / s)        h' = s q + z

A few large columns set s for all others. An orthonormal matrix H spreads them, h H, and is undone by Hᵀ.

Shapes: B batch, n tokens, r columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.posthoc.bit_planes import pack_codes, planes, unpack_codes
from cllm.posthoc.code import Code, smallest_scale


def hadamard(size: int) -> Tensor:
    """An orthonormal (size, size) fp64 matrix: Sylvester's, ±1 / √size, if `size` is a power of two; else one such
    block for each power of two in `size`, largest first."""
    blocks = []
    for power in (1 << bit for bit in reversed(range(size.bit_length())) if size >> bit & 1):
        block = torch.ones(1, 1, dtype=torch.float64)
        while len(block) < power:
            block = torch.cat((torch.cat((block, block), 1), torch.cat((block, -block), 1)))
        blocks.append(block / power**0.5)
    return torch.block_diag(*blocks)


@dataclass(frozen=True)
class TokenQuantized(Code):
    """Codes of every token, in groups of columns."""

    packed: Tensor
    """uint8 (B, bytes)."""
    scale: Tensor
    """(B, n, groups)."""
    zero: Tensor
    """(B, n, groups)."""
    sizes: tuple[int, ...]
    """Columns of each group."""
    bits: int

    @classmethod
    def of(cls, rows: Tensor, sizes: Sequence[int], bits: int, dtype: torch.dtype) -> TokenQuantized:
        """Of `rows` (B, n, r) fp32, scales and zeros in `dtype`."""
        parts = rows.split(list(sizes), dim=-1)
        zero = torch.stack([part.amin(-1) for part in parts], dim=-1).to(dtype)
        top = torch.stack([part.amax(-1) for part in parts], dim=-1)
        scale = ((top - zero.float()) / (2**bits - 1)).clamp(min=smallest_scale(dtype)).to(dtype)
        low, step = (_spread(t, sizes) for t in (zero, scale))
        codes = ((rows - low) / step).round().clamp(0, 2**bits - 1).to(torch.uint8)
        return cls(pack_codes(codes.flatten(1), bits), scale, zero, tuple(sizes), bits)

    @staticmethod
    def nbytes(tokens: int, sizes: Sequence[int], bits: int, element: int) -> int:
        """Bytes of `tokens` tokens of one sequence, with `element` bytes for a scale."""
        packed = sum(-(-tokens * sum(sizes) * width // 8) for width in planes(bits))
        return packed + 2 * tokens * len(sizes) * element

    def decode(self) -> Tensor:
        batch, tokens, _ = self.scale.shape
        codes = unpack_codes(self.packed, self.bits, tokens * sum(self.sizes)).view(batch, tokens, -1)
        low, step = (_spread(t, self.sizes) for t in (self.zero, self.scale))
        return (codes.float() * step + low).to(self.scale.dtype)


def _spread(of_groups: Tensor, sizes: Sequence[int]) -> Tensor:
    """(B, n, r) fp32: the number of its group for every column, from (B, n, groups)."""
    return of_groups.float().repeat_interleave(torch.tensor(sizes, device=of_groups.device), dim=-1)
