"""Graph pass that removes redundant work around casts to fp8 in compiled code.

- A clamp to the dtype's range before a cast. torchao adds it because uncompiled casts do not saturate before torch
  2.12; compiled casts do. Its two comparisons, which let NaN pass, cost more than the cast.
- Copies of a transposed tensor. If several products read it, the compiler writes one copy for each of them.

    block.compile(options={"post_grad_custom_post_pass": FP8_CASTS})
"""

from __future__ import annotations

import torch
from torch import fx
from torch._inductor import inductor_prims

from cllm.kernels.graph_pass import GraphPass

aten, prims = torch.ops.aten, torch.ops.prims
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class Fp8Casts(GraphPass):
    """The pass described in the module. It changes no value, NaN and infinities included."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if not self._is_fp8(node):
                continue
            if node.target is prims.convert_element_type.default:
                _drop_clamp(graph, node)
            elif node.target is aten.clone.default and _readers(node) > 1:
                _write_one_copy(graph, node)

    def _is_fp8(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, torch.Tensor) and value.dtype in _FP8 and value.device.type in self.devices


def _drop_clamp(graph: fx.Graph, cast: fx.Node) -> None:
    """Replace cast(clamp_max(clamp_min(x, -m), m)) by cast(x), for m the largest number of the cast's dtype."""
    largest = torch.finfo(cast.meta["val"].dtype).max
    x, clamps = cast.args[0], []
    for target, bound in ((aten.clamp_max.default, largest), (aten.clamp_min.default, -largest)):
        if not isinstance(x, fx.Node) or x.target is not target or x.args[1:] != (bound,):
            return
        clamps.append(x)
        x = x.args[0]
    cast.args = (x, *cast.args[1:])
    for clamp in clamps:
        if not clamp.users:
            graph.erase_node(clamp)


def _readers(copy: fx.Node) -> int:
    """How many nodes read a copy, directly or transposed."""
    views = [user for user in copy.users if user.target is aten.permute.default]
    return len(copy.users) - len(views) + sum(len(view.users) for view in views)


def _write_one_copy(graph: fx.Graph, copy: fx.Node) -> None:
    """Make the compiler write the copy to memory here, for all readers."""
    with graph.inserting_after(copy):
        written = graph.call_function(inductor_prims.force_stride_order, (copy, list(copy.meta["val"].stride())))
    written.meta["val"] = copy.meta["val"]
    copy.replace_all_uses_with(written, delete_user_cb=lambda user: user is not written)


FP8_CASTS = Fp8Casts()
"""One instance for all blocks: blocks share compiled code only if their compiler options are equal."""
