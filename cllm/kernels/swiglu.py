"""SwiGLU whose activation is computed in the epilogues of its matrix products, by quack-kernels (CuTe DSL).

    forward    pre = x Wᵀ, h = silu(gate) * up leave one product together; out = h W_downᵀ
    backward   d_h = d_out W_down never reaches memory: the product's epilogue turns it into d_pre and makes h again

By kernels of their own, activation and gradient read five tensors of T x d_ff and write four; here four of these reads
and two of these writes are gone, and h is not kept. W has the rows of gate and up by turns, so that a gate and its up
meet in one thread.

Shapes: N tokens, d model width, F d_ff. On a CPU the same operators compute with torch, for tests.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cllm.kernels.backends.base import distribution, load

KNOWN = "0.6"
"""The version of quack-kernels whose functions are those called here; they change from one to the next."""
_MULTIPLE = 8
"""Rows of all factors begin at multiples of 16 bytes."""
_TILES = {"gated": (128, 192), "dgated": (128, 128)}
"""Of both products, in the order N, d_ff or 2 d_ff: within 2 % of the best of 20 at d 1024 and 2048, 4 % at 3072 (one
H200). The package would try all of them for each shape, 25 seconds a time."""


@functools.cache
def missing(device: torch.device) -> str | None:
    """Why there are no such kernels here, or None. The first call with a GPU compiles and tries both."""
    if device.type != "cuda":
        return "needs a CUDA device"
    if (capability := torch.cuda.get_device_capability(device)) != (9, 0):
        return "needs sm_90, not sm_{}{}".format(*capability)
    found = distribution("quack-kernels")
    if found is not None and not found.version.startswith(f"{KNOWN}."):
        return f"quack-kernels {found.version} is installed; known is {KNOWN}"
    loaded = load(["quack-kernels"], ["quack.gemm_interface"], ["gemm_gated", "gemm_dgated"])
    if isinstance(loaded, str):
        return loaded
    x, w_in, w_down = (torch.zeros(shape, device=device, dtype=torch.bfloat16) for shape in ((8, 8), (32, 8), (8, 16)))
    try:
        out, pre = _forward(x, w_in, w_down)
        _activation_backward(out, w_down, pre)
        torch.cuda.synchronize(device)
    except Exception as error:  # a compiler that does not fit raises anything
        return f"quack-kernels does not run: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def unsupported(*widths: int) -> str | None:
    """Why layers of these widths, d and F, are not computed, or None."""
    if any(width % _MULTIPLE for width in widths):
        return f"needs widths in multiples of {_MULTIPLE}, not {' and '.join(map(str, widths))}"
    return None


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x)).

    Args:
        x: (..., d), bf16.
        gate: (F, d); cast to the dtype of `x`, as are the others.
        up: (F, d).
        down: (d, F).

    Returns:
        (..., d) in the dtype of `x`.
    """
    w_in = torch.stack((gate, up), dim=1).flatten(0, 1).to(x.dtype)
    out, _ = _forward(x.flatten(0, -2), w_in, down.to(x.dtype))
    return out.unflatten(0, x.shape[:-1])


@torch.library.custom_op("cllm::swiglu_forward", mutates_args=(), device_types="cuda")
def _forward(x: Tensor, w_in: Tensor, w_down: Tensor) -> tuple[Tensor, Tensor]:
    """out (N, d) and pre (N, 2 F) of x (N, d), w_in (2 F, d), w_down (d, F)."""
    pre, h = _quack("gemm_interface").gemm_gated(x, w_in.t(), activation="swiglu", **_how("gated"))
    return h @ w_down.t(), pre


@_forward.register_kernel("cpu")
def _(x: Tensor, w_in: Tensor, w_down: Tensor) -> tuple[Tensor, Tensor]:
    pre = x @ w_in.t()
    return (F.silu(pre[:, ::2]) * pre[:, 1::2]) @ w_down.t(), pre


@_forward.register_fake
def _(x: Tensor, w_in: Tensor, w_down: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((len(x), len(w_in)))


@torch.library.custom_op("cllm::swiglu_backward", mutates_args=(), device_types="cuda")
def _activation_backward(d_out: Tensor, w_down: Tensor, pre: Tensor) -> tuple[Tensor, Tensor]:
    """d_pre (N, 2 F) and h (N, F) of d_out (N, d), w_down (d, F), pre (N, 2 F)."""
    gemm_dgated = _quack("gemm_interface").gemm_dgated
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


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _backward(ctx: Any, d_out: Tensor, _d_pre: Tensor | None) -> tuple[Tensor | None, ...]:
    x, w_in, w_down, pre = ctx.saved_tensors
    d_out = d_out.contiguous()
    d_pre, h = _activation_backward(d_out, w_down, pre)
    wanted = ctx.needs_input_grad
    return (
        d_pre @ w_in if wanted[0] else None,
        d_pre.t() @ x if wanted[1] else None,
        d_out.t() @ h if wanted[2] else None,
    )


_forward.register_autograd(_backward, setup_context=_save)


def _quack(module: str) -> Any:
    return importlib.import_module(f"quack.{module}")


@functools.cache
def _how(product: str) -> dict[str, Any]:
    tile_m, tile_n = _TILES[product]
    config = _quack("gemm_config").GemmConfig(
        tile_m=tile_m, tile_n=tile_n, pingpong=True, is_dynamic_persistent=False, cluster_m=1, cluster_n=2,
        device_capacity=9,
    )  # fmt: skip
    return {"config": config, "tuned": False}
