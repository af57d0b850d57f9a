"""Joint attention, forward and backward, beside attention over one slot; and the merge of its parts beside a copy."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.kernels.table import Table, rand
from benchmarks.timing import BF16, replayed_ms
from cllm.kernels.attention import attention
from cllm.kernels.backends.mask import Mask
from cllm.kernels.joint import JointPart, joint_attention
from cllm.kernels.merge import merge

HEADS, DIM, WINDOW = 16, 64, 128


class Moved(TorchDispatchMode):
    """Counts the bytes of the tensors that torch's operators read and write; views count nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator and count."""
        results = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, kwargs, results)) if isinstance(x, Tensor)]
        if not function.is_view:
            self.bytes += sum(distinct_bytes(x) for x in tensors)
        return results


def distinct_bytes(x: Tensor) -> int:
    """Bytes of the numbers of a tensor; those that it repeats by a stride of 0 count once."""
    size = x.element_size()
    for n, stride in zip(x.shape, x.stride(), strict=True):
        size *= n if stride else min(n, 1)
    return size


def moved_bytes(function: Callable[..., Any], *inputs: Any) -> int:
    """Bytes that torch's operators move in one call."""
    with Moved() as moved:
        function(*inputs)
    return moved.bytes


def bench_joint(table: Table, copy: float, batch: int = 16, length: int = 4096) -> None:
    """Time one layer that joins a slot with a window and a sink, the attentions over each of its slots, and its merge.

    Compiled, its gradient sums are one kernel each, as in training.
    """
    shape, case = (batch, length, HEADS, DIM), f"{batch} x {length}, {HEADS} heads of {DIM}"
    q, k, v, near_k, near_v = (rand(*shape) for _ in range(5))
    sink = torch.zeros(HEADS, device=q.device, requires_grad=True)

    def joint(q: Tensor, k: Tensor, v: Tensor, near_k: Tensor, near_v: Tensor, sink: Tensor) -> Tensor:
        return joint_attention(q, [JointPart(k, v, Mask()), JointPart(near_k, near_v, Mask(WINDOW))], sink)

    table.time("joint", case, "attention to all", functools.partial(attention, mask=Mask()), q, k, v)
    table.time("joint", case, f"to a window of {WINDOW}", functools.partial(attention, mask=Mask(WINDOW)), q, k, v)
    table.time("joint", case, "joint, not compiled", joint, q, k, v, near_k, near_v, sink)
    table.time("joint", case, "joint, compiled", torch.compile(joint), q, k, v, near_k, near_v, sink)

    outs = [rand(*shape, grad=False) for _ in range(2)]
    lses = [torch.randn(batch, HEADS, length, device=q.device) for _ in range(2)]
    least = 3 * outs[0].nbytes + 3 * lses[0].nbytes
    source = torch.ones(least // 2, dtype=torch.uint8, device=q.device)
    merged = functools.partial(merge, outs, lses, sink.detach(), BF16)
    calls: dict[str, Callable[[], Any]] = {
        "a copy of as many bytes": functools.partial(torch.empty_like(source).copy_, source),
        "one kernel": functools.partial(merged, "auto"),
        "plain torch": functools.partial(merged, "reference"),
    }
    for name, call in calls.items():  # as CUDA graphs: a launch from Python takes longer than the kernel
        table.measure("merge", case, name, functools.partial(replayed_ms, [call]), least / copy * 1000)
    plain = moved_bytes(calls["plain torch"])
    print(f"merge     bytes: plain torch {plain / 1e9:.3f} GB, least {least / 1e9:.3f} GB", flush=True)
