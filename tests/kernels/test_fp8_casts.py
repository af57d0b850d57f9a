"""Casts to fp8 in compiled code: which clamps go, which copies are written once, and that values stay.

`tests/gpu/test_fp8.py` has what the GPU's casts do beyond the range.
"""

from __future__ import annotations

import pytest
import torch
from torch._inductor import inductor_prims
from torch.fx.experimental.proxy_tensor import make_fx

from cllm.kernels.fp8_casts import FP8_CASTS, Fp8Casts
from tests.kernels.graph_passes import Counting, calls, compiled

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
aten = torch.ops.aten


def counting_casts() -> Counting:
    """Counts the clamps, and the copies that are written once."""

    def count(graph):
        clamps = calls(graph, aten.clamp_min.default, aten.clamp_max.default)
        return len(clamps), len(calls(graph, inductor_prims.force_stride_order))

    return Counting(Fp8Casts(("cpu",)), count)


def cast(x, dtype, bound=None, low=None):
    """As torchao casts: clamped to the range first."""
    bound = torch.finfo(dtype).max if bound is None else bound
    return x.float().clamp(min=-bound if low is None else low, max=bound).to(dtype)


def both_layouts(x, dtype, readers):
    """A cast by rows, and the sums of `readers` functions of its transposed copy."""
    rows = cast(x, dtype)
    columns = rows.t().contiguous().t()
    return rows, *(torch.flip(columns.float(), [n % 2]) * (n + 1) for n in range(readers))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_compiled_casts_are_the_same_without_their_clamp(dtype):
    torch.manual_seed(0)
    x, counting = 100 * torch.randn(33, 48, dtype=torch.bfloat16), counting_casts()
    found = compiled(cast, counting)(x, dtype)
    assert counting.found == [(0, 0)]
    assert torch.equal(found.view(torch.uint8), cast(x, dtype).view(torch.uint8))


@pytest.mark.parametrize(("readers", "once"), [(1, 0), (2, 1), (3, 1)])
def test_a_transposed_copy_with_several_readers_is_written_once(readers, once):
    torch.manual_seed(0)
    x, counting = torch.randn(32, 48), counting_casts()
    found = compiled(both_layouts, counting)(x, E4M3, readers)
    assert counting.found == [(0, once)]
    for a, b in zip(found, both_layouts(x, E4M3, readers), strict=True):
        assert torch.equal(a.float(), b.float())


def decomposed(function, *inputs):
    """The graph of a function, a clamp as the compiler has it: two operators."""

    def clamp(x, low, high):
        return aten.clamp_max.default(aten.clamp_min.default(x, low), high)

    def to(x, **kwargs):
        return torch.ops.prims.convert_element_type.default(x, kwargs["dtype"])

    table = {aten.clamp.default: clamp, aten._to_copy.default: to}
    return make_fx(function, decomposition_table=table, tracing_mode="fake")(*inputs)


@pytest.mark.parametrize(
    ("function", "left"),
    [
        (lambda x: cast(x, E4M3), 0),
        (lambda x: cast(x, E5M2), 0),
        (lambda x: cast(x, E4M3, bound=400.0), 2),
        (lambda x: cast(x, E4M3, low=0.0), 2),
        (lambda x: cast(x, E5M2, bound=448.0), 2),
        (lambda x: cast(x, E4M3, bound=57344.0), 2),
        (lambda x: x.clamp(min=-448, max=448).to(torch.bfloat16), 2),
        (lambda x: ((y := x.clamp(min=-448, max=448)).to(E4M3), y), 2),
    ],
)
def test_only_clamps_to_the_full_range_before_a_cast_are_removed(function, left):
    counting, traced = counting_casts(), decomposed(function, torch.randn(4, 8))
    counting(traced.graph)
    assert counting.found == [(left, 0)]
    x = torch.linspace(-300, 300, 32).view(4, 8)
    traced.recompile()
    found, wanted = traced(x), function(x)
    for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (found, wanted)), strict=True):
        assert torch.equal(a.float(), b.float())


def test_graphs_of_other_devices_do_not_change():
    traced = decomposed(lambda x: cast(x, E4M3), torch.randn(4, 8))
    before = traced.code
    FP8_CASTS(traced.graph)
    traced.recompile()
    assert traced.code == before
