# mypy: disable-error-code="assignment"
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
    interpolation the slower half of the channel pairs turns so little in a stretch of 256 tokens, or of 1,024 with a
                  larger base of RoPE, that four positions there determine its part of every score. So these channels
                  are not rebuilt: `triton_nodes.py` rotates the queries by the four positions and multiplies them with
                  their rows of B. A times these vectors, interpolated, is the slower channels' part of the scores. With
                  four query heads for each KV head of 128 channels, A is multiplied with 64 + 16 columns instead of
                  128.

Shapes: B batch, S compressed tokens, H query heads, G KV heads, D channels of a head, r rank.
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

TILE = 64
"""Tokens of a tile: the rows of one product of a warpgroup. Written as 64 in the kernels, which cannot read globals."""


STRETCHES = (256, 512, 1024)
"""Tokens over which slow channels are interpolated. The shortest is written as 4 tiles in the kernels."""
NODES = (10, 79, 176, 245)
"""Tokens of the shortest stretch between which scores are interpolated: the nodes of the Chebyshev polynomial of degree
4, rounded. The numbers in `_weights` belong to them. A stretch n times as long has them at n times these tokens."""


@jit
def _load(
    a_desc, b_desc, w_desc, tiles_of_a, rows_of_b, rows_of_w, full, empty, b_full, w_full, w_empty, a_row, b_row, w_row,
    first_stretch, n_tiles, step,
    CHUNKS: gl.constexpr, PACK: gl.constexpr, HALF: gl.constexpr, FAST: gl.constexpr, COLUMNS: gl.constexpr,
    TILES: gl.constexpr, STAGES: gl.constexpr, RANKS: gl.constexpr,
):  # fmt: skip
    """Load the rows of B once, lower halves of all heads before upper halves; then tiles of A as stages become free,
    and before the first tile of a stretch its rows of W."""
    mbarrier.expect(b_full, CHUNKS * 2 * PACK * FAST * RANKS * 2)
    for k in gl.static_range(CHUNKS):
        for part in gl.static_range(2 * PACK):
            to = rows_of_b.index(k).slice(part * FAST, FAST, dim=0)
            row = b_row + (part % PACK) * 2 * HALF + (part // PACK) * HALF
            tma.async_copy_global_to_shared(b_desc, [row, k * RANKS], b_full, to)
    in_flight = 0
    for i in range(n_tiles):
        stretch = first_stretch + i // TILES * step
        if COLUMNS > 0:
            n = i // TILES
            is_new = i % TILES == 0
            mbarrier.wait(w_empty.index(n & 1), (n // 2 + 1) & 1, pred=is_new)
            mbarrier.expect(w_full.index(n & 1), CHUNKS * COLUMNS * RANKS * 2, pred=is_new)
            for k in gl.static_range(CHUNKS):
                rows = rows_of_w.index((n & 1) * CHUNKS + k)
                at = [w_row + stretch * COLUMNS, k * RANKS]
                tma.async_copy_global_to_shared(w_desc, at, w_full.index(n & 1), rows, pred=is_new)
        token = a_row + (stretch * TILES + i % TILES) * 64
        for k in gl.static_range(CHUNKS):
            stage = in_flight % STAGES
            mbarrier.wait(empty.index(stage), (in_flight // STAGES + 1) & 1)
            mbarrier.expect(full.index(stage), 64 * RANKS * 2)
            tma.async_copy_global_to_shared(a_desc, [token, k * RANKS], full.index(stage), tiles_of_a.index(stage))
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
def _heads(x, WIDTH: gl.constexpr, PACK: gl.constexpr):
    """`x` (64, PACK · WIDTH) as PACK tensors (64, WIDTH)."""
    if PACK == 1:
        return (x,)
    else:
        return _split(x, WIDTH)


@jit
def _weights(token, LAYOUT: gl.constexpr, COLUMNS: gl.constexpr):
    """Weights (64, COLUMNS) of nodes 0 and 1, in even and odd columns, and of nodes 2 and 3, at tokens `token` (64,)
    fp32 of the shortest stretch; those of a longer one are fractions.

    They are exact for waves of 0.0094 and 0.0039 radians a token, and off by at most 0.002 for all up to 0.0102. Cubic
    interpolation would be off by up to 0.014. As functions of the distance from the middle, the two outer nodes have
    the sum and the difference of an even and an odd function, and so have the inner ones; here they are polynomials.
    """
    x = (token - 127.5) * (1.0 / 128)
    t = x * x
    outer = (((-0.00014328025 * t + 0.00571568809) * t - 0.115316439) * t + 0.82417327) * t - 0.115966429
    inner = (((0.000130858413 * t - 0.00522921688) * t + 0.106601631) * t - 0.815983773) * t + 0.614968861
    outer_odd = x * ((((-4.99180947e-05 * t + 0.00254971337) * t - 0.0719011058) * t + 0.847896857) * t - 0.120257983)
    inner_odd = x * ((((0.0001174544 * t - 0.00600270478) * t + 0.169848195) * t - 2.05004376) * t + 1.61042905)
    is_even = (gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT)) % 2 == 0)[None, :]
    left = gl.where(is_even, (outer - outer_odd)[:, None], (inner - inner_odd)[:, None])
    right = gl.where(is_even, (inner + inner_odd)[:, None], (outer + outer_odd)[:, None])
    return left, right


@jit
def _before(row_cos, row_sin, zero_cos, zero_sin):
    """Row -n of the table from its row n: conjugate, times the square of row 0, which `zero_cos` and `zero_sin` point
    to."""
    c, s = gl.load(zero_cos), gl.load(zero_sin)
    square = 1.0 / (c * c + s * s)
    twice_cos, twice_sin = (c * c - s * s) * square, 2 * c * s * square
    return row_cos * twice_cos + row_sin * twice_sin, row_cos * twice_sin - row_sin * twice_cos


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
    FAST: gl.constexpr, COLUMNS: gl.constexpr, TILES: gl.constexpr, HEADS: gl.constexpr, ROOM: gl.constexpr,
    STAGES: gl.constexpr, ADD: gl.constexpr,
    query, cos, sin, low, scores, tiles_of_a, rows_of_b, rows_of_w, full, empty, b_full, w_full, w_empty, order,
    q_strides, table_stride, score_strides, head_0, first_stretch, n_tiles, step, tokens, log2_scale,
):  # fmt: skip
    """Score every other tile, from number `GROUP` on (0 or 1). `query` and `scores` point to this sequence."""
    dtype: gl.constexpr = query.dtype.element_ty
    WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * PACK * FAST, 16])
    KEYS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, FAST, 16])
    PRODUCTS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * ROOM, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, PRODUCTS, 2)
    QUERY: gl.constexpr = gl.BlockedLayout([1, max(1, FAST // 32)], [1, 32], [4, 1], [1, 0])

    # RoPE of positions 0 to 63, with cos and sin as two numbers of 16 bits in one register: row δ of the table, turned
    # back by its row 0. The table's factor is applied to the queries, which are exact: rounded to 16 bits, it would
    # change all scores by the same ratio.
    token = gl.arange(0, 64, layout=gl.SliceLayout(1, KEYS))
    channel = gl.arange(0, FAST, layout=gl.SliceLayout(0, KEYS))
    at = token[:, None] * table_stride + channel[None, :]
    first_cos, first_sin = gl.load(cos + channel), gl.load(sin + channel)
    square = 1.0 / (first_cos * first_cos + first_sin * first_sin)
    first_cos, first_sin = (first_cos * square)[None, :], (first_sin * square)[None, :]
    row_cos, row_sin = gl.load(cos + at), gl.load(sin + at)
    near = (row_cos * first_cos + row_sin * first_sin).to(gl.float16).to(gl.uint16, bitcast=True).to(gl.uint32)
    near = near | (
        (row_sin * first_cos - row_cos * first_sin).to(gl.float16).to(gl.uint16, bitcast=True).to(gl.uint32) << 16
    )

    q_head = gl.arange(0, ROOM, layout=gl.SliceLayout(1, QUERY))
    q_channel = gl.arange(0, FAST, layout=gl.SliceLayout(0, QUERY))
    is_head = (q_head < HEADS)[:, None]
    lower_q = ()
    upper_q = ()
    for g in gl.static_range(PACK):
        at = query + (head_0 + g * HEADS + q_head)[:, None] * q_strides[1] + q_channel[None, :]
        lower_q = lower_q + (gl.load(at, mask=is_head, other=0.0).to(gl.float32),)
        upper_q = upper_q + (gl.load(at + HALF, mask=is_head, other=0.0).to(gl.float32),)

    mbarrier.wait(b_full, 0)
    for i in range(GROUP, n_tiles, 2):
        begin = ((first_stretch + i // TILES * step) * TILES + i % TILES) * 64
        base = begin - low
        row = gl.where(base < 0, -base, base) * table_stride + q_channel
        far_cos, far_sin = gl.load(cos + row), gl.load(sin + row)

        # Wait for the other warpgroup's products: so tiles of A are consumed in order, and the parity of a barrier
        # distinguishes one use of a stage from the next.
        mbarrier.wait(order.index(GROUP), (i // 2 + 1 - GROUP) & 1)
        stage, phase = i * CHUNKS % STAGES, i * CHUNKS // STAGES & 1
        keys = warpgroup_mma_init(gl.zeros([64, 2 * PACK * FAST], gl.float32, layout=WIDE))
        if COLUMNS > 0:
            n = i // TILES
            NODES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
            slow = warpgroup_mma_init(gl.zeros([64, COLUMNS], gl.float32, layout=NODES))
            mbarrier.wait(w_full.index(n & 1), (n // 2) & 1)
        for k in range(CHUNKS):
            mbarrier.wait(full.index(stage), phase)
            rows = rows_of_b.index(k).permute((1, 0))
            keys = warpgroup_mma(tiles_of_a.index(stage), rows, keys, use_acc=k > 0, is_async=True)
            if COLUMNS > 0:
                rows = rows_of_w.index((n & 1) * CHUNKS + k).permute((1, 0))
                slow = warpgroup_mma(tiles_of_a.index(stage), rows, slow, use_acc=k > 0, is_async=True)
                keys, slow = warpgroup_mma_wait(2, deps=(keys, slow))
                slow = warpgroup_mma_init(slow)
                keys = warpgroup_mma_init(keys)
            else:
                keys = warpgroup_mma_init(warpgroup_mma_wait(1, deps=(keys,)))
            mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), count=1, pred=k > 0)
            stage += 1
            phase = gl.where(stage == STAGES, phase ^ 1, phase)
            stage = gl.where(stage == STAGES, 0, stage)
        mbarrier.arrive(order.index(1 - GROUP), count=1)

        before_cos, before_sin = _before(far_cos, far_sin, cos + q_channel, sin + q_channel)
        far_cos, far_sin = gl.where(base < 0, before_cos, far_cos), gl.where(base < 0, before_sin, far_sin)
        far_cos, far_sin = far_cos[None, :], far_sin[None, :]
        for g in gl.static_range(PACK):
            for half in gl.static_range(2):
                if half == 0:
                    q = lower_q[g] * far_cos + upper_q[g] * far_sin
                else:
                    q = upper_q[g] * far_cos - lower_q[g] * far_sin
                high = q.to(dtype)
                rest = (q - high.to(gl.float32)).to(dtype)
                pair = gl.reshape(gl.permute(gl.join(high, rest), [0, 2, 1]), [2 * ROOM, FAST])
                rotated_queries.index(2 * g + half).store(pair)
        fence_async_shared()

        if COLUMNS > 0:
            keys, slow = warpgroup_mma_wait(0, deps=(keys, slow))
            mbarrier.arrive(w_empty.index(n & 1), count=1)
            u = ((i % TILES) * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, PRODUCTS))).to(gl.float32)
            weights = _weights(u * (4.0 / TILES), PRODUCTS, 2 * ROOM)
            slow_parts = _heads(slow, 4 * ROOM, PACK)
        else:
            keys = warpgroup_mma_wait(0, deps=(keys,))
        mbarrier.arrive(empty.index(gl.where(stage == 0, STAGES - 1, stage - 1)), count=1)
        c = (near & 0xFFFF).to(gl.uint16).to(gl.float16, bitcast=True).to(gl.float32)
        s = (near >> 16).to(gl.uint16).to(gl.float16, bitcast=True).to(gl.float32)
        halves = _halves(keys, FAST, PACK)
        for g in gl.static_range(PACK):
            lower = gl.convert_layout(halves[g], KEYS, assert_trivial=True)
            upper = gl.convert_layout(halves[PACK + g], KEYS, assert_trivial=True)
            rotated = gl.convert_layout((lower * c - upper * s).to(dtype), OPERAND)
            if COLUMNS > 0:
                nodes = _split(slow_parts[g], 2 * ROOM)
                products = gl.convert_layout(nodes[0], PRODUCTS, assert_trivial=True) * weights[0]
                products += gl.convert_layout(nodes[1], PRODUCTS, assert_trivial=True) * weights[1]
            else:
                products = gl.zeros([64, 2 * ROOM], gl.float32, layout=PRODUCTS)
            products = warpgroup_mma(rotated, rotated_queries.index(2 * g).permute((1, 0)), products)
            rotated = gl.convert_layout((upper * c + lower * s).to(dtype), OPERAND)
            products = warpgroup_mma(rotated, rotated_queries.index(2 * g + 1).permute((1, 0)), products)
            _write(
                products, scores, score_strides, head_0 + g * HEADS, begin, low, tokens, log2_scale, HEADS, ROOM, ADD
            )


@jit
def resident_scores(
    query, a_desc, b_desc, w_desc, cos, sin, first, scores, q_strides, table_stride, score_strides, tokens, log2_scale,
    G: gl.constexpr, HEADS: gl.constexpr, ROOM: gl.constexpr, HALF: gl.constexpr, FAST: gl.constexpr,
    PACK: gl.constexpr, RANK: gl.constexpr, RANKS: gl.constexpr, STAGES: gl.constexpr, TILES: gl.constexpr,
    ADD: gl.constexpr,
):  # fmt: skip
    """Scores (B, H, S) fp32 of all tokens, to base 2; -inf before `first` (B,), or None.

    `a_desc` describes A (B · S, r) in blocks of 64 rows by RANKS ranks, `b_desc` B (B · G · D, r) in FAST by RANKS.
    A program has PACK KV heads of one sequence and every n-th stretch of TILES tiles, for n programs per pack. ROOM is
    HEADS, padded to a power of two that is at least 4.

    FAST of the D / 2 channel pairs are rebuilt. If these are not all, `w_desc` describes what `triton_nodes.py` made
    for the others, (B · G / PACK · stretches · PACK · 4 · ROOM, r) in blocks for one stretch and pack by RANKS.
    Otherwise it is None, and a stretch is one tile.
    """
    packs: gl.constexpr = G // PACK
    CHUNKS: gl.constexpr = (RANK + RANKS - 1) // RANKS
    COLUMNS: gl.constexpr = 0 if FAST == HALF else PACK * 4 * ROOM
    pack, sequence = gl.program_id(0) % packs, gl.program_id(1)
    first_stretch, step = gl.program_id(0) // packs, gl.num_programs(0) // packs
    stretches = gl.cdiv(tokens, 64 * TILES)
    n_stretches = (stretches - first_stretch + step - 1) // step
    n_tiles = n_stretches * TILES
    if first_stretch + (n_stretches - 1) * step == stretches - 1:  # the last stretch may have tiles without tokens
        n_tiles -= stretches * TILES - gl.cdiv(tokens, 64)
    low = 0
    if first is not None:
        low = gl.load(first + sequence).to(gl.int32)
    query += sequence.to(gl.int64) * q_strides[0]
    scores += sequence.to(gl.int64) * score_strides[0]

    queries: gl.constexpr = gl.NVMMASharedLayout(2 * FAST, 16)
    tiles_of_a = gl.allocate_shared_memory(a_desc.dtype, [STAGES, 64, RANKS], a_desc.layout)
    rows_of_b = gl.allocate_shared_memory(b_desc.dtype, [CHUNKS, 2 * PACK * FAST, RANKS], b_desc.layout)
    rotated_0 = gl.allocate_shared_memory(a_desc.dtype, [2 * PACK, 2 * ROOM, FAST], queries)
    rotated_1 = gl.allocate_shared_memory(a_desc.dtype, [2 * PACK, 2 * ROOM, FAST], queries)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    b_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    w_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    rows_of_w = rows_of_b
    if COLUMNS > 0:
        rows_of_w = gl.allocate_shared_memory(w_desc.dtype, [2 * CHUNKS, COLUMNS, RANKS], w_desc.layout)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=1)
    for two in gl.static_range(2):
        mbarrier.init(order.index(two), count=1)
        mbarrier.init(w_full.index(two), count=1)
        mbarrier.init(w_empty.index(two), count=TILES)
    mbarrier.init(b_full, count=1)
    fence_async_shared()

    a_row, b_row = sequence * tokens, (sequence * G + pack * PACK) * 2 * HALF
    w_row = (sequence * packs + pack) * stretches * COLUMNS
    head_0 = pack * PACK * HEADS
    work = (
        query, cos, sin, low, scores, tiles_of_a, rows_of_b, rows_of_w, full, empty, b_full, w_full, w_empty, order,
        q_strides, table_stride, score_strides, head_0, first_stretch, n_tiles, step, tokens, log2_scale,
    )  # fmt: skip
    shape: gl.constexpr = (CHUNKS, PACK, HALF, FAST, COLUMNS, TILES, HEADS, ROOM, STAGES, ADD)
    loads = (
        a_desc, b_desc, w_desc, tiles_of_a, rows_of_b, rows_of_w, full, empty, b_full, w_full, w_empty, a_row, b_row,
        w_row, first_stretch, n_tiles, step,
    )  # fmt: skip
    load_shape: gl.constexpr = (CHUNKS, PACK, HALF, FAST, COLUMNS, TILES, STAGES, RANKS)
    gl.warp_specialize(
        [
            (_score, (rotated_0, 0) + shape + work),
            (_score, (rotated_1, 1) + shape + work),
            (_load, loads + load_shape),
        ],
        [4, 1],
        [232, 24],
    )
