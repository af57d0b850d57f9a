"""Attention with the log-sum-exp of its scores in plain torch, on any device and in any dtype.

Queries are taken in blocks, and each block reads the keys between the first and the last that one of its queries sees.
So windows are cheap, and memory does not grow with T x S. Sums are fp32, or fp64 for fp64 tensors.

Shapes: B batch, T queries, S keys, H query heads, G KV heads, n = H / G, D and E channels of a key and a value head.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cllm.kernels.backends.mask import Mask


def _block(q: Tensor, mask: Mask) -> int:
    """Queries of a block: few for a window, whose keys a block reads and hides in part; many on a GPU."""
    return 1024 if q.is_cuda else 256 if mask.window is None else 64


def attention_in_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q kᵀ + mask) v and log Σ exp(scale q kᵀ + mask).

    Args:
        q: (B, T, H, D).
        k: (B, S, G, D), S >= T.
        v: (B, S, G, E).
        mask: causal; every query must see a key.
        scale: factor on the scores.

    Returns:
        (B, T, H, E) in the dtype of `v`, and (B, H, T) fp32 or fp64.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = v.new_empty((*q.shape[:3], v.shape[-1])), q.new_empty((len(q), q.shape[2], q.shape[1]), dtype=wide)
    for rows, keys, hidden in _blocks(q, k, mask):
        scores = _scores(q[:, rows], k[:, keys], hidden, scale, wide)
        total = scores.logsumexp(-1)  # B, G, n, t
        weights = (scores - total[..., None]).exp_()
        out[:, rows] = torch.einsum("bgnts,bsge->btgne", weights, v[:, keys].to(wide)).flatten(2, 3).to(v.dtype)
        lse[:, :, rows] = total.flatten(1, 2)
    return out, lse


def gradients_in_blocks(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Mask, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for q, k and v, in their dtypes; see `Backend.backward`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    d_q, groups = torch.empty_like(q), k.shape[2]
    d_k, d_v = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    for rows, keys, hidden in _blocks(q, k, mask):
        query, key, value = q[:, rows].to(wide).unflatten(2, (groups, -1)), k[:, keys].to(wide), v[:, keys].to(wide)
        gradient = d_out[:, rows].to(wide)
        delta = (gradient * out[:, rows].to(wide)).sum(-1).transpose(1, 2).unflatten(1, (groups, -1))  # B, G, n, t
        gradient = gradient.unflatten(2, (groups, -1))
        scores = _scores(q[:, rows], k[:, keys], hidden, scale, wide)
        weights = (scores - lse[:, :, rows].unflatten(1, (groups, -1))[..., None]).exp_()
        d_v[:, keys] += torch.einsum("bgnts,btgne->bsge", weights, gradient)
        d_scores = torch.einsum("btgne,bsge->bgnts", gradient, value).sub_(delta[..., None]).mul_(weights).mul_(scale)
        d_q[:, rows] = torch.einsum("bgnts,bsgd->btgnd", d_scores, key).flatten(2, 3).to(q.dtype)
        d_k[:, keys] += torch.einsum("bgnts,btgnd->bsgd", d_scores, query)
    return d_q, d_k.to(k.dtype), d_v.to(v.dtype)


def _scores(q: Tensor, k: Tensor, hidden: Tensor, scale: float, wide: torch.dtype) -> Tensor:
    """(B, G, n, t, s), -inf where `hidden` (1 or B, t, s)."""
    query = (q.to(wide) * scale).unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("btgnd,bsgd->bgnts", query, k.to(wide))
    return scores.masked_fill_(hidden[:, None, None], float("-inf"))


def _blocks(q: Tensor, k: Tensor, mask: Mask) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of queries, the keys that they may see, and the mask between them (1 or B, t, s), True if hidden."""
    length, size = q.shape[1], k.shape[1]
    past, ids, block = size - length, mask.document_ids, _block(q, mask)
    for start in range(0, length, block):
        stop = min(start + block, length)
        first = 0 if mask.window is None else max(past + start - mask.window + 1, 0)
        rows, keys = slice(start, stop), slice(first, past + stop)
        distance = torch.arange(past + start, past + stop, device=q.device)[:, None] - torch.arange(
            first, past + stop, device=q.device
        )
        hidden = distance < 0
        if mask.window is not None:
            hidden = hidden | (distance >= mask.window)
        hidden = hidden[None]
        if ids is not None:
            hidden = hidden | (ids[:, past + start : past + stop, None] != ids[:, None, keys])
        yield rows, keys, hidden
