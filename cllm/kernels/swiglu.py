"""SwiGLU whose activation is computed in the epilogues of its matrix products, by quack-kernels (CuTe DSL).

    forward    pre = x Wᵀ, h = silu(gate) * up leave one product together; out = residual + h W_downᵀ another
    backward   d_h = d_out W_down never reaches memory: the product's epilogue turns it into d_pre and makes h again

By kernels of their own, activation and gradient read five tensors of N x F and write four. Here the two products have
them at hand, all but pre in the second, and h is not kept. W has the rows of gate and up by turns, so that a gate and
its up meet in one thread.

Shapes: N tokens, d model width, F d_ff. On a CPU the same operators compute with torch, for tests.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cllm.kernels.quack import missing as missing_quack
from cllm.kernels.quack import quack

_MULTIPLE = 8
"""Rows of all factors begin at multiples of 16 bytes."""
_TILES = {"gated": (128, 192), "dgated": (128, 128)}
"""Of both products, in the order N, d_ff or 2 d_ff: within 2.2 % of the best of about 20 at d 1024, 2048 and 3072 (one
H200). The package would try all of them for each shape, 15 to 33 seconds a time."""


@functools.cache
def missing(device: torch.device) -> str | None:
    """Why there are no such kernels here, or None. The first call with a GPU compiles and tries both."""

    def trial() -> None:
        shapes = ((8, 8), (32, 8), (8, 16))
        x, w_in, w_down = (torch.zeros(shape, device=device, dtype=torch.bfloat16) for shape in shapes)
        pre, _ = _hidden(x, w_in)
        _activation_backward(x, w_down, pre)

    return missing_quack(device, "gemm_interface", ["gemm_gated", "gemm_dgated"], trial)


def unsupported(*widths: int) -> str | None:
    """Why layers of these widths, d and F, are not computed, or None."""
    if any(width % _MULTIPLE for width in widths):
        return f"needs widths in multiples of {_MULTIPLE}, not {' and '.join(map(str, widths))}"
    return None


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, residual: Tensor | None = None) -> Tensor:
    """residual + down(silu(gate(x)) * up(x)), rounded once.

    Args:
        x: (..., d), bf16.
        gate: (F, d); cast to the dtype of `x`, as are the others.
        up: (F, d).
        down: (d, F).
        residual: (..., d) in the dtype of `x`; 0 by default.

    Returns:
        (..., d) in the dtype of `x`.
    """
    # Cast first: gradients are then cast from the halves of one tensor to tensors of their own, in one pass.
    w_in = torch.stack((gate.to(x.dtype), up.to(x.dtype)), dim=1).flatten(0, 1)
    return _SwiGLU.apply(x, w_in, down.to(x.dtype), residual)


@torch.library.custom_op("cllm::swiglu_hidden", mutates_args=(), device_types="cuda")
def _hidden(x: Tensor, w_in: Tensor) -> tuple[Tensor, Tensor]:
    """pre (N, 2 F) and h (N, F) of x (N, d), w_in (2 F, d)."""
    pre, h = quack("gemm_interface").gemm_gated(x, w_in.t(), activation="swiglu", **_how("gated"))
    return pre, h


@_hidden.register_kernel("cpu")
def _(x: Tensor, w_in: Tensor) -> tuple[Tensor, Tensor]:
    pre = x @ w_in.t()
    return pre, F.silu(pre[:, ::2]) * pre[:, 1::2]


@_hidden.register_fake
def _(x: Tensor, w_in: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty((len(x), len(w_in))), x.new_empty((len(x), len(w_in) // 2))


@torch.library.custom_op("cllm::add_product", mutates_args=("total",))
def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (..., n) += a (N, k) b (k, n) in the product's epilogue."""
    total = total.view(len(a), -1)
    torch.addmm(total, a, b, out=total)


@torch.library.custom_op("cllm::swiglu_backward", mutates_args=(), device_types="cuda")
def _activation_backward(d_out: Tensor, w_down: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """d_pre (N, 2 F) and h (N, F) of d_out (N, d), w_down (d, F), pre (N, 2 F)."""
    gemm_dgated = quack("gemm_interface").gemm_dgated
    return gemm_dgated(d_out, w_down, pre, activation="swiglu", dynamic_scheduler=False, **_how("dgated"))


@_activation_backward.register_kernel("cpu")
def _(d_out: Tensor, w_down: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = pre[:, ::2], pre[:, 1::2]
    d_h, open_ = d_out @ w_down, gate.sigmoid()
    d_gate = d_h * up * open_ * (1 + gate * (1 - open_))
    return torch.stack((d_gate, d_h * gate * open_), dim=2).flatten(1), gate * open_ * up


@_activation_backward.register_fake
def _(d_out: Tensor, w_down: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    return pre.new_empty(pre.shape), pre.new_empty((len(pre), pre.shape[1] // 2))


class _SwiGLU(torch.autograd.Function):
    """out (..., d) of x (..., d), w_in (2 F, d), w_down (d, F), residual (..., d) or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_in: Tensor, w_down: Tensor, residual: Tensor | None) -> Tensor:
        flat = x.flatten(0, -2)
        pre, h = _hidden(flat, w_in)
        ctx.save_for_backward(flat, w_in, w_down, pre)
        if residual is None:
            return (h @ w_down.t()).view(x.shape)
        # Compiled, this is no copy: the kernel that computes the residual writes it here, where the product is added.
        out = residual.clone(memory_format=torch.contiguous_format)
        _add_product(out, h, w_down.t())
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w_in, w_down, pre = ctx.saved_tensors
        d_out = grads[0].flatten(0, -2).contiguous()
        d_pre, h = _activation_backward(d_out, w_down, pre)
        wanted = ctx.needs_input_grad
        return (
            (d_pre @ w_in).view(grads[0].shape) if wanted[0] else None,
            d_pre.t() @ x if wanted[1] else None,
            d_out.t() @ h if wanted[2] else None,
            grads[0] if wanted[3] else None,
        )


@functools.cache
def _how(product: str) -> dict[str, Any]:
    tile_m, tile_n = _TILES[product]
    config = quack("gemm_config").GemmConfig(
        tile_m=tile_m, tile_n=tile_n, pingpong=True, is_dynamic_persistent=False, cluster_m=1, cluster_n=2,
        device_capacity=9,
    )  # fmt: skip
    return {"config": config, "tuned": False}
