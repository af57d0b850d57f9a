# mypy: disable-error-code="import-not-found,import-untyped,assignment,var-annotated"

"""Products of a few rows with weights, for decoding steps of a few sequences: weights are read at the memory's rate.

A step multiplies one row of each sequence with every weight, so reading the weights is all that takes time. Kernels
for matrices of many rows read weights of a few million numbers at a third to two thirds of a copy's rate. Here programs
have a few rows of W each, read them in long pieces, and have the next pieces in flight meanwhile. Products of one
input, such as those of queries, keys and values, are one launch, which keeps more programs busy.

    y_i = x W_iᵀ        x (M, K), W_i (N_i, K), y_i (M, N_i), M from 2 to 16

One row is left to the compiler, which writes such a product as a reduction (`Decoder.compile_decoding`).

    torch.compile(block, options={"post_grad_custom_post_pass": FEW_ROWS})
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from cllm.kernels import triton_decode
from cllm.kernels.graph_pass import HALF, VIEWS, GraphPass, aten
from cllm.kernels.limits import device_limits
from cllm.kernels.triton_decode import jit, tl

MOST_ROWS = 16
"""Rows of the smallest tile of a tensor core's product."""
_MOST_WEIGHTS = 4
"""Weights of one launch."""


@torch.library.custom_op("cllm::few_rows", mutates_args=())
def few_rows(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """x W_iᵀ (M, N_i) for each weight W_i (N_i, K), of x (M, K), summed in fp32."""
    if triton_decode.device_obstacle(x) is not None:
        return [torch.mm(x, weight.mT) for weight in weights]
    with torch.cuda.device_of(x):
        return run(x, weights)


@few_rows.register_fake
def _(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    return [x.new_empty((x.shape[0], weight.shape[0])) for weight in weights]


class FewRows(GraphPass):
    """Replaces products of 2 to 16 rows with 16-bit weights by `few_rows`: one for all weights of one input."""

    def __call__(self, graph: fx.Graph) -> None:
        groups: dict[tuple[fx.Node, torch.Size], list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            if self._fits(node):
                x: Any = node.args[0]
                groups[_viewed(x), x.meta["val"].shape].append(node)
        for nodes in groups.values():
            for i in range(0, len(nodes), _MOST_WEIGHTS):
                _merge(graph, nodes[i : i + _MOST_WEIGHTS])
        graph.eliminate_dead_code()

    def _fits(self, node: fx.Node) -> bool:
        if node.op != "call_function" or node.target is not aten.mm.default:
            return False
        args: Any = node.args
        x, transposed = (arg.meta["val"] for arg in args)
        return (
            _weight(node) is not None
            and 2 <= x.shape[0] <= MOST_ROWS
            and x.dtype in HALF
            and transposed.dtype == x.dtype
            and x.device.type in self.devices
            and x.is_contiguous()
            and transposed.mT.is_contiguous()
        )


def _viewed(x: fx.Node) -> fx.Node:
    """The tensor of which `x` is a view: each product has a view of its own."""
    while x.op == "call_function" and x.target in VIEWS:
        x = x.args[0]
    return x


def _weight(product: fx.Node) -> fx.Node | None:
    """W of a product x Wᵀ, if W is an input of the graph."""
    transposed = product.args[1]
    assert isinstance(transposed, fx.Node)
    if transposed.target not in (aten.permute.default, aten.t.default):
        return None
    weight = transposed.args[0]
    assert isinstance(weight, fx.Node)
    return weight if weight.op in ("placeholder", "get_attr") else None


def _merge(graph: fx.Graph, products: Sequence[fx.Node]) -> None:
    weights = [_weight(node) for node in products]
    with graph.inserting_before(products[0]):
        merged = graph.call_function(torch.ops.cllm.few_rows.default, (products[0].args[0], weights))
        merged.meta["val"] = [node.meta["val"] for node in products]
        for i, node in enumerate(products):
            result = graph.call_function(getitem, (merged, i))
            result.meta = node.meta
            node.replace_all_uses_with(result)
    for node in products:
        graph.erase_node(node)


def tile(size: int, shared: int) -> tuple[int, int, int, int]:
    """(rows of W of a program, columns of a piece, warps, pieces in flight) for weights with `size` rows in all.

    The fastest of 46 to 63 on one H200 for five to ten shapes, by `size` alone; `shared`: bytes of a multiprocessor's
    shared memory.
    """
    if size < 3072:  # many programs
        rows, piece, warps, pieces = 16, 512, 2, 4
    elif size < 8192:
        rows, piece, warps, pieces = 64, 128, 4, 6
    else:
        rows, piece, warps, pieces = 64, 128, 2, 4
    return rows, piece, warps, min(pieces, shared // (2 * piece * (rows + MOST_ROWS)))


def run(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Launch the kernel, without checks."""
    M, K = x.shape
    sizes = tuple(weight.shape[0] for weight in weights)
    rows, piece, warps, stages = tile(sum(sizes), device_limits(x.device).shared)
    begins, programs = [], 0
    for size in sizes:
        begins.append(programs)
        programs += -(-size // rows)
    outs = [x.new_empty((M, size)) for size in sizes]
    multiply[(programs,)](
        x, tuple(weights), tuple(outs), sizes, tuple(begins), M, K,
        ROWS=rows, PIECE=piece, EVEN=K % piece == 0, STAGES=stages, BLOCK=MOST_ROWS, num_warps=warps,
    )  # fmt: skip
    return outs


@jit
def multiply(
    x, weights, outs, sizes, begins, M, K,
    ROWS: tl.constexpr, PIECE: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program: ROWS rows of one of the weights."""
    program = tl.program_id(0)
    weight, out, size, begin = weights[0], outs[0], sizes[0], begins[0]
    for i in tl.static_range(1, len(sizes)):
        if program >= begins[i]:
            weight, out, size, begin = weights[i], outs[i], sizes[i], begins[i]
    row = (program - begin) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PIECE)
    m = tl.arange(0, BLOCK)
    at_w = weight + row.to(tl.int64)[:, None] * K + column[None, :]
    at_x = x + m[None, :] * K + column[:, None]
    in_w, in_x = (row < size)[:, None], (m < M)[None, :]
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for k in tl.range(0, K, PIECE, num_stages=STAGES):
        if EVEN:
            a = tl.load(at_w + k, mask=in_w, other=0.0, eviction_policy="evict_first")
            b = tl.load(at_x + k, mask=in_x, other=0.0)
        else:
            a = tl.load(at_w + k, mask=in_w & (k + column < K)[None, :], other=0.0, eviction_policy="evict_first")
            b = tl.load(at_x + k, mask=in_x & (k + column < K)[:, None], other=0.0)
        total = tl.dot(a, b, total)
    tl.store(out + m[None, :] * size + row[:, None], total.to(out.dtype.element_ty), mask=in_w & in_x)


FEW_ROWS = FewRows()
"""One instance for all blocks: blocks share compiled code only if their compiler options are equal."""
