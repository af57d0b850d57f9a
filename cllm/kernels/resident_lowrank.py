"""Launches `gluon_lowrank.resident_scores`: supported calls, tiles, and the launch.

Shapes: B batch, S compressed tokens, H query heads, G KV heads, D channels of a head, r rank.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cllm.kernels import gluon_lowrank, hopper, triton_nodes
from cllm.kernels.gluon_lowrank import NODES, STRETCHES, TILE
from cllm.kernels.limits import Limits, next_power_of_2
from cllm.kernels.selection import Table

_FEWEST_STAGES, _MOST_STAGES = 4, 16
_SLOW = 0.0102 * STRETCHES[0]
"""Radians at most by which an interpolated channel pair turns in a stretch, as `gluon_lowrank._weights` are made for.
RoPE turns its slower half by at most 0.01 a token with base 10,000, and by 0.0014 with base 500,000."""
_REGISTERS = 168
"""Registers of a thread when a program starts: 3 warpgroups have 65,536 together, and then redistribute them."""
_NODE_ROWS, _NODE_RANKS = 64, 64
"""Tiles of `project_nodes`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentTiles:
    """Tiles of a program that keeps B in shared memory and streams A."""

    pack: int
    """KV heads of a program: A is read once for all of them."""
    stages: int
    """Tiles of A in flight."""
    stretch: int = TILE
    """Tokens in a row that a program scores. In a longer stretch than a tile, the slower half of the channels is
    interpolated instead of rebuilt."""
    ranks: int = 32
    """Ranks of a tile: 32 or 64."""

    @property
    def interpolates(self) -> bool:
        """Whether slow channels are interpolated."""
        return self.stretch > TILE

    def shared(self, *, dim: int, heads: int, rank: int) -> int:
        """Bytes of shared memory: rows of B, of W for two stretches, tiles of A, rotated queries of both warpgroups,
        barriers."""
        padded, rebuilt = -(-rank // self.ranks) * self.ranks, dim // 2 if self.interpolates else dim
        rows_of_b = padded * self.pack * rebuilt
        rows_of_w = 2 * padded * self.columns(heads)
        queries = 2 * self.pack * 2 * _padded_heads(heads) * rebuilt
        barriers = 8 * (2 * self.stages + 7)
        return 2 * (rows_of_b + rows_of_w + self.stages * TILE * self.ranks + queries) + barriers + 256

    def columns(self, heads: int) -> int:
        """Columns of W of a program and stretch, for `heads` query heads of a KV head."""
        return self.pack * len(NODES) * _padded_heads(heads) if self.interpolates else 0


def _padded_heads(heads: int) -> int:
    """Query heads of a product, padded: two columns each, at least eight columns."""
    return max(4, next_power_of_2(heads))


@functools.cache
def choose_resident(
    *, dim: int, groups: int, heads: int, rank: int, tokens: int, batch: int, turn: float, limits: Limits
) -> ResidentTiles | None:
    """Tiles by rule, or None if `triton_lowrank.rebuilt_scores` is as good or the only choice: for few tokens, so that
    programs would load B for less than two tiles each, and for rows of B that do not fit in shared memory.

    Slow channels are interpolated if that leaves at most three quarters of the columns, a program has two KV heads, and
    each program could have two of the shortest stretches. The stretch is the one that leaves the fewest tokens to the
    busiest program, and of such the longest: nodes then cost least.

    Args:
        dim: channels of a head; 64 or 128.
        groups: KV heads.
        heads: query heads of one KV head.
        rank: rank of the factors; their rows start at multiples of 16 bytes.
        tokens: S.
        batch: B.
        turn: of `Table`.
        limits: resources of the device.
    """
    if dim not in (64, 128) or rank % 8 or heads > 16:
        return None
    stretches = [stretch for stretch in STRETCHES if stretch <= tokens and turn * stretch <= _SLOW]
    if heads == 1 or len(NODES) * _padded_heads(heads) > dim // 4:
        stretches = []
    for pack in (2, 1):
        if groups % pack:
            continue
        programs = programs_per_pack(batch=batch, packs=groups // pack, limits=limits)
        ways = [ResidentTiles(pack=pack, stages=0)]
        if stretches and pack > 1 and tokens >= 2 * STRETCHES[0] * programs:
            stretch = min(stretches, key=lambda n: (min(-(-tokens // (n * programs)) * n, tokens), -n))
            ways = [replace(ways[0], stretch=stretch, ranks=ranks) for ranks in (64, 32)] + ways
        for none in ways:
            left = limits.shared - none.shared(dim=dim, heads=heads, rank=rank)
            stages = min(_MOST_STAGES, left // (2 * TILE * none.ranks + 16))
            if stages >= _FEWEST_STAGES and tokens >= 2 * TILE * programs:
                return replace(none, stages=stages)
    return None


def programs_per_pack(*, batch: int, packs: int, limits: Limits) -> int:
    """Programs that share the tiles of one sequence and one pack of KV heads."""
    return max(1, limits.processors // (batch * packs))


def resident_tiles(
    query: Tensor, a: Tensor, b: Tensor, table: Table, groups: int, limits: Limits
) -> ResidentTiles | None:
    """Tiles for keys with factors `a` (B, S, r) and `b` (B, G · D, r) and `query` (B, H, D), or None: unsupported."""
    if table.turn is None:  # a tile's first position and the distance from it are two rows of the table
        return None
    if not hopper.is_usable(query.device):
        return None
    sixteen = query.element_size() == a.element_size() == 2 and query.dtype == a.dtype
    if not sixteen or not (a.is_contiguous() and b.is_contiguous()) or a.data_ptr() % 16 or b.data_ptr() % 16:
        return None
    batch, n_heads, dim = query.shape
    turn = table.turn if query.dtype == torch.bfloat16 else math.inf  # interpolation is exact to 9 bits, fp16 to 11
    return choose_resident(
        dim=dim, groups=groups, heads=n_heads // groups, rank=a.shape[2], tokens=a.shape[1], batch=batch, turn=turn,
        limits=limits,
    )  # fmt: skip


def launch(
    tiles: ResidentTiles,
    query: Tensor,
    a: Tensor,
    b: Tensor,
    table: Table,
    first: Tensor | None,
    scores: Tensor,
    groups: int,
    log2_scale: float,
    limits: Limits,
    *,
    add: bool,
) -> None:
    """Write `scores` (B, H, S) fp32, or add to them with `add`."""
    batch, n_heads, dim = query.shape
    tokens, rank, heads = a.shape[1], a.shape[2], n_heads // groups
    packs, room, (cos, sin) = groups // tiles.pack, _padded_heads(heads), (table.cos, table.sin)
    fast, w = dim // 2, None
    if tiles.interpolates:
        fast = dim // 4
        nodes = project_nodes(tiles, query, b, table, first, tokens, groups)
        w = hopper.tma_descriptor(nodes, tiles.columns(heads), tiles.ranks)
    gluon_lowrank.resident_scores[(packs * programs_per_pack(batch=batch, packs=packs, limits=limits), batch)](
        query, hopper.tma_descriptor(a, TILE, tiles.ranks), hopper.tma_descriptor(b, fast, tiles.ranks),
        w, cos, sin, first, scores, query.stride()[:2], cos.stride(0), scores.stride()[:2], tokens, log2_scale,
        G=groups, HEADS=heads, ROOM=room, HALF=dim // 2, FAST=fast, PACK=tiles.pack, RANK=rank, RANKS=tiles.ranks,
        STAGES=tiles.stages, TILES=tiles.stretch // TILE, ADD=add, num_warps=4, maxnreg=_REGISTERS,
    )  # fmt: skip


def project_nodes(
    tiles: ResidentTiles, query: Tensor, b: Tensor, table: Table, first: Tensor | None, tokens: int, groups: int
) -> Tensor:
    """Rows W (B, G / pack, stretches, pack, 2, heads, 2, r), in the dtype of `b`, that give the slower half of the
    channels' part of the scores (see `triton_nodes.project_nodes`), heads padded."""
    batch, n_heads, dim = query.shape
    heads, rank, stretches = n_heads // groups, b.shape[2], -(-tokens // tiles.stretch)
    room, longer = _padded_heads(heads), tiles.stretch // STRETCHES[0]
    out = b.new_empty((batch, groups // tiles.pack, stretches, tiles.pack, 2, room, 2, rank))
    grid = (-(-stretches * len(NODES) * room // _NODE_ROWS), groups * batch)
    triton_nodes.project_nodes[grid](
        query, b, table.cos, table.sin, first, out, query.stride()[:2], b.stride()[:2], table.cos.stride(0), stretches,
        rank, G=groups, HEADS=heads, ROOM=room, HALF=dim // 2, PACK=tiles.pack, STRETCH=tiles.stretch,
        **{f"NODE_{i}": longer * node for i, node in enumerate(NODES)}, BLOCK_M=_NODE_ROWS,
        BLOCK_R=min(_NODE_RANKS, max(16, next_power_of_2(rank))),
    )  # fmt: skip
    return out
