"""Attention of one new token a sequence over cached slots, for every kind of slot, behind one function.

    scores = scale Σ_p q_p k_p        result_p = softmax(scores) v_p

A slot may come in several parts. Plain and grouped attention have one of each. Fused keys (FusedKV, arXiv 2512.03870)
are two parts whose queries carry the weights, (a ⊙ q) k_1 + (b ⊙ q) k_n, and fused values two results that the caller
weighs, so that nothing is materialised. A latent (MLA, arXiv 2405.04434, section 2.1.2) with its up-projections
absorbed is one KV head whose key parts are the latent and the RoPE key, and whose value is the latent again.

Shapes: B batch, S entries, H query heads, G KV heads (H a multiple of G), D and E channels of a key and value part.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cllm.errors import UserError
from cllm.kernels import split_decode

__all__ = ["Kernel", "Stored", "Visible", "decode_attention", "decode_attention_reference"]

log = logging.getLogger(__name__)

Kernel = Literal["auto", "triton", "reference"]


@dataclass(frozen=True, slots=True)
class Stored:
    """One cached tensor."""

    data: Tensor
    """(B, S, G, D), channels contiguous; bf16, fp16, fp32 or float8_e4m3fn."""
    scale: Tensor | None = None
    """(B, S, G) bf16 or fp32 factor of each token and head, for float8 data."""


@dataclass(frozen=True, slots=True)
class Visible:
    """Which of the S entries the new token sees.

    The entries are a ring: entry j holds column c_j = column - ((column - j) mod S), the newest one that falls on j; it
    is empty while c_j < 0. The token sees the columns from `first` on, of these the last `window`, up to its own.
    """

    column: Tensor
    """(1,) int64, on the device: the column of the new token, whose own entry is already stored."""
    first: Tensor | None
    """(B,) int64: the first column that each row sees (left padding); None: 0."""
    window: int | None
    """Columns that the token sees, its own included; None: all that are stored."""
    exclude_self: bool
    """The token does not see its own column."""


def decode_attention(
    queries: Sequence[Tensor],
    keys: Sequence[Stored],
    values: Sequence[Stored],
    visible: Visible,
    *,
    scale: float,
    kernel: Kernel = "auto",
) -> list[Tensor]:
    """Attention of one new token of each sequence; no gradients.

    Query head h reads KV head h // (H / G). Sums are fp32 (fp64 for fp64 queries). On a GPU a tensor that is a key part
    and a value part is read once, only visible entries are read, and nothing waits for the device, so that a CUDA graph
    may capture the call and replay it while `visible.column` grows. To torch.compile it is one opaque operator.

    Args:
        queries: (B, H, D_p) for each key part.
        keys: the parts of the keys.
        values: the parts of the values.
        visible: which entries are seen.
        scale: factor on the scores.
        kernel: `auto` takes Triton on a GPU and plain torch for what Triton cannot, and tells once which and why, as a
            warning where that makes a GPU slow; or one of the two by name.

    Returns:
        For each value part (B, H, E_p) in the queries' dtype, 0 where a row sees nothing. Results of several parts are
        slices of one tensor.

    Raises:
        UserError: for a kernel that does not exist or does not compute this call.
        ValueError: for another number of queries than of key parts, or H no multiple of G.
    """
    n_heads, groups = queries[0].shape[1], keys[0].data.shape[2]
    if len(queries) != len(keys):
        raise ValueError(f"decode_attention: {len(queries)} queries for {len(keys)} key parts")
    if n_heads % groups:
        raise ValueError(f"decode_attention: {n_heads} query heads are no multiple of {groups} KV heads")
    out = _decode_attention(
        list(queries),
        [k.data for k in keys],
        [k.scale for k in keys],
        [v.data for v in values],
        [v.scale for v in values],
        visible.column,
        visible.first,
        visible.window,
        visible.exclude_self,
        scale,
        kernel,
    )
    return list(out.split([v.data.shape[-1] for v in values], dim=-1))


@torch.library.custom_op("cllm::decode_attention", mutates_args=())
def _decode_attention(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    key_scales: Sequence[Tensor | None],
    values: Sequence[Tensor],
    value_scales: Sequence[Tensor | None],
    column: Tensor,
    first: Tensor | None,
    window: int | None,
    exclude_self: bool,
    scale: float,
    kernel: str,
) -> Tensor:
    """(B, H, sum of E_p): one tensor, because results of an operator must not share memory."""
    if _runs_triton(kernel, queries, keys, values, [*key_scales, *value_scales]):
        with torch.cuda.device_of(queries[0]):
            return split_decode.run(
                queries, keys, key_scales, values, value_scales, column, first, window, exclude_self, scale
            )
    parts = decode_attention_reference(
        queries,
        [Stored(*pair) for pair in zip(keys, key_scales, strict=True)],
        [Stored(*pair) for pair in zip(values, value_scales, strict=True)],
        Visible(column, first, window, exclude_self),
        scale=scale,
    )
    return torch.cat(parts, dim=-1)


@_decode_attention.register_fake
def _(queries, keys, key_scales, values, value_scales, column, first, window, exclude_self, scale, kernel) -> Tensor:
    return queries[0].new_empty((*queries[0].shape[:2], sum(v.shape[-1] for v in values)))


def _runs_triton(
    kernel: str,
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    scales: Sequence[Tensor | None],
) -> bool:
    if kernel == "reference":
        return False
    if kernel not in ("auto", "triton"):
        raise UserError(f'decode_attention: kernel is "{kernel}"; allowed: auto, triton, reference')
    reason = split_decode.unsupported(queries, keys, values, scales)
    if kernel == "auto":
        slow = reason is not None and queries[0].is_cuda
        _told("triton" if reason is None else f"plain torch, because triton cannot: {reason}", slow)
    elif reason is not None:
        raise UserError(f'decode_attention: kernel is "triton", which cannot: {reason}; allowed: auto, reference')
    return reason is None


@functools.cache
def _told(choice: str, slow: bool) -> None:
    log.log(logging.WARNING if slow else logging.INFO, "decode attention: %s%s", choice, " (slow)" if slow else "")


def decode_attention_reference(
    queries: Sequence[Tensor],
    keys: Sequence[Stored],
    values: Sequence[Stored],
    visible: Visible,
    *,
    scale: float,
) -> list[Tensor]:
    """`decode_attention` in plain torch: every entry is read, in fp32 or, for fp64 queries, in fp64."""
    batch, n_heads = queries[0].shape[:2]
    length, groups = keys[0].data.shape[1:3]
    dtype = torch.float64 if queries[0].dtype == torch.float64 else torch.float32
    column = visible.column
    stored = column - (column - torch.arange(length, device=column.device)) % length  # S: the column of each entry
    seen = (stored >= 0) & (stored < column if visible.exclude_self else stored <= column)
    if visible.window is not None:
        seen = seen & (stored > column - visible.window)
    first = 0 if visible.first is None else visible.first[:, None]
    seen = (seen & (stored >= first)).expand(batch, -1)  # B, S

    def read(part: Stored) -> Tensor:
        data = part.data.to(dtype) if part.scale is None else part.data.to(dtype) * part.scale.to(dtype)[..., None]
        return data.masked_fill(~seen[:, :, None, None], 0)  # an entry never written may hold anything

    with torch.autocast(column.device.type, enabled=False):
        scores = sum(
            torch.einsum("bgnd,bsgd->bgns", q.to(dtype).unflatten(1, (groups, -1)), read(k))
            for q, k in zip(queries, keys, strict=True)
        )
        assert isinstance(scores, Tensor)
        hidden = ~seen[:, None, None, :]
        # Where a row sees nothing all weights are equal, but what they weigh is 0.
        weights = (scores * scale).masked_fill(hidden, torch.finfo(dtype).min).softmax(-1)
        results = [torch.einsum("bgns,bsge->bgne", weights, read(v)) for v in values]
    return [result.reshape(batch, n_heads, -1).to(queries[0].dtype) for result in results]
