# mypy: disable-error-code="import-not-found,import-untyped"
"""A Triton kernel for slow channels of low-rank keys: queries, rotated by some positions, times rows of B.

The score of the token at position p with row a of A is a · w(p), w(p) = Bᵀ RoPE(-p) q. For channel pairs that turn
slowly, w(p) can be interpolated between four positions of a stretch of tokens, which `gluon_lowrank.py` does.

Shapes: B batch, S compressed tokens, H query heads, G KV heads, D channels of a head, r rank.
"""

from __future__ import annotations

from cllm.kernels.triton_decode import jit, tl


@jit
def _back(cos, sin, zero_c, zero_s, low, row, channel, is_row, table_stride):
    """cos and sin of position row - low, from the table's row |row - low|; the table may begin at any position.

    Row -n of the table is row n, conjugate, times the square of row 0, `zero_c` + i `zero_s`.
    """
    base = row - low
    at = (tl.abs(base) * table_stride)[:, None] + channel[None, :]
    c, s = tl.load(cos + at, mask=is_row, other=1.0), tl.load(sin + at, mask=is_row, other=0.0)
    square = 1.0 / (zero_c * zero_c + zero_s * zero_s)
    back_c = ((zero_c * zero_c - zero_s * zero_s) * square)[None, :]
    back_s = (2 * zero_c * zero_s * square)[None, :]
    is_before = (base < 0)[:, None]
    return tl.where(is_before, c * back_c + s * back_s, c), tl.where(is_before, c * back_s - s * back_c, s)


@jit
def project_nodes(
    query, b, cos, sin, first, out, q_strides, b_strides, table_stride, stretches, rank,
    G: tl.constexpr, HEADS: tl.constexpr, ROOM: tl.constexpr, HALF: tl.constexpr, PACK: tl.constexpr,
    STRETCH: tl.constexpr, NODE_0: tl.constexpr, NODE_1: tl.constexpr, NODE_2: tl.constexpr, NODE_3: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Write `out` (B, G / PACK, stretches, PACK, 2, ROOM, 2, r): w of the slower half of the channel pairs at the four
    nodes of each stretch. The node is 2 i + j for the indices i and j around the query head. One program has BLOCK_M of
    the rows of a KV head."""
    SLOW: tl.constexpr = HALF // 2
    ROWS: tl.constexpr = 4 * ROOM
    g, sequence = tl.program_id(1) % G, tl.program_id(1) // G
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    stretch, row = m // ROWS, m % ROWS
    is_row = (stretch < stretches)[:, None]
    head, node = row // 2 % ROOM, row // (2 * ROOM) * 2 + row % 2
    offset = tl.where(node < 2, tl.where(node == 0, NODE_0, NODE_1), tl.where(node == 2, NODE_2, NODE_3))
    channel = SLOW + tl.arange(0, SLOW)
    low = 0
    if first is not None:
        low = tl.load(first + sequence).to(tl.int32)

    # The position of a node is that of the stretch's first token, plus the node's row without what row 0 has.
    zero_c, zero_s = tl.load(cos + channel), tl.load(sin + channel)
    begin_c, begin_s = _back(cos, sin, zero_c, zero_s, low, stretch * STRETCH, channel, is_row, table_stride)
    at = (offset * table_stride)[:, None] + channel[None, :]
    node_c, node_s = tl.load(cos + at), tl.load(sin + at)
    square = 1.0 / (zero_c * zero_c + zero_s * zero_s)
    zero_c, zero_s = (zero_c * square)[None, :], (zero_s * square)[None, :]
    node_c, node_s = node_c * zero_c + node_s * zero_s, node_s * zero_c - node_c * zero_s
    c, s = begin_c * node_c - begin_s * node_s, begin_s * node_c + begin_c * node_s

    q = query + sequence.to(tl.int64) * q_strides[0] + (g * HEADS + head)[:, None] * q_strides[1] + channel[None, :]
    is_head = (head < HEADS)[:, None]
    lower_q = tl.load(q, mask=is_head, other=0.0).to(tl.float32)
    upper_q = tl.load(q + HALF, mask=is_head, other=0.0).to(tl.float32)
    lower, upper = lower_q * c + upper_q * s, upper_q * c - lower_q * s
    dtype: tl.constexpr = b.dtype.element_ty
    # A query as two numbers of 16 bits: exact to about 16 bits.
    high_lower, high_upper = lower.to(dtype), upper.to(dtype)
    rest_lower, rest_upper = (
        (lower - high_lower.to(tl.float32)).to(dtype),
        (upper - high_upper.to(tl.float32)).to(dtype),
    )
    b += sequence.to(tl.int64) * b_strides[0] + g * 2 * HALF * b_strides[1]
    pack = (sequence * (G // PACK) + g // PACK).to(tl.int64) * stretches
    out += ((((pack + stretch) * PACK + g % PACK) * ROWS + row) * rank)[:, None]
    for begin in range(0, rank, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        is_rank = (r < rank)[None, :]
        rows = b + channel[:, None] * b_strides[1] + r[None, :]
        lower_b = tl.load(rows, mask=is_rank, other=0.0)
        upper_b = tl.load(rows + HALF * b_strides[1], mask=is_rank, other=0.0)
        w = tl.dot(high_lower, lower_b) + tl.dot(high_upper, upper_b)
        w += tl.dot(rest_lower, lower_b) + tl.dot(rest_upper, upper_b)
        tl.store(out + r[None, :], w.to(dtype), mask=is_row & is_rank)
