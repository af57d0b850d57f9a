"""Attention of one new token of each sequence over tokens stored as low-rank factors (xKV, arXiv 2503.18893), and over
an exact tail of later tokens.

    K = RoPE(A_k B_kᵀ)    V = A_v B_vᵀ    o = Σ_t p_t v_t = (P A_v) B_vᵀ + P_tail V_tail,    P = softmax(scale q Kᵀ)

Keys are rebuilt one tile at a time and never stored; values are never rebuilt. With a `Selection`, only the tokens that
it chooses are read (`cllm.kernels.selection`). Keys and values may have several parts, as in `cllm.kernels.decode`.
Values may also be uncompressed, and then in host memory, from which only those of selected tokens are copied (ShadowKV,
arXiv 2410.21465).

Shapes: B batch, S compressed tokens, T tokens of the tail, H query heads, G KV heads, D channels of a head, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cllm.kernels import split_lowrank
from cllm.kernels.choice import Kernel, uses_triton
from cllm.kernels.decode import Visible
from cllm.kernels.gather import gather_rows
from cllm.kernels.selection import Factored, Selection, Table, chosen_tokens

__all__ = ["Factored", "Selection", "Table", "lowrank_decode", "lowrank_decode_reference"]


def lowrank_decode(
    queries: Sequence[Tensor],
    keys: Sequence[Factored],
    values: Sequence[Factored],
    table: Table,
    visible: Visible,
    *,
    scale: float,
    selection: Selection | None = None,
    kernel: Kernel = "auto",
) -> list[Tensor]:
    """Attention of one new token of each sequence; no gradients.

    Query head h reads KV head h // (H / G). Token t is rotated by row t - `visible.first` of the table. Sums are fp32
    (fp64 for fp64 queries). Shapes do not depend on `visible.column`, so that a CUDA graph may capture the call and
    replay it until the tail is full. For torch.compile it is one opaque operator.

    Args:
        queries: (B, H, D) after RoPE, for each key part.
        keys: the parts of the keys, all with the same S and T.
        values: the parts of the values, with the same S and T.
        table: RoPE of the compressed positions.
        visible: which columns are seen; the tail's columns follow the compressed ones. Without a window.
        scale: factor on the scores.
        selection: read only the chosen chunks; for one key part. A budget of S tokens or more reads all of them.
        kernel: as for `decode_attention`.

    Returns:
        For each value part (B, H, D) in the queries' dtype, 0 where a row sees nothing.

    Raises:
        UserError: for a kernel that does not exist or does not compute this call.
        ValueError: if there are not as many queries as key parts, or H is no multiple of G; for a window, for a
            selection with several key parts, and without one for values in host memory.
    """
    n_heads, groups = queries[0].shape[1], keys[0].tail.shape[2]
    if len(queries) != len(keys):
        raise ValueError(f"lowrank_decode: {len(queries)} queries for {len(keys)} key parts")
    if n_heads % groups:
        raise ValueError(f"lowrank_decode: {n_heads} query heads are no multiple of {groups} KV heads")
    if visible.window is not None:
        raise ValueError(f"lowrank_decode: a window of {visible.window}; allowed: none")
    if selection is not None and len(keys) > 1:
        raise ValueError(f"lowrank_decode: a selection for {len(keys)} key parts; allowed: 1")
    if selection is None and any(part.a.device != queries[0].device for part in values):
        raise ValueError(f"lowrank_decode: values on {values[0].a.device} without a selection; allowed: with one")
    chosen: tuple[Any, ...] = (None, None, None, 0, 0)
    if selection is not None:
        chosen = (selection.landmarks, selection.outliers, selection.outlier_keys, selection.chunk, selection.budget)
    out = _lowrank_decode(
        list(queries),
        *([getattr(part, name) for part in parts] for parts in (keys, values) for name in ("a", "b", "tail")),
        table.cos,
        table.sin,
        table.turn,
        visible.column,
        visible.first,
        visible.exclude_self,
        scale,
        *chosen,
        kernel,
    )
    return list(out.split([v.tail.shape[-1] for v in values], dim=-1))


@torch.library.custom_op("cllm::lowrank_decode", mutates_args=())
def _lowrank_decode(
    queries: Sequence[Tensor],
    key_a: Sequence[Tensor],
    key_b: Sequence[Tensor],
    key_tails: Sequence[Tensor],
    value_a: Sequence[Tensor],
    value_b: Sequence[Tensor | None],
    value_tails: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    turn: float | None,
    column: Tensor,
    first: Tensor | None,
    exclude_self: bool,
    scale: float,
    landmarks: Tensor | None,
    outliers: Tensor | None,
    outlier_keys: Tensor | None,
    chunk: int,
    budget: int,
    kernel: str,
) -> Tensor:
    """(B, H, parts · D): one tensor, because results of an operator must not share memory."""
    keys = [Factored(*part) for part in zip(key_a, key_b, key_tails, strict=True)]
    values = [Factored(*part) for part in zip(value_a, value_b, value_tails, strict=True)]
    visible = Visible(column, first, None, exclude_self)
    selection = None
    if landmarks is not None and outliers is not None and outlier_keys is not None:
        selection = Selection(landmarks, outliers, outlier_keys, chunk, budget)

    def unsupported() -> str | None:
        return split_lowrank.unsupported(queries, keys, values, selection)

    if uses_triton("lowrank_decode", kernel, unsupported, on_gpu=queries[0].is_cuda):
        with torch.cuda.device_of(queries[0]):
            return split_lowrank.run(queries, keys, values, Table(cos, sin, turn), visible, scale, selection)
    parts = lowrank_decode_reference(queries, keys, values, Table(cos, sin), visible, scale=scale, selection=selection)
    return torch.cat(parts, dim=-1)


@_lowrank_decode.register_fake
def _(queries, key_a, key_b, key_tails, value_a, value_b, value_tails, *rest) -> Tensor:
    return queries[0].new_empty((*queries[0].shape[:2], sum(v.shape[-1] for v in value_tails)))


def lowrank_decode_reference(
    queries: Sequence[Tensor],
    keys: Sequence[Factored],
    values: Sequence[Factored],
    table: Table,
    visible: Visible,
    *,
    scale: float,
    selection: Selection | None = None,
) -> list[Tensor]:
    """`lowrank_decode` in plain torch, in fp32 or, for fp64 queries, in fp64."""
    compressed, groups = keys[0].a.shape[1], keys[0].tail.shape[2]
    dtype = torch.float64 if queries[0].dtype == torch.float64 else torch.float32
    device = visible.column.device
    first = torch.zeros(1, dtype=torch.long, device=device) if visible.first is None else visible.first
    first = first[:, None, None]  # B or 1, 1, 1
    tail_columns = torch.arange(compressed, compressed + keys[0].tail.shape[1], device=device)
    tail_seen = (tail_columns >= first) & (tail_columns < visible.column + (not visible.exclude_self))  # B or 1, 1, T

    def seen_tail(part: Factored) -> Tensor:
        return part.tail.to(dtype).masked_fill(~tail_seen[:, 0, :, None, None], 0)  # free entries are undefined

    with torch.autocast(device.type, enabled=False):
        grouped = [q.to(dtype).unflatten(1, (groups, -1)) for q in queries]  # B, G, H / G, D
        index, tokens = None, torch.arange(compressed, device=device)[None, None]
        if selection is not None:
            landmark_scores = torch.einsum("bgnd,bcgd->bgnc", grouped[0], selection.landmarks.to(dtype)) * scale
            ends = (torch.arange(landmark_scores.shape[-1], device=device) + 1) * selection.chunk
            landmark_scores = landmark_scores.masked_fill(ends <= first[..., None], -torch.inf)
            tokens = chosen_tokens(landmark_scores.flatten(1, 2), selection)
            index = tokens.clamp(max=compressed - 1)
        seen = (tokens >= first) & (tokens < compressed)  # B or 1, G or 1, n
        compressed_scores = sum(
            torch.einsum("bgnd,bgtd->bgnt", q, _keys(part, table, tokens, first, index, dtype))
            for q, part in zip(grouped, keys, strict=True)
        )
        assert isinstance(compressed_scores, Tensor)
        if selection is not None:
            exact = selection.outlier_keys.to(dtype)
            compressed_scores[..., : exact.shape[1]] = torch.einsum("bgnd,btgd->bgnt", grouped[0], exact)
        tail_scores = sum(torch.einsum("bgnd,btgd->bgnt", q, seen_tail(k)) for q, k in zip(grouped, keys, strict=True))
        assert isinstance(tail_scores, Tensor)
        hidden = torch.cat(
            [~mask[:, :, None].expand_as(x) for mask, x in ((seen, compressed_scores), (tail_seen, tail_scores))], -1
        )
        scores = torch.cat((compressed_scores, tail_scores), -1) * scale
        # If a row sees nothing, all weights are equal, and become 0.
        weights = scores.masked_fill(hidden, torch.finfo(dtype).min).softmax(-1).masked_fill(hidden, 0)
        compressed_weights, tail_weights = weights.split((compressed_scores.shape[-1], tail_scores.shape[-1]), -1)
        results = []
        for part in values:
            of_tail = torch.einsum("bgnt,btgd->bgnd", tail_weights, seen_tail(part))
            if part.b is None:
                results.append(compressed_weights @ _uncompressed(part, index, dtype) + of_tail)
                continue
            b = part.b.to(dtype).unflatten(1, (groups, -1))  # B, G, D, r
            mixed = compressed_weights @ _rows(part, index, dtype)  # B, G, H / G, r
            results.append(mixed @ b.mT + of_tail)
    return [result.flatten(1, 2).to(queries[0].dtype) for result in results]


def _rows(part: Factored, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows of A: all, (B, 1, S, r), or those of `index` (B, G, n), (B, G, n, r)."""
    if index is None:
        return part.a.to(dtype)[:, None]
    batch = torch.arange(len(index), device=index.device)[:, None, None]
    return part.a[batch, index].to(dtype)


def _uncompressed(part: Factored, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Uncompressed values: all, (B, G, S, D), or those of `index` (B, G, n), (B, G, n, D)."""
    rows = part.a.unflatten(2, part.tail.shape[2:])
    return (rows if index is None else gather_rows(rows, index)).transpose(1, 2).to(dtype)


def _keys(
    part: Factored, table: Table, tokens: Tensor, first: Tensor, index: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Keys after RoPE (B, G, n, D) of `tokens` (B or 1, G or 1, n)."""
    groups = part.tail.shape[2]
    assert part.b is not None, "only values are uncompressed"
    k = _rows(part, index, dtype) @ part.b.to(dtype).unflatten(1, (groups, -1)).mT
    position = (tokens.clamp(max=part.a.shape[1] - 1) - first).clamp(min=0)
    cos, sin = (t[position].to(dtype) for t in (table.cos, table.sin))
    lower, upper = k.chunk(2, dim=-1)
    return torch.cat((lower * cos - upper * sin, upper * cos + lower * sin), dim=-1)
