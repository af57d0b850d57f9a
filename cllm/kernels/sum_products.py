"""Graph pass that fuses sums of matrix products: each product is added to the sum in its epilogue.

The gradient of a normalised input is such a sum, with one product each for q, k and v, or for gate and up. torch's
compiler writes each product to memory, and the kernel after them reads and adds them. With this pass, that kernel reads
one tensor. Adding in the epilogue costs nothing if the tensor cores are the limit: on one H200 with the 374 M model,
products of one kind took 30.4 ms a step both before and after a fifth of them were changed. Sums with any other term
are left to the compiler, because torch's `addmm` copies a tensor that it must not overwrite, which costs as much.

    block.compile(options={"post_grad_custom_pre_pass": SUM_PRODUCTS})
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from cllm.kernels.graph_pass import HALF, VIEWS, GraphPass, aten


@torch.library.custom_op("cllm::sum_products", mutates_args=())
def sum_products(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Σ_i a_i b_i (N, n) of a_i (N, k_i) and b_i (k_i, n), summed in fp32 and rounded after each product."""
    total = torch.mm(a[0], b[0])
    for left, right in zip(a[1:], b[1:], strict=True):
        torch.addmm(total, left, right, out=total)
    return total


@sum_products.register_fake
def _(a: list[Tensor], b: list[Tensor]) -> Tensor:
    return a[0].new_empty((a[0].shape[0], b[0].shape[1]))


class SumProducts(GraphPass):
    """Replaces every sum of 16-bit products by one `sum_products`, if nothing else reads the products or sums."""

    def __call__(self, graph: fx.Graph) -> None:
        done: set[fx.Node] = set()
        for node in reversed(list(graph.nodes)):
            if node in done or not _is_sum(node):
                continue
            inner: list[fx.Node] = [node]
            products: list[fx.Node] = []
            if all(_collect(part, inner, products) for part in node.args) and self._compatible(products):
                done.update(inner)
                _merge(graph, node, products)
        graph.eliminate_dead_code()

    def _compatible(self, products: Sequence[fx.Node]) -> bool:
        values = [node.meta["val"] for node in products]
        kinds = {(value.device.type, value.dtype, value.shape) for value in values}
        return len(kinds) == 1 and values[0].device.type in self.devices and values[0].dtype in HALF


def _is_sum(node: object) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.op == "call_function"
        and node.target is aten.add.Tensor
        and len(node.args) == 2
        and not node.kwargs
    )


def _collect(node: object, sums: list[fx.Node], products: list[fx.Node]) -> bool:
    """Whether `node` consists only of sums and products that nothing else reads. Appends them to the lists."""
    while isinstance(node, fx.Node) and node.op == "call_function" and len(node.users) == 1:
        if node.target is aten.mm.default:
            products.append(node)
            return True
        if _is_sum(node):
            sums.append(node)
            return all(_collect(part, sums, products) for part in node.args)
        if node.target not in VIEWS:
            return False
        node = node.args[0]
    return False


def _merge(graph: fx.Graph, total: fx.Node, products: Sequence[fx.Node]) -> None:
    factors = [list(side) for side in zip(*(node.args for node in products), strict=True)]
    with graph.inserting_before(total):
        merged = graph.call_function(torch.ops.cllm.sum_products.default, (factors[0], factors[1]))
        merged.meta["val"] = products[0].meta["val"].new_empty(products[0].meta["val"].shape)
        viewed = graph.call_function(aten.view.default, (merged, list(total.meta["val"].shape)))
        viewed.meta = total.meta
    total.replace_all_uses_with(viewed)
    graph.erase_node(total)


SUM_PRODUCTS = SumProducts()
"""One instance for all blocks: blocks share compiled code only if their compiler options are equal."""
