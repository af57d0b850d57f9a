"""How the Triton kernels of `triton_lowrank` are launched: what they support, tiles, splits, and the call itself.

Shapes: B batch, S compressed tokens, n tokens of a stretch, H query heads, G KV heads, D channels of a head, r rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.kernels import resident_lowrank, triton_decode, triton_lowrank
from cllm.kernels.decode import Visible
from cllm.kernels.selection import Factored, Selection, chosen_chunks, chosen_tokens
from cllm.kernels.split_decode import Limits, _limits, _power

MAX_DIM = 256
MAX_HEADS = 64
"""Query heads of one KV head."""
_QUERIES = 2**14
"""Bytes of shared memory for queries, and for what changes its layout."""
_MOST_CHUNKS = 2**15
"""What one program chooses from; more go through plain torch."""
_LOG2 = math.log2(math.e)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuild:
    """How keys are rebuilt."""

    block_n: int
    """Tokens of a tile."""
    block_r: int
    """Ranks of a tile."""
    pack: int
    """KV heads of one program: the tile of A is loaded once for them."""
    num_warps: int
    num_stages: int

    def shared(self, half: int, size: int) -> int:
        """Bytes of shared memory of tiles under way, `half` channels and `size` bytes a number."""
        return self.num_stages * (self.block_n + 2 * self.pack * half) * self.block_r * size


def _half(dim: int) -> int:
    """Channels of a tile that holds half of a head: a power of two, and what a matrix product takes at least."""
    return max(16, _power(dim // 2))


@functools.cache
def choose_rebuild(*, dim: int, groups: int, size: int, gathered: bool, limits: Limits) -> Rebuild:
    """Tiles by rule; nothing is tried at run time.

    Rebuilding is a matrix product of S x r by r x G · D, so its tile is that of one: 128 tokens by 256 channels in 8
    warps, two KV heads of 128, which halves how often A is read from the L2 cache. Tokens chosen by each KV head for
    itself are no common tile: then a program has one, and 64 tokens, so that 2048 of them fill the device. Numbers of
    4 bytes take half the tile, for their products take three passes. Fewer stages where shared memory is small. The
    two accumulators take at most half of the registers: turning and scoring need the rest.

    Args:
        dim: channels of a head.
        groups: KV heads.
        size: bytes of a number.
        gathered: whether each KV head has tokens of its own.
        limits: of the device.
    """
    half, wide = _half(dim), size > 2
    pack = 1
    while not gathered and not wide and groups % (2 * pack) == 0 and 2 * pack * half <= 128:
        pack *= 2
    block_n = 64 if gathered or wide or half > 64 else 128
    warps = 8 if block_n * pack * half >= 128 * 64 else 4
    stages, block_r = 3, 32 if wide else 64
    while True:
        found = Rebuild(block_n=block_n, block_r=block_r, pack=pack, num_warps=warps, num_stages=stages)
        if found.shared(half, size) <= limits.shared - _QUERIES or stages == 1:
            return found
        stages -= 1


def choose_splits(*, programs: int, tokens: int, block_n: int, gathered: bool, limits: Limits) -> int:
    """Programs that share the tokens of a stretch: two for each multiprocessor, or four where rows are gathered, for
    that is mostly waiting; no more than tiles; a power of two for a short stretch, which grows by a token each step and
    should not be compiled anew each time."""
    tiles = -(-tokens // block_n)
    wanted = max(1, min(tiles, (4 if gathered else 2) * limits.processors // programs, 128))
    return wanted if tiles >= 64 else 1 << (wanted.bit_length() - 1)


def unsupported(
    queries: Sequence[Tensor], keys: Sequence[Factored], values: Sequence[Factored], selection: Selection | None
) -> str | None:
    """Why the kernels do not compute this call, or None."""
    device = queries[0].device
    if triton_decode.MISSING is not None:
        return f"triton cannot be imported: {triton_decode.MISSING}"
    if device.type == "cpu" and not triton_decode.INTERPRETED:
        return "the tensors are on the CPU"
    if device.type not in ("cuda", "cpu"):
        return f"the tensors are on {device.type}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0 or newer"
    tensors = [*queries, *(t for part in (*keys, *values) for t in (part.a, part.b, part.tail))]
    if selection is not None:
        tensors += [selection.landmarks, selection.outlier_keys]
    for tensor in tensors:
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"has {str(tensor.dtype).removeprefix('torch.')}"
        if tensor.stride(-1) != 1:
            return "the channels of a tensor are not contiguous"
    for part in (*keys, *values):
        if part.a.dtype != part.b.dtype:
            return "factors of two dtypes"
    heads, dim = queries[0].shape[1] // keys[0].tail.shape[2], queries[0].shape[2]
    if dim % 2 or dim > MAX_DIM:
        return f"has heads of {dim} channels; at most {MAX_DIM}, and an even number"
    if heads > MAX_HEADS:
        return f"has {heads} query heads a KV head; at most {MAX_HEADS}"
    limits, size = _limits(device), keys[0].a.element_size()
    rebuild = choose_rebuild(
        dim=dim, groups=keys[0].tail.shape[2], size=size, gathered=selection is not None, limits=limits
    )
    if (needed := rebuild.shared(_half(dim), size)) > limits.shared - _QUERIES:
        return f"needs {needed} bytes of shared memory; the device has {limits.shared}"
    return None


class _Call:
    """The launches of one call; what they have in common are the queries' heads and which columns are seen."""

    def __init__(self, queries: Sequence[Tensor], groups: int, visible: Visible, scale: float):
        self.batch, n_heads, self.dim = queries[0].shape
        self.groups, self.heads = groups, n_heads // groups
        self.visible, self.scale, self.device = visible, scale, queries[0].device
        self.limits = _limits(self.device)
        self.block_h = max(16, _power(self.heads))

    def scores(self, tokens: int) -> Tensor:
        """Room for (B, H, n), rows aligned so that loads are wide."""
        room = -(-tokens // 16) * 16
        shape = (self.batch, self.groups * self.heads, room)
        return torch.empty(shape, dtype=torch.float32, device=self.device)[..., :tokens]

    def rebuilt(self, q, part, table, index, scores, rebuild: Rebuild | None, *, add: bool) -> None:
        """Scores of rebuilt keys; by rule where `rebuild` is None."""
        by_rule = rebuild is None and index is None
        if by_rule and (how := resident_lowrank.resident(q, part.a, part.b, self.groups, self.limits)) is not None:
            resident_lowrank.launch(
                how, q, part.a, part.b, table, self.visible.first, scores, self.groups, self.scale * _LOG2, self.limits,
                add=add,
            )  # fmt: skip
            return
        rebuild = rebuild or choose_rebuild(
            dim=self.dim, groups=self.groups, size=part.a.element_size(), gathered=index is not None, limits=self.limits
        )
        tokens, rank, (cos, sin) = scores.shape[2], part.a.shape[2], table
        half = _half(self.dim)
        grid = (self.groups // rebuild.pack, -(-tokens // rebuild.block_n), self.batch)
        triton_lowrank.rebuilt_scores[grid](
            q, part.a, part.b, cos, sin, index, self.visible.first, scores,
            q.stride()[:2], part.a.stride()[:2], part.b.stride()[:2], cos.stride(0), scores.stride()[:2],
            _strides(index), tokens, part.a.shape[1], rank, self.scale * _LOG2,
            G=self.groups, HEADS=self.heads, DIM=self.dim, HALF=half, PACK=rebuild.pack, BLOCK_H=self.block_h,
            BLOCK_N=rebuild.block_n, BLOCK_R=rebuild.block_r, STAGES=rebuild.num_stages,
            WHOLE=rank % rebuild.block_r == 0 and 2 * half == self.dim,
            LONG=part.a.shape[1] * part.a.stride(1) >= 2**31,
            ADD=add, num_warps=rebuild.num_warps,
        )  # fmt: skip

    def plain(self, q, keys, scores, *, index=None, tail_from=None, stop=2**30, span=1, factor=_LOG2, add=False):
        """Scores of stored keys (B, n, G, D); `tail_from` is the column of the first, for keys that a ring holds."""
        tokens, tail = keys.shape[1], tail_from is not None
        triton_lowrank.plain_scores[(self.groups, -(-tokens // 64), self.batch)](
            q, keys, index, self.visible.column if tail else None, self.visible.first, scores,
            q.stride()[:2], keys.stride()[:3], scores.stride()[:2],
            _strides(index), tokens, tail_from or 0, stop, self.scale * factor,
            G=self.groups, HEADS=self.heads, DIM=self.dim, BLOCK_D=max(16, _power(self.dim)), BLOCK_H=self.block_h,
            BLOCK_N=64, SPAN=span, EXCLUDE_SELF=self.visible.exclude_self, ADD=add,
        )  # fmt: skip

    def weighed(self, scores, values, index, *, shared: bool) -> tuple[Tensor, Tensor]:
        """Σ p v (B, H, W) fp32 and its log-sum-exp (B, H); `shared`: `values` (B, n, 1, W) are those of all heads."""
        tokens, width = scores.shape[2], values.shape[3]
        common = shared and index is None
        groups, heads = (1, self.groups * self.heads) if common else (self.groups, self.heads)
        block_h, block_w = min(32, max(16, _power(heads))), min(256, max(16, _power(width)))
        if values.element_size() > 2:
            block_w = min(block_w, 64)
        chunks, blocks = -(-width // block_w), self.batch * groups * -(-heads // block_h)
        splits = choose_splits(
            programs=chunks * blocks, tokens=tokens, block_n=64, gathered=index is not None, limits=self.limits
        )
        shape = (self.batch, self.groups * self.heads, splits)
        partial = torch.empty((*shape, width), dtype=torch.float32, device=self.device)
        log_sums = torch.empty(shape, dtype=torch.float32, device=self.device)
        strides = (*values.stride()[:2], 0 if shared else values.stride(2))
        triton_lowrank.weigh[(splits, chunks, blocks)](
            scores, values, index, partial, log_sums, scores.stride()[:2], strides, tokens, _strides(index),
            G=groups, HEADS=heads, WIDTH=width, BLOCK_H=block_h, BLOCK_N=64, BLOCK_W=block_w, STAGES=3,
        )  # fmt: skip
        if splits == 1:
            return partial[:, :, 0], log_sums[:, :, 0]
        merged = torch.empty((*shape[:2], width), dtype=torch.float32, device=self.device)
        merged_log_sum = torch.empty(shape[:2], dtype=torch.float32, device=self.device)
        every = _power(splits)
        triton_decode.merge[(shape[0] * shape[1], -(-width // 32))](
            partial, log_sums, merged, merged_log_sum, SPLITS=splits, OUT_WIDTH=width, ALL=every, CHUNK=every, BLOCK=32
        )
        return merged, merged_log_sum

    def finished(self, early: tuple[Tensor, Tensor], late: tuple[Tensor, Tensor], b: Tensor, out: Tensor) -> None:
        """Write what `weighed` found of the factors and of the tail, both contiguous, into `out` (B, H, D)."""
        triton_lowrank.finish[(out.shape[0] * out.shape[1], -(-self.dim // 16))](
            *early, b, *late, out, b.stride()[:2], out.stride()[:2],
            G=self.groups, HEADS=self.heads, RANK=b.shape[2], DIM=self.dim, BLOCK_R=min(256, _power(b.shape[2])),
            BLOCK_D=16,
        )  # fmt: skip


@contextmanager
def _branch(device: torch.device, number: int) -> Iterator[Callable[[], None]]:
    """What is launched inside needs nothing of what is launched after it, until the function that it yields is called.

    In a CUDA graph that is being captured it becomes a branch, which runs beside the rest: these kernels are so short
    that each leaves most of a GPU idle. Otherwise it runs in its turn, for events cost the host more than they save.
    """
    side = _side(device, number) if device.type == "cuda" else None  # made before anything is captured
    if side is None or not torch.cuda.is_current_stream_capturing():
        yield lambda: None
        return
    main = torch.cuda.current_stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield lambda: main.wait_stream(side)


@functools.cache
def _side(device: torch.device, number: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _strides(index: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if index is None else index.stride()[:2]


def run(
    queries: Sequence[Tensor],
    keys: Sequence[Factored],
    values: Sequence[Factored],
    table: tuple[Tensor, Tensor],
    visible: Visible,
    scale: float,
    selection: Selection | None,
    rebuild: Rebuild | None = None,
) -> Tensor:
    """What `cllm.kernels.lowrank_decode.lowrank_decode` documents, for calls that `unsupported` answers with None.

    Args:
        rebuild: tiles to rebuild keys in; by default as `resident_lowrank` and `choose_rebuild` say.

    Returns:
        (B, H, parts · D): the value parts side by side.
    """
    compressed, groups = keys[0].a.shape[1], keys[0].tail.shape[2]
    call = _Call(queries, groups, visible, scale)
    index, rest_index, outliers = None, None, 0
    with _branch(call.device, 0) as tail_is_done:
        tail_scores = call.scores(keys[0].tail.shape[1])
        for i, (q, part) in enumerate(zip(queries, keys, strict=True)):
            call.plain(q, part.tail, tail_scores, tail_from=compressed, add=i > 0)
        late = [call.weighed(tail_scores, part.tail, None, shared=False) for part in values]
    if selection is not None:
        index, outliers = _choose(call, queries[0], selection), selection.outlier_keys.shape[1]
        rest_index = index[..., outliers:]
    scores = call.scores(compressed if index is None else index.shape[2])
    rest = scores[..., outliers:]
    with _branch(call.device, 1) as outliers_are_done:
        if selection is not None and outliers:
            call.plain(queries[0], selection.outlier_keys, scores[..., :outliers], index=index, stop=compressed)
    if rest.shape[2]:
        for i, (q, part) in enumerate(zip(queries, keys, strict=True)):
            call.rebuilt(q, part, table, rest_index, rest, rebuild, add=i > 0)
    outliers_are_done()
    early = [call.weighed(scores, part.a[:, :, None], index, shared=True) for part in values]
    tail_is_done()
    out = queries[0].new_empty((*queries[0].shape[:2], len(values) * call.dim))
    for i, target in enumerate(out.split(call.dim, dim=-1)):
        call.finished(early[i], late[i], values[i].b, target)
    return out


def _choose(call: _Call, q: Tensor, selection: Selection) -> Tensor:
    """Tokens (B, G, n) int64 that this step reads."""
    chunks, outliers, span = selection.landmarks.shape[1], selection.outliers, selection.chunk
    marks = call.scores(chunks)
    call.plain(q, selection.landmarks, marks, span=span, factor=1.0)
    block, count = _power(chunks), chosen_chunks(selection)
    if block > _MOST_CHUNKS or count == 0:
        return chosen_tokens(marks, selection)
    always = outliers.shape[2]
    out = torch.empty((call.batch, call.groups, (always + count) * span), dtype=torch.int64, device=call.device)
    triton_lowrank.choose[(call.groups, call.batch)](
        marks, outliers, out, marks.stride()[:2], outliers.stride()[:2], out.stride()[:2], chunks,
        HEADS=call.heads, OUTLIERS=always, COUNT=count, SPAN=span, BLOCK=block, BLOCK_M=_power(max(always, 1)),
        TOGETHER=min(_power(call.heads), max(1, _MOST_CHUNKS // block)), num_warps=min(16, max(4, block // 512)),
    )  # fmt: skip
    return out
