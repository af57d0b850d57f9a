"""Joint attention's operators: their gradients' sums and torch's rules. Its definition is tested in tests/plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from cllm.kernels.attention import Mask
from cllm.kernels.decode import Stored, Visible
from cllm.kernels.joint import DecodePart, JointPart, _sum, joint_attention, joint_decode


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_16_bits_are_added_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    """To the bit, for numbers of very different sizes."""
    draw = torch.Generator().manual_seed(0)
    wide = [torch.randn(20_000, generator=draw) * 2.0 ** torch.randint(-8, 8, (20_000,), generator=draw) for _ in "abc"]
    parts = [part.to(dtype) for part in wide]
    total = torch.zeros(20_000)
    for n, part in enumerate(parts, 1):
        total = total + part.float()
        assert torch.equal(_sum(parts[:n], torch.float32), total.to(dtype))
    assert not torch.equal(parts[0] + parts[1] + parts[2], total.to(dtype)), "three roundings would be seen"


def inputs(n: int) -> tuple[torch.Tensor, ...]:
    """Queries, a sink, and keys and values of n parts."""
    torch.manual_seed(0)
    drawn = (torch.randn(2, 7 + i // 2, 2, 8) for i in range(2 * n))
    return tuple(x.requires_grad_() for x in (torch.randn(2, 7, 4, 8), torch.randn(4), *drawn))


def attend(q: torch.Tensor, sink: torch.Tensor, *slots: torch.Tensor) -> torch.Tensor:
    parts = [JointPart(*slots[i : i + 2], Mask(3 + i, False, None, None)) for i in range(0, len(slots), 2)]
    return joint_attention(q, parts, sink)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_operators_keep_torchs_rules(n: int) -> None:
    """Shapes for the compiler, aliases and gradients are as registered."""
    q, sink, *slots = inputs(n)
    rule = (None, None, None, [3] * n, 0.3, ",".join(["sdpa"] * n))
    forward, backward = torch.ops.cllm.joint_attention.default, torch.ops.cllm.joint_attention_backward.default
    torch.library.opcheck(forward, (q, slots[::2], slots[1::2], sink, *rule))
    q, slots = q.detach(), [slot.detach() for slot in slots]
    out, lse = forward(q, slots[::2], slots[1::2], sink.detach(), *rule)
    torch.library.opcheck(backward, (torch.randn_like(out), q, slots[::2], slots[1::2], out, lse, *rule))


@pytest.mark.parametrize("n", [2, 3])
def test_the_compiler_sees_the_sums_of_gradients(n: int) -> None:
    """They are outside of the operators, so that they become one kernel with what follows, such as RoPE's gradient."""
    seen: list[Any] = []

    def remember(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        seen.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    tensors = inputs(n)
    compiled = torch.compile(attend, backend=aot_autograd(fw_compiler=remember, bw_compiler=remember), fullgraph=True)
    found = torch.autograd.grad(compiled(*tensors).square().sum(), tensors)
    wanted = torch.autograd.grad(attend(*tensors).square().sum(), tensors)
    torch.testing.assert_close(found, wanted)
    assert seen[0].count(torch.ops.cllm.joint_attention.default) == 1
    assert seen[1].count(torch.ops.cllm.joint_attention_backward.default) == 1
    assert seen[1].count(torch.ops.aten.add.Tensor) == n - 1
    assert seen[1].count(torch.ops.aten.sum.dim_IntList) == 2, "the sink's gradient: over channels, and over tokens"


def test_a_decoding_step_compiles_in_one_piece() -> None:
    """The compiler then makes a kernel of the merge itself."""
    torch.manual_seed(0)
    q, sink = torch.randn(2, 4, 8), torch.randn(4)
    parts = [
        DecodePart(
            Stored(torch.randn(2, 9, g, 8)),
            Stored(torch.randn(2, 9, g, 8)),
            Visible(torch.tensor([7]), None, window, False),
        )
        for g, window in ((4, None), (2, 3))
    ]

    def step(q: torch.Tensor) -> torch.Tensor:
        return joint_decode(q, parts, sink, scale=0.3)

    torch.testing.assert_close(torch.compile(step, backend="eager", fullgraph=True)(q), step(q))
