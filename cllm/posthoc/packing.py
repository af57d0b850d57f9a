"""Small integers packed into bytes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """`codes` (B, m), each below 2^bits, as uint8 (B, ⌈m · bits / 8⌉); the first code is in the lowest bits."""
    per_byte = 8 // bits
    padded = F.pad(codes.to(torch.uint8), (0, -codes.shape[1] % per_byte)).unflatten(1, (-1, per_byte))
    packed = torch.zeros_like(padded[..., 0])
    for place in range(per_byte):
        packed |= padded[..., place] << (place * bits)
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of every row, uint8 (B, count)."""
    places = torch.arange(8 // bits, dtype=torch.uint8, device=packed.device) * bits
    return ((packed[..., None] >> places) & (2**bits - 1)).flatten(1)[:, :count]
