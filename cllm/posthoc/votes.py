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
from cllm.posthoc.slots import CompressibleSlots, together

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
    layers: Mapping[int, CompressibleSlots],
    readers: Mapping[int, Sequence[SlotReader]],
    queries: RecordedQueries | LaterQueries,
    user: str,
    *,
    entropy: bool = False,
) -> dict[int, Votes]:
    """The votes of the recorded queries of some layers, those of one shape together as far as memory allows.

    Args:
        layers: of each layer the slots that it may read, which keep the same tokens, the last ones of the text among
            them.
        readers: of each slot.
        queries: of the layers, for the last tokens.
        user: the method that errors name.
        entropy: compute the entropy too.

    Raises:
        UserError: if the queries of this prompt were not recorded.
    """
    found: dict[int, Votes] = {}
    left = list(layers)
    while left:
        cached, keys = layers[left[0]], [_read_keys(layers[left[0]], readers, left[0])]
        tokens = keys[0].shape[1]
        asked = [queries.of(left[0], tokens)]  # B, m, H, D
        if len(asked[0]) != len(keys[0]):
            raise UserError(not_recorded(user))
        scores = max(asked[0][..., 0].numel() * tokens, 1)
        most = max(min(_SCORES, together(keys[0].device)) // scores, 1)
        for layer in left[1:most]:
            k, q = _read_keys(layers[layer], readers, layer), queries.of(layer, tokens)
            shapes, device = (k.shape, q.shape), k.device
            if shapes != (keys[0].shape, asked[0].shape) or device != keys[0].device:
                break
            if not _see_alike(cached, layers[layer], left[0], layer):
                break
            keys.append(k)
            asked.append(q)
        alike, left = left[: len(keys)], left[len(keys) :]
        exclude_self = _excludes_self(cached, alike[0])
        votes = _votes(cached, torch.cat(asked), torch.cat(keys), len(keys), exclude_self, entropy=entropy)
        found |= zip(alike, votes, strict=True)
    return found


def _see_alike(one: CompressibleSlots, other: CompressibleSlots, layer: int, other_layer: int) -> bool:
    """Whether two layers see their tokens alike."""
    return one.first_column == other.first_column and _excludes_self(one, layer) == _excludes_self(other, other_layer)


def _excludes_self(cached: CompressibleSlots, layer: int) -> bool:
    return any(read.exclude_self for read in cached.reads if read.layer == layer)


def _votes(
    cached: CompressibleSlots, q: Tensor, k: Tensor, layers: int, exclude_self: bool, *, entropy: bool
) -> list[Votes]:
    """The votes of several layers.

    Args:
        cached: slots of one of the layers.
        q: (layers · B, m, H, D): the last queries before RoPE, one layer after the other.
        k: (layers · B, n, G, D) fp32: the keys that the layers read.
        layers: how many.
        exclude_self: as in `JointRead`.
        entropy: compute it.
    """
    batch, tokens, groups, dim = k.shape
    columns = torch.arange(tokens - q.shape[1], tokens, device=k.device)[None]  # 1, m
    positions = columns + cached.first_column
    is_text = cached.is_text(tokens)
    if cached.starts is not None and is_text is not None:
        positions = (positions - cached.starts[:, None]).clamp(min=0).repeat(layers, 1)
        is_text = is_text.repeat(layers, 1)
    q = apply_rope(q.float(), cached.rope(dim, positions)).unflatten(2, (groups, -1)) / dim**0.5  # B, m, G, H/G, D
    heads = q.shape[2] * q.shape[3]
    received, total = k.new_zeros(batch, heads, tokens), k.new_zeros(batch)
    size = max(_SCORES // (batch * heads * tokens), 1)
    last = q.shape[1]
    for begin in range(0, last, size):
        part, at = q[:, begin : begin + size], columns[:, begin : begin + size]
        first = tokens - last + begin
        end = first + part.shape[1]  # later keys are seen by none of these queries
        first = first if is_text is None else 0  # without padding all of them see the keys before the first of them
        visible = torch.arange(first, end, device=k.device) <= at[..., None] - int(exclude_self)  # 1, m, end - first
        if is_text is not None:
            visible = visible & is_text[:, None, :end] & is_text[:, at[0]][..., None]
        seen = visible[:, None, None]  # B or 1, 1, 1, m, end - first
        scores = torch.einsum("bmgrd,bngd->bgrmn", part, k[:, :end])
        scores[..., first:].masked_fill_(~seen, -torch.inf)
        weights = scores.softmax(-1)
        if exclude_self or is_text is not None:
            weights = weights.nan_to_num_(0.0)  # a query that sees nothing has no attention
        received[..., :end] += weights.sum(-2).flatten(1, 2)
        if entropy:
            total += torch.special.entr(weights).sum((1, 2, 3, 4))
    if not entropy:
        return [Votes(of_layer, None) for of_layer in received.chunk(layers)]
    counted = last if is_text is None else is_text[:, columns[0]].sum(1).clamp(min=1)
    parts = zip(received.chunk(layers), (total / counted / heads).chunk(layers), strict=True)
    return [Votes(of_layer, spread) for of_layer, spread in parts]


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
