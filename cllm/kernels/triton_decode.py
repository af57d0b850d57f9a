# mypy: disable-error-code="import-not-found,import-untyped,assignment,var-annotated"
# ruff: noqa: RUF005 - the kernels' language adds tuples and does not unpack them
"""Split-KV flash decoding in Triton: the kernels that `cllm.kernels.split_decode` launches.

There are two kernels. The first runs several programs, the *splits*, for every (sequence, KV head, block of query
heads). Each split loops over an equal share of the columns that the new token sees, and writes a partial output and the
log-sum-exp of its scores. The second kernel merges the splits. Programs loop over columns, and column c is entry
c mod S. So only visible entries are read, with any window, any padding and any state of the ring.

Tiles have power-of-two widths. Other head dimensions are cut into two *chunks*, 576 = 512 + 64. Scores are added over
chunks as over key parts, and every chunk of a value part is a separate output.

Keys that are stored before RoPE are rotated here (`split_dot`), so that they are read once, also as values.

Shapes: B batch, S entries, H query heads, G KV heads, D and E channels of a key and value part, N columns of a tile, P
rotated pairs.
"""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl

    MISSING = None
    TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    jit = triton.jit
except ImportError as error:
    triton = tl = None
    MISSING = str(error)
    TYPES = {}

    def jit(function):
        """Without Triton the kernels below are plain functions, and never called."""
        return function


def device_obstacle(x: torch.Tensor) -> str | None:
    """The reason why no Triton kernel runs where `x` is, or None."""
    if MISSING is not None:
        return f"triton cannot be imported: {MISSING}"
    if not x.is_cuda and not (INTERPRETED and x.device.type == "cpu"):
        return f"the tensors are on {'the CPU' if x.device.type == 'cpu' else x.device.type}"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "needs compute capability 8.0 or newer"
    return None


@jit
def _share(column, first, b, window, EXCLUDE_SELF: tl.constexpr, BLOCK_N: tl.constexpr):
    """The columns [begin, stop) of this program: its share of the columns that row b sees."""
    end = tl.load(column).to(tl.int32) + (0 if EXCLUDE_SELF else 1)
    low = tl.maximum(tl.load(column).to(tl.int32) - window + 1, 0)
    if first is not None:
        low = tl.maximum(low, tl.load(first + b).to(tl.int32))
    tiles = tl.cdiv(tl.maximum(end - low, 0), BLOCK_N)
    share = tl.cdiv(tiles, tl.num_programs(1)) * BLOCK_N
    begin = low + tl.program_id(1) * share
    return begin, tl.minimum(begin + share, end)


@jit
def _entries(start, stop, S, BLOCK_N: tl.constexpr):
    """Entries (N,) int64 of the columns from `start` on, and whether each column is before `stop`."""
    offset = tl.arange(0, BLOCK_N)
    entry = start % S + offset
    entry = tl.where(entry >= S, entry - S, entry)
    return entry.to(tl.int64), start + offset < stop


@jit
def _tile(chunk, b, g, entry, seen, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows (N, BLOCK) of a chunk, zero for entries not seen. Offsets are int64: caches can exceed 2^31 elements."""
    data, strides, _, _ = chunk
    channel = tl.arange(0, BLOCK)
    mask = seen[:, None]
    if WIDTH < BLOCK:
        mask = mask & (channel < WIDTH)[None, :]
    base = data + b.to(tl.int64) * strides[0] + g.to(tl.int64) * strides[2]
    return tl.load(base + entry[:, None] * strides[1] + channel[None, :], mask=mask, other=0.0)


@jit
def _scaled(x, chunk, b, g, entry, seen, SCALED: tl.constexpr):
    """x (..., N) times the chunk's scale of each token, if it has one."""
    if SCALED:
        _, _, scale, strides = chunk
        at = scale + b.to(tl.int64) * strides[0] + g.to(tl.int64) * strides[2] + entry * strides[1]
        x = x * tl.load(at, mask=seen, other=0.0).to(tl.float32)
    return x


@jit
def _zeros(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros((ROWS, COLUMNS), dtype=tl.float32)


@jit
def _turns(table, strides, b, entry, seen, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows (N, BLOCK) fp32 of a table of cos or sin (B, S, P), zero for entries not seen."""
    pair = tl.arange(0, BLOCK)
    at = table + b.to(tl.int64) * strides[0] + entry[:, None] * strides[1] + pair[None, :]
    return tl.load(at, mask=seen[:, None] & (pair < PAIRS)[None, :], other=0.0)


@jit
def _turn(table, strides, b, entry, PAIRS: tl.constexpr, BLOCK: tl.constexpr):
    """The row (BLOCK,) fp32 of one entry."""
    pair = tl.arange(0, BLOCK)
    at = table + b.to(tl.int64) * strides[0] + entry.to(tl.int64) * strides[1] + pair
    return tl.load(at, mask=pair < PAIRS, other=1.0)


@jit
def _turned_scores(queries, keys, cos, sin, back_cos, back_sin, tile_cos, tile_sin, TYPE: tl.constexpr):
    """Scores (H, N) of pairs of channels: keys turned by the angles of the first tile, queries back by the rest.

    `queries` and `keys` are the first and the second channels of the pairs; the others are described in `split_dot`.
    """
    turn_cos = (cos * back_cos + sin * back_sin)[None, :]
    turn_sin = (sin * back_cos - cos * back_sin)[None, :]
    q_low = queries[0].to(tl.float32)
    q_high = queries[1].to(tl.float32)
    k_low = keys[0].to(tl.float32)
    k_high = keys[1].to(tl.float32)
    turned_low = (q_low * turn_cos + q_high * turn_sin).to(TYPE)
    turned_high = (q_high * turn_cos - q_low * turn_sin).to(TYPE)
    key_low = (k_low * tile_cos - k_high * tile_sin).to(TYPE)
    key_high = (k_high * tile_cos + k_low * tile_sin).to(TYPE)
    scores = tl.dot(turned_low, tl.trans(key_low), input_precision="tf32x3")
    return tl.dot(turned_high, tl.trans(key_high), acc=scores, input_precision="tf32x3")


@jit
def split_dot(
    queries,
    keys,
    values,
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
    WIDTHS: tl.constexpr,
    BLOCKS: tl.constexpr,
    K_SCALED: tl.constexpr,
    K_TYPES: tl.constexpr,
    TURN_OF: tl.constexpr,
    TURN_STARTS: tl.constexpr,
    TURN_WIDTHS: tl.constexpr,
    TURN_BLOCKS: tl.constexpr,
    OUT_WIDTHS: tl.constexpr,
    OUT_BLOCKS: tl.constexpr,
    OUT_STARTS: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    V_TYPES: tl.constexpr,
    V_FROM: tl.constexpr,
    V_SCALED: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One split for a block of the HEADS query heads of one KV head, with matrix products.

    Tuples have one item for each chunk. An item of `queries` is a pointer and strides (B, H). An item of `keys` or
    `values` is a pointer and strides (B, S, G), and the same for its scales, which are read only with K_SCALED or
    V_SCALED. V_FROM is the index of the key chunk with the same data as a value chunk, or -1.
    `partial` is (B, H, splits, OUT_WIDTH) fp32, `log_sums` (B, H, splits) fp32, to base 2.

    Keys that are stored before RoPE are pairs of chunks, the first and the second channels of RoPE's pairs. For the
    second, TURN_OF is the index of its pairs in the other tuples of that name; it is -2 for the first, and -1 for other
    chunks. `cos` and `sin` (B, S, P), with `turn_strides` of B and S, are those of each entry; or None. Keys of every
    tile are turned by the angles of the first tile, which stay in registers, and queries back by the angle between the
    two tiles: scores depend on the difference alone.
    """
    H_BLOCKS: tl.constexpr = (HEADS + BLOCK_H - 1) // BLOCK_H
    pid = tl.program_id(0)
    b, g = pid // (H_BLOCKS * G), pid // H_BLOCKS % G
    in_group = pid % H_BLOCKS * BLOCK_H + tl.arange(0, BLOCK_H)
    head, is_head = g * HEADS + in_group, in_group < HEADS
    begin, stop = _share(column, first, b, window, EXCLUDE_SELF, BLOCK_N)

    rows = ()
    for i in tl.static_range(len(queries)):
        query, strides = queries[i]
        channel = tl.arange(0, BLOCKS[i])
        at = query + b.to(tl.int64) * strides[0] + head[:, None] * strides[1] + channel[None, :]
        row = tl.load(at, mask=is_head[:, None] & (channel < WIDTHS[i])[None, :], other=0.0)
        rows = rows + (row.to(K_TYPES[i]),)
    sums = ()
    for i in tl.static_range(len(OUT_BLOCKS)):
        sums = sums + (_zeros(BLOCK_H, OUT_BLOCKS[i]),)
    largest = tl.full((BLOCK_H,), -1e30, dtype=tl.float32)
    total = tl.zeros((BLOCK_H,), dtype=tl.float32)

    tile_cos = ()
    tile_sin = ()
    back_cos = ()
    back_sin = ()
    for i in tl.static_range(len(TURN_STARTS)):
        entry, seen = _entries(begin, stop, S, BLOCK_N)
        tile_cos = tile_cos + (
            _turns(cos + TURN_STARTS[i], turn_strides, b, entry, seen, TURN_WIDTHS[i], TURN_BLOCKS[i]),
        )
        tile_sin = tile_sin + (
            _turns(sin + TURN_STARTS[i], turn_strides, b, entry, seen, TURN_WIDTHS[i], TURN_BLOCKS[i]),
        )
        first_cos = _turn(cos + TURN_STARTS[i], turn_strides, b, begin % S, TURN_WIDTHS[i], TURN_BLOCKS[i])
        first_sin = _turn(sin + TURN_STARTS[i], turn_strides, b, begin % S, TURN_WIDTHS[i], TURN_BLOCKS[i])
        square = first_cos * first_cos + first_sin * first_sin  # of the factor on cos and sin
        back_cos = back_cos + (first_cos / square,)
        back_sin = back_sin + (first_sin / square,)

    for start in tl.range(begin, stop, BLOCK_N, num_stages=STAGES):
        entry, seen = _entries(start, stop, S, BLOCK_N)
        scores = tl.zeros((BLOCK_H, BLOCK_N), dtype=tl.float32)
        tiles = ()
        for i in tl.static_range(len(keys)):
            tile = _tile(keys[i], b, g, entry, seen, WIDTHS[i], BLOCKS[i])
            tiles = tiles + (tile,)
            if TURN_OF[i] == -1:
                part = tl.dot(rows[i], tl.trans(tile.to(K_TYPES[i])), input_precision="tf32x3")
                scores += _scaled(part, keys[i], b, g, entry, seen, K_SCALED[i])
            if TURN_OF[i] >= 0:
                part = _turned_scores(
                    (rows[i - 1], rows[i]),
                    (tiles[i - 1], tile),
                    _turn(
                        cos + TURN_STARTS[TURN_OF[i]], turn_strides, b, start % S, TURN_WIDTHS[TURN_OF[i]], BLOCKS[i]
                    ),
                    _turn(
                        sin + TURN_STARTS[TURN_OF[i]], turn_strides, b, start % S, TURN_WIDTHS[TURN_OF[i]], BLOCKS[i]
                    ),
                    back_cos[TURN_OF[i]],
                    back_sin[TURN_OF[i]],
                    tile_cos[TURN_OF[i]],
                    tile_sin[TURN_OF[i]],
                    K_TYPES[i],
                )
                scores += _scaled(part, keys[i], b, g, entry, seen, K_SCALED[i])
        scores = tl.where(seen[None, :], scores * log2_scale, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(weights, axis=1)
        largest = larger
        added = ()
        for i in tl.static_range(len(OUT_BLOCKS)):
            if V_FROM[i] >= 0:
                tile = tiles[V_FROM[i]]
            else:
                tile = _tile(values[i], b, g, entry, seen, OUT_WIDTHS[i], OUT_BLOCKS[i])
            scaled = _scaled(weights, values[i], b, g, entry, seen, V_SCALED[i])
            part = sums[i] * shrink[:, None]
            added = added + (tl.dot(scaled.to(V_TYPES[i]), tile.to(V_TYPES[i]), acc=part, input_precision="tf32x3"),)
        sums = added

    row = (b * G * HEADS + head).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(log_sums + row, tl.where(total == 0, float("-inf"), largest + tl.log2(total)), mask=is_head)
    for i in tl.static_range(len(OUT_BLOCKS)):
        channel = tl.arange(0, OUT_BLOCKS[i])
        at = partial + row[:, None] * OUT_WIDTH + OUT_STARTS[i] + channel[None, :]
        mask = (is_head & (begin < stop))[:, None] & (channel < OUT_WIDTHS[i])[None, :]
        tl.store(at, sums[i] / total[:, None], mask=mask)


@jit
def split_elementwise(
    queries,
    keys,
    values,
    column,
    first,
    partial,
    log_sums,
    S,
    window,
    log2_scale,
    G: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCKS: tl.constexpr,
    K_SCALED: tl.constexpr,
    OUT_WIDTHS: tl.constexpr,
    OUT_BLOCKS: tl.constexpr,
    OUT_STARTS: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    V_FROM: tl.constexpr,
    V_SCALED: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One split for the only query head of a KV head, in fp32 without matrix products; arguments as for `split_dot`.

    Every row of the tile has a separate softmax. They are merged after the last tile, so that the loop needs no
    reduction over rows.
    """
    pid = tl.program_id(0)
    b, g = pid // G, pid % G
    begin, stop = _share(column, first, b, window, EXCLUDE_SELF, BLOCK_N)

    rows = ()
    for i in tl.static_range(len(queries)):
        query, strides = queries[i]
        channel = tl.arange(0, BLOCKS[i])
        at = query + b.to(tl.int64) * strides[0] + g * strides[1] + channel
        rows = rows + (tl.load(at, mask=channel < WIDTHS[i], other=0.0).to(tl.float32),)
    sums = ()
    for i in tl.static_range(len(OUT_BLOCKS)):
        sums = sums + (_zeros(BLOCK_N, OUT_BLOCKS[i]),)
    largest = tl.full((BLOCK_N,), -1e30, dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)

    for start in tl.range(begin, stop, BLOCK_N, num_stages=STAGES):
        entry, seen = _entries(start, stop, S, BLOCK_N)
        scores = tl.zeros((BLOCK_N,), dtype=tl.float32)
        tiles = ()
        for i in tl.static_range(len(keys)):
            tile = _tile(keys[i], b, g, entry, seen, WIDTHS[i], BLOCKS[i])
            tiles = tiles + (tile,)
            part = tl.sum(rows[i][None, :] * tile.to(tl.float32), axis=1)
            scores += _scaled(part, keys[i], b, g, entry, seen, K_SCALED[i])
        scores = tl.where(seen, scores * log2_scale, float("-inf"))
        larger = tl.maximum(largest, scores)
        weights = tl.exp2(scores - larger)
        shrink = tl.exp2(largest - larger)
        total = total * shrink + weights
        largest = larger
        added = ()
        for i in tl.static_range(len(OUT_BLOCKS)):
            if V_FROM[i] >= 0:
                tile = tiles[V_FROM[i]]
            else:
                tile = _tile(values[i], b, g, entry, seen, OUT_WIDTHS[i], OUT_BLOCKS[i])
            scaled = _scaled(weights, values[i], b, g, entry, seen, V_SCALED[i])
            added = added + (sums[i] * shrink[:, None] + scaled[:, None] * tile.to(tl.float32),)
        sums = added

    top = tl.max(largest, axis=0)
    weights = tl.exp2(largest - top)
    total_sum = tl.sum(total * weights, axis=0)
    row = pid.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(log_sums + row, tl.where(total_sum == 0, float("-inf"), top + tl.log2(total_sum)))
    for i in tl.static_range(len(OUT_BLOCKS)):
        channel = tl.arange(0, OUT_BLOCKS[i])
        mask = (channel < OUT_WIDTHS[i]) & (begin < stop)
        part = tl.sum(sums[i] * weights[:, None], axis=0) / total_sum
        tl.store(partial + row * OUT_WIDTH + OUT_STARTS[i] + channel, part, mask=mask)


@jit
def merge(
    partial,
    log_sums,
    out,
    log_sum_out,
    splits,
    OUT_WIDTH: tl.constexpr,
    ALL: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[row] = Σ_s 2^l_s partial[row, s] / Σ_s 2^l_s, or 0 if every split is empty. `partial` of an empty split is
    uninitialised. log_sum_out[row] = log2 Σ_s 2^l_s, unless it is None.

    ALL is the power of two from `splits` on. The number of splits itself is no constant: it grows with a cache that
    grows, and every other constant is another kernel to compile.
    """
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, ALL)
    every = tl.load(log_sums + row * splits + index, mask=index < splits, other=float("-inf"))
    top = tl.maximum(tl.max(every, axis=0), -1e30)
    total = tl.sum(tl.exp2(every - top), axis=0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    summed = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, splits, CHUNK):
        split = start + tl.arange(0, CHUNK)
        log_sum = tl.load(log_sums + row * splits + split, mask=split < splits, other=float("-inf"))
        mask = (log_sum != float("-inf"))[:, None] & (channel < OUT_WIDTH)[None, :]
        at = partial + (row * splits + split)[:, None] * OUT_WIDTH + channel[None, :]
        summed += tl.sum(tl.exp2(log_sum - top)[:, None] * tl.load(at, mask=mask, other=0.0), axis=0)
    summed = summed / tl.where(total == 0, 1.0, total)
    tl.store(out + row * OUT_WIDTH + channel, summed.to(out.dtype.element_ty), mask=channel < OUT_WIDTH)
    if log_sum_out is not None:
        log_sum_of_row = tl.where(total == 0, float("-inf"), top + tl.log2(total))
        tl.store(log_sum_out + row, log_sum_of_row, mask=tl.program_id(1) == 0)


INTERPRETED = MISSING is None and not isinstance(merge, triton.JITFunction)
"""Whether TRITON_INTERPRET=1 is set: then the kernels run on a CPU, in Triton's interpreter."""
