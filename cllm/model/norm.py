"""RMSNorm (arXiv 1910.07467) computed in fp32."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension, computed in fp32 and returned in the dtype of `x`.

    Unlike torch's layer, it also computes in fp32 if its weight or its input is bf16.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        return F.rms_norm(x.float(), self.normalized_shape, weight, self.eps).to(x.dtype)


class BlockRMSNorm(RMSNorm):
    """An RMSNorm of each of several blocks of equal width, times a constant: scale x_i / rms(x_i) * weight_i.

    The weight is (width,), that of all blocks in a row.
    """

    def __init__(self, width: int, *, blocks: int, scale: float, eps: float):
        super().__init__(width, eps=eps)
        self.blocks, self.scale = blocks, scale

    def forward(self, x: Tensor) -> Tensor:
        parts = x.float().unflatten(-1, (self.blocks, -1))
        normed = F.rms_norm(parts, parts.shape[-1:], None, self.eps).flatten(-2)
        return (self.scale * normed * self.weight.float()).to(x.dtype)
