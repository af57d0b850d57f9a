"""Codes of any width from 1 to 8 bits, packed without a spare bit.

`quantize.pack` packs widths that divide a byte. Other widths are split into planes that do: 3 bits are a plane of 2 low
bits and a plane of 1 high bit, one after the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cllm.posthoc.quantize import pack, unpack


def planes(bits: int) -> list[int]:
    """Widths of the planes of a code of `bits` bits, lowest bits first: the powers of two in `bits`, descending."""
    return [width for width in (8, 4, 2, 1) if bits & width]


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """`codes` uint8 (B, m), each below 2^bits, as uint8 (B, bytes): ⌈m · width / 8⌉ bytes for each plane."""
    packed, low = [], 0
    for width in planes(bits):
        packed.append(pack((codes >> low) & (2**width - 1), width))
        low += width
    return torch.cat(packed, dim=1)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The `count` codes of every row, uint8 (B, count)."""
    codes = torch.zeros(len(packed), count, dtype=torch.uint8, device=packed.device)
    first, low = 0, 0
    for width in planes(bits):
        size = -(-count * width // 8)
        codes |= unpack(packed[:, first : first + size], width, count) << low
        first, low = first + size, low + width
    return codes
