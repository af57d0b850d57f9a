"""Sums of products in compiled code: which become one operator, and that the result is the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from cllm.kernels.sum_products import SumProducts
from tests.kernels.graph_passes import Counting, calls, compiled

BF16 = torch.bfloat16


def counting_sums() -> Counting:
    """Counts the products in each operator, and those outside of them."""

    def count(graph):
        merged = [len(n.args[0]) for n in calls(graph, torch.ops.cllm.sum_products.default)]
        return merged, len(calls(graph, torch.ops.aten.mm.default))

    return Counting(SumProducts(("cpu",)), count)


class Layer(nn.Module):
    """x + d(a(n) * b(n) * c(n)) for n = 2 x: a sum of three gradients of n backward, and residual sums."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8, bias=False) for _ in range(4))

    def forward(self, x):
        n = 2 * x
        return x + self.d(self.a(n) * self.b(n) * self.c(n))


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_gradients_of_one_input_become_one(dtype):
    torch.manual_seed(0)
    layer, counting = Layer().to(dtype), counting_sums()
    x = torch.randn(2, 16, 8, dtype=dtype, requires_grad=True)
    d_out = torch.randn(2, 16, 8, dtype=dtype)
    results = []
    for function in (layer, compiled(layer, counting, first=True)):
        out = function(x)
        results.append([out.detach(), *torch.autograd.grad(out, (x, *layer.parameters()), d_out)])
    assert counting.found == [([], 4), ([3], 5) if dtype == BF16 else ([], 8)]
    for found, wanted in zip(*reversed(results), strict=True):
        assert (found - wanted).norm() <= (1e-2 if dtype == BF16 else 1e-6) * wanted.norm()


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x, w: x @ w + x @ w.T, ([2], 0)),
        (lambda x, w: (x @ w + x @ w.T) + ((2 * x) @ w + (3 * x) @ w), ([4], 0)),
        (lambda x, w: x + (x @ w + x @ w.T), ([2], 0)),
        (lambda x, w: x @ w + x, ([], 1)),
        (lambda x, w: x @ w + 1, ([], 1)),
        (lambda x, w: x @ w + (x @ w.T).relu(), ([], 2)),
        (lambda x, w: torch.stack(((y := x @ w) + x @ w.T, y)), ([], 2)),
        (lambda x, w: x @ w + (x @ w.T)[:1], ([], 2)),
    ],
)
def test_nothing_but_products_that_nobody_else_reads(function, left):
    torch.manual_seed(0)
    x, w = torch.randn(16, 8, dtype=BF16), torch.randn(8, 8, dtype=BF16)
    counting, traced = counting_sums(), make_fx(function, tracing_mode="fake")(x, w)
    counting(traced.graph)
    traced.recompile()
    found, wanted = traced(x, w).float(), function(x, w).float()
    assert (found - wanted).norm() < 0.02 * wanted.norm()
    assert counting.found == [left]
