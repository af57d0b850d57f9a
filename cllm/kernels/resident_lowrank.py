"""When and how `gluon_lowrank.resident_scores` is launched.

Shapes: B batch, S compressed tokens, H query heads, G KV heads, D channels of a head, r rank.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.kernels import gluon_lowrank, triton_decode
from cllm.kernels.gluon_lowrank import RANKS, TILE
from cllm.kernels.split_decode import Limits, _power

_FEWEST_STAGES, _MOST_STAGES = 4, 16
_REGISTERS = 168
"""Of a thread when a program starts: 3 warpgroups have 65,536 together. They share them out anew as they need them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resident:
    """How a program keeps B and loads A."""

    pack: int
    """KV heads of a program: A is read once for so many."""
    stages: int
    """Tiles of A under way."""

    def shared(self, *, dim: int, heads: int, rank: int) -> int:
        """Bytes of shared memory: rows of B, tiles of A, turned queries of both warpgroups, barriers."""
        chunks = -(-rank // RANKS)
        rows_of_b = chunks * self.pack * dim * RANKS
        queries = 2 * self.pack * 2 * _room(heads) * dim
        return 2 * (rows_of_b + self.stages * TILE * RANKS + queries) + 8 * (2 * self.stages + 3) + 256


def _room(heads: int) -> int:
    """Query heads of a product: two columns each, eight columns at least."""
    return max(4, _power(heads))


@functools.cache
def choose_resident(
    *, dim: int, groups: int, heads: int, rank: int, tokens: int, batch: int, limits: Limits
) -> Resident | None:
    """By rule, or None where keys are rebuilt as well by `triton_lowrank.rebuilt_scores`: few tokens, so that programs
    would load B for less than two tiles each, or rows of B that do not fit in shared memory.

    Args:
        dim: channels of a head; 64 or 128.
        groups: KV heads.
        heads: query heads of one KV head.
        rank: of the factors; rows of them start at multiples of 16 bytes.
        tokens: S.
        batch: B.
        limits: of the device.
    """
    if dim not in (64, 128) or rank % 8 or heads > 16:
        return None
    for pack in (2, 1):
        if groups % pack:
            continue
        bare = Resident(pack=pack, stages=0).shared(dim=dim, heads=heads, rank=rank)
        stages = min(_MOST_STAGES, (limits.shared - bare) // (2 * TILE * RANKS + 16))
        if stages >= _FEWEST_STAGES and tokens >= 2 * TILE * slots(batch=batch, packs=groups // pack, limits=limits):
            return Resident(pack=pack, stages=stages)
    return None


def slots(*, batch: int, packs: int, limits: Limits) -> int:
    """Programs that share the tiles of one sequence and some KV heads."""
    return max(1, limits.processors // (batch * packs))


def resident(query: Tensor, a: Tensor, b: Tensor, groups: int, limits: Limits) -> Resident | None:
    """How to rebuild keys of factors `a` (B, S, r) and `b` (B, G · D, r) for `query` (B, H, D), or None: not so."""
    if gluon_lowrank.MISSING is not None or triton_decode.INTERPRETED or not _is_hopper(query.device):
        return None
    sixteen = query.element_size() == a.element_size() == 2 and query.dtype == a.dtype
    if not sixteen or not (a.is_contiguous() and b.is_contiguous()) or a.data_ptr() % 16 or b.data_ptr() % 16:
        return None
    batch, n_heads, dim = query.shape
    return choose_resident(
        dim=dim, groups=groups, heads=n_heads // groups, rank=a.shape[2], tokens=a.shape[1], batch=batch, limits=limits
    )


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def launch(
    how: Resident,
    query: Tensor,
    a: Tensor,
    b: Tensor,
    table: tuple[Tensor, Tensor],
    first: Tensor | None,
    scores: Tensor,
    groups: int,
    log2_scale: float,
    limits: Limits,
    *,
    add: bool,
) -> None:
    """Write `scores` (B, H, S) fp32, or with `add` add to them. `table` is cos and sin (positions, D / 2) fp32."""
    batch, n_heads, dim = query.shape
    tokens, rank, heads = a.shape[1], a.shape[2], n_heads // groups
    packs = groups // how.pack
    gluon_lowrank.resident_scores[(packs * slots(batch=batch, packs=packs, limits=limits), batch)](
        query, gluon_lowrank.described(a, TILE), gluon_lowrank.described(b, dim // 2),
        *table, first, scores, query.stride()[:2], table[0].stride(0), scores.stride()[:2], tokens, log2_scale,
        G=groups, HEADS=heads, ROOM=_room(heads), HALF=dim // 2, PACK=how.pack, CHUNKS=-(-rank // RANKS),
        STAGES=how.stages, ADD=add, num_warps=4, maxnreg=_REGISTERS,
    )  # fmt: skip
