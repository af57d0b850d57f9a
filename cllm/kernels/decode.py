"""Attention of one new token of each sequence over cached slots, for every kind of slot.

    scores = scale Σ_p q_p k_p        result_p = softmax(scores) v_p

Keys and values may have several parts:

- Plain and grouped attention have one key part and one value part.
- Fused keys (FusedKV, arXiv 2512.03870) are two parts. Their queries carry the weights: (a ⊙ q) k_1 + (b ⊙ q) k_n.
  Fused values are two results, which the caller weights. So no fused tensor is ever computed.
- A latent (MLA, arXiv 2405.04434, section 2.1.2) with absorbed up-projections is one KV head. Its key parts are the
  latent and the RoPE key, and its value part is the latent.
- Keys that are stored before RoPE (`Stored.rope`) are rotated on the way. If they are values too, they are read once.

Shapes: B batch, S entries, H query heads, G KV heads (H a multiple of G), D and E channels of a key and value part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cllm.kernels import split_decode
from cllm.kernels.choice import Kernel, uses_triton

__all__ = [
    "Kernel",
    "Stored",
    "Visible",
    "decode_attention",
    "decode_attention_lse",
    "decode_attention_reference",
    "rotation_of",
]


@dataclass(frozen=True, slots=True)
class Stored:
    """One cached tensor."""

    data: Tensor
    """(B, S, G, D), channels contiguous; bf16, fp16, fp32 or float8_e4m3fn."""
    scale: Tensor | None = None
    """(B, S, G) bf16 or fp32, one factor for each token and head of float8 data."""
    rope: tuple[Tensor, Tensor] | None = None
    """cos and signed sin (B or 1, S, 1, 2, D / 2) fp32 of each entry, as `rope_table` returns them: the data are keys
    before RoPE. All parts of a call have the same. None: the data are used as they are."""


@dataclass(frozen=True, slots=True)
class Visible:
    """Which of the S entries the new token sees.

    The entries are a ring: entry j holds column c_j = column - ((column - j) mod S), the newest column that maps to j,
    and is empty while c_j < 0. The token sees the last `window` of the columns from `first` up to its own.
    """

    column: Tensor
    """(1,) int64, on the device: the column of the new token, whose entry is already stored."""
    first: Tensor | None
    """(B,) int64: the first column that each row sees (left padding); None: 0."""
    window: int | None
    """Number of columns that the token sees, its own included; None: all stored columns."""
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

    Query head h reads KV head h // (H / G). Sums are fp32 (fp64 for fp64 queries). On a GPU only visible entries are
    read, and a tensor that is both a key part and a value part is read once. There is no device sync, so that a CUDA
    graph may capture the call and replay it while `visible.column` grows. For torch.compile it is one opaque operator.

    Args:
        queries: (B, H, D_p) for each key part.
        keys: the parts of the keys.
        values: the parts of the values.
        visible: which entries are seen.
        scale: factor on the scores.
        kernel: `auto`: Triton on a GPU if it supports the call, otherwise plain torch; the choice and its reason are
            logged once, as a warning for plain torch on a GPU. Or one of the two by name.

    Returns:
        For each value part (B, H, E_p) in the queries' dtype, 0 where a row sees nothing. Results of several parts are
        slices of one tensor.

    Raises:
        UserError: for a kernel that does not exist or does not compute this call.
        ValueError: if there are not as many queries as key parts, or H is no multiple of G.
    """
    n_heads, groups = queries[0].shape[1], keys[0].data.shape[2]
    if len(queries) != len(keys):
        raise ValueError(f"decode_attention: {len(queries)} queries for {len(keys)} key parts")
    if n_heads % groups:
        raise ValueError(f"decode_attention: {n_heads} query heads are no multiple of {groups} KV heads")
    arguments = _operator_arguments(queries, keys, values, visible)
    out = _decode_attention(*arguments, scale, kernel, *_rope(keys))
    return list(out.split([v.data.shape[-1] for v in values], dim=-1))


def decode_attention_lse(
    queries: Sequence[Tensor],
    keys: Sequence[Stored],
    values: Sequence[Stored],
    visible: Visible,
    *,
    scale: float,
    kernel: Kernel = "auto",
) -> tuple[list[Tensor], Tensor]:
    """`decode_attention`, with results in fp32 (fp64 for fp64 queries), and the log-sum-exp (B, H) of the scores.

    The log-sum-exp is to base e, in the dtype of the results, and -inf where a row sees nothing. Calls over parts of
    the keys can be merged by it.
    """
    arguments = _operator_arguments(queries, keys, values, visible)
    out, lse = _decode_attention_lse(*arguments, scale, kernel, *_rope(keys))
    return list(out.split([v.data.shape[-1] for v in values], dim=-1)), lse


def rotation_of(keys: Sequence[Stored]) -> split_decode.Rotation | None:
    """RoPE of the key parts that are stored before it; None if there is no such part."""
    tables = {i: key.rope for i, key in enumerate(keys) if key.rope is not None}
    for table in tables.values():
        cos, sin = (t[:, :, 0, 1] for t in table)  # of the second channel of each pair, whose sine has its own sign
        return split_decode.Rotation(cos, sin, tuple(tables))
    return None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x` (B, S, G, D) rotated by cos and sin (B or 1, S, 1, 1 or 2, D / 2), the sine negative for the first half."""
    halves = x.unflatten(-1, (2, -1))
    return (halves * cos + halves.flip(-2) * sin).flatten(-2)


def _rope(keys: Sequence[Stored]) -> tuple[Tensor | None, Tensor | None, list[int]]:
    """The last arguments of the two operators below."""
    rotation = rotation_of(keys)
    return (None, None, []) if rotation is None else (rotation.cos, rotation.sin, list(rotation.parts))


def _rotation(cos: Tensor | None, sin: Tensor | None, rotated: Sequence[int] | None) -> split_decode.Rotation | None:
    return None if cos is None or sin is None else split_decode.Rotation(cos, sin, tuple(rotated or ()))


def _operator_arguments(
    queries: Sequence[Tensor], keys: Sequence[Stored], values: Sequence[Stored], visible: Visible
) -> tuple[Any, ...]:
    """The first arguments of the two operators below, which take tensors and numbers only."""
    return (
        list(queries),
        [k.data for k in keys],
        [k.scale for k in keys],
        [v.data for v in values],
        [v.scale for v in values],
        visible.column,
        visible.first,
        visible.window,
        visible.exclude_self,
    )


def _as_stored(
    keys: Sequence[Tensor], scales: Sequence[Tensor | None], rotation: split_decode.Rotation | None
) -> list[Stored]:
    """The key parts of an operator's arguments."""
    if rotation is None:
        return [Stored(*pair) for pair in zip(keys, scales, strict=True)]
    cos, sin = (t[:, :, None, None] for t in rotation[:2])  # B, S, 1, 1, D/2
    rope = cos, torch.cat((-sin, sin), dim=-2)
    pairs = zip(keys, scales, strict=True)
    return [Stored(k, scale, rope if i in rotation.parts else None) for i, (k, scale) in enumerate(pairs)]


def _compute(
    function: str, kernel: str, rotation: split_decode.Rotation | None, arguments: tuple[Any, ...], *, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """The results (B, H, sum of E_p) of the operator `function`, and the log-sum-exp (B, H) of the scores.

    Plain torch returns both in fp32 or fp64. Triton returns the log-sum-exp, and results in fp32, only `with_lse`.

    Args:
        arguments: of the operator, from `queries` to `scale`.
    """
    queries, keys, key_scales, values, value_scales, column, first, window, exclude_self, scale = arguments

    def unsupported() -> str | None:
        return split_decode.unsupported(queries, keys, values, [*key_scales, *value_scales], rotation)

    if uses_triton(function, kernel, unsupported, on_gpu=queries[0].is_cuda):
        with torch.cuda.device_of(queries[0]):
            lse = queries[0].new_empty(queries[0].shape[:2], dtype=torch.float32) if with_lse else None
            rule = (column, first, window, exclude_self, scale)
            out = split_decode.run(
                queries, keys, key_scales, values, value_scales, *rule, log_sum=lse, rotation=rotation
            )
            return out, None if lse is None else lse * math.log(2)
    results, lse = _reference(
        queries,
        _as_stored(keys, key_scales, rotation),
        [Stored(*pair) for pair in zip(values, value_scales, strict=True)],
        Visible(column, first, window, exclude_self),
        scale,
    )
    return torch.cat(results, dim=-1), lse


@torch.library.custom_op("cllm::decode_attention_lse", mutates_args=())
def _decode_attention_lse(
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
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rotated: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    rotation = _rotation(cos, sin, rotated)
    arguments = (queries, keys, key_scales, values, value_scales, column, first, window, exclude_self, scale)
    out, lse = _compute("decode_attention_lse", kernel, rotation, arguments, with_lse=True)
    assert lse is not None
    return out, lse


@_decode_attention_lse.register_fake
def _(queries, keys, key_scales, values, value_scales, *more):
    wide = torch.promote_types(queries[0].dtype, torch.float32)
    shape = queries[0].shape[:2]
    return (
        queries[0].new_empty((*shape, sum(v.shape[-1] for v in values)), dtype=wide),
        queries[0].new_empty(shape, dtype=wide),
    )


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
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    rotated: Sequence[int] | None = None,
) -> Tensor:
    """(B, H, sum of E_p): one tensor, because results of an operator must not share memory."""
    rotation = _rotation(cos, sin, rotated)
    arguments = (queries, keys, key_scales, values, value_scales, column, first, window, exclude_self, scale)
    out, _ = _compute("decode_attention", kernel, rotation, arguments, with_lse=False)
    return out.to(queries[0].dtype)


@_decode_attention.register_fake
def _(queries, keys, key_scales, values, value_scales, *more) -> Tensor:
    return queries[0].new_empty((*queries[0].shape[:2], sum(v.shape[-1] for v in values)))


def decode_attention_reference(
    queries: Sequence[Tensor],
    keys: Sequence[Stored],
    values: Sequence[Stored],
    visible: Visible,
    *,
    scale: float,
) -> list[Tensor]:
    """`decode_attention` in plain torch, which reads every entry, in fp32 or, for fp64 queries, in fp64."""
    return [result.to(queries[0].dtype) for result in _reference(queries, keys, values, visible, scale)[0]]


def _reference(
    queries: Sequence[Tensor], keys: Sequence[Stored], values: Sequence[Stored], visible: Visible, scale: float
) -> tuple[list[Tensor], Tensor]:
    """Results (B, H, E_p) for each value part, and the log-sum-exp of the scores (B, H), in fp32 or fp64."""
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
        if part.rope is not None:
            data = _turned(data, *(t.to(dtype) for t in part.rope))
        return data.masked_fill(~seen[:, :, None, None], 0)  # entries that were never written are undefined

    with torch.autocast(column.device.type, enabled=False):
        scores = sum(
            torch.einsum("bgnd,bsgd->bgns", q.to(dtype).unflatten(1, (groups, -1)), read(k))
            for q, k in zip(queries, keys, strict=True)
        )
        assert isinstance(scores, Tensor)
        hidden = ~seen[:, None, None, :]
        # If a row sees nothing, all weights are equal, but all values are 0.
        weights = (scores * scale).masked_fill(hidden, torch.finfo(dtype).min).softmax(-1)
        results = [torch.einsum("bgns,bsge->bgne", weights, read(v)) for v in values]
        lse = (scores * scale).masked_fill(hidden, float("-inf")).logsumexp(-1)
    return [result.reshape(batch, n_heads, -1) for result in results], lse.reshape(batch, n_heads)
