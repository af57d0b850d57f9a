# mypy: disable-error-code="import-not-found,import-untyped,assignment,var-annotated"
"""RoPE of many keys at once, as one kernel: it reads every number once and writes it once.

As single operators of torch (products of numbers of two dtypes with a table that repeats over heads) this took 15 ms
for the keys of an 8B model with 32,768 tokens on an H200 (2026-11-28), where moving 6.4 GB takes 1.5 ms.

Shapes: B batch, n tokens, G heads, D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cllm.kernels import triton_decode
from cllm.kernels.choice import Kernel, uses_triton
from cllm.kernels.triton_decode import jit, tl

_TOKENS = 32
"""Of a program, for one head."""


def rotate(k: Tensor, cos: Tensor, sin: Tensor, kernel: Kernel = "auto") -> Tensor:
    """`k` rotated, in fp32, contiguous; no gradients.

    Args:
        k: (B, n, G, D).
        cos: (1, n, 1, 2, D / 2), or b of them if `k` is a stack of batches of b, as `rope_table` returns it.
        sin: the same, negative for the first channels of pairs.
        kernel: as for `decode_attention`.

    Raises:
        UserError: for a kernel that does not exist or does not compute this call.
    """
    if not uses_triton("rotate", kernel, lambda: _unsupported(k), on_gpu=k.is_cuda):
        halves = (k if k.itemsize < 4 else k.float()).unflatten(-1, (2, -1))  # B, n, G, 2, D / 2
        halves = halves.unflatten(0, (-1, len(cos)))
        out = halves * cos
        for half in (0, 1):  # reads less than a flip of the halves
            out[..., half, :].addcmul_(halves[..., 1 - half, :], sin[..., half, :])
        return out.flatten(0, 1).flatten(-2)
    with torch.cuda.device_of(k):
        return run(k, cos, sin)


def run(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Launch the kernel, without checks."""
    batch, n, heads, dim = k.shape
    out = torch.empty(k.shape, device=k.device)
    cos, sin = cos[:, :, 0, 1].contiguous(), sin[:, :, 0, 1].contiguous()
    rotate_pairs[(-(-n // _TOKENS), batch, heads)](
        out, k, cos, sin, n, len(cos), k.stride(0), k.stride(1), k.stride(2), HALF=dim // 2, TOKENS=_TOKENS
    )  # fmt: skip
    return out


def _unsupported(k: Tensor) -> str | None:
    """The reason why the kernel cannot compute a call, or None."""
    if (reason := triton_decode.device_obstacle(k)) is not None:
        return reason
    if k.dtype not in triton_decode.TYPES:
        return f"does not compute {str(k.dtype).removeprefix('torch.')}"
    half = k.shape[3] // 2
    if half & (half - 1) or not 8 <= half <= 256:
        return f"heads of {k.shape[3]} channels"
    if k.stride(3) != 1:
        return "the channels of a tensor are not contiguous"
    if max(k.shape[0], k.shape[2]) > 65535:
        return f"{k.shape[0]} sequences and {k.shape[2]} heads; at most 65535"
    return None


@jit
def rotate_pairs(
    out, k, cos, sin, n, tables, stride_b, stride_n, stride_g, HALF: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """Rotate TOKENS tokens of one head of one sequence."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    b, g, heads = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(2)
    channel = tl.arange(0, HALF)[None, :]
    seen = (token < n)[:, None] & (channel < HALF)
    at = (token.to(tl.int64) + (b % tables) * n)[:, None] * HALF + channel
    turn, across = tl.load(cos + at, mask=seen, other=0.0), tl.load(sin + at, mask=seen, other=0.0)
    at = k + b * stride_b + g * stride_g + token.to(tl.int64)[:, None] * stride_n + channel
    first = tl.load(at, mask=seen, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=seen, other=0.0).to(tl.float32)
    at = out + ((b * n + token.to(tl.int64))[:, None] * heads + g) * (2 * HALF) + channel
    tl.store(at, first * turn - second * across, mask=seen)
    tl.store(at + HALF, second * turn + first * across, mask=seen)
