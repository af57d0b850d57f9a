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
