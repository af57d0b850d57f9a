"""Eviction: the slots of a filled cache without the tokens that a method drops.

Keys are cached after RoPE, so a token that stays keeps its true position, and later tokens keep theirs because a cache
counts all tokens that it has seen. Attention does not depend on the order of what it reads. What is left of a slot is
therefore a shorter slot, in the order of columns and without gaps:

    column of the cache     0 1 2 3 4 5 6 7 | 8 9      prefix | later
    as it is read               0 1 4 7     | 8 9      4 tokens evicted; each KV head may keep other tokens

Masks count columns from the end, where nothing is missing. A padded sequence that has fewer tokens than are kept begins
with the rest of its padding, so that masks of the last columns hide that too.

Shapes: B batch, n tokens of a slot, m of them kept, G KV heads, width the shape of one token in one tensor of a slot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from cllm.cache.slot import Slot
from cllm.posthoc.slots import CompressibleSlots
from cllm.posthoc.tensor_tree import total_bytes


@dataclass(frozen=True)
class Kept:
    """The tokens that are not evicted, by owner. A slot without entries keeps all."""

    entries: Mapping[int, Tensor] = field(default_factory=dict)
    """(B, G or 1, m) int64, ascending, sinks included. A padded sequence with fewer than m tokens keeps padding too."""
    scores: Mapping[int, Tensor] = field(default_factory=dict)
    """(B, G or 1, n) fp32 of all n tokens, for methods that add to them at the next eviction. Those of kept tokens are
    stored with them; a tensor of several slots is stored once."""


def best_entries(scores: Tensor, count: int) -> Tensor:
    """(B, G, count) int64, ascending: the entries of the highest `scores` (B, G, n); of equal ones, the first."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :count].sort(dim=-1).values


def take(x: Tensor, entries: Tensor) -> Tensor:
    """The tokens of `x` (B, n, *width) at `entries` (B, G or 1, m) int64; with G, those of each head of a (G, D)."""
    index = entries.mT  # B, m, G or 1
    width = x.shape[2:]
    index = index[..., None] if len(width) == 2 else index
    return x.gather(1, index.expand(len(x), -1, *width))


def evict(cached: CompressibleSlots, kept: Kept) -> CompressibleSlots:
    """`cached` with only the kept tokens of each slot, and their scores.

    Returns:
        Slots that may differ in length, see `equal_parts`. The bytes of the entire cache are those that are left, with
        the scores, which no method compresses.
    """
    slots, evicted, columns = dict(cached.slots), dict(cached.evicted), dict(cached.columns)
    lost = sum(_token_bytes(slots[owner]) * count for owner, count in evicted.items() if owner in slots)
    shared = dict[int, Tensor]()
    for owner, entries in kept.entries.items():
        full, count = slots[owner], slots[owner].k.shape[1] - entries.shape[-1]
        slots[owner] = Slot(take(full.k, entries), take(full.v, entries))
        if entries.shape[1] == 1 and (owner in columns or not evicted.get(owner)):
            if id(entries) not in shared:
                before = columns.get(owner)
                shared[id(entries)] = entries[:, 0] if before is None else _taken(before, entries[:, 0])
            columns[owner] = shared[id(entries)]
        evicted[owner] = evicted.get(owner, 0) + count
        lost += _token_bytes(full) * count
    scores, taken = {}, dict[int, Tensor]()
    for owner, all_scores in kept.scores.items():
        if id(all_scores) not in taken:
            chosen = kept.entries.get(owner)
            taken[id(all_scores)] = all_scores if chosen is None else all_scores.gather(-1, chosen)
        scores[owner] = taken[id(all_scores)]
    added = total_bytes(scores.values())
    return dataclasses.replace(
        cached,
        slots=slots,
        evicted=evicted,
        columns=columns,
        scores=scores,
        cache_bytes=cached.cache_bytes - lost + added,
        incompressible_bytes=cached.incompressible_bytes + added,
    )


def _token_bytes(slot: Slot) -> int:
    """Bytes of one token of a slot, for all sequences."""
    return (slot.k.nbytes + slot.v.nbytes) // slot.k.shape[1]


def _taken(before: Tensor, entries: Tensor) -> Tensor:
    """(B, m) int64: the columns of the tokens at `entries` (B, m) of a slot that had those at the columns `before`."""
    return before.expand(len(entries), -1).gather(1, entries)


def equal_parts(cached: CompressibleSlots) -> list[CompressibleSlots]:
    """The slots of `cached`, separated by their length; one part if all are of one length.

    The bytes of the entire cache are shared out in proportion to those of the slots.
    """
    lengths = sorted({slot.k.shape[1] for slot in cached.slots.values()})
    if len(lengths) <= 1:
        return [cached]
    parts, total = [], sum(slot.k.nbytes + slot.v.nbytes for slot in cached.slots.values())
    for length in lengths:
        slots = {owner: slot for owner, slot in cached.slots.items() if slot.k.shape[1] == length}
        share = sum(slot.k.nbytes + slot.v.nbytes for slot in slots.values()) / total
        parts.append(
            dataclasses.replace(
                cached,
                slots=slots,
                latent=cached.latent & slots.keys(),
                cache_bytes=round(cached.cache_bytes * share),
                incompressible_bytes=round(cached.incompressible_bytes * share),
            )
        )
    return parts
