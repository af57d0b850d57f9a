"""Tiles of the kernels of `triton_lowrank` and `triton_choose`, by rule.

Shapes: B batch, S compressed tokens, G KV heads, D channels of a head, r rank.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from cllm.kernels.limits import Limits, next_power_of_2

QUERIES = 2**14
"""Bytes of shared memory for queries and for changes of layout."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuild:
    """Tiles of the kernel that rebuilds keys."""

    block_n: int
    """Tokens of a tile."""
    block_r: int
    """Ranks of a tile."""
    pack: int
    """KV heads of one program: the tile of A is loaded once for all of them."""
    num_warps: int
    num_stages: int

    def shared(self, half: int, size: int) -> int:
        """Bytes of shared memory of tiles in flight, for `half` channels of `size` bytes."""
        return self.num_stages * (self.block_n + 2 * self.pack * half) * self.block_r * size


def half_channels(dim: int) -> int:
    """Channels of a tile with half of a head: a power of two, at least 16 for a matrix product."""
    return max(16, next_power_of_2(dim // 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Choosing:
    """Tiles of `order_chunks` and `take_chunks`, by which many programs choose the chunks of one KV head.

    The defaults were the fastest found for 8,192 chunks on an H200 (2026-11-27).
    """

    landmarks: int = 128
    """Landmarks of a program that scores them."""
    ordered: int = 256
    """Chunks of a program that orders them."""
    taken: int = 512
    """Chunks of a program that takes the best."""
    warps: int = 32
    """Of that program, at most; there is one for every 512 chunks of a KV head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighing:
    """Tiles of the weighted sum of rows of A."""

    block_n: int = 64
    """Tokens of a tile."""
    block_w: int = 256
    """Ranks of a tile."""
    splits: int | None = None
    """Programs that share the tokens; None: by rule."""
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Tiles of a call, for `benchmarks.posthoc_variants`; None: by rule."""

    rebuild: Rebuild | None = None
    choosing: Choosing | Literal["one program"] | None = None
    """`one program` chooses all chunks of a KV head."""
    weighing: Weighing | None = None


@functools.cache
def choose_choosing(*, chunks: int, rows: int, limits: Limits) -> Choosing | Literal["one program"]:
    """How chunks are chosen for `rows` KV heads of all sequences, by rule.

    One program for each KV head leaves most of a GPU idle, and its time grows with the chunks. On an H200 (2026-11-27,
    8 KV heads) it takes 27 µs for 8,192 chunks and 141 µs for 32,768; the two kernels of many programs take 11 and 27.
    A step with 2,048 chosen tokens takes 0.053 ms instead of 0.068, and 0.089 instead of 0.198.

    Each program that takes chunks searches the bound by itself. There are at most as many as multiprocessors, so that
    searches do not wait for each other: with four times as many, a step over 32,768 chunks takes 0.137 ms. Fewer than
    8,192 chunks, and fewer than 512 for each program, were not measured.

    Args:
        chunks: landmarks of a KV head.
        rows: B · G.
        limits: resources of the device.
    """
    programs = limits.processors // rows
    if chunks < 4096 or programs < 4:
        return "one program"
    return Choosing(taken=max(512, next_power_of_2(-(-chunks // programs))))


def choose_weighing(*, gathered: bool) -> Weighing:
    """Tiles of the weighted sum, by rule.

    On an H200 (2026-11-27) a step with 2,048 chosen tokens takes 0.0520 ms with tiles of 32 tokens, 0.0526 with 64 and
    0.0532 with 128. With all tokens, 65,536, it takes 0.1189 ms with 64, 0.1271 with 32 and 0.1369 with 128. Other
    widths, warps and stages were not faster.

    Args:
        gathered: whether each KV head reads chosen tokens.
    """
    return Weighing(block_n=32 if gathered else 64)


@functools.cache
def choose_rebuild(*, dim: int, groups: int, size: int, gathered: bool, limits: Limits) -> Rebuild:
    """Tiles by rule, without autotuning.

    Rebuilding is a matrix product of S x r by r x G · D, so its tile is 128 tokens by 256 channels in 8 warps. That is
    two KV heads of 128, which halves the reads of A from the L2 cache. With chosen tokens, KV heads have different
    tokens and share no tile. Then a program has one KV head and 64 tokens, so that 2048 tokens fill the device. Numbers
    of 4 bytes get half the tile, because their products take three passes. Small shared memory gets fewer stages. The
    two accumulators take at most half of the registers; RoPE and scoring need the rest.

    Args:
        dim: channels of a head.
        groups: KV heads.
        size: bytes of a number.
        gathered: whether each KV head reads different tokens.
        limits: resources of the device.
    """
    half, wide = half_channels(dim), size > 2
    pack = 1
    while not gathered and not wide and groups % (2 * pack) == 0 and 2 * pack * half <= 128:
        pack *= 2
    block_n = 64 if gathered or wide or half > 64 else 128
    warps = 8 if block_n * pack * half >= 128 * 64 else 4
    stages, block_r = 3, 32 if wide else 64
    while True:
        rebuild = Rebuild(block_n=block_n, block_r=block_r, pack=pack, num_warps=warps, num_stages=stages)
        if rebuild.shared(half, size) <= limits.shared - QUERIES or stages == 1:
            return rebuild
        stages -= 1


def choose_splits(*, programs: int, tokens: int, block_n: int, gathered: bool, limits: Limits) -> int:
    """Number of programs that share `tokens`: two for each multiprocessor, or four if rows are gathered, because these
    mostly wait for memory; at most the number of tiles. For few tokens it is a power of two: their number grows by one
    in each step, and each number of splits is compiled separately.
    """
    tiles = -(-tokens // block_n)
    wanted = max(1, min(tiles, (4 if gathered else 2) * limits.processors // programs, 128))
    return wanted if tiles >= 64 else 1 << (wanted.bit_length() - 1)
