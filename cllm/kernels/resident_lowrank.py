"""Launches `gluon_lowrank.resident_scores`: supported calls, tiles, and the launch.

Shapes: B batch, S compressed tokens, H query heads, G KV heads, D channels of a head, r rank.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.kernels import gluon_lowrank, triton_decode
from cllm.kernels.gluon_lowrank import RANKS, TILE
from cllm.kernels.limits import Limits, next_power_of_2

_FEWEST_STAGES, _MOST_STAGES = 4, 16
_REGISTERS = 168
"""Registers of a thread when a program starts: 3 warpgroups have 65,536 together, and then redistribute them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentTiles:
    """Tiles of a program that keeps B in shared memory and streams A."""

    pack: int
    """KV heads of a program: A is read once for all of them."""
    stages: int
    """Tiles of A in flight."""

    def shared(self, *, dim: int, heads: int, rank: int) -> int:
        """Bytes of shared memory: rows of B, tiles of A, rotated queries of both warpgroups, barriers."""
        chunks = -(-rank // RANKS)
        rows_of_b = chunks * self.pack * dim * RANKS
        queries = 2 * self.pack * 2 * _padded_heads(heads) * dim
        return 2 * (rows_of_b + self.stages * TILE * RANKS + queries) + 8 * (2 * self.stages + 3) + 256


def _padded_heads(heads: int) -> int:
    """Query heads of a product, padded: two columns each, at least eight columns."""
    return max(4, next_power_of_2(heads))


@functools.cache
def choose_resident(
    *, dim: int, groups: int, heads: int, rank: int, tokens: int, batch: int, limits: Limits
) -> ResidentTiles | None:
    """Tiles by rule, or None if `triton_lowrank.rebuilt_scores` is as good or the only choice: for few tokens, so that
    programs would load B for less than two tiles each, and for rows of B that do not fit in shared memory.

    Args:
        dim: channels of a head; 64 or 128.
        groups: KV heads.
        heads: query heads of one KV head.
        rank: rank of the factors; their rows start at multiples of 16 bytes.
        tokens: S.
        batch: B.
        limits: resources of the device.
    """
    if dim not in (64, 128) or rank % 8 or heads > 16:
        return None
    for pack in (2, 1):
        if groups % pack:
            continue
        without_a = ResidentTiles(pack=pack, stages=0).shared(dim=dim, heads=heads, rank=rank)
        stages = min(_MOST_STAGES, (limits.shared - without_a) // (2 * TILE * RANKS + 16))
        programs = programs_per_pack(batch=batch, packs=groups // pack, limits=limits)
        if stages >= _FEWEST_STAGES and tokens >= 2 * TILE * programs:
            return ResidentTiles(pack=pack, stages=stages)
    return None


def programs_per_pack(*, batch: int, packs: int, limits: Limits) -> int:
    """Programs that share the tiles of one sequence and one pack of KV heads."""
    return max(1, limits.processors // (batch * packs))


def resident_tiles(query: Tensor, a: Tensor, b: Tensor, groups: int, limits: Limits) -> ResidentTiles | None:
    """Tiles for keys with factors `a` (B, S, r) and `b` (B, G · D, r) and `query` (B, H, D), or None: unsupported."""
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
    tiles: ResidentTiles,
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
    """Write `scores` (B, H, S) fp32, or add to them with `add`. `table` is cos and sin (positions, D / 2) fp32."""
    batch, n_heads, dim = query.shape
    tokens, rank, heads = a.shape[1], a.shape[2], n_heads // groups
    packs = groups // tiles.pack
    gluon_lowrank.resident_scores[(packs * programs_per_pack(batch=batch, packs=packs, limits=limits), batch)](
        query, gluon_lowrank.tma_descriptor(a, TILE), gluon_lowrank.tma_descriptor(b, dim // 2),
        *table, first, scores, query.stride()[:2], table[0].stride(0), scores.stride()[:2], tokens, log2_scale,
        G=groups, HEADS=heads, ROOM=_padded_heads(heads), HALF=dim // 2, PACK=tiles.pack, CHUNKS=-(-rank // RANKS),
        STAGES=tiles.stages, ADD=add, num_warps=4, maxnreg=_REGISTERS,
    )  # fmt: skip
