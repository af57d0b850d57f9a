# mypy: disable-error-code="assignment,var-annotated"
# ruff: noqa: RUF005 - the kernels' language adds tuples and does not unpack them
"""Decoding over a latent and its RoPE key, for Hopper GPUs, in Gluon (Triton's layer for layouts, TMA and wgmma).

Computes `triton_decode.split_dot` for one KV head whose values are its latent, and numbers of 16 bits. It is faster,
because loads, products and softmax overlap:

    two roles       one warp loads tiles of 64 tokens (TMA) into a ring of shared memory, as far ahead as the ring is
                    long. Four warps compute.
    tokens as rows  scores (64 tokens x heads) are tile · queries^T, outputs (channels x heads) are tile^T · weights.
                    Both products read the tile where it was loaded, and few heads do not leave rows of a product empty.
    parts           a tile is loaded and released in three parts, so that a part is loaded again while the others are
                    still multiplied.

A tile is cut into *slabs* of 64 channels: the RoPE key, then the latent. Tiles are of entries instead of columns: those
of a ring that the token sees are one or two stretches of entries.

Shapes: B batch, S entries, H query heads, C channels of the latent.
"""

from __future__ import annotations

from cllm.kernels.hopper import (
    fence_async_shared,
    gl,
    jit,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)


@jit
def _seen(column, first, b, S, window, EXCLUDE_SELF: gl.constexpr):
    """The entries that row b sees: the first, the number from it up to the ring's end, and the number from entry 0 on.

    A token sees at most S columns, so that no entry is in both stretches.
    """
    last = gl.load(column).to(gl.int32)
    low = gl.maximum(last - window + 1, 0)
    if first is not None:
        low = gl.maximum(low, gl.load(first + b).to(gl.int32))
    count = gl.maximum(last + (0 if EXCLUDE_SELF else 1) - low, 0)
    begin = low % S
    before = gl.minimum(count, S - begin)
    return begin, before, count - before


@jit
def _tile(number, begin, before, after):
    """The first entry of a tile, and how many of its 64 entries are seen; more than 64 means all."""
    tiles = gl.cdiv(before, 64)
    is_before = number < tiles
    entry = gl.where(is_before, begin + number * 64, (number - tiles) * 64)
    return entry, gl.where(is_before, before - number * 64, after - (number - tiles) * 64)


@jit
def _load(
    latent_desc, rope_desc, slabs, full, empty, row, begin, before, after, first_tile, n_tiles,
    SLABS: gl.constexpr, PER_PART: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Load the parts of all tiles, each as soon as its place in the ring is free."""
    n = 0
    for i in range(n_tiles):
        entry, _ = _tile(first_tile + i, begin, before, after)
        for part in gl.static_range(SLABS // PER_PART):
            place = n % RING
            mbarrier.wait(empty.index(place), (n // RING + 1) & 1)
            mbarrier.expect(full.index(place), PER_PART * 64 * 64 * 2)
            for k in gl.static_range(PER_PART):
                to = slabs.index(place * PER_PART + k)
                if part == 0 and k == 0:
                    tma.async_copy_global_to_shared(rope_desc, [row + entry, 0], full.index(place), to)
                else:
                    at = [row + entry, (part * PER_PART + k - 1) * 64]
                    tma.async_copy_global_to_shared(latent_desc, at, full.index(place), to)
            n += 1


@jit
def _zero_unseen(slabs, place, seen, SLABS: gl.constexpr, PER_PART: gl.constexpr, RING: gl.constexpr):
    """Set entries of the latent that are not seen to zero. They may be NaN, which a weight of zero does not remove."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    token = gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    for k in range(1, SLABS):
        slab = slabs.index((place + k // PER_PART) % RING * PER_PART + k % PER_PART)
        x = slab.load(LAYOUT)
        slab.store(gl.where(token < seen, x, gl.zeros_like(x)))


@jit
def _attend(
    latent_query, rope_query, latent_strides, rope_strides, queries, weights, slabs, full, empty,
    begin, before, after, first_tile, n_tiles, partial, log_sums, row, row_step, log2_scale,
    SLABS: gl.constexpr, PER_PART: gl.constexpr, RING: gl.constexpr, HEADS: gl.constexpr, BLOCK_H: gl.constexpr,
):  # fmt: skip
    """Attention over all tiles of this program. `latent_query` and `rope_query` point to this sequence."""
    PARTS: gl.constexpr = SLABS // PER_PART
    dtype: gl.constexpr = latent_query.dtype.element_ty
    ROWS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_H, 16])
    QUERY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])

    head = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, QUERY))[:, None]
    channel = gl.arange(0, 64, layout=gl.SliceLayout(0, QUERY))[None, :]
    rows = (gl.load(rope_query + head * rope_strides[1] + channel, mask=head < HEADS, other=0.0),)
    for k in gl.static_range(SLABS - 1):
        at = latent_query + head * latent_strides[1] + k * 64 + channel
        rows = rows + (gl.load(at, mask=head < HEADS, other=0.0),)
    for k in gl.static_range(SLABS):
        queries.index(k).store(rows[k])
    fence_async_shared()

    token = gl.arange(0, 64, layout=gl.SliceLayout(1, ROWS))[:, None]
    largest = gl.full([BLOCK_H], -1e30, gl.float32, layout=gl.SliceLayout(0, ROWS))
    total = gl.zeros([64, BLOCK_H], gl.float32, layout=ROWS)
    sums = ()
    for _slab in gl.static_range(SLABS - 1):
        sums = sums + (gl.zeros([64, BLOCK_H], gl.float32, layout=ROWS),)

    for i in range(n_tiles):
        _, seen = _tile(first_tile + i, begin, before, after)
        n = i * PARTS
        scores = warpgroup_mma_init(gl.zeros([64, BLOCK_H], gl.float32, layout=ROWS))
        for part in gl.static_range(PARTS):
            place = (n + part) % RING
            mbarrier.wait(full.index(place), (n + part) // RING & 1)
            for k in gl.static_range(PER_PART):
                keys = slabs.index(place * PER_PART + k)
                query = queries.index(part * PER_PART + k).permute((1, 0))
                scores = warpgroup_mma(keys, query, scores, use_acc=part + k > 0, is_async=True)
        scores = warpgroup_mma_wait(0, deps=(scores,))
        scores = gl.where(token < seen, scores * log2_scale, float("-inf"))
        larger = gl.maximum(largest, gl.max(scores, axis=0))
        shrink = gl.exp2(largest - larger)[None, :]
        weight = gl.exp2(scores - larger[None, :])
        largest = larger
        total = total * shrink + weight  # of each row of the tile; summed after the last
        weights.store(gl.permute(weight.to(dtype), (1, 0)))
        if seen < 64:
            _zero_unseen(slabs, n, seen, SLABS, PER_PART, RING)
        fence_async_shared()

        added = ()
        for k in gl.static_range(1, SLABS):
            values = slabs.index((n + k // PER_PART) % RING * PER_PART + k % PER_PART).permute((1, 0))
            shrunk = warpgroup_mma_init(sums[k - 1] * shrink)
            added = added + (warpgroup_mma(values, weights.permute((1, 0)), shrunk, is_async=True),)
        for part in gl.static_range(PARTS):
            added = warpgroup_mma_wait((PARTS - 1 - part) * PER_PART, deps=added)
            mbarrier.arrive(empty.index((n + part) % RING), count=1)
            if part < PARTS - 1:
                pending = ()
                for k in gl.static_range(SLABS - 1):
                    pending = pending + (warpgroup_mma_init(added[k]),)
                added = pending
        sums = added

    all_total = gl.sum(total, axis=0)
    column_head = gl.arange(0, BLOCK_H, layout=gl.SliceLayout(0, ROWS))
    out = row + column_head * row_step
    log_sum = gl.where(all_total == 0, float("-inf"), largest + gl.log2(all_total))
    gl.store(log_sums + out, log_sum, mask=column_head < HEADS)
    share = (1.0 / gl.where(all_total == 0, 1.0, all_total))[None, :]
    mask = (column_head < HEADS)[None, :] & (n_tiles > 0)
    for k in gl.static_range(SLABS - 1):
        at = partial + (out.to(gl.int64) * ((SLABS - 1) * 64))[None, :] + k * 64 + token
        gl.store(at, sums[k] * share, mask=mask)


@jit
def split_latent(
    latent_query, rope_query, latent_desc, rope_desc, latent_strides, rope_strides, column, first, partial, log_sums, S,
    window, log2_scale,
    HEADS: gl.constexpr, BLOCK_H: gl.constexpr, SLABS: gl.constexpr, PER_PART: gl.constexpr, RING: gl.constexpr,
    EXCLUDE_SELF: gl.constexpr,
):  # fmt: skip
    """One split of all query heads of a sequence: `partial` (B, H, splits, C) fp32 and `log_sums` (B, H, splits) fp32,
    to base 2, -inf for a split without tiles.

    The queries are (B, H, C) and (B, H, 64), with strides of B and H. The descriptors are of the latent (B · S, C) and
    of the RoPE key (B · S, 64), in tiles of 64 x 64. SLABS is C / 64 + 1, a multiple of PER_PART, the slabs of a part.
    RING is the number of parts in shared memory, at least those of one tile.
    """
    split, splits, b = gl.program_id(0), gl.num_programs(0), gl.program_id(1)
    begin, before, after = _seen(column, first, b, S, window, EXCLUDE_SELF)
    slabs = gl.allocate_shared_memory(latent_desc.dtype, [RING * PER_PART, 64, 64], latent_desc.layout)
    queries = gl.allocate_shared_memory(latent_desc.dtype, [SLABS, BLOCK_H, 64], latent_desc.layout)
    weights = gl.allocate_shared_memory(latent_desc.dtype, [BLOCK_H, 64], latent_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(RING):
        mbarrier.init(full.index(place), count=1)
        mbarrier.init(empty.index(place), count=1)
    fence_async_shared()

    tiles = gl.cdiv(before, 64) + gl.cdiv(after, 64)
    first_tile = tiles * split // splits
    n_tiles = tiles * (split + 1) // splits - first_tile
    share = (begin, before, after, first_tile, n_tiles)
    work = (
        latent_query + b.to(gl.int64) * latent_strides[0], rope_query + b.to(gl.int64) * rope_strides[0],
        latent_strides, rope_strides, queries, weights, slabs, full, empty,
    )  # fmt: skip
    results = (partial, log_sums, b * HEADS * splits + split, splits, log2_scale)
    shape: gl.constexpr = (SLABS, PER_PART, RING)
    heads: gl.constexpr = (HEADS, BLOCK_H)
    loads = (latent_desc, rope_desc, slabs, full, empty, b * S)
    gl.warp_specialize([(_attend, work + share + results + shape + heads), (_load, loads + share + shape)], [1], [24])
