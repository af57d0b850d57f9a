"""Launches the Triton kernel of `triton_tied`: supported calls, tiles, splits, and the launch.

Shapes: B batch, S entries, H query heads, G KV heads, D channels of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cllm.kernels import triton_decode, triton_tied
from cllm.kernels.limits import Limits, balanced_splits, next_power_of_2
from cllm.kernels.split_call import SplitCall

MAX_DIM = 256
MAX_HEADS = 2
"""Query heads of a KV head that the kernel computes: every one takes registers, and operations for every number. Two
heads need about 14 instructions for each number of 16 bits. An H200 can issue about 14 while it reads one."""
PROGRAMS = 2
"""Programs of a multiprocessor with the default tiles."""
_CHANNELS = 8
"""Channels of each half that a thread has: 16 bytes in bf16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TiedTiles:
    """How one call is divided among programs. A tile has `parts` parts of `rows` rows."""

    splits: int
    """Programs that share the columns of one sequence and KV head."""
    parts: int = 4
    """Rows of a tile that one thread has."""
    num_warps: int = 4
    num_stages: int = 3
    """Tiles in shared memory: one in use, the others being loaded."""

    def rows(self, dim: int) -> int:
        """Rows of a part, for heads of `dim` channels: a thread has 8 channels of each half of one row."""
        return max(1, self.num_warps * 32 * _CHANNELS // _block(dim))


def _block(dim: int) -> int:
    """Half of the channels of a head, padded to a power of two."""
    return max(16, next_power_of_2(dim // 2))


def supports(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    key_scales: Sequence[Tensor | None],
    values: Sequence[Tensor],
    value_scales: Sequence[Tensor | None],
    rotated: Sequence[int],
) -> bool:
    """Whether the kernel computes this call: one key part before RoPE, also the value, and few query heads.

    `rotated` are the key parts that are stored before RoPE.
    """
    if list(rotated) != [0] or len(keys) != 1 or len(values) != 1 or not values[0].is_set_to(keys[0]):
        return False
    a, b = key_scales[0], value_scales[0]
    same_scale = a.is_set_to(b) if a is not None and b is not None else a is b
    groups, dim = keys[0].shape[2:]
    return same_scale and queries[0].shape[1] <= MAX_HEADS * groups and dim <= MAX_DIM


@functools.cache
def choose_tiles(*, groups: int, dim: int, size: int, columns: int, limits: Limits) -> TiedTiles:
    """Tiles and splits by rule, without autotuning.

    Two programs of four warps run on a multiprocessor. With three stages they have two tiles of 64 rows in flight each,
    64 KiB in bf16. On an H200 (2026-11-28, 64 KV heads of 128 channels, 32,768 tokens) 4 splits of each KV head read at
    97 to 99 % of a copy's rate, 6 at 72 %, 8 at 94 % and 16 at 88 %. Numbers of 4 bytes take twice the registers, so
    that a thread has half as many rows. Tiles are shorter if there would be fewer of them than programs that the device
    runs at once.

    Args:
        groups: sequences x KV heads.
        dim: channels of a head.
        size: bytes of a number.
        columns: maximum number of columns that a token can see.
        limits: resources of the device.
    """
    default, slots = TiedTiles(splits=1), PROGRAMS * limits.processors
    parts, rows = default.parts // 2 if size > 2 else default.parts, default.rows(dim)
    while parts > 1 and groups * -(-columns // (parts * rows)) < slots:
        parts //= 2
    most = max(1, min(-(-columns // (parts * rows)), 2 * slots // groups, 256))
    return TiedTiles(splits=balanced_splits(groups, slots, most), parts=parts)


def launch(
    tiles: TiedTiles, query: Tensor, x: Tensor, scale: Tensor | None, cos: Tensor, sin: Tensor, call: SplitCall
) -> Any:
    """Write the results of all splits, for `merge`.

    Args:
        query: (B, H, D).
        x: (B, S, G, D), keys before RoPE and values.
        scale: (B, S, G) of float8 numbers, or None.
        cos: (B or 1, S, D / 2) fp32 for each entry; `sin` has the same shape, strides and dtype.

    Returns:
        The compiled kernel, or None in the interpreter.
    """
    batch, _, groups, dim = x.shape
    scales = x if scale is None else scale  # a tuple cannot hold None; without scales the kernel does not read it
    return triton_tied.split_tied[(batch * groups, tiles.splits)](
        query, query.stride()[:2], (x, x.stride()[:3]), (scales, scales.stride()[:3]), cos, sin,
        cos.expand(batch, -1, -1).stride()[:2], *call.arguments,
        G=groups, HEADS=query.shape[1] // groups, HALF=dim // 2, BLOCK=_block(dim), SCALED=scale is not None,
        EXCLUDE_SELF=call.exclude_self, LONG=call.length * x.stride(1) >= 2**31,
        ROWS=tiles.rows(dim), PARTS=tiles.parts, STAGES=tiles.num_stages,
        PACKED=x.dtype == torch.bfloat16 and not triton_decode.INTERPRETED,
        num_warps=tiles.num_warps,
    )  # fmt: skip
