# mypy: disable-error-code="import-not-found,import-untyped,assignment,var-annotated"
# ruff: noqa: RUF005 - the kernels' language adds tuples and does not unpack them
"""A candidate kernel for decoding over a latent slot, in Triton: query heads are the columns of both matrix products.

A latent slot has one KV head. Its keys are the latent C and a RoPE key R, side by side, and its values are the latent
again: each number is read once, 2 bytes for about 2 products with every query head.

The kernel in use (`cllm.kernels.triton_decode.split_dot`) has query heads as rows: scores = Q Kᵀ. A Hopper GPU's
products of warp groups (wgmma) have 64 rows. With 16 query heads Triton takes the older products of single warps (mma),
whose operands are in registers. What limits it is probably shared memory: every warp reads all queries from there again
for every tile, and its tokens. Compiled for an H100 with the tiles by rule (32 tokens, 576 channels, 8 warps), each
warp reads 64 times 512 bytes a tile: 256 KiB in all for 36 KiB of the slot. At 128 bytes a cycle that takes 2,048
cycles, about as long as an H200 takes to read the tile from memory. And the scores of a warp are one chain of 36
products, each of which waits for the one before.

Here tokens and channels are rows, of which there are enough:

    scoresᵀ (N, H) = C (N, E) Qᵀ (E, H) + R (N, P) Qᵀ (P, H)
    outᵀ    (E, H) = Cᵀ (E, N) weights (N, H)

So both products can be wgmma, which reads its operands from shared memory, in the form in which a tile was loaded: by
rows for scores, by columns for outputs. A tile of 64 tokens (72 KiB) takes 68 of them, which read 2.5 KiB each: a third
of the bytes for each token. Registers have only scores and outputs: 512 x 16 fp32 outputs are 64 registers of each of
128 threads. In return a tile needs 64 tokens, weights go through shared memory (2 KiB), and the maximum of the scores
of a head is over rows, which all warps have.

Rows are loaded by addresses that every thread computes (cp.async), or with `descriptor` by the tensor memory
accelerator (TMA), for which one thread gives the first row of a tile.

Shapes: B batch, S entries, H query heads, G KV heads, E channels of the latent (its rank), P channels of the RoPE key,
N tokens of a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cllm.kernels import split_decode
from cllm.kernels.limits import next_power_of_2
from cllm.kernels.triton_decode import MISSING, _entries, _share, _tile, _zeros, jit

if MISSING is None:
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

MIN_ROWS = 64
"""Rows of a wgmma."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentTiles:
    """How one call is divided among programs."""

    block_n: int = 64
    """Tokens of a tile, a power of two; below 64, scores are no wgmma."""
    splits: int = 33
    """Programs that share the tokens of one sequence and block of query heads."""
    chunk: int = 512
    """Channels of the latent that are loaded and multiplied at once, a power of two, at least 64."""
    num_warps: int = 4
    num_stages: int = 2
    """Tiles in shared memory: one in use, the others being loaded."""
    descriptor: bool = False
    """Load by TMA instead of cp.async."""

    def __str__(self) -> str:
        how = "TMA" if self.descriptor else "cp.async"
        form = f"N{self.block_n} chunk{self.chunk} splits{self.splits} warps{self.num_warps} stages{self.num_stages}"
        return f"{form} {how}"


def block_h(heads: int) -> int:
    """Query heads of one program: columns of both products, at least 16, at most 64."""
    return min(64, max(16, next_power_of_2(heads)))


def chunk_of(rank: int, most: int) -> int:
    """Channels of a chunk of at most `most`, for a latent of `rank` channels.

    One chunk for a power of two; else the largest power of two that divides the rank, or 64, of which the last chunk is
    padded. 384 are three chunks of 128, and 96 two of 64.
    """
    divisor = max(MIN_ROWS, rank & -rank)
    return min(most, divisor if divisor < rank else max(MIN_ROWS, next_power_of_2(rank)))


def unsupported(queries: list[Tensor], latent: Tensor, rope: Tensor | None) -> str | None:
    """The reason why the kernel does not compute a call, or None; arguments as for `run`."""
    tensors = [*queries, latent, *([] if rope is None else [rope])]
    if any(t.dtype not in (torch.bfloat16, torch.float16) or t.dtype != latent.dtype for t in tensors):
        return "needs bf16 or fp16 queries and slots of one dtype"
    if any(t.stride(-1) != 1 for t in tensors):
        return "the channels of a tensor are not contiguous"
    return None


def run(
    queries: list[Tensor],
    latent: Tensor,
    rope: Tensor | None,
    column: Tensor,
    first: Tensor | None,
    window: int | None,
    exclude_self: bool,
    scale: float,
    tiles: LatentTiles,
    log_sum: Tensor | None = None,
) -> Tensor:
    """Attention of one new token, as `cllm.kernels.split_decode.run` computes it for this slot.

    Args:
        queries: (B, H, E), and (B, H, P) if there is a RoPE key.
        latent: (B, S, G, E), keys and values. With `tiles.descriptor` entries that are not seen are read too, and must
            be finite.
        rope: (B, S, G, P), more channels of the keys, or None.
        column: (1,), that of the new token.
        first: (B,), the first column that each sequence sees, or None.
        window: number of columns that the token sees, or None for all entries.
        exclude_self: hide the token's own column.
        scale: of scores.
        tiles: of the kernel.
        log_sum: (B, H) fp32, contiguous: receives the log-sum-exp of the scores, to base 2; or None.

    Returns:
        (B, H, E); fp32 with `log_sum`.

    Raises:
        ValueError: for a call that is unsupported.
    """
    if (reason := unsupported(queries, latent, rope)) is not None:
        raise ValueError(f"the kernel with tokens as rows {reason}")
    batch, n_heads, rank = queries[0].shape
    length, groups = latent.shape[1:3]
    heads, query_rope = n_heads // groups, queries[-1]
    dtype = latent.dtype if log_sum is None else torch.float32
    out = torch.empty((batch, n_heads, rank), dtype=dtype, device=latent.device)
    partial = torch.empty((batch, n_heads, tiles.splits, rank), dtype=torch.float32, device=latent.device)
    log_sums = torch.empty((batch, n_heads, tiles.splits), dtype=torch.float32, device=latent.device)
    width = 0 if rope is None else rope.shape[-1]
    chunk, rope_block = chunk_of(rank, tiles.chunk), max(16, next_power_of_2(width))
    columns = block_h(heads)
    split_latent[(batch * groups * -(-heads // columns), tiles.splits)](
        (queries[0], queries[0].stride()[:2]), (query_rope, query_rope.stride()[:2]),
        *_argument(latent, tiles, chunk), *_argument(latent if rope is None else rope, tiles, rope_block),
        column, first, partial, log_sums, length, min(length, window or length), scale * math.log2(math.e),
        G=groups, HEADS=heads, RANK=rank, CHUNK=chunk, CHUNKS=-(-rank // chunk), ROPE=width, ROPE_BLOCK=rope_block,
        EXCLUDE_SELF=exclude_self, BLOCK_H=columns, BLOCK_N=tiles.block_n, STAGES=tiles.num_stages,
        TURNS=2 if tiles.descriptor else 1, num_warps=tiles.num_warps,
    )  # fmt: skip
    split_decode.merge_splits(partial, log_sums, out, log_sum)
    return out


def _argument(data: Tensor, tiles: LatentTiles, block: int) -> tuple[Any, tuple[int, ...]]:
    """A part of the slot (B, S, G, channels) for `_load`: with strides, or as a descriptor of (B, G, S, channels)."""
    if not tiles.descriptor:
        return data, data.stride()[:3]
    turned = data.transpose(1, 2)
    return TensorDescriptor(turned, list(turned.shape), list(turned.stride()), [1, 1, tiles.block_n, block]), ()


@jit
def _rows(query, head, is_head, b, START: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Channels (H, BLOCK) of queries, from START on; zero from WIDTH on."""
    data, strides = query
    channel = START + tl.arange(0, BLOCK)
    at = data + b.to(tl.int64) * strides[0] + head[:, None] * strides[1] + channel[None, :]
    return tl.load(at, mask=is_head[:, None] & (channel < WIDTH)[None, :], other=0.0)


@jit
def _load(part, b, g, start, stop, S, FROM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr):
    """Rows (N, BLOCK) of a part of the slot from column `start` on: BLOCK channels from FROM on, of WIDTH in all.

    A part is a pointer and strides (B, S, G), for which unseen entries are zero and not read; or the descriptor of
    (B, G, S, WIDTH) and (), which reads entries until S.
    """
    data, strides = part
    if len(strides) == 0:
        rows = data.load([b.to(tl.int32), g.to(tl.int32), start % S, FROM]).reshape(N, BLOCK)
    else:
        entry, seen = _entries(start, stop, S, N)
        rows = _tile((data + FROM, strides, data, strides), b, g, entry, seen, min(BLOCK, WIDTH - FROM), BLOCK)
    return rows


@jit
def split_latent(
    query, query_rope, latent, latent_strides, rope, rope_strides, column, first, partial, log_sums, S, window,
    log2_scale, G: tl.constexpr, HEADS: tl.constexpr, RANK: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    ROPE: tl.constexpr, ROPE_BLOCK: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """One split for a block of the HEADS query heads of one KV head.

    `query` (B, H, RANK) and `query_rope` (B, H, ROPE) are pointers and strides (B, H). `latent` and `rope` are as for
    `_load`. `partial` is (B, H, splits, RANK) fp32, `log_sums` (B, H, splits) fp32, to base 2. The latent has CHUNKS
    parts of CHUNK channels, each with its own outputs; without RoPE keys ROPE is 0.

    TURNS is 2 for descriptors, which cannot continue at the first entry of the ring: the loop over tiles runs until the
    ring's end, and again for the remaining columns.
    """
    H_BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    pid = tl.program_id(0)
    b, g = pid // (H_BLOCKS * G), pid // H_BLOCKS % G
    in_group = pid % H_BLOCKS * BLOCK_H + tl.arange(0, BLOCK_H)
    head, is_head = g * HEADS + in_group, in_group < HEADS
    begin, stop = _share(column, first, b, window, EXCLUDE_SELF, BLOCK_N)

    rows = ()
    sums = ()
    for i in tl.static_range(CHUNKS):
        rows = rows + (_rows(query, head, is_head, b, i * CHUNK, RANK, CHUNK),)
        sums = sums + (_zeros(CHUNK, BLOCK_H),)
    if ROPE > 0:
        rope_rows = _rows(query_rope, head, is_head, b, 0, ROPE, ROPE_BLOCK)
    largest = tl.full((BLOCK_H,), -1e30, dtype=tl.float32)
    total = _zeros(BLOCK_N, BLOCK_H)  # of each row; added after the last tile

    for turn in range(TURNS):
        low, high = begin, stop
        if TURNS > 1:
            end = (begin // S + 1) * S  # of the ring
            low = tl.where(turn == 0, begin, tl.minimum(end, stop))
            high = tl.where(turn == 0, tl.minimum(end, stop), stop)
        for start in tl.range(low, high, BLOCK_N, num_stages=STAGES):
            scores = _zeros(BLOCK_N, BLOCK_H)
            tiles = ()
            for i in tl.static_range(CHUNKS):
                tile = _load((latent, latent_strides), b, g, start, high, S, i * CHUNK, RANK, CHUNK, BLOCK_N)
                tiles = tiles + (tile,)
                scores = tl.dot(tile, tl.trans(rows[i]), acc=scores)
            if ROPE > 0:
                tile = _load((rope, rope_strides), b, g, start, high, S, 0, ROPE, ROPE_BLOCK, BLOCK_N)
                scores = tl.dot(tile, tl.trans(rope_rows), acc=scores)
            seen = start + tl.arange(0, BLOCK_N) < high
            scores = tl.where(seen[:, None], scores * log2_scale, float("-inf"))
            larger = tl.maximum(largest, tl.max(scores, axis=0))
            weights = tl.exp2(scores - larger[None, :])
            shrink = tl.exp2(largest - larger)
            total = total * shrink[None, :] + weights
            largest = larger
            weights = weights.to(query[0].dtype.element_ty)
            added = ()
            for i in tl.static_range(CHUNKS):
                added = added + (tl.dot(tl.trans(tiles[i]), weights, acc=sums[i] * shrink[None, :]),)
            sums = added

    total_sum = tl.sum(total, axis=0)
    row = (b * G * HEADS + head).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(log_sums + row, tl.where(total_sum == 0, float("-inf"), largest + tl.log2(total_sum)), mask=is_head)
    for i in tl.static_range(CHUNKS):
        channel = i * CHUNK + tl.arange(0, CHUNK)
        at = partial + row[None, :] * RANK + channel[:, None]
        mask = (is_head & (begin < stop))[None, :] & (channel < RANK)[:, None]
        tl.store(at, sums[i] / total_sum[None, :], mask=mask)
