"""The attention that cached tokens get from the prompt's own queries.

    a_ts = softmax over s ≤ t of R_t q_t · k_s / √D
    received_s = Σ_t a_ts
    entropy = mean over t of -Σ_s a_ts ln a_ts

with keys k as they are cached, after RoPE, and queries q recorded before RoPE and rotated to their positions. A layer
whose keys are made of several slots reads their weighted sum, as in a decoder.

Shapes: B batch, n tokens, m recorded queries, H query heads, G KV heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.errors import UserError
from cllm.model.rope import apply_rope
from cllm.posthoc.later_queries import LaterQueries
from cllm.posthoc.readers import RecordedQueries, SlotReader, not_recorded
from cllm.posthoc.slots import CompressibleSlots

_SCORES = 2**25
"""Scores that are computed at once, which bounds the memory."""


@dataclass(frozen=True)
class Votes:
    """The votes of one layer's queries for the tokens that it reads."""

    received: Tensor
    """(B, H, n) fp32: the attention that a token gets, summed over queries; 0 for padding."""
    entropy: Tensor | None
    """(B,) fp32: of the attention of a query in nats, the mean over queries and heads; None: not asked for."""


def total_received(votes: Sequence[Votes]) -> Tensor:
    """(B, H, n) fp32: the attention that tokens get, summed over layers and their queries."""
    return torch.stack([vote.received for vote in votes]).sum(0)


def layer_votes(
    cached: CompressibleSlots,
    readers: Mapping[int, Sequence[SlotReader]],
    queries: RecordedQueries | LaterQueries,
    layer: int,
    user: str,
    *,
    entropy: bool = False,
) -> Votes:
    """The votes of the recorded queries of `layer`.

    Args:
        cached: slots that keep the same tokens, the last ones of the text among them.
        readers: of each slot.
        queries: of the layer, for the last tokens.
        layer: which reads slots of `cached` only.
        user: the method that errors name.
        entropy: compute the entropy too.

    Raises:
        UserError: if the queries of this prompt were not recorded.
    """
    k = _read_keys(cached, readers, layer)
    batch, tokens, groups, dim = k.shape
    q = queries.of(layer, tokens)  # B, m, H, D
    if len(q) != batch:
        raise UserError(not_recorded(user))
    columns = torch.arange(tokens - q.shape[1], tokens, device=k.device)[None]  # 1, m
    positions = columns + cached.first_column
    if cached.starts is not None:
        positions = (positions - cached.starts[:, None]).clamp(min=0)
    q = apply_rope(q.float(), cached.rope(dim, positions)).unflatten(2, (groups, -1)) / dim**0.5  # B, m, G, H/G, D
    exclude_self = any(read.exclude_self for read in cached.reads if read.layer == layer)
    is_text = cached.is_text(tokens)
    heads = q.shape[2] * q.shape[3]
    received, total = k.new_zeros(batch, heads, tokens), k.new_zeros(batch)
    size = max(_SCORES // (batch * heads * tokens), 1)
    last = q.shape[1]
    for begin in range(0, last, size):
        part, at = q[:, begin : begin + size], columns[:, begin : begin + size]
        end = tokens - last + min(begin + size, last)  # later keys are seen by none of these queries
        visible = torch.arange(end, device=k.device) <= at[..., None] - int(exclude_self)  # 1, m, end
        if is_text is not None:
            visible = visible & is_text[:, None, :end] & is_text[:, at[0]][..., None]
        seen = visible[:, None, None]  # B or 1, 1, 1, m, end
        scores = torch.einsum("bmgrd,bngd->bgrmn", part, k[:, :end]).masked_fill_(~seen, -torch.inf)
        weights = scores.softmax(-1).nan_to_num(0.0)  # a query that sees nothing has no attention
        received[..., :end] += weights.sum(-2).flatten(1, 2)
        if entropy:
            total += torch.special.entr(weights).sum((1, 2, 3, 4))
    if not entropy:
        return Votes(received, None)
    counted = q.shape[1] if is_text is None else is_text[:, columns[0]].sum(1).clamp(min=1)
    return Votes(received, total / counted / heads)


def _read_keys(cached: CompressibleSlots, readers: Mapping[int, Sequence[SlotReader]], layer: int) -> Tensor:
    """(B, n, G, D) fp32: the keys that a layer reads, after RoPE."""
    total: Tensor | None = None
    for slot, stored in cached.slots.items():
        for reader in readers[slot]:
            if reader.layer == layer and reader.keys is not None:
                part = stored.k.float() * reader.keys.to(stored.k.device, torch.float32)
                total = part if total is None else total + part
    assert total is not None, "a layer that reads values of a slot with keys from elsewhere reads both together"
    return total
