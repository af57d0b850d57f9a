# mypy: disable-error-code="import-not-found,import-untyped,assignment"
# ruff: noqa: RUF005 - the kernels' language adds tuples and does not unpack them
"""Scores of keys rebuilt from low-rank factors, for Hopper GPUs, in Gluon (Triton's layer for layouts, TMA and wgmma).

Computes `triton_lowrank.rebuilt_scores` for all tokens of a sequence and numbers of 16 bits. It is faster, because:

    resident B    a program keeps the rows of B of its KV heads in shared memory, for all its tiles of tokens. It reads
                  only A again, once for every `PACK` heads, instead of B for every tile.
    three roles   one warp loads tiles of A (TMA), and two warpgroups alternate between tiles: while one applies RoPE to
                  its keys and scores them, the tensor cores work for the other.
    split RoPE    RoPE of position t0 + δ is RoPE of δ on the keys and of -t0 on the queries. δ is 0 to 63 in every
                  tile, so that its cosines and sines stay in registers. The rotated queries are exact to about 16 bits:
                  sums of two bf16 numbers, one column each.

Shapes: B batch, S compressed tokens, H query heads, G KV heads, D channels of a head, r rank.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

SUPPORTED_VERSIONS = ("3.6", "3.7")
"""Versions of Triton whose Gluon these kernels are written for. Gluon may still change between versions."""
MISSING: str | None = None
"""The reason why Gluon cannot be used, or None."""
try:
    import triton
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_init,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    jit = gluon.jit
    if ".".join(triton.__version__.split(".")[:2]) not in SUPPORTED_VERSIONS:
        MISSING = f"Gluon of triton {triton.__version__}; supported are those of {' and '.join(SUPPORTED_VERSIONS)}"
except ImportError as error:  # no Triton, or an older one
    MISSING = " ".join(str(error).split())

    def jit(fn: Any) -> Any:
        """Without Gluon the kernels below are plain functions, and never called."""
        return fn


TILE = 64
"""Tokens of a tile: the rows of one product of a warpgroup. Written as 64 in the kernels, which cannot read globals."""
RANKS = 32
"""Ranks of a tile. Written as 32 in the kernels."""


def tma_descriptor(factor: Tensor, rows: int) -> Any:
    """The TMA descriptor of a contiguous factor (B, n, r) of 16 bits: (B · n, r) in tiles of `rows` by RANKS."""
    layout = gl.NVMMASharedLayout(2 * RANKS, 16)
    return TensorDescriptor.from_tensor(factor.view(-1, factor.shape[-1]), [rows, RANKS], layout)


@jit
def _load(
    a_desc, b_desc, tiles_of_a, rows_of_b, full, empty, b_full, a_row, b_row, first_tile, n_tiles, step,
    CHUNKS: gl.constexpr, PACK: gl.constexpr, HALF: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the rows of B once, lower halves of all heads before upper halves; then tiles of A as stages become free."""
    mbarrier.expect(b_full, CHUNKS * 2 * PACK * HALF * 32 * 2)
    for k in gl.static_range(CHUNKS):
        for part in gl.static_range(2 * PACK):
            to = rows_of_b.index(k).slice(part * HALF, HALF, dim=0)
            row = b_row + (part % PACK) * 2 * HALF + (part // PACK) * HALF
            tma.async_copy_global_to_shared(b_desc, [row, k * 32], b_full, to)
    in_flight = 0
    for i in range(n_tiles):
        row = a_row + (first_tile + i * step) * 64
        for k in gl.static_range(CHUNKS):
            stage = in_flight % STAGES
            mbarrier.wait(empty.index(stage), (in_flight // STAGES + 1) & 1)
            mbarrier.expect(full.index(stage), 64 * 32 * 2)
            tma.async_copy_global_to_shared(a_desc, [row, k * 32], full.index(stage), tiles_of_a.index(stage))
            in_flight += 1


@jit
def _split(x, WIDTH: gl.constexpr):
    """`x` (64, 2 · WIDTH) as its left and right (64, WIDTH), without exchange between threads."""
    return gl.split(gl.permute(gl.reshape(x, [64, 2, WIDTH]), [0, 2, 1]))


@jit
def _halves(x, HALF: gl.constexpr, PACK: gl.constexpr):
    """`x` (64, 2 · PACK · HALF) as tensors (64, HALF): the lower halves of PACK heads, then the upper halves."""
    lower, upper = _split(x, PACK * HALF)
    if PACK == 1:
        return lower, upper
    else:
        return _split(lower, HALF) + _split(upper, HALF)


@jit
def _write(
    products, scores, score_strides, first_head, begin, low, tokens, log2_scale,
    HEADS: gl.constexpr, ROOM: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """Write the scores of a tile for the query heads of one KV head: the sum of each head's columns (64, 2 · ROOM)."""
    high, rest = gl.split(gl.reshape(products, [64, ROOM, 2]))
    value = (high + rest) * log2_scale
    LAYOUT: gl.constexpr = value.type.layout
    head = gl.arange(0, ROOM, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    token = begin + gl.arange(0, 64, layout=gl.SliceLayout(1, LAYOUT))[:, None]
    at = scores + (first_head + head) * score_strides[1] + token
    is_score = (head < HEADS) & (token < tokens)
    if ADD:
        value += gl.load(at, mask=is_score, other=0.0)
    gl.store(at, gl.where(token >= low, value, float("-inf")), mask=is_score)


@jit
def _score(
    rotated_queries, GROUP: gl.constexpr, CHUNKS: gl.constexpr, PACK: gl.constexpr, HALF: gl.constexpr,
    HEADS: gl.constexpr, ROOM: gl.constexpr, STAGES: gl.constexpr, ADD: gl.constexpr,
    query, cos, sin, low, scores, tiles_of_a, rows_of_b, full, empty, b_full, order, q_strides, table_stride,
    score_strides, head_0, first_tile, n_tiles, step, tokens, log2_scale,
):  # fmt: skip
    """Score every other tile, from number `GROUP` on (0 or 1). `query` and `scores` point to this sequence."""
    dtype: gl.constexpr = query.dtype.element_ty
    WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * PACK * HALF, 16])
    KEYS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    PRODUCTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * ROOM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, PRODUCTS, 2)
    QUERY: gl.constexpr = gl.BlockedLayout([1, HALF // 32], [1, 32], [4, 1], [1, 0])

    # RoPE of positions 0 to 63, with cos and sin as two numbers of 16 bits in one register. The table's factor is
    # applied to the queries, which are exact: rounded to 16 bits, it would change all scores by the same ratio.
    token = gl.arange(0, 64, layout=gl.SliceLayout(1, KEYS))
    channel = gl.arange(0, HALF, layout=gl.SliceLayout(0, KEYS))
    at = token[:, None] * table_stride + channel[None, :]
    factor = gl.load(cos)
    near = (gl.load(cos + at) / factor).to(gl.float16).to(gl.uint16, bitcast=True).to(gl.uint32)
    near = near | ((gl.load(sin + at) / factor).to(gl.float16).to(gl.uint16, bitcast=True).to(gl.uint32) << 16)

    q_head = gl.arange(0, ROOM, layout=gl.SliceLayout(1, QUERY))
    q_channel = gl.arange(0, HALF, layout=gl.SliceLayout(0, QUERY))
    is_head = (q_head < HEADS)[:, None]
    lower_q = ()
    upper_q = ()
    for g in gl.static_range(PACK):
        at = query + (head_0 + g * HEADS + q_head)[:, None] * q_strides[1] + q_channel[None, :]
        lower_q = lower_q + (gl.load(at, mask=is_head, other=0.0).to(gl.float32),)
        upper_q = upper_q + (gl.load(at + HALF, mask=is_head, other=0.0).to(gl.float32),)

    mbarrier.wait(b_full, 0)
    for i in range(GROUP, n_tiles, 2):
        begin = (first_tile + i * step) * 64
        base = begin - low
        row = gl.where(base < 0, -base, base) * table_stride + q_channel
        far_cos, far_sin = gl.load(cos + row), gl.load(sin + row)

        # Wait for the other warpgroup's products: so tiles of A are consumed in order, and the parity of a barrier
        # distinguishes one use of a stage from the next.
        mbarrier.wait(order.index(GROUP), (i // 2 + 1 - GROUP) & 1)
        stage, phase = i * CHUNKS % STAGES, i * CHUNKS // STAGES & 1
        keys = warpgroup_mma_init(gl.zeros([64, 2 * PACK * HALF], gl.float32, layout=WIDE))
        for k in range(CHUNKS):
            mbarrier.wait(full.index(stage), phase)
            rows = rows_of_b.index(k).permute((1, 0))
            keys = warpgroup_mma(tiles_of_a.index(stage), rows, keys, use_acc=k > 0, is_async=True)
            keys = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(keys,)))
            mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), count=1, pred=k > 0)
            stage += 1
            phase = gl.where(stage == STAGES, phase ^ 1, phase)
            stage = gl.where(stage == STAGES, 0, stage)
        mbarrier.arrive(order.index(1 - GROUP), count=1)

        far_cos = far_cos[None, :]
        far_sin = gl.where(base < 0, -far_sin, far_sin)[None, :]
        for g in gl.static_range(PACK):
            for half in gl.static_range(2):
                if half == 0:
                    q = lower_q[g] * far_cos + upper_q[g] * far_sin
                else:
                    q = upper_q[g] * far_cos - lower_q[g] * far_sin
                high = q.to(dtype)
                rest = (q - high.to(gl.float32)).to(dtype)
                pair = gl.reshape(gl.permute(gl.join(high, rest), [0, 2, 1]), [2 * ROOM, HALF])
                rotated_queries.index(2 * g + half).store(pair)
        fence_async_shared()

        keys = warpgroup_mma_wait(0, deps=(keys,))
        mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), count=1)
        c = (near & 0xFFFF).to(gl.uint16).to(gl.float16, bitcast=True).to(gl.float32)
        s = (near >> 16).to(gl.uint16).to(gl.float16, bitcast=True).to(gl.float32)
        halves = _halves(keys, HALF, PACK)
        for g in gl.static_range(PACK):
            lower = gl.convert_layout(halves[g], KEYS, assert_trivial=True)
            upper = gl.convert_layout(halves[PACK + g], KEYS, assert_trivial=True)
            rotated = gl.convert_layout((lower * c - upper * s).to(dtype), OPERAND)
            products = gl.zeros([64, 2 * ROOM], gl.float32, layout=PRODUCTS)
            products = warpgroup_mma(rotated, rotated_queries.index(2 * g).permute((1, 0)), products)
            rotated = gl.convert_layout((upper * c + lower * s).to(dtype), OPERAND)
            products = warpgroup_mma(rotated, rotated_queries.index(2 * g + 1).permute((1, 0)), products)
            _write(
                products, scores, score_strides, head_0 + g * HEADS, begin, low, tokens, log2_scale, HEADS, ROOM, ADD
            )


@jit
def resident_scores(
    query, a_desc, b_desc, cos, sin, first, scores, q_strides, table_stride, score_strides, tokens, log2_scale,
    G: gl.constexpr, HEADS: gl.constexpr, ROOM: gl.constexpr, HALF: gl.constexpr, PACK: gl.constexpr,
    CHUNKS: gl.constexpr, STAGES: gl.constexpr, ADD: gl.constexpr,
):  # fmt: skip
    """Scores (B, H, S) fp32 of all tokens, to base 2; -inf before `first` (B,), or None.

    `a_desc` describes A (B · S, r) in blocks of 64 rows by 32 ranks, `b_desc` B (B · G · D, r) in D / 2 rows by 32. A
    program has PACK KV heads of one sequence and every n-th tile, for n programs per pack. ROOM is HEADS, padded to a
    power of two that is at least 4.
    """
    packs: gl.constexpr = G // PACK
    pack, sequence = gl.program_id(0) % packs, gl.program_id(1)
    first_tile, step = gl.program_id(0) // packs, gl.num_programs(0) // packs
    n_tiles = (gl.cdiv(tokens, 64) - first_tile + step - 1) // step
    low = 0
    if first is not None:
        low = gl.load(first + sequence).to(gl.int32)
    query += sequence.to(gl.int64) * q_strides[0]
    scores += sequence.to(gl.int64) * score_strides[0]

    queries: gl.constexpr = gl.NVMMASharedLayout(2 * HALF, 16)
    tiles_of_a = gl.allocate_shared_memory(a_desc.dtype, [STAGES, 64, 32], a_desc.layout)
    rows_of_b = gl.allocate_shared_memory(b_desc.dtype, [CHUNKS, 2 * PACK * HALF, 32], b_desc.layout)
    rotated_0 = gl.allocate_shared_memory(a_desc.dtype, [2 * PACK, 2 * ROOM, HALF], queries)
    rotated_1 = gl.allocate_shared_memory(a_desc.dtype, [2 * PACK, 2 * ROOM, HALF], queries)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    b_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    for group in gl.static_range(2):
        mbarrier.init(order.index(group), count=1)
    mbarrier.init(b_full, count=1)
    fence_async_shared()

    a_row, b_row = sequence * tokens, (sequence * G + pack * PACK) * 2 * HALF
    head_0 = pack * PACK * HEADS
    work = (
        query, cos, sin, low, scores, tiles_of_a, rows_of_b, full, empty, b_full, order, q_strides, table_stride,
        score_strides, head_0, first_tile, n_tiles, step, tokens, log2_scale,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_score, (rotated_0, 0, CHUNKS, PACK, HALF, HEADS, ROOM, STAGES, ADD) + work),
            (_score, (rotated_1, 1, CHUNKS, PACK, HALF, HEADS, ROOM, STAGES, ADD) + work),
            (_load, (
                a_desc, b_desc, tiles_of_a, rows_of_b, full, empty, b_full, a_row, b_row, first_tile, n_tiles, step,
                CHUNKS, PACK, HALF, STAGES,
            )),
        ],
        [4, 1],
        [232, 24],
    )  # fmt: skip
