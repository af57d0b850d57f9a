"""RMSNorm (arXiv 1910.07467) computed in fp32."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension; fp32 inside, the dtype of `x` outside.

    torch's own layer, told to keep fp32 also when its weight or its input was cast to bf16.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        return F.rms_norm(x.float(), self.normalized_shape, weight, self.eps).to(x.dtype)
