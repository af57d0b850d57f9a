# mypy: disable-error-code="import-not-found,import-untyped,assignment,var-annotated"
# ruff: noqa: RUF005 - the kernels' language adds tuples and does not unpack them
"""Split-KV decoding of tied slots in Triton, for few query heads a KV head.

Values are X; keys are RoPE(X), stored before RoPE.

Instead of the keys, the query is rotated back. Two channels of a pair are a complex number: of a key before RoPE, x; of
the query, q; and of the table of cos and sin at column t, e_t. The score of column t is

    Re(x_t e_t conj(q)) = Re(x_t conj(w_t)),   w_t = conj(e_t) q.

One thread has the same channels of a few rows, M columns apart. It computes w of its first row from the table, once a
tile, and of the second by a fixed rotation u = e_M / e_0, so that the table's row of a tile's first column is all that
is read of the table. The others follow by Chebyshev's recurrence, with half of a rotation's operations; its errors grow
with the square of the rows, which are few:

    w_{t+M} = conj(u) w_t,    w_{t+2M} = 2 Re(u) w_{t+M} - w_t

Nothing is exchanged between threads but the sums of scores over channels: there is no matrix product, whose operands
would have to be rounded and to change threads. X is read once, for scores and values.

Shapes: B batch, S entries, H query heads, G KV heads, D channels of a head, M rows of a part of a tile.
"""

from __future__ import annotations

from cllm.kernels.triton_decode import MISSING, _entries, _scaled, _share, _turn, _turns, _zeros, jit

if MISSING is None:
    import triton.language as tl


@jit
def _times_conjugate(x, y, cos, sin):
    """(x + iy) (cos - i sin)."""
    return x * cos + y * sin, y * cos - x * sin


@jit
def _wide(x, PACKED: tl.constexpr):
    """`x` in fp32. PACKED: bf16, of which two are in one register; Triton's cast takes a third instruction for them."""
    if PACKED:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], tl.float32, is_pure=True, pack=2
        )
    return x.to(tl.float32)


@jit
def _place(start, stop, S, PART: tl.constexpr, ROWS: tl.constexpr, LONG: tl.constexpr):
    """Entries (ROWS,) of one part of the tile from column `start` on, and whether each column is before `stop`."""
    row = PART * ROWS + tl.arange(0, ROWS)
    place = start % S + row
    place = tl.where(place >= S, place - S, place)
    if LONG:
        place = place.to(tl.int64)
    return place, start + row < stop


@jit
def _halves(
    x, stride, start, stop, S, HALF: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr, ROWS: tl.constexpr,
    LONG: tl.constexpr,
):  # fmt: skip
    """The first and the second channels (ROWS, BLOCK) of all pairs of one part of a tile; zero for entries not seen."""
    place, seen = _place(start, stop, S, PART, ROWS, LONG)
    channel = tl.arange(0, BLOCK)
    mask = seen[:, None]
    if HALF < BLOCK:
        mask = mask & (channel < HALF)[None, :]
    at = x + place[:, None] * stride + channel[None, :]
    return tl.load(at, mask=mask, other=0.0), tl.load(at + HALF, mask=mask, other=0.0)


@jit
def _load(
    x, stride, start, stop, S, HALF: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
    LONG: tl.constexpr,
):  # fmt: skip
    """All parts of a tile."""
    tile = ()
    for part in tl.static_range(PARTS):
        tile = tile + (_halves(x, stride, start, stop, S, HALF, BLOCK, part, ROWS, LONG),)
    return tile


@jit
def _far(cos, sin, strides, b, start, S, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """The table's row (1, BLOCK) of column `start`: cos and sin."""
    return (
        _turn(cos, strides, b, start % S, HALF, BLOCK)[None, :],
        _turn(sin, strides, b, start % S, HALF, BLOCK)[None, :],
    )


@jit
def _start(
    query, row_cos, row_sin, first_cos, first_sin, log2_scale, HALF: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The state of one query head before the first tile: query (ROWS, BLOCK) rotated for each row, sums, softmax."""
    channel = tl.arange(0, BLOCK)
    low = tl.load(query + channel, mask=channel < HALF, other=0.0).to(tl.float32)[None, :] * log2_scale
    high = tl.load(query + HALF + channel, mask=channel < HALF, other=0.0).to(tl.float32)[None, :] * log2_scale
    low, high = _times_conjugate(low, high, row_cos, row_sin)
    # Times first / square, because each tile multiplies by the conjugate of its first column's row.
    square = first_cos * first_cos + first_sin * first_sin
    low, high = _times_conjugate(low / square, high / square, first_cos, -first_sin)
    largest = tl.full((ROWS,), -1e30, dtype=tl.float32)
    return low, high, _zeros(ROWS, BLOCK), _zeros(ROWS, BLOCK), largest, tl.zeros((ROWS,), dtype=tl.float32)


@jit
def _attend(
    state, tile, turn, step, scales, b, g, start, stop, S, SCALED: tl.constexpr, LONG: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """The state of one query head after a tile. `turn` and `step` are cos and sin of the tile and from part to part."""
    q_low, q_high, sum_low, sum_high, largest, total = state
    step_cos, step_sin = step
    low, high = _times_conjugate(q_low, q_high, turn[0], turn[1])
    before_low, before_high = low, high
    scores = ()
    larger = largest
    for part in tl.static_range(PARTS):
        if part > 0:
            if part > 1:
                next_low = (2 * step_cos) * low - before_low
                next_high = (2 * step_cos) * high - before_high
            else:
                next_low, next_high = _times_conjugate(low, high, step_cos, step_sin)
            before_low, before_high = low, high
            low, high = next_low, next_high
        place, is_seen = _place(start, stop, S, part, ROWS, LONG)
        score = tl.sum(_wide(tile[part][0], PACKED) * low + _wide(tile[part][1], PACKED) * high, axis=1)
        score = _scaled(score, scales, b, g, place.to(tl.int64), is_seen, SCALED)
        score = tl.where(is_seen, score, float("-inf"))
        larger = tl.maximum(larger, score)
        scores = scores + (score,)
    shrink = tl.exp2(largest - larger)
    total = total * shrink
    sum_low = sum_low * shrink[:, None]
    sum_high = sum_high * shrink[:, None]
    for part in tl.static_range(PARTS):
        place, is_seen = _place(start, stop, S, part, ROWS, LONG)
        weight = tl.exp2(scores[part] - larger)
        total += weight
        weight = _scaled(weight, scales, b, g, place.to(tl.int64), is_seen, SCALED)[:, None]
        sum_low += weight * _wide(tile[part][0], PACKED)
        sum_high += weight * _wide(tile[part][1], PACKED)
    return q_low, q_high, sum_low, sum_high, larger, total


@jit
def _store(state, partial, log_sums, row, is_any, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Merge the rows of one query head, and write its split, number `row`."""
    _, _, sum_low, sum_high, largest, total = state
    channel = tl.arange(0, BLOCK)
    top = tl.max(largest, axis=0)
    shrink = tl.exp2(largest - top)
    total_sum = tl.sum(total * shrink, axis=0)
    tl.store(log_sums + row, tl.where(total_sum == 0, float("-inf"), top + tl.log2(total_sum)))
    at = partial + row * (2 * HALF) + channel
    mask = (channel < HALF) & is_any
    tl.store(at, tl.sum(sum_low * shrink[:, None], axis=0) / total_sum, mask=mask)
    tl.store(at + HALF, tl.sum(sum_high * shrink[:, None], axis=0) / total_sum, mask=mask)


@jit
def split_tied(
    query,
    query_strides,
    data,
    scale,
    cos,
    sin,
    turn_strides,
    column,
    first,
    partial,
    log_sums,
    S,
    window,
    log2_scale,
    G: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALED: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    LONG: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    PACKED: tl.constexpr,
):
    """One split of one KV head.

    `query` (B, H, D) has `query_strides` of B and H, and every KV head has HEADS query heads. `data` is a pointer and
    strides (B, S, G) of X (B, S, G, D), and `scale` the same of its scales (B, S, G), which are read only with SCALED.
    `cos` and `sin` (B, S, D / 2) fp32 have `turn_strides` of B and S. `partial` is (B, H, splits, D) fp32, `log_sums`
    (B, H, splits) fp32, to base 2.

    BLOCK is HALF = D / 2, padded to a power of two. A tile has PARTS parts of ROWS rows; the n-th rows of all parts
    share a separate softmax, and they are merged after the last tile, so that the loop needs no reduction over rows.
    LONG: offsets within a sequence can exceed 2^31 elements.
    """
    TILE: tl.constexpr = ROWS * PARTS
    pid = tl.program_id(0)
    b, g = pid // G, pid % G
    begin, stop = _share(column, first, b, window, EXCLUDE_SELF, TILE)
    x, strides = data
    scales = (x, strides, scale[0], scale[1])
    x += b.to(tl.int64) * strides[0] + g.to(tl.int64) * strides[2]
    entry, seen = _entries(begin, stop, S, ROWS)
    row_cos = _turns(cos, turn_strides, b, entry, seen, HALF, BLOCK)
    row_sin = _turns(sin, turn_strides, b, entry, seen, HALF, BLOCK)
    first_cos, first_sin = _far(cos, sin, turn_strides, b, begin, S, HALF, BLOCK)
    next_cos, next_sin = _far(cos, sin, turn_strides, b, begin + ROWS, S, HALF, BLOCK)
    square = first_cos * first_cos + first_sin * first_sin  # of the factor on cos and sin
    step_cos, step_sin = _times_conjugate(next_cos / square, next_sin / square, first_cos, first_sin)
    step = (step_cos + _zeros(ROWS, BLOCK), step_sin + _zeros(ROWS, BLOCK))
    states = ()
    for h in tl.static_range(HEADS):
        row_of_query = query + b.to(tl.int64) * query_strides[0] + (g * HEADS + h) * query_strides[1]
        state = _start(row_of_query, row_cos, row_sin, first_cos, first_sin, log2_scale, HALF, BLOCK, ROWS)
        states = states + (state,)

    for start in tl.range(begin, stop, TILE, num_stages=STAGES):
        tile = _load(x, strides[1], start, stop, S, HALF, BLOCK, PARTS, ROWS, LONG)
        turn = _far(cos, sin, turn_strides, b, start, S, HALF, BLOCK)
        after = ()
        for h in tl.static_range(HEADS):
            state = _attend(
                states[h], tile, turn, step, scales, b, g, start, stop, S, SCALED, LONG, ROWS, PARTS, PACKED
            )
            after = after + (state,)
        states = after

    for h in tl.static_range(HEADS):
        row = ((b * G + g) * HEADS + h).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        _store(states[h], partial, log_sums, row, begin < stop, HALF, BLOCK)
