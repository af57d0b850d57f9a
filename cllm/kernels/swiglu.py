"""SwiGLU whose activation is computed in the epilogues of its matrix products, by quack-kernels (CuTe DSL).

    forward    one product computes pre = x Wᵀ and, in its epilogue, h = silu(gate) * up
               a second computes out = residual + h W_downᵀ
    backward   one product computes d_h = d_out W_down; its epilogue turns d_h into d_pre and recomputes h

Separate kernels for the activation and its gradient would read five N x F tensors and write four. Fused, only `pre` is
read back, `d_h` never reaches memory, and `h` is not saved. Rows of gate and up alternate in W, so that one thread has
both.

Shapes: N tokens, d model width, F d_ff. On a CPU the same operators run in torch, for tests.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cllm.kernels import quack

_MULTIPLE = 8
"""Widths are multiples of this, so that rows of all factors begin at multiples of 16 bytes."""
_TILES = {"gated": (128, 192), "dgated": (128, 128)}
"""Tile sizes of both products, over N and over d_ff or 2 d_ff. They are within 2.2 % of the best of about 20 at d 1024,
2048 and 3072 (one H200). The package would try all of them for each shape, which takes 15 to 33 seconds."""


@functools.cache
def unavailable(device: torch.device) -> str | None:
    """The reason why the kernels cannot run on `device`, or None. The first call on a GPU compiles and runs them."""

    def trial() -> None:
        shapes = ((8, 8), (32, 8), (8, 16))
        x, w_in, w_down = (torch.zeros(shape, device=device, dtype=torch.bfloat16) for shape in shapes)
        pre, _ = _hidden(x, w_in)
        _activation_backward(x, w_down, pre)

    return quack.unavailable(device, "gemm_interface", ["gemm_gated", "gemm_dgated"], trial)


def unsupported(*widths: int) -> str | None:
    """The reason why layers of these widths, d and F, are not supported, or None."""
    if any(width % _MULTIPLE for width in widths):
        return f"needs widths in multiples of {_MULTIPLE}, not {' and '.join(map(str, widths))}"
    return None


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, residual: Tensor | None = None) -> Tensor:
    """residual + down(silu(gate(x)) * up(x)), with one rounding.

    Args:
        x: (..., d), bf16.
        gate: (F, d); cast to the dtype of `x`, as are the others.
        up: (F, d).
        down: (d, F).
        residual: (..., d) in the dtype of `x`; 0 by default.

    Returns:
        (..., d) in the dtype of `x`.
    """
    # Cast before stacking: the backward then casts the two gradients out of one tensor in one pass.
    w_in = torch.stack((gate.to(x.dtype), up.to(x.dtype)), dim=1).flatten(0, 1)
    return _SwiGLU.apply(x, w_in, down.to(x.dtype), residual)


@torch.library.custom_op("cllm::swiglu_hidden", mutates_args=(), device_types="cuda")
def _hidden(x: Tensor, w_in: Tensor) -> tuple[Tensor, Tensor]:
    """pre (N, 2 F) and h (N, F) from x (N, d), w_in (2 F, d)."""
    pre, h = quack.load_module("gemm_interface").gemm_gated(x, w_in.t(), activation="swiglu", **_options("gated"))
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
    """total (..., n) += a (N, k) @ b (k, n), added in the product's epilogue."""
    total = total.view(len(a), -1)
    torch.addmm(total, a, b, out=total)


@torch.library.custom_op("cllm::swiglu_backward", mutates_args=(), device_types="cuda")
def _activation_backward(d_out: Tensor, w_down: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """d_pre (N, 2 F) and h (N, F) from d_out (N, d), w_down (d, F), pre (N, 2 F)."""
    gemm_dgated = quack.load_module("gemm_interface").gemm_dgated
    return gemm_dgated(d_out, w_down, pre, activation="swiglu", dynamic_scheduler=False, **_options("dgated"))


@_activation_backward.register_kernel("cpu")
def _(d_out: Tensor, w_down: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = pre[:, ::2], pre[:, 1::2]
    d_h, sigmoid = d_out @ w_down, gate.sigmoid()
    d_gate = d_h * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.stack((d_gate, d_h * gate * sigmoid), dim=2).flatten(1), gate * sigmoid * up


@_activation_backward.register_fake
def _(d_out: Tensor, w_down: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    return pre.new_empty(pre.shape), pre.new_empty((len(pre), pre.shape[1] // 2))


class _SwiGLU(torch.autograd.Function):
    """out (..., d) from x (..., d), w_in (2 F, d), w_down (d, F), residual (..., d) or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_in: Tensor, w_down: Tensor, residual: Tensor | None) -> Tensor:
        flat = x.flatten(0, -2)
        pre, h = _hidden(flat, w_in)
        ctx.save_for_backward(flat, w_in, w_down, pre)
        if residual is None:
            return (h @ w_down.t()).view(x.shape)
        # Compiled, this is not a copy: the kernel that computes the residual writes it here, and the product is added.
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
def _options(product: str) -> dict[str, Any]:
    tile_m, tile_n = _TILES[product]
    config = quack.load_module("gemm_config").GemmConfig(
        tile_m=tile_m, tile_n=tile_n, pingpong=True, is_dynamic_persistent=False, cluster_m=1, cluster_n=2,
        device_capacity=9,
    )  # fmt: skip
    return {"config": config, "tuned": False}
