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
        stack = _stack_alike(left, layers, readers, queries, user)
        found |= zip(stack.layers, _votes(layers[left[0]], stack, entropy=entropy), strict=True)
        left = left[len(stack.layers) :]
    return found


@dataclass(frozen=True)
class _Stack:
    """Layers that vote as one batch, one layer after the other."""

    layers: list[int]
    q: Tensor
    """(layers · B, m, H, D): the last queries before RoPE."""
    k: Tensor
    """(layers · B, n, G, D) fp32: the keys that the layers read, after RoPE."""


def _stack_alike(
    left: Sequence[int],
    layers: Mapping[int, CompressibleSlots],
    readers: Mapping[int, Sequence[SlotReader]],
    queries: RecordedQueries | LaterQueries,
    user: str,
) -> _Stack:
    """The first of the layers `left`, and those next to it that have its shapes and see their tokens alike, as far as
    memory allows. See `layer_votes` for the other arguments."""
    first = left[0]
    keys = [_read_keys(layers[first], readers, first)]
    tokens, device = keys[0].shape[1], keys[0].device
    asked = [queries.of(first, tokens)]
    if len(asked[0]) != len(keys[0]):
        raise UserError(not_recorded(user))
    scores = max(asked[0][..., 0].numel() * tokens, 1)
    most = max(min(_SCORES, together(device)) // scores, 1)
    for layer in left[1:most]:
        k, q = _read_keys(layers[layer], readers, layer), queries.of(layer, tokens)
        if (k.shape, q.shape, k.device) != (keys[0].shape, asked[0].shape, device):
            break
        if not _see_alike(layers[first], layers[layer], first, layer):
            break
        keys.append(k)
        asked.append(q)
    return _Stack(list(left[: len(keys)]), torch.cat(asked), torch.cat(keys))


def _see_alike(one: CompressibleSlots, other: CompressibleSlots, layer: int, other_layer: int) -> bool:
    """Whether two layers see their tokens alike."""
    return one.first_column == other.first_column and _excludes_self(one, layer) == _excludes_self(other, other_layer)


def _excludes_self(cached: CompressibleSlots, layer: int) -> bool:
    return any(read.exclude_self for read in cached.reads if read.layer == layer)


def _votes(cached: CompressibleSlots, stack: _Stack, *, entropy: bool) -> list[Votes]:
    """The votes of each layer of a stack; `cached` are the slots of the first, and `entropy` asks for that too."""
    k, layers = stack.k, len(stack.layers)
    batch, tokens, groups, dim = k.shape
    last = stack.q.shape[1]
    positions = torch.arange(tokens - last, tokens, device=k.device)[None] + cached.first_column  # 1, m
    is_text = cached.is_text(tokens)
    if cached.starts is not None and is_text is not None:
        positions = (positions - cached.starts[:, None]).clamp(min=0).repeat(layers, 1)
        is_text = is_text.repeat(layers, 1)
    q = (
        apply_rope(stack.q.float(), cached.rope(dim, positions)).unflatten(2, (groups, -1)) / dim**0.5
    )  # B, m, G, H/G, D
    heads = q.shape[2] * q.shape[3]
    exclude_self = _excludes_self(cached, stack.layers[0])
    received, total_entropy = k.new_zeros(batch, heads, tokens), k.new_zeros(batch)
    size = max(_SCORES // (batch * heads * tokens), 1)
    for begin in range(0, last, size):
        weights = _attention(q[:, begin : begin + size], k, tokens - last + begin, is_text, exclude_self)
        received[..., : weights.shape[-1]] += weights.sum(-2).flatten(1, 2)
        if entropy:
            total_entropy += torch.special.entr(weights).sum((1, 2, 3, 4))
    if not entropy:
        return [Votes(of_layer, None) for of_layer in received.chunk(layers)]
    counted = last if is_text is None else is_text[:, tokens - last :].sum(1).clamp(min=1)
    parts = zip(received.chunk(layers), (total_entropy / counted / heads).chunk(layers), strict=True)
    return [Votes(of_layer, mean_entropy) for of_layer, mean_entropy in parts]


def _attention(q: Tensor, k: Tensor, first: int, is_text: Tensor | None, exclude_self: bool) -> Tensor:
    """The attention (B, G, H / G, m, e) of queries that follow one another, for the e keys up to the last query's own.

    Args:
        q: (B, m, G, H / G, D), after RoPE and divided by √D.
        k: (B, n, G, D).
        first: the first query's column.
        is_text: (B, n), False for padding, which gets no attention and pays none; None: no padding.
        exclude_self: as in `JointRead`.
    """
    end = first + q.shape[1]  # none of these queries sees later keys
    masked = first if is_text is None else 0  # without padding all queries see the keys before the first one's column
    columns = torch.arange(first, end, device=k.device)[None, :, None]
    visible = torch.arange(masked, end, device=k.device) <= columns - int(exclude_self)  # 1, m, end - masked
    if is_text is not None:
        visible = visible & is_text[:, None, :end] & is_text[:, first:end, None]
    scores = torch.einsum("bmgrd,bngd->bgrmn", q, k[:, :end])
    scores[..., masked:].masked_fill_(~visible[:, None, None], -torch.inf)
    weights = scores.softmax(-1)
    if exclude_self or is_text is not None:
        weights = weights.nan_to_num_(0.0)  # a query that sees nothing has no attention
    return weights


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
