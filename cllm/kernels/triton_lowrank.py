# mypy: disable-error-code="import-not-found,import-untyped,assignment"
# ruff: noqa: RUF005 - the kernels' language adds tuples and does not unpack them
"""Decoding over low-rank factors in Triton: the kernels that `cllm.kernels.lowrank_decode` launches.

    rebuilt_scores   scores of keys that are rebuilt tile by tile from their factors; RoPE is applied in registers
    plain_scores     scores of uncompressed keys: the exact tail, outliers, landmarks
    weigh            softmax over scores, times rows of A or exact values
    finish           rows of A to values, and the sum with the tail's, after `triton_decode.merge` has merged the splits

Scores (B, H, n) fp32, to base 2, are written to memory; they are a fiftieth of the size of the factors. A program that
rebuilds keys has one KV head and no free registers. A program that reads A has all query heads, which share A.

Rotate-half pairs channel j with channel j + D/2. A program rebuilds both halves of a head in one product, in which
eight channels of one half are next to the same eight of the other. So each thread has both channels of a pair, and
splitting the halves moves no data.

Shapes: B batch, S compressed tokens, n tokens that are scored, H query heads, G KV heads, D channels of a head, r rank,
N tokens of a tile.
"""

from __future__ import annotations

from cllm.kernels.triton_decode import MISSING, jit

if MISSING is None:
    import triton.language as tl


@jit
def _emit(scores, strides, value, b, head, is_head, token, seen, N, ADD: tl.constexpr):
    """Write (N, heads) scores, -inf for tokens not seen. With ADD, add to the scores of earlier key parts."""
    at = scores + b * strides[0] + head[None, :] * strides[1] + token[:, None]
    mask = is_head[None, :] & (token < N)[:, None]
    if ADD:
        value += tl.load(at, mask=mask, other=0.0)
    tl.store(at, tl.where(seen[:, None], value, float("-inf")), mask=mask)


@jit
def _query(query, strides, b, head, is_head, channel, is_channel):
    """Queries (heads, channels), padded with 0."""
    at = query + b * strides[0] + head[:, None] * strides[1] + channel[None, :]
    return tl.load(at, mask=is_head[:, None] & is_channel[None, :], other=0.0)


@jit
def _rotations(cos, sin, stride, position, channel, is_channel):
    """Cosines and sines (N, channels) of positions (N,)."""
    at = position[:, None] * stride + channel[None, :]
    c = tl.load(cos + at, mask=is_channel[None, :], other=0.0)
    s = tl.load(sin + at, mask=is_channel[None, :], other=0.0)
    return c, s


@jit
def rebuilt_scores(
    query,
    a,
    b,
    cos,
    sin,
    index,
    first,
    scores,
    q_strides,
    a_strides,
    b_strides,
    table_stride,
    score_strides,
    i_strides,
    N,
    S,
    rank,
    log2_scale,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    UNPADDED: tl.constexpr,
    LONG: tl.constexpr,
    ADD: tl.constexpr,
):
    """Scores of a tile of tokens for the query heads of PACK KV heads.

    `a` is (B, S, r) and `b` (B, G · D, r), ranks contiguous; `cos` and `sin` are (positions, D / 2) fp32; `index`
    (B, G, n) is which tokens (PACK is 1 then), or None: all. Programs of one tile are neighbours, so that its rows of A
    are in the L2 cache. UNPADDED: no rank and no channel is padding. LONG: offsets of rows of A need 64 bits.

    Queries are loaded before the product, to hide their latency. So are cosines and sines of chosen tokens, whose
    smaller tiles leave registers for them.
    """
    pack, row_of_batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    token = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if index is not None:
        chosen = index + row_of_batch * i_strides[0] + pack * i_strides[1] + token
        column = tl.load(chosen, mask=token < N, other=S).to(tl.int32)
    else:
        column = token
    inside = column < S
    low = 0
    if first is not None:
        low = tl.load(first + row_of_batch).to(tl.int32)
    channel = tl.arange(0, HALF)
    is_channel = channel < DIM // 2
    in_group = tl.arange(0, BLOCK_H)
    is_head = in_group < HEADS
    queries = ()
    for i in tl.static_range(PACK):
        head = (pack * PACK + i) * HEADS + in_group
        for half in tl.static_range(2):
            q = _query(query + half * (DIM // 2), q_strides, row_of_batch, head, is_head, channel, is_channel)
            queries = queries + (q,)
    position = tl.maximum(tl.where(inside, column, 0) - low, 0)
    if index is not None:
        c, s = _rotations(cos, sin, table_stride, position, channel, is_channel)

    row = tl.minimum(column, S - 1)  # offsets of 32 bits: pointers would take twice the registers
    if LONG:
        row = row.to(tl.int64)
    n = tl.arange(0, 2 * HALF)
    paired = n // 16 * 8 + n % 8
    paired_row = paired + n // 8 % 2 * (DIM // 2)
    rows, weights = row[:, None] * a_strides[1], paired_row[:, None] * b_strides[1]
    a_row, b_row = a + row_of_batch * a_strides[0], b + row_of_batch * b_strides[0]
    keys = ()
    for _ in tl.static_range(PACK):
        keys = keys + (tl.zeros((BLOCK_N, 2 * HALF), dtype=tl.float32),)
    for start in tl.range(0, rank, BLOCK_R, num_stages=STAGES):
        r = start + tl.arange(0, BLOCK_R)
        if UNPADDED:
            tile = tl.load(a_row + (rows + r[None, :]))
        else:
            tile = tl.load(a_row + (rows + r[None, :]), mask=(r < rank)[None, :], other=0.0)
        next_keys = ()
        for i in tl.static_range(PACK):
            at = b_row + (pack * PACK + i) * DIM * b_strides[1] + (weights + r[None, :])
            if UNPADDED:
                part = tl.load(at)
            else:
                part = tl.load(at, mask=(paired < DIM // 2)[:, None] & (r < rank)[None, :], other=0.0)
            next_keys = next_keys + (tl.dot(tile, tl.trans(part), acc=keys[i], input_precision="tf32x3"),)
        keys = next_keys

    if index is None:
        c, s = _rotations(cos, sin, table_stride, position, channel, is_channel)
    for i in tl.static_range(PACK):
        pairs = tl.permute(tl.reshape(keys[i], (BLOCK_N, HALF // 8, 2, 8)), (0, 1, 3, 2))
        lower, upper = tl.split(pairs)
        lower, upper = tl.reshape(lower, (BLOCK_N, HALF)), tl.reshape(upper, (BLOCK_N, HALF))
        rotated = (lower * c - upper * s).to(query.dtype.element_ty)
        value = tl.dot(rotated, tl.trans(queries[2 * i]), input_precision="tf32x3")
        rotated = (upper * c + lower * s).to(query.dtype.element_ty)
        value = tl.dot(rotated, tl.trans(queries[2 * i + 1]), acc=value, input_precision="tf32x3")
        head = (pack * PACK + i) * HEADS + in_group
        seen = inside & (column >= low)
        _emit(scores, score_strides, value * log2_scale, row_of_batch, head, is_head, token, seen, N, ADD)


@jit
def plain_scores(
    query,
    keys,
    index,
    column,
    first,
    scores,
    largest,
    sums,
    q_strides,
    k_strides,
    score_strides,
    i_strides,
    N,
    offset,
    stop,
    log2_scale,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPAN: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    ADD: tl.constexpr,
):
    """Scores of `keys` (B, n, G, D) for the query heads of one KV head.

    Entry j represents the columns offset + j · SPAN to offset + j · SPAN + SPAN - 1, or `index[b, g, j]`. It is seen if
    one of them is `first` or later and the first of them is before `stop` and not after `column`.

    If they are not None, `largest` and `sums` (B, H, tiles) fp32 get the maximum of each tile's scores, at least -1e30,
    and the sum of exp(score - maximum).
    """
    g, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    token = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if index is not None:
        oldest = tl.load(index + b * i_strides[0] + g * i_strides[1] + token, mask=token < N, other=stop).to(tl.int32)
    else:
        oldest = offset + token * SPAN
    seen = (token < N) & (oldest < stop)
    if first is not None:
        seen = seen & (oldest + SPAN - 1 >= tl.load(first + b).to(tl.int32))
    if column is not None:
        seen = seen & (oldest <= tl.load(column).to(tl.int32) - (1 if EXCLUDE_SELF else 0))
    channel = tl.arange(0, BLOCK_D)
    is_channel = channel < DIM
    in_group = tl.arange(0, BLOCK_H)
    head, is_head = g * HEADS + in_group, in_group < HEADS
    at = keys + b * k_strides[0] + token.to(tl.int64)[:, None] * k_strides[1] + g * k_strides[2] + channel[None, :]
    tile = tl.load(at, mask=seen[:, None] & is_channel[None, :], other=0.0)
    q = _query(query, q_strides, b, head, is_head, channel, is_channel)
    value = tl.dot(tile.to(q.dtype), tl.trans(q), input_precision="tf32x3") * log2_scale
    _emit(scores, score_strides, value, b, head, is_head, token, seen, N, ADD)
    if largest is not None:
        value = tl.where(seen[:, None], value, float("-inf"))
        most = tl.maximum(tl.max(value, 0), -1e30)
        of_tile = (b * G * HEADS + head) * tl.num_programs(1) + tl.program_id(1)
        tl.store(largest + of_tile, most, mask=is_head)
        tl.store(sums + of_tile, tl.sum(tl.exp(value - most[None, :]), 0), mask=is_head)


@jit
def weigh(
    scores,
    values,
    index,
    first,
    partial,
    log_sums,
    score_strides,
    v_strides,
    N,
    S,
    i_strides,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SCORED_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Σ_t p_t v_t over a split of the tokens, for a block of the HEADS query heads of one of G heads of `values`.

    `values` is (B, S, G, WIDTH) by its strides. Token t reads row `index[b, g, t]`, or row t if `index` is None. Rows
    before `first` (B,) are not read, unless that is None. With SCORED_ROWS those of tokens that no head sees are not
    read either, because they are undefined; such loads wait for the scores, which is slower.
    The outputs are `partial` (B, H, splits, WIDTH) fp32 and `log_sums` (B, H, splits) fp32, to base 2.
    """
    H_BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    pid = tl.program_id(2)
    b, g = (pid // (H_BLOCKS * G)).to(tl.int64), pid // H_BLOCKS % G
    in_group = pid % H_BLOCKS * BLOCK_H + tl.arange(0, BLOCK_H)
    head, is_head = g * HEADS + in_group, in_group < HEADS
    channel = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    is_channel = channel < WIDTH
    share = tl.cdiv(tl.cdiv(N, BLOCK_N), tl.num_programs(0)) * BLOCK_N
    begin = tl.program_id(0) * share
    stop = tl.minimum(begin + share, N)
    low = 0
    if first is not None:
        low = tl.load(first + b)

    source = scores + b * score_strides[0] + head[:, None] * score_strides[1]
    base = values + b * v_strides[0] + g * v_strides[2]
    sums = tl.zeros((BLOCK_H, BLOCK_W), dtype=tl.float32)
    largest = tl.full((BLOCK_H,), -1e30, dtype=tl.float32)
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)
    for start in tl.range(begin, stop, BLOCK_N, num_stages=STAGES):
        token = start + tl.arange(0, BLOCK_N)
        inside = token < stop
        score = tl.load(source + token[None, :], mask=is_head[:, None] & inside[None, :], other=float("-inf"))
        row = token
        if index is not None:
            row = tl.load(index + b * i_strides[0] + g * i_strides[1] + token, mask=inside, other=0)
        is_row = inside & (row >= low) & (row < S)
        if SCORED_ROWS:
            is_row &= tl.max(score, axis=0) > float("-inf")
        at = base + row.to(tl.int64)[:, None] * v_strides[1] + channel[None, :]
        tile = tl.load(at, mask=is_row[:, None] & is_channel[None, :], other=0.0)
        larger = tl.maximum(largest, tl.max(score, axis=1))
        weights = tl.exp2(score - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(weights, axis=1)
        largest = larger
        sums = tl.dot(weights.to(tile.dtype), tile, acc=sums * shrink[:, None], input_precision="tf32x3")

    at = (b * G * HEADS + head) * tl.num_programs(0) + tl.program_id(0)
    if tl.program_id(1) == 0:
        tl.store(log_sums + at, tl.where(total == 0, float("-inf"), largest + tl.log2(total)), mask=is_head)
    mask = (is_head & (total > 0))[:, None] & is_channel[None, :]
    tl.store(partial + at[:, None] * WIDTH + channel[None, :], sums / total[:, None], mask=mask)


@jit
def finish(
    mixed,
    log_sum,
    b,
    tail,
    tail_log_sum,
    out,
    b_strides,
    out_strides,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The output of one query head: B times the weighted sum of rows of A, plus the weighted sum of exact values; 0 if
    nothing was seen.

    `mixed` is (B, H, RANK), `tail` (B, H, D), their log-sum-exps (B, H), `b` (B, G · D, RANK), `out` (B, H, D). If `b`
    is None, `mixed` is (B, H, D), the weighted sum of values that are not in factors.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // (G * HEADS), row % (G * HEADS)
    low, exact = tl.load(log_sum + row), tl.load(tail_log_sum + row)
    top = tl.maximum(tl.maximum(low, exact), -1e30)
    low, exact = tl.exp2(low - top), tl.exp2(exact - top)

    channel = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_channel = channel < DIM
    if b is None:
        summed = tl.load(mixed + row * DIM + channel, mask=is_channel, other=0.0)
    else:
        rows = b + batch * b_strides[0] + (head // HEADS * DIM + channel)[:, None] * b_strides[1]
        summed = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for start in range(0, RANK, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            tile = tl.load(rows + r[None, :], mask=is_channel[:, None] & (r < RANK)[None, :], other=0.0)
            weight = tl.load(mixed + row * RANK + r, mask=r < RANK, other=0.0)
            summed += tl.sum(tile.to(tl.float32) * weight[None, :], axis=1)
    exact_sum = tl.load(tail + row * DIM + channel, mask=is_channel, other=0.0)
    summed = tl.where(low > 0, low * summed, 0.0) + tl.where(exact > 0, exact * exact_sum, 0.0)  # empty sums may be NaN
    total = low + exact
    at = out + batch * out_strides[0] + head * out_strides[1] + channel
    tl.store(at, (summed / tl.where(total == 0, 1.0, total)).to(out.dtype.element_ty), mask=is_channel)
