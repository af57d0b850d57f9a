"""SwiGLU within its products: the operators' arithmetic and gradients, on a CPU, where torch computes them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cllm.kernels import swiglu
from cllm.model.mlp import GatedMLP


def weights(d: int, d_ff: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=draw, dtype=dtype, requires_grad=True) for s in ((d_ff, d), (d_ff, d), (d, d_ff))]


@pytest.mark.parametrize("residual", [False, True])
def test_output_and_gradients_are_those_of_the_formula(residual):
    factors = weights(6, 10)
    draw = torch.Generator().manual_seed(1)
    x, added = (torch.randn(2, 5, 6, dtype=torch.float64, generator=draw, requires_grad=True) for _ in range(2))
    gate, up, down = factors
    plain = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down) + (added if residual else 0)
    found = swiglu.swiglu(x, *factors, added if residual else None)
    torch.testing.assert_close(found, plain)
    d_out = torch.randn_like(plain)
    leaves = (x, *factors, added) if residual else (x, *factors)
    wanted = torch.autograd.grad(plain, leaves, d_out)
    torch.testing.assert_close(torch.autograd.grad(found, leaves, d_out), wanted)


@pytest.mark.parametrize("frozen", range(3))
def test_frozen_factors_get_no_gradient_and_the_others_theirs(frozen):
    factors = weights(8, 16)
    factors[frozen].requires_grad_(False)
    x = torch.randn(3, 8, dtype=torch.float64)
    swiglu.swiglu(x, *factors).square().sum().backward()
    assert [w.grad is None for w in factors] == [i == frozen for i in range(3)]


def test_operators_keep_torchs_rules():
    """Shapes for the compiler, aliases and gradients are as registered."""
    gate, up, down = (w.detach() for w in weights(8, 16, torch.float32))
    w_in = torch.stack((gate, up), 1).flatten(0, 1)
    x, total = torch.randn(4, 8), torch.randn(2, 2, 8)
    torch.library.opcheck(torch.ops.cllm.swiglu_hidden.default, (x, w_in))
    pre, h = torch.ops.cllm.swiglu_hidden(x, w_in)
    torch.library.opcheck(torch.ops.cllm.add_product.default, (total, h, down.t()))
    torch.library.opcheck(torch.ops.cllm.swiglu_backward.default, (x, down, pre))


@pytest.mark.parametrize("compiled", [False, True])
def test_a_residual_that_others_read_stays_as_it_was(compiled):
    layer = GatedMLP(8, 16)
    layer.fused = True

    def twice(x, added):
        added = added + 1
        out = layer(x, added)
        return out, added * 2, added

    run = torch.compile(twice, fullgraph=True) if compiled else twice
    x, added = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    before = added.clone()
    out, twofold, kept = run(x, added)
    assert added.equal(before)
    assert kept.equal(before + 1)
    assert twofold.equal((before + 1) * 2)
    layer.fused = False
    torch.testing.assert_close(out, layer(x, before + 1))


@pytest.mark.parametrize("wide_residual", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_layer_gives_the_same_fused_compiled_or_not(autocast, wide_residual):
    torch.manual_seed(0)
    layer, x = GatedMLP(16, 48), torch.randn(2, 8, 16)
    residual = torch.randn(2, 8, 16, dtype=torch.bfloat16 if autocast and not wide_residual else torch.float32)
    outputs, gradients = [], []
    for fused, run in (
        (False, layer),
        (True, layer),
        (True, torch.compile(layer, fullgraph=True, backend="aot_eager")),
    ):
        layer.fused = fused
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = run(x, residual)
        out.float().square().sum().backward()
        outputs.append(out.detach())
        gradients.append([p.grad.clone() for p in layer.parameters()])
    assert {(out.dtype, g[0].dtype) for out, g in zip(outputs, gradients, strict=True)} == {
        (residual.dtype, torch.float32)
    }
    for out, found in zip(outputs[1:], gradients[1:], strict=True):
        for mine, other in zip((out, *found), (outputs[0], *gradients[0]), strict=True):
            assert (mine - other).norm() < (1e-2 if autocast else 1e-6) * other.norm()


def test_without_a_backward_products_are_torchs(monkeypatch):
    layer = GatedMLP(8, 16)
    layer.fused = True
    monkeypatch.setattr("cllm.model.mlp.swiglu", None)
    with torch.no_grad():
        layer(torch.randn(2, 8), torch.randn(2, 8))
    with pytest.raises(TypeError):
        layer(torch.randn(2, 8), torch.randn(2, 8))


@pytest.mark.parametrize(("widths", "message"), [((16, 48), None), ((16, 44), "multiples of 8, not 16 and 44")])
def test_widths(widths, message):
    reason = swiglu.unsupported(*widths)
    assert reason is message or message in reason


def test_there_are_none_on_a_cpu():
    assert swiglu.unavailable(torch.device("cpu")) == "needs a CUDA device"
