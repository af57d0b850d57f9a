"""Gated feed-forward layer: SwiGLU, or GEGLU with the tanh approximation of GELU (arXiv 2002.05202)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllm.kernels.swiglu import swiglu
from cllm.model.precision import product_dtype


class GatedMLP(nn.Module):
    """down(f(gate(x)) * up(x)), with f the `activation`."""

    def __init__(self, d_model: int, d_ff: int, activation: Literal["silu", "gelu_tanh"] = "silu"):
        super().__init__()
        self.activation = activation
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)
        self.fused = False
        """Whether passes with a backward compute SwiGLU in the products' epilogues (`cllm.kernels.swiglu`)."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """(B, T, d_model) for `x` of that shape, added to `residual`, the residual stream, if it is given."""
        if self.fused and torch.is_grad_enabled():
            dtype = product_dtype(x)
            factors = (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
            if residual is not None and residual.dtype == dtype:
                return swiglu(x.to(dtype), *factors, residual)
            out = swiglu(x.to(dtype), *factors)
        else:
            gate = self.gate_proj(x)
            gate = F.silu(gate) if self.activation == "silu" else F.gelu(gate, approximate="tanh")
            out = self.down_proj(gate * self.up_proj(x))
        return out if residual is None else residual + out
