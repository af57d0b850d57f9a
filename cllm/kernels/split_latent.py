"""Launches the kernel of `gluon_latent`: supported calls, splits, and the launch.

Shapes: B batch, S entries, H query heads.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cllm.kernels import gluon_latent, hopper
from cllm.kernels.limits import Limits
from cllm.kernels.split_call import SplitCall

TILE = 64
"""Tokens of a tile, and channels of a slab. Written as 64 in the kernel, which cannot read globals."""
RANK, ROPE = 512, 64
"""Channels of the latent and of its RoPE key: the only ones that are measured. A rank of 512 is eight slabs."""
MAX_HEADS = 16
"""Query heads. More would need more registers, and as rows they would fill a product."""
_PER_PART, _RING = 3, 8
"""Slabs of a part, and parts in shared memory: 192 KiB, of which a tile takes 72."""
_REGISTERS = 240
"""Registers of a thread that computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentTiles:
    """How one call is divided among programs, one for each multiprocessor at a time."""

    splits: int
    """Programs that share the entries of one sequence."""


def shared_bytes() -> int:
    """Bytes of shared memory of a program: the ring, the queries, the weights of a tile, barriers and sums of warps."""
    ring = _RING * _PER_PART * TILE * TILE
    return 2 * (ring + MAX_HEADS * (RANK + ROPE) + MAX_HEADS * TILE) + 8 * 2 * _RING + 1024


def supports(
    queries: Sequence[Tensor],
    keys: Sequence[Tensor],
    key_scales: Sequence[Tensor | None],
    values: Sequence[Tensor],
    value_scales: Sequence[Tensor | None],
    rotated: Sequence[int],
) -> bool:
    """Whether the kernel computes this call.

    It needs a Hopper GPU and Gluon; a latent of 512 channels, which is the value too, with a RoPE key of 64 that is
    stored after RoPE; one KV head of at most 16 query heads; and one dtype of 16 bits. TMA needs slots whose rows are
    side by side, at addresses that are multiples of 16 bytes.

    `rotated` are the key parts that are stored before RoPE.
    """
    if [x.shape[2:] for x in keys] != [(1, RANK), (1, ROPE)] or len(values) != 1 or not values[0].is_set_to(keys[0]):
        return False
    if any(scale is not None for scale in (*key_scales, *value_scales)) or rotated or queries[0].shape[1] > MAX_HEADS:
        return False
    dtype = queries[0].dtype
    if dtype not in (torch.bfloat16, torch.float16) or any(x.dtype != dtype for x in (*queries, *keys)):
        return False
    if any(not x.is_contiguous() or x.data_ptr() % 16 or x.shape[0] * x.shape[1] >= 2**31 for x in keys):
        return False
    return hopper.is_usable(queries[0].device)


@functools.cache
def choose_tiles(*, batch: int, columns: int, limits: Limits) -> LatentTiles:
    """Splits by rule: a power of two, or the number that fills the device once.

    Of these the fastest by a model of the times on an H200 (2026-11-29), in units of a tile when all multiprocessors
    read, 2.3 µs. With fewer programs a tile takes less, but with half of them still 1.4 µs. A program takes as long as
    two tiles more, to start and to write its result. Merging 32 more splits takes as long as a tile. Of the numbers
    that were measured for 15 lengths, from 1 x 64 tokens to 200 x 2,048, this chooses the fastest each time.

    Args:
        batch: sequences.
        columns: maximum number of columns that a token can see.
        limits: resources of the device.
    """
    tiles = -(-columns // TILE)
    most = min(tiles, 256)

    def time(splits: int) -> float:
        programs = batch * splits
        waves, full = -(-programs // limits.processors), min(1, programs / limits.processors)
        return waves * (-(-tiles // splits) * max(0.6, full) + 2) + splits / 32

    numbers = {2**n for n in range(most.bit_length())} | {max(1, min(limits.processors // batch, most))}
    return LatentTiles(splits=min(sorted(numbers), key=time))


def launch(tiles: LatentTiles, queries: Sequence[Tensor], keys: Sequence[Tensor], call: SplitCall) -> Any:
    """Write the results of all splits, for `merge`.

    Args:
        queries: (B, H, 512) and (B, H, 64).
        keys: the latent (B, S, 1, 512) and the RoPE key (B, S, 1, 64).

    Returns:
        The compiled kernel.
    """
    descriptors = [hopper.tma_descriptor(x, TILE, TILE) for x in keys]
    return gluon_latent.split_latent[(tiles.splits, len(keys[0]))](
        *queries, *descriptors, queries[0].stride()[:2], queries[1].stride()[:2], *call.arguments,
        HEADS=queries[0].shape[1], BLOCK_H=MAX_HEADS, SLABS=RANK // TILE + 1, PER_PART=_PER_PART, RING=_RING,
        EXCLUDE_SELF=call.exclude_self, num_warps=4, maxnreg=_REGISTERS,
    )  # fmt: skip
