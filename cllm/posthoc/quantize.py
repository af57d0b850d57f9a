"""Quantised tensors, for KIVI (arXiv 2402.02750) and XQuant (arXiv 2510.11236).

For a group of elements X and b bits

    z = min X        s = (max X - min X) / (2^b - 1)        Q = round((X - z) / s)        X' = s Q + z

Groups run along the tokens, for every channel, in keys; along the channels, for every token, in values (KIVI).
z and s are stored in the cache's dtype, and Q is computed from the stored values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cllm.posthoc.code import Code, smallest_scale

Bits = Literal[1, 2, 4, 8]


@dataclass(frozen=True)
class Quantized(Code):
    """The first tokens, or none, as packed codes, the rest exact. Slots that share codes share `packed`."""

    packed: Tensor
    """uint8 (B, bytes)."""
    scale: Tensor
    """(B, groups)."""
    zero: Tensor
    """(B, groups)."""
    rest: Tensor
    """(B, remaining tokens, C), exact."""
    kind: Literal["k", "v"]
    bits: Bits
    size: int
    """Elements of a group."""
    width: tuple[int, ...]

    def decode(self) -> Tensor:
        rows, channels = self.scale.shape[1], self.rest.shape[2]
        if not rows:
            return self.rest.unflatten(-1, self.width)
        codes = unpack(self.packed, self.bits, rows * self.size).view(-1, rows, self.size)
        groups = codes.float() * self.scale.float()[..., None] + self.zero.float()[..., None]
        if self.kind == "k":
            quantized = groups.view(len(groups), -1, channels, self.size).mT.flatten(1, 2)  # B, n, C
        else:
            quantized = groups.view(len(groups), -1, channels)
        return torch.cat((quantized.to(self.rest.dtype), self.rest), dim=1).unflatten(-1, self.width)


def grouped(rows: Tensor, kind: Literal["k", "v"], size: int) -> Tensor:
    """(B, groups, size) of `rows` (B, n, C): n a multiple of `size` for keys, C for values."""
    if kind == "k":
        return rows.unflatten(1, (-1, size)).mT.flatten(1, 2)
    return rows.unflatten(2, (-1, size)).flatten(1, 2)


def quantize(groups: Tensor, bits: Bits, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 (B, groups, size), scale and zero (B, groups) in `dtype`, of `groups` (B, groups, size) fp32."""
    zero, top = groups.amin(-1).to(dtype), groups.amax(-1)
    scale = ((top - zero.float()) / (2**bits - 1)).clamp(min=smallest_scale(dtype)).to(dtype)
    codes = ((groups - zero.float()[..., None]) / scale.float()[..., None]).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, zero


def pack(codes: Tensor, bits: int) -> Tensor:
    """`codes` (B, m), each below 2^bits, as uint8 (B, ⌈m · bits / 8⌉); the first code is in the lowest bits."""
    per_byte = 8 // bits
    padded = F.pad(codes.to(torch.uint8), (0, -codes.shape[1] % per_byte)).unflatten(1, (-1, per_byte))
    packed = torch.zeros_like(padded[..., 0])
    for i in range(per_byte):
        packed |= padded[..., i] << (i * bits)
    return packed


def join_packed(first: Quantized, second: Quantized) -> Tensor:
    """The packed codes of `first`, then those of `second`, which has the same bits and group."""
    counts = [code.scale.shape[1] * code.size for code in (first, second)]
    if counts[0] * first.bits % 8 == 0:
        return torch.cat((first.packed, second.packed), dim=1)
    parts = [unpack(code.packed, first.bits, n) for code, n in zip((first, second), counts, strict=True)]
    return pack(torch.cat(parts, dim=1), first.bits)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of every row, uint8 (B, count)."""
    shifts = torch.arange(8 // bits, dtype=torch.uint8, device=packed.device) * bits
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(1)[:, :count]
