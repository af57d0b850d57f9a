"""SwiGLU feed-forward layer (arXiv 2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllm.kernels.swiglu import swiglu
from cllm.model.precision import product_dtype


class SwiGLU(nn.Module):
    """residual + down(silu(gate(x)) * up(x))."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)
        self.fused = False
        """Whether passes with a backward compute the activation in the products' epilogues (`cllm.kernels.swiglu`)."""

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """The residual stream (B, T, d_model) after this layer, for `x` and `residual` of that shape."""
        if self.fused and torch.is_grad_enabled():
            dtype = product_dtype(x)
            factors = (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
            if residual.dtype == dtype:
                return swiglu(x.to(dtype), *factors, residual)
            return residual + swiglu(x.to(dtype), *factors)
        return residual + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
