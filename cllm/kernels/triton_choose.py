# mypy: disable-error-code="import-not-found,import-untyped,assignment"
"""The choice of chunks for a decoding step in Triton: kernels that `split_lowrank` launches.

    choose          the chunks whose landmarks have the best scores, by one program for each KV head

    order_chunks    the same by many programs: one integer for each chunk, in the order of its best log-probability
                    from any query head
    take_chunks     and the tokens of the chunks with the largest integers

Shapes: B batch, H query heads, G KV heads.
"""

from __future__ import annotations

from cllm.kernels.triton_decode import MISSING, jit

if MISSING is None:
    import triton.language as tl


@jit
def choose(
    landmark_scores,
    outliers,
    out,
    m_strides,
    o_strides,
    out_strides,
    CHUNKS,
    HEADS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    COUNT: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Tokens of the chunks that one KV head reads: the outliers, then the COUNT other chunks of largest probability
    from any of its query heads, in ascending order. Among equal chunks, the first are taken.

    `landmark_scores` is (B, H, CHUNKS) fp32, `outliers` (B, G, OUTLIERS) int64 and `out` (B, G, (OUTLIERS + COUNT) ·
    SPAN) int64. The scores of the first query head are overwritten: there, outliers are removed by their indices.

    A log-probability is never positive, so that its bits, read as an integer, have its order. The COUNT-th largest is
    found two bits at a time; the three counts of each step are summed in one word. Most of the time is waiting, for
    memory and for other warps in sums over all chunks. So TOGETHER heads are read at once, and the two cumulative sums,
    of larger and of equal chunks, are halves of one word.
    """
    group, b = tl.program_id(0), tl.program_id(1)
    chunk = tl.arange(0, BLOCK)
    is_chunk = chunk < CHUNKS
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, HEADS, TOGETHER):
        head = start + tl.arange(0, TOGETHER)
        at = landmark_scores + b * m_strides[0] + (group * HEADS + head)[:, None] * m_strides[1] + chunk[None, :]
        score = tl.load(at, mask=(head < HEADS)[:, None] & is_chunk[None, :], other=float("-inf"))
        most = tl.maximum(tl.max(score, 1), -1e30)
        total = tl.maximum(tl.sum(tl.exp(score - most[:, None]), 1), 1e-30)
        best = tl.maximum(best, tl.max(score - (most + tl.log(total))[:, None], 0))
    magnitude = tl.minimum(best, 0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    order = tl.where(is_chunk, 0x7FFFFFFF - magnitude, -1)
    always = outliers + b * o_strides[0] + group * o_strides[1]
    m = tl.arange(0, BLOCK_M)
    first = tl.load(always + m, mask=m < OUTLIERS, other=0)
    row = landmark_scores + b * m_strides[0] + group * HEADS * m_strides[1]
    tl.debug_barrier()
    tl.store(row + chunk, order.to(tl.float32, bitcast=True), mask=is_chunk)
    tl.debug_barrier()
    none = tl.full((BLOCK_M,), -1, tl.int32)
    tl.store(row + first, none.to(tl.float32, bitcast=True), mask=m < OUTLIERS)
    tl.debug_barrier()
    order = tl.load(row + chunk, mask=is_chunk, other=0.0, volatile=True).to(tl.int32, bitcast=True)
    order = tl.where(is_chunk, order, -1)
    least = tl.where(tl.sum((order >= 1 << 30).to(tl.int32), 0) >= COUNT, 1 << 30, 0)
    for step in range(15):
        bit = 28 - 2 * step
        one, two, three = least | (1 << bit), least | (2 << bit), least | (3 << bit)
        counts = (order >= one).to(tl.int64)
        counts += ((order >= two).to(tl.int64) << 20) + ((order >= three).to(tl.int64) << 40)
        summed = tl.sum(counts, 0)
        least = tl.where((summed & 0xFFFFF) >= COUNT, one, least)
        least = tl.where(((summed >> 20) & 0xFFFFF) >= COUNT, two, least)
        least = tl.where((summed >> 40) >= COUNT, three, least)
    larger, equal = order > least, order == least
    sums = tl.cumsum(larger.to(tl.uint32) + (equal.to(tl.uint32) << 16), 0)
    so_far, equal_so_far = (sums & 0xFFFF).to(tl.int32), (sums >> 16).to(tl.int32)
    room = COUNT - tl.max(so_far, 0)
    taken = larger | (equal & (equal_so_far <= room))
    position = OUTLIERS + so_far + tl.minimum(equal_so_far, room) - 1
    to = out + b * out_strides[0] + group * out_strides[1]
    for j in range(SPAN):
        tl.store(to + position * SPAN + j, (chunk * SPAN + j).to(tl.int64), mask=taken)
    for j in range(SPAN):
        tl.store(to + m * SPAN + j, first * SPAN + j, mask=m < OUTLIERS)


@jit
def order_chunks(
    landmark_scores,
    largest,
    sums,
    outliers,
    order,
    m_strides,
    o_strides,
    order_strides,
    CHUNKS,
    TILES,
    HEADS: tl.constexpr,
    OUTLIERS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Write `order` (B, G, CHUNKS) int32 of BLOCK chunks of one KV head: larger for more probable chunks, 0 or more,
    and -1 for outliers.

    `landmark_scores` is (B, H, CHUNKS) fp32, `outliers` (B, G, OUTLIERS) int64. `largest` and `sums` (B, H, TILES) fp32
    are the maximum of the scores of a tile, and the sum of exp(score - maximum): together they give the log-sum-exp of
    all scores of a head without reading these. A log-probability is never positive, so that its bits, read as an
    integer, have its order. TOGETHER query heads are read at once.
    """
    group, b = tl.program_id(1), tl.program_id(2)
    begin = tl.program_id(0) * BLOCK
    chunk, tile = begin + tl.arange(0, BLOCK), tl.arange(0, BLOCK_T)
    is_chunk = chunk < CHUNKS
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, HEADS, TOGETHER):
        head = start + tl.arange(0, TOGETHER)
        is_head = (head < HEADS)[:, None]
        of_tile = ((b * tl.num_programs(1) + group) * HEADS + head)[:, None] * TILES + tile[None, :]
        is_tile = is_head & (tile < TILES)[None, :]
        at = landmark_scores + b * m_strides[0] + (group * HEADS + head)[:, None] * m_strides[1] + chunk[None, :]
        score = tl.load(at, mask=is_head & is_chunk[None, :], other=float("-inf"))
        high = tl.load(largest + of_tile, mask=is_tile, other=-1e30)
        part = tl.load(sums + of_tile, mask=is_tile, other=0.0)
        most = tl.max(high, 1)
        total = tl.maximum(tl.sum(part * tl.exp(high - most[:, None]), 1), 1e-30)
        best = tl.maximum(best, tl.max(score - (most + tl.log(total))[:, None], 0))
    magnitude = tl.minimum(best, 0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    row = order + b * order_strides[0] + group * order_strides[1]
    tl.store(row + chunk, 0x7FFFFFFE - tl.minimum(magnitude, 0x7FFFFFFE), mask=is_chunk)
    tl.debug_barrier()  # outliers are overwritten by their indices
    m = tl.arange(0, BLOCK_M)
    first = tl.load(outliers + b * o_strides[0] + group * o_strides[1] + m, mask=m < OUTLIERS, other=-1)
    tl.store(row + first, tl.full((BLOCK_M,), -1, tl.int32), mask=(first >= begin) & (first < begin + BLOCK))


@jit
def take_chunks(
    order,
    outliers,
    out,
    order_strides,
    o_strides,
    out_strides,
    CHUNKS,
    OUTLIERS: tl.constexpr,
    COUNT: tl.constexpr,
    SPAN: tl.constexpr,
    ALL: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Tokens of the chunks that one KV head reads: the outliers, then the COUNT chunks with the largest `order`, in
    ascending order. Among equal chunks, the first are taken.

    `order` is (B, G, CHUNKS) int32 with at least COUNT entries that are not negative, ALL a power of two that is not
    below CHUNKS and at most 2^15, `out` (B, G, (OUTLIERS + COUNT) · SPAN) int64.

    Every program finds the bound between taken and other chunks by itself, which costs less than another launch, and
    writes the tokens of BLOCK chunks. The bound lies in an interval that each step cuts to a third: the counts of its
    two inner points are halves of one word, because most of a step is waiting for other warps in a sum over all chunks.
    The search ends when exactly COUNT chunks are above its lower end, usually after half of the steps.
    """
    group, b = tl.program_id(1), tl.program_id(2)
    begin = tl.program_id(0) * BLOCK
    row = order + b * order_strides[0] + group * order_strides[1]
    chunk = tl.arange(0, ALL)
    key = tl.load(row + chunk, mask=chunk < CHUNKS, other=-1)
    own = begin + tl.arange(0, BLOCK)
    own_key = tl.load(row + own, mask=own < CHUNKS, other=-1)

    high = tl.max(key, 0) + 1
    low = tl.min(tl.where(key < 0, high - 1, key), 0)
    kept = tl.sum((key >= low).to(tl.int32), 0)  # entries that are `low` or more: never fewer than COUNT
    above = kept * 0  # entries that are `high` or more: always fewer
    while (high - low > 1) & (kept > COUNT):
        third = tl.maximum((high - low) // 3, 1)
        one, two = low + third, high - third
        counts = tl.sum((key >= one).to(tl.uint32) + ((key >= two).to(tl.uint32) << 16), 0)
        at_one, at_two = (counts & 0xFFFF).to(tl.int32), (counts >> 16).to(tl.int32)
        above = tl.where(at_one < COUNT, at_one, tl.where(at_two < COUNT, at_two, above))
        high = tl.where(at_one < COUNT, one, tl.where(at_two < COUNT, two, high))
        kept = tl.where(at_two >= COUNT, at_two, tl.where(at_one >= COUNT, at_one, kept))
        low = tl.where(at_two >= COUNT, two, tl.where(at_one >= COUNT, one, low))
    # All from `bound` on are taken, and the first `room` of those in [low, bound), which are equal.
    bound = tl.where(kept == COUNT, low, high)
    room = tl.where(kept == COUNT, 0, COUNT - above)

    sure = (key >= bound) & (chunk < begin)
    equal = (key >= low) & (key < bound) & (chunk < begin)
    before = tl.sum(sure.to(tl.uint32) + (equal.to(tl.uint32) << 16), 0)
    sure, equal = own_key >= bound, (own_key >= low) & (own_key < bound)
    so_far = before + tl.cumsum(sure.to(tl.uint32) + (equal.to(tl.uint32) << 16), 0)
    sure_so_far, equal_so_far = (so_far & 0xFFFF).to(tl.int32), (so_far >> 16).to(tl.int32)
    taken = sure | (equal & (equal_so_far <= room))
    position = OUTLIERS + sure_so_far + tl.minimum(equal_so_far, room) - 1
    to = out + b * out_strides[0] + group * out_strides[1]
    for j in range(SPAN):
        tl.store(to + position * SPAN + j, (own * SPAN + j).to(tl.int64), mask=taken)
    m = tl.arange(0, BLOCK_M)
    is_first = (m < OUTLIERS) & (begin == 0)
    first = tl.load(outliers + b * o_strides[0] + group * o_strides[1] + m, mask=is_first, other=0)
    for j in range(SPAN):
        tl.store(to + m * SPAN + j, first * SPAN + j, mask=is_first)
