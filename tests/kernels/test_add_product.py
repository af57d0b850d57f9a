"""Sums with products in compiled code: which become one, and that the result is the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cllm.kernels.add_product import AddProducts

BF16 = torch.bfloat16


class Counting(AddProducts):
    """Counts what it leaves in each graph: (sums with products, products)."""

    def __init__(self):
        super().__init__(("cpu",))
        self.found: list[tuple[int, int]] = []

    def __call__(self, graph):
        super().__call__(graph)
        names = [str(node.target) for node in graph.nodes]
        self.found.append((names.count("cllm.add_product.default"), names.count("aten.mm.default")))

    def uuid(self):
        return None


class Layer(nn.Module):
    """x + W3 (a(n) * b(n)) for n = 2 x: a residual sum forward, a sum of two gradients of n backward."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8, bias=False) for _ in range(3))

    def forward(self, x):
        n = 2 * x
        return x + self.c(self.a(n) * self.b(n))


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_residual_and_gradient_sums_become_one_product(dtype):
    torch.manual_seed(0)
    layer, counting = Layer().to(dtype), Counting()
    x = torch.randn(2, 16, 8, dtype=dtype, requires_grad=True)
    d_out = torch.randn(2, 16, 8, dtype=dtype)
    torch._dynamo.reset()
    run = torch.compile(layer, fullgraph=True, dynamic=False, options={"post_grad_custom_pre_pass": counting})
    results = []
    for function in (layer, run):
        out = function(x)
        results.append([out.detach(), *torch.autograd.grad(out, (x, *layer.parameters()), d_out)])
    assert counting.found == ([(1, 2), (1, 5)] if dtype == BF16 else [(0, 3), (0, 6)])
    for found, wanted in zip(*reversed(results), strict=True):
        assert (found - wanted).norm() <= (1e-2 if dtype == BF16 else 1e-6) * wanted.norm()


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: (x @ w) + 1,
        lambda x, w: (x @ w) + x[:1],
        lambda x, w: (x @ w) + x.float(),
        lambda x, w: (x @ w).view(2, 8, 8) + x.view(8, 2, 8).transpose(0, 1),
        lambda x, w: torch.stack(((y := x @ w) + x, y)),
    ],
)
def test_other_sums_stay(function):
    x, w = torch.randn(16, 8, dtype=BF16), torch.randn(8, 8, dtype=BF16)
    torch._dynamo.reset()
    counting = Counting()
    run = torch.compile(function, dynamic=False, options={"post_grad_custom_pre_pass": counting})
    torch.testing.assert_close(run(x, w), function(x, w), atol=0.1, rtol=0.02)
    assert counting.found == [(0, 1)]
