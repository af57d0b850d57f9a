"""Launches the Triton kernels of `triton_lowrank` and `triton_choose`: which calls are supported, and the launches.

Shapes: B batch, S compressed tokens, n tokens that are scored, H query heads, G KV heads, D channels of a head, r rank.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from cllm.kernels import resident_lowrank, triton_choose, triton_decode, triton_lowrank
from cllm.kernels.decode import Visible
from cllm.kernels.gather import gather_rows
from cllm.kernels.limits import device_limits, next_power_of_2
from cllm.kernels.lowrank_tiles import (
    QUERIES,
    Choosing,
    Tuning,
    choose_choosing,
    choose_rebuild,
    choose_splits,
    choose_weighing,
    half_channels,
)
from cllm.kernels.selection import Factored, Selection, Table, chosen_chunks, chosen_tokens

MAX_DIM = 256
MAX_HEADS = 64
"""Query heads of one KV head."""
_MOST_CHUNKS = 2**15
"""Maximum number of chunks from which the kernel chooses; for more, plain torch chooses."""
_LOG2 = math.log2(math.e)


def unsupported(
    queries: Sequence[Tensor], keys: Sequence[Factored], values: Sequence[Factored], selection: Selection | None
) -> str | None:
    """The reason why the kernels do not support this call, or None."""
    if obstacle := triton_decode.device_obstacle(queries[0]):
        return obstacle
    tensors = [*queries, *(t for part in (*keys, *values) for t in (part.a, part.b, part.tail) if t is not None)]
    if selection is not None:
        tensors += [selection.landmarks, selection.outlier_keys]
    for tensor in tensors:
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"does not compute {str(tensor.dtype).removeprefix('torch.')}"
        if tensor.stride(-1) != 1:
            return "the channels of a tensor are not contiguous"
    for part in (*keys, *values):
        if part.b is not None and part.a.dtype != part.b.dtype:
            return "the factors have different dtypes"
    heads, dim = queries[0].shape[1] // keys[0].tail.shape[2], queries[0].shape[2]
    if dim % 2 or dim > MAX_DIM:
        return f"heads of {dim} channels; supported: even numbers up to {MAX_DIM}"
    if heads > MAX_HEADS:
        return f"{heads} query heads for each KV head; at most {MAX_HEADS}"
    limits, size = device_limits(queries[0].device), keys[0].a.element_size()
    rebuild = choose_rebuild(
        dim=dim, groups=keys[0].tail.shape[2], size=size, gathered=selection is not None, limits=limits
    )
    if (needed := rebuild.shared(half_channels(dim), size)) > limits.shared - QUERIES:
        return f"needs {needed} bytes of shared memory; the device has {limits.shared}"
    return None


class _Call:
    """The launches of one call, which share the queries' heads and the visible columns."""

    def __init__(
        self, queries: Sequence[Tensor], groups: int, visible: Visible, scale: float, tuning: Tuning | None = None
    ):
        self.batch, n_heads, self.dim = queries[0].shape
        self.groups, self.heads = groups, n_heads // groups
        self.visible, self.scale, self.device = visible, scale, queries[0].device
        self.limits, self.tuning = device_limits(self.device), tuning or Tuning()
        self.block_h = max(16, next_power_of_2(self.heads))

    def empty_scores(self, tokens: int) -> Tensor:
        """An uninitialised tensor (B, H, n) fp32. Rows are aligned, so that loads are wide."""
        padded = -(-tokens // 16) * 16
        shape = (self.batch, self.groups * self.heads, padded)
        return torch.empty(shape, dtype=torch.float32, device=self.device)[..., :tokens]

    def score_rebuilt(self, q, part, table, index, scores, *, add: bool) -> None:
        """Write the scores of rebuilt keys, or add to them with `add`."""
        resident, rebuild = None, self.tuning.rebuild
        if rebuild is None and index is None:
            resident = resident_lowrank.resident_tiles(q, part.a, part.b, table, self.groups, self.limits)
        if resident is not None:
            resident_lowrank.launch(
                resident, q, part.a, part.b, table, self.visible.first, scores, self.groups, self.scale * _LOG2,
                self.limits, add=add,
            )  # fmt: skip
            return
        rebuild = rebuild or choose_rebuild(
            dim=self.dim, groups=self.groups, size=part.a.element_size(), gathered=index is not None, limits=self.limits
        )
        tokens, rank, cos, sin = scores.shape[2], part.a.shape[2], table.cos, table.sin
        half = half_channels(self.dim)
        grid = (self.groups // rebuild.pack, -(-tokens // rebuild.block_n), self.batch)
        triton_lowrank.rebuilt_scores[grid](
            q, part.a, part.b, cos, sin, index, self.visible.first, scores,
            q.stride()[:2], part.a.stride()[:2], part.b.stride()[:2], cos.stride(0), scores.stride()[:2],
            _strides(index), tokens, part.a.shape[1], rank, self.scale * _LOG2,
            G=self.groups, HEADS=self.heads, DIM=self.dim, HALF=half, PACK=rebuild.pack, BLOCK_H=self.block_h,
            BLOCK_N=rebuild.block_n, BLOCK_R=rebuild.block_r, STAGES=rebuild.num_stages,
            UNPADDED=rank % rebuild.block_r == 0 and 2 * half == self.dim,
            LONG=part.a.shape[1] * part.a.stride(1) >= 2**31,
            ADD=add, num_warps=rebuild.num_warps,
        )  # fmt: skip

    def score_stored(
        self, q, keys, scores, *, index=None, tail_from=None, stop=2**30, span=1, factor=_LOG2, add=False, block_n=64,
        maxima=(None, None),
    ):  # fmt: skip
        """Write the scores of stored keys (B, n, G, D). For keys of the tail, `tail_from` is the first one's column."""
        tokens, tail = keys.shape[1], tail_from is not None
        triton_lowrank.plain_scores[(self.groups, -(-tokens // block_n), self.batch)](
            q, keys, index, self.visible.column if tail else None, self.visible.first, scores, *maxima,
            q.stride()[:2], keys.stride()[:3], scores.stride()[:2],
            _strides(index), tokens, tail_from or 0, stop, self.scale * factor,
            G=self.groups, HEADS=self.heads, DIM=self.dim, BLOCK_D=max(16, next_power_of_2(self.dim)),
            BLOCK_H=self.block_h, BLOCK_N=block_n, SPAN=span, EXCLUDE_SELF=self.visible.exclude_self, ADD=add,
        )  # fmt: skip

    def sum_rows(self, scores: Tensor, part: Factored, index: Tensor | None, gathered: Tensor | None):
        """`weighted_sum` of the compressed tokens' rows of A, or of their uncompressed values, which may be gathered
        already."""
        if part.b is not None:
            return self.weighted_sum(scores, part.a[:, :, None], index, shared=True)
        if gathered is not None:
            return self.weighted_sum(scores, gathered, None, is_gathered=True)
        return self.weighted_sum(scores, part.a.unflatten(2, part.tail.shape[2:]), index)

    def weighted_sum(
        self, scores, values, index, *, shared=False, is_tail=False, is_gathered=False
    ) -> tuple[Tensor, Tensor]:
        """Σ p v (B, H, W) fp32 and the log-sum-exp (B, H).

        `values` are (B, n, G, W), or (B, n, 1, W) for all heads if `shared`. Those of the `tail` are undefined where no
        token is; gathered ones are those of the scored tokens, and 0 there.
        """
        tokens, width = scores.shape[2], values.shape[3]
        one_group, is_gathered = shared and index is None, is_gathered or index is not None
        first = None if is_tail or (is_gathered and index is None) else self.visible.first
        groups, heads = (1, self.groups * self.heads) if one_group else (self.groups, self.heads)
        how = (None if is_tail else self.tuning.weighing) or choose_weighing(gathered=is_gathered)
        block_h, block_w = min(32, max(16, next_power_of_2(heads))), min(how.block_w, max(16, next_power_of_2(width)))
        if values.element_size() > 2:
            block_w = min(block_w, 64)
        chunks, blocks = -(-width // block_w), self.batch * groups * -(-heads // block_h)
        splits = how.splits or choose_splits(
            programs=chunks * blocks, tokens=tokens, block_n=how.block_n, gathered=is_gathered, limits=self.limits
        )
        shape = (self.batch, self.groups * self.heads, splits)
        partial = torch.empty((*shape, width), dtype=torch.float32, device=self.device)
        log_sums = torch.empty(shape, dtype=torch.float32, device=self.device)
        strides = (*values.stride()[:2], 0 if shared else values.stride(2))
        triton_lowrank.weigh[(splits, chunks, blocks)](
            scores, values, index, first, partial, log_sums, scores.stride()[:2],
            strides, tokens, values.shape[1], _strides(index),
            G=groups, HEADS=heads, WIDTH=width, BLOCK_H=block_h, BLOCK_N=how.block_n, BLOCK_W=block_w,
            SCORED_ROWS=is_tail, STAGES=how.stages, num_warps=how.warps,
        )  # fmt: skip
        if splits == 1:
            return partial[:, :, 0], log_sums[:, :, 0]
        merged = torch.empty((*shape[:2], width), dtype=torch.float32, device=self.device)
        merged_log_sum = torch.empty(shape[:2], dtype=torch.float32, device=self.device)
        every = next_power_of_2(splits)
        triton_decode.merge[(shape[0] * shape[1], -(-width // 32))](
            partial, log_sums, merged, merged_log_sum, splits, OUT_WIDTH=width, ALL=every, CHUNK=every, BLOCK=32
        )
        return merged, merged_log_sum

    def write_output(
        self, compressed: tuple[Tensor, Tensor], tail: tuple[Tensor, Tensor], b: Tensor | None, out: Tensor
    ) -> None:
        """Write `out` (B, H, D) from the results of `weighted_sum`, contiguous, for the compressed tokens and for the
        tail."""
        rank = compressed[0].shape[2]
        triton_lowrank.finish[(out.shape[0] * out.shape[1], -(-self.dim // 16))](
            *compressed, b, *tail, out, _strides(b), out.stride()[:2],
            G=self.groups, HEADS=self.heads, RANK=rank, DIM=self.dim,
            BLOCK_R=min(256, next_power_of_2(rank)), BLOCK_D=16,
        )  # fmt: skip


@contextmanager
def _parallel_branch(device: torch.device, number: int) -> Iterator[Callable[[], None]]:
    """Kernels launched in this context may run in parallel with kernels launched after it, until the yielded function
    is called to join them.

    While a CUDA graph is captured, they become a branch of the graph: these kernels are so short that each leaves most
    of a GPU idle. Otherwise all kernels run in order, because events would cost the host more time than they save.
    """
    side = _side_stream(device, number) if device.type == "cuda" else None  # created before a capture begins
    if side is None or not torch.cuda.is_current_stream_capturing():
        yield lambda: None
        return
    main = torch.cuda.current_stream(device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        yield lambda: main.wait_stream(side)


@functools.cache
def _side_stream(device: torch.device, number: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _strides(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if tensor is None else tensor.stride()[:2]


def run(
    queries: Sequence[Tensor],
    keys: Sequence[Factored],
    values: Sequence[Factored],
    table: Table,
    visible: Visible,
    scale: float,
    selection: Selection | None,
    tuning: Tuning | None = None,
) -> Tensor:
    """Compute `cllm.kernels.lowrank_decode.lowrank_decode` for a call that is supported (see `unsupported`).

    Args:
        tuning: tiles; by default those of the rules.

    Returns:
        (B, H, parts · D): the value parts side by side.
    """
    compressed, groups = keys[0].a.shape[1], keys[0].tail.shape[2]
    call = _Call(queries, groups, visible, scale, tuning)
    index, rest_index, outliers = None, None, 0
    with _parallel_branch(call.device, 0) as join_tail:
        tail_scores = call.empty_scores(keys[0].tail.shape[1])
        for i, (q, part) in enumerate(zip(queries, keys, strict=True)):
            call.score_stored(q, part.tail, tail_scores, tail_from=compressed, add=i > 0)
        tails = [call.weighted_sum(tail_scores, part.tail, None, is_tail=True) for part in values]
    if selection is not None:
        index, outliers = _choose(call, queries[0], selection), selection.outlier_keys.shape[1]
        rest_index = index[..., outliers:]
    with _parallel_branch(call.device, 2) as join_gathered:
        gathered = [_gathered(call, part, index) for part in values]
    scores = call.empty_scores(compressed if index is None else index.shape[2])
    rest = scores[..., outliers:]
    with _parallel_branch(call.device, 1) as join_outliers:
        if selection is not None and outliers:
            call.score_stored(queries[0], selection.outlier_keys, scores[..., :outliers], index=index, stop=compressed)
    if rest.shape[2]:
        for i, (q, part) in enumerate(zip(queries, keys, strict=True)):
            call.score_rebuilt(q, part, table, rest_index, rest, add=i > 0)
    join_outliers()
    join_gathered()
    sums = [call.sum_rows(scores, part, index, rows) for part, rows in zip(values, gathered, strict=True)]
    join_tail()
    out = queries[0].new_empty((*queries[0].shape[:2], len(values) * call.dim))
    for i, target in enumerate(out.split(call.dim, dim=-1)):
        call.write_output(sums[i], tails[i], values[i].b, target)
    return out


def _gathered(call: _Call, part: Factored, index: Tensor | None) -> Tensor | None:
    """Values (B, n, G, D) of the chosen tokens, if they are in host memory: each is read once over the bus, while keys
    are rebuilt."""
    if part.b is not None or index is None or part.a.device == call.device:
        return None
    return gather_rows(part.a.unflatten(2, part.tail.shape[2:]), index, call.visible.first)


def _choose(call: _Call, q: Tensor, selection: Selection) -> Tensor:
    """Tokens (B, G, n) int64 that this step reads."""
    chunks, span = selection.landmarks.shape[1], selection.chunk
    scores, how = call.empty_scores(chunks), call.tuning.choosing
    how = how or choose_choosing(chunks=chunks, rows=call.batch * call.groups, limits=call.limits)
    by_torch = next_power_of_2(chunks) > _MOST_CHUNKS or chosen_chunks(selection) == 0
    if by_torch or isinstance(how, str):
        call.score_stored(q, selection.landmarks, scores, span=span, factor=1.0)
        return chosen_tokens(scores, selection) if by_torch else _choose_alone(scores, selection)
    tiles = -(-chunks // how.landmarks)
    largest, sums = torch.empty((2, call.batch, call.groups * call.heads, tiles), device=call.device)
    call.score_stored(
        q, selection.landmarks, scores, span=span, factor=1.0, block_n=how.landmarks, maxima=(largest, sums)
    )
    return _choose_together(scores, largest, sums, selection, how)


def _choose_alone(scores: Tensor, selection: Selection) -> Tensor:
    """`chosen_tokens` of the landmarks' `scores` (B, H, chunks) fp32, by one program for each KV head."""
    (batch, n_heads, chunks), outliers, span = scores.shape, selection.outliers, selection.chunk
    groups, always, count, block = (
        outliers.shape[1],
        outliers.shape[2],
        chosen_chunks(selection),
        next_power_of_2(chunks),
    )
    out = torch.empty((batch, groups, (always + count) * span), dtype=torch.int64, device=scores.device)
    triton_choose.choose[(groups, batch)](
        scores, outliers, out, scores.stride()[:2], outliers.stride()[:2], out.stride()[:2], chunks,
        HEADS=n_heads // groups, OUTLIERS=always, COUNT=count, SPAN=span, BLOCK=block,
        BLOCK_M=next_power_of_2(max(always, 1)),
        TOGETHER=min(next_power_of_2(n_heads // groups), max(1, _MOST_CHUNKS // block)),
        num_warps=min(16, max(4, block // 512)),
    )  # fmt: skip
    return out


def _choose_together(scores: Tensor, largest: Tensor, sums: Tensor, selection: Selection, how: Choosing) -> Tensor:
    """The same by many programs, with `largest` and `sums` (B, H, tiles) of tiles of `scores`, as `plain_scores` writes
    them."""
    (batch, n_heads, chunks), outliers, span = scores.shape, selection.outliers, selection.chunk
    count, always, groups, tiles = chosen_chunks(selection), outliers.shape[2], outliers.shape[1], largest.shape[2]
    heads, every, block_m = n_heads // groups, next_power_of_2(chunks), next_power_of_2(max(always, 1))
    order = torch.empty((batch, groups, -(-chunks // 16) * 16), dtype=torch.int32, device=scores.device)
    out = torch.empty((batch, groups, (always + count) * span), dtype=torch.int64, device=scores.device)
    strides = (outliers.stride()[:2], order.stride()[:2])
    ordered, taken = min(how.ordered, every), min(how.taken, every)
    triton_choose.order_chunks[(-(-chunks // ordered), groups, batch)](
        scores, largest, sums, outliers, order, scores.stride()[:2], *strides, chunks, tiles,
        HEADS=heads, OUTLIERS=always, BLOCK=ordered, BLOCK_M=block_m, BLOCK_T=next_power_of_2(tiles),
        TOGETHER=min(next_power_of_2(heads), 4),
    )  # fmt: skip
    triton_choose.take_chunks[(-(-chunks // taken), groups, batch)](
        order, outliers, out, *reversed(strides), out.stride()[:2], chunks,
        OUTLIERS=always, COUNT=count, SPAN=span, ALL=every, BLOCK=taken, BLOCK_M=block_m,
        num_warps=min(how.warps, max(4, every // 512)),
    )  # fmt: skip
    return out
