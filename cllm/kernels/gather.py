# mypy: disable-error-code="import-not-found,import-untyped,assignment,var-annotated"
"""Rows of chosen tokens, copied from host memory to the device: each KV head reads tokens of its own.

On a GPU one kernel reads pinned host memory over the bus, at addresses that it takes from the index on the device. So
the host does not wait for the index, and a CUDA graph can capture the copy. Otherwise the index is copied to the host.

Shapes: B batch, S tokens, G KV heads, D channels of a head, n chosen tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cllm.kernels import triton_decode
from cllm.kernels.limits import next_power_of_2
from cllm.kernels.triton_decode import jit, tl

_TOKENS = 16
"""Of a program, for one KV head: 4 KiB of 128 channels of 16 bits, so that many programs wait for the bus at once."""


def gather_rows(source: Tensor, index: Tensor, first: Tensor | None = None) -> Tensor:
    """Rows (B, n, G, D) of `source` on the index's device, contiguous; 0 for tokens that do not exist.

    Args:
        source: (B, S, G, D), channels contiguous, on the index's device or in host memory. With pinned host memory the
            host does not wait; otherwise it does.
        index: (B, G, n) int64; tokens from S on do not exist.
        first: (B,) int64: tokens before it do not exist either; None: 0.
    """
    if source.device == index.device:
        return _gather(source, index, first)
    if source.is_pinned() and triton_decode.device_obstacle(index) is None:
        with torch.cuda.device_of(index):
            return run(source, index, first)
    return _gather(source, index.cpu(), None if first is None else first.cpu()).to(index.device)


def _gather(source: Tensor, index: Tensor, first: Tensor | None) -> Tensor:
    """`gather_rows` in plain torch, where all tensors are in one memory."""
    batch = torch.arange(index.shape[0], device=index.device)[:, None, None]
    head = torch.arange(index.shape[1], device=index.device)[:, None]
    exists = index < source.shape[1]
    if first is not None:
        exists &= index >= first[:, None, None]
    rows = source[batch, index.clamp(max=source.shape[1] - 1), head]  # B, G, n, D
    return rows.masked_fill(~exists[..., None], 0).transpose(1, 2).contiguous()


def run(source: Tensor, index: Tensor, first: Tensor | None) -> Tensor:
    """Launch the kernel, without checks."""
    (batch, groups, n), dim = index.shape, source.shape[3]
    out = torch.empty((batch, n, groups, dim), dtype=source.dtype, device=index.device)
    copy_rows[(-(-n // _TOKENS), groups, batch)](
        source, index, first, out, source.stride()[:3], index.stride(), out.stride()[:3], n, source.shape[1],
        DIM=dim, TOKENS=_TOKENS, CHANNELS=next_power_of_2(dim),
    )  # fmt: skip
    return out


@jit
def copy_rows(
    source,
    index,
    first,
    out,
    s_strides,
    i_strides,
    out_strides,
    n,
    S,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Copy TOKENS rows of one KV head of one sequence. See `gather_rows`."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    g, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.load(index + b * i_strides[0] + g * i_strides[1] + token * i_strides[2], mask=token < n, other=S)
    exists = row < S
    if first is not None:
        exists = exists & (row >= tl.load(first + b))
    channel = tl.arange(0, CHANNELS)
    is_channel = (channel < DIM)[None, :]
    at = source + b * s_strides[0] + row.to(tl.int64)[:, None] * s_strides[1] + g * s_strides[2] + channel[None, :]
    tile = tl.load(at, mask=exists[:, None] & is_channel, other=0.0)
    at = out + b * out_strides[0] + token.to(tl.int64)[:, None] * out_strides[1] + g * out_strides[2] + channel[None, :]
    tl.store(at, tile, mask=(token < n)[:, None] & is_channel)
