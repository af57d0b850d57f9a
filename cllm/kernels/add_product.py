"""Sums of a tensor and a matrix product, in the product's own epilogue.

torch's compiler takes such a sum for cheaper beside other element-wise work and writes the product out first. Where its
tensor cores bound a product, reading the summand in its epilogue costs nothing (one H200, 374 M: products of one kind
took 30.4 ms a step before a fifth of them did so, and after). What is left of the sum, or of the norm behind it, then
reads one tensor less: for the residual stream, and for the gradient of a normalised input, which q, k, v, gate and up
each have a part of.

    block.compile(options={"post_grad_custom_pre_pass": ADD_PRODUCTS})
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
_HALF = (torch.bfloat16, torch.float16)


@torch.library.custom_op("cllm::add_product", mutates_args=())
def add_product(summand: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """summand (N, n) + a (N, k) b (k, n), summed in fp32 and rounded once. As an operator of its own, because the
    compiler would take `addmm` apart."""
    return torch.addmm(summand, a, b)


@add_product.register_fake
def _(summand: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.empty_like(summand, memory_format=torch.contiguous_format)


class AddProducts(CustomGraphPass):
    """In a compiled graph, makes every add(mm(a, b), summand) of 16-bit numbers one `add_product`."""

    def __init__(self, devices: Sequence[str] = ("cuda",)):
        self.devices = tuple(devices)

    def __call__(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if node.op != "call_function" or node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2:
                continue
            for viewed, summand in (node.args, node.args[::-1]):
                product = _product(viewed)
                if product is not None and self._fits(product, viewed, summand):
                    _merge(graph, node, product, summand)
                    break
        graph.eliminate_dead_code()

    def uuid(self) -> object:
        """The compiler's cache knows code that this pass has changed by this."""
        return get_hash_for_files((__file__,), str(self.devices))

    def _fits(self, product: fx.Node, viewed: fx.Node, summand: object) -> bool:
        if not isinstance(summand, fx.Node):
            return False
        made, whole, other = (_value(node) for node in (product, viewed, summand))
        if made is None or whole is None or other is None:
            return False
        sizes = (*made.shape, *whole.shape, *other.shape)
        return (
            all(isinstance(size, int) for size in sizes)
            and whole.shape == other.shape
            and whole.shape[-1] == made.shape[-1]
            and made.dtype == other.dtype
            and made.dtype in _HALF
            and other.is_contiguous()
            and made.device.type in self.devices
        )


def _value(node: fx.Node) -> Tensor | None:
    value = node.meta.get("val")
    return value if isinstance(value, Tensor) else None


def _product(node: object) -> fx.Node | None:
    """The product that `node` is a view of, if nothing else reads it."""
    while isinstance(node, fx.Node) and node.op == "call_function" and len(node.users) == 1:
        if node.target is aten.mm.default:
            return node
        if node.target not in _VIEWS:
            return None
        node = node.args[0]
    return None


def _merge(graph: fx.Graph, total: fx.Node, product: fx.Node, summand: fx.Node) -> None:
    shape = list(product.meta["val"].shape)
    with graph.inserting_before(total):
        flat = graph.call_function(aten.view.default, (summand, shape))
        flat.meta["val"] = summand.meta["val"].view(shape)
        merged = graph.call_function(torch.ops.cllm.add_product.default, (flat, *product.args))
        merged.meta["val"] = product.meta["val"].new_empty(shape)
        found = graph.call_function(aten.view.default, (merged, list(total.meta["val"].shape)))
        found.meta = total.meta
    total.replace_all_uses_with(found)
    graph.erase_node(total)


ADD_PRODUCTS = AddProducts()
"""The same for all blocks: what they compile to is shared where nothing differs, their options included."""
