"""Attention of one new token a sequence over tokens that are stored as low-rank factors (xKV, arXiv 2503.18893), and
over an exact tail.

    K = RoPE(A_k B_kᵀ)    V = A_v B_vᵀ    o = Σ_t p_t v_t = (P A_v) B_vᵀ + P_tail V_tail,    P = softmax(scale q Kᵀ)

Keys are rebuilt a tile at a time and never stored; values are not rebuilt at all. With a `Selection` only the tokens
that it chooses are read (`cllm.kernels.selection`).

A slot may come in several parts, as in `cllm.kernels.decode`.

Shapes: B batch, S compressed tokens, T tokens of the tail, H query heads, G KV heads, D channels of a head, r rank.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from cllm.errors import UserError
from cllm.kernels import split_lowrank
from cllm.kernels.decode import Kernel, Visible
from cllm.kernels.selection import Factored, Selection, chosen_tokens

__all__ = ["Factored", "Selection", "lowrank_decode", "lowrank_decode_reference"]

log = logging.getLogger(__name__)

Table = tuple[Tensor, Tensor]
"""cos and sin (positions, D / 2) fp32 for at least S positions, both positive turns: of `rope_table` the first row of
cos and the second of sin."""


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

    Query head h reads KV head h // (H / G). Token t has position t - `visible.first`. Sums are fp32 (fp64 for fp64
    queries). Shapes do not depend on `visible.column`, so that a CUDA graph may capture the call and replay it while
    the tail has places left; to torch.compile it is one opaque operator.

    Args:
        queries: (B, H, D) after RoPE, for each key part.
        keys: the parts of the keys, of one S and T.
        values: the parts of the values, of the same S and T.
        table: RoPE of the compressed positions.
        visible: which columns are seen, compressed ones and the tail's counted through; without a window.
        scale: factor on the scores.
        selection: read chosen chunks only; for one key part. A budget of S tokens or more reads them all.
        kernel: `auto` takes Triton on a GPU and plain torch for what Triton cannot, and logs once which and why; or one
            of the two by name.

    Returns:
        For each value part (B, H, D) in the queries' dtype, 0 where a row sees nothing.

    Raises:
        UserError: for a kernel that does not exist or does not compute this call.
        ValueError: for another number of queries than of key parts, H no multiple of G, a window, or a selection with
            several key parts.
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
    chosen = (None, None, None, 0, 0)
    if selection is not None:
        chosen = (selection.landmarks, selection.outliers, selection.outlier_keys, selection.chunk, selection.budget)  # type: ignore[assignment]
    out = _lowrank_decode(
        list(queries),
        *([getattr(part, name) for part in parts] for parts in (keys, values) for name in ("a", "b", "tail")),
        *table,
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
    value_b: Sequence[Tensor],
    value_tails: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
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
    if _runs_triton(kernel, queries, keys, values, selection):
        with torch.cuda.device_of(queries[0]):
            return split_lowrank.run(queries, keys, values, (cos, sin), visible, scale, selection)
    parts = lowrank_decode_reference(queries, keys, values, (cos, sin), visible, scale=scale, selection=selection)
    return torch.cat(parts, dim=-1)


@_lowrank_decode.register_fake
def _(queries, key_a, key_b, key_tails, value_a, value_b, value_tails, *rest) -> Tensor:
    return queries[0].new_empty((*queries[0].shape[:2], sum(v.shape[-1] for v in value_tails)))


def _runs_triton(kernel: str, queries, keys, values, selection: Selection | None) -> bool:
    if kernel == "reference":
        return False
    if kernel not in ("auto", "triton"):
        raise UserError(f'lowrank_decode: kernel is "{kernel}"; allowed: auto, triton, reference')
    reason = split_lowrank.unsupported(queries, keys, values, selection)
    if kernel == "auto":
        slow = reason is not None and queries[0].is_cuda
        _told("triton" if reason is None else f"plain torch, because triton cannot: {reason}", slow)
    elif reason is not None:
        raise UserError(f'lowrank_decode: kernel is "triton", which cannot: {reason}; allowed: auto, reference')
    return reason is None


@functools.cache
def _told(choice: str, slow: bool) -> None:
    """Once for each choice: one that makes a GPU `slow` as a warning."""
    log.log(logging.WARNING if slow else logging.INFO, "decoding over low-rank factors: %s", choice)


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
    since = torch.arange(compressed, compressed + keys[0].tail.shape[1], device=device)
    later = (since >= first) & (since < visible.column + (not visible.exclude_self))  # B or 1, 1, T

    def tail(part: Factored) -> Tensor:
        return part.tail.to(dtype).masked_fill(~later[:, 0, :, None, None], 0)  # a place not filled may hold anything

    with torch.autocast(device.type, enabled=False):
        grouped = [q.to(dtype).unflatten(1, (groups, -1)) for q in queries]  # B, G, H / G, D
        index, places = None, torch.arange(compressed, device=device)[None, None]
        if selection is not None:
            marks = torch.einsum("bgnd,bcgd->bgnc", grouped[0], selection.landmarks.to(dtype)) * scale
            ends = (torch.arange(marks.shape[-1], device=device) + 1) * selection.chunk
            places = chosen_tokens(marks.masked_fill(ends <= first[..., None], -torch.inf).flatten(1, 2), selection)
            index = places.clamp(max=compressed - 1)
        seen = (places >= first) & (places < compressed)  # B or 1, G or 1, n
        early_scores = sum(
            torch.einsum("bgnd,bgtd->bgnt", q, _keys(part, table, places, first, index, dtype))
            for q, part in zip(grouped, keys, strict=True)
        )
        assert isinstance(early_scores, Tensor)
        if selection is not None:
            exact = selection.outlier_keys.to(dtype)
            early_scores[..., : exact.shape[1]] = torch.einsum("bgnd,btgd->bgnt", grouped[0], exact)
        late_scores = sum(torch.einsum("bgnd,btgd->bgnt", q, tail(k)) for q, k in zip(grouped, keys, strict=True))
        assert isinstance(late_scores, Tensor)
        hidden = torch.cat(
            [~mask[:, :, None].expand_as(x) for mask, x in ((seen, early_scores), (later, late_scores))], -1
        )
        scores = torch.cat((early_scores, late_scores), -1) * scale
        # Where a row sees nothing all weights are equal, and become 0.
        weights = scores.masked_fill(hidden, torch.finfo(dtype).min).softmax(-1).masked_fill(hidden, 0)
        early, late = weights.split((early_scores.shape[-1], late_scores.shape[-1]), -1)
        results = []
        for part in values:
            b = part.b.to(dtype).unflatten(1, (groups, -1))  # B, G, D, r
            mixed = early @ _rows(part, index, dtype)  # B, G, H / G, r
            results.append(mixed @ b.mT + torch.einsum("bgnt,btgd->bgnd", late, tail(part)))
    return [result.flatten(1, 2).to(queries[0].dtype) for result in results]


def _rows(part: Factored, index: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Rows of A: all (B, 1, S, r), or those of `index` (B, G, n) as (B, G, n, r)."""
    if index is None:
        return part.a.to(dtype)[:, None]
    batch = torch.arange(len(index), device=index.device)[:, None, None]
    return part.a[batch, index].to(dtype)


def _keys(
    part: Factored, table: Table, places: Tensor, first: Tensor, index: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Keys after RoPE (B, G, n, D) of the tokens at `places` (B or 1, G or 1, n)."""
    groups = part.tail.shape[2]
    k = _rows(part, index, dtype) @ part.b.to(dtype).unflatten(1, (groups, -1)).mT
    at = (places.clamp(max=part.a.shape[1] - 1) - first).clamp(min=0)
    cos, sin = (t[at].to(dtype) for t in table)
    lower, upper = k.chunk(2, dim=-1)
    return torch.cat((lower * cos - upper * sin, upper * cos + lower * sin), dim=-1)
