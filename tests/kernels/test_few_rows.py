"""Products of a few rows with weights: which ones become one call, and the kernel against fp64.

Run as a program, this file tests the Triton kernel, interpreted on the CPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

from cllm.kernels import few_rows
from cllm.kernels.few_rows import FewRows
from tests.kernels.graph_passes import Counting, calls, compiled

SHAPES = ((2, (16,), 64), (4, (40, 64, 9), 200), (3, (1, 130), 1024), (16, (33,), 520), (5, (7, 8, 9, 10), 24))
"""M, N of each weight, and K: sizes that are no multiples of a tile."""


def factors(rows: int, sizes: tuple[int, ...], width: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Random factors. The memory behind each of them is NaN."""
    draw = torch.Generator().manual_seed(width)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=draw).to(dtype)
        memory = torch.full((values.numel() + width,), torch.nan, dtype=dtype)
        return memory[: values.numel()].view(shape).copy_(values)

    return normal(rows, width), [normal(size, width) for size in sizes]


def test_the_interpreted_kernel_multiplies(run_interpreted):
    run_interpreted(__file__)


class Block(nn.Module):
    """Products of queries, keys and values, of gate and up, and two of other inputs."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        for name, size in (("q", 32), ("k", 16), ("v", 16), ("o", 32), ("gate", 48), ("up", 48)):
            setattr(self, name, nn.Linear(32, size, bias=False, dtype=dtype))
        self.down = nn.Linear(48, 32, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        q, k, v = self.q(x), self.k(x), self.v(x)
        x = x + self.o(q + torch.cat((k, v), -1))
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def counting_few_rows(*, only: bool = False) -> Counting:
    """Counts the weights of each call, and the products that are left."""

    def count(graph):
        merged = [len(n.args[1]) for n in calls(graph, torch.ops.cllm.few_rows.default)]
        return merged, len(calls(graph, torch.ops.aten.mm.default))

    return Counting(FewRows(("cpu",)), count, only=only)


@pytest.mark.parametrize(
    ("rows", "dtype", "merged", "left"),
    [
        (4, torch.bfloat16, [3, 1, 2, 1], 0),
        (16, torch.float16, [3, 1, 2, 1], 0),
    ],
)
def test_products_of_one_input_become_one_call(rows, dtype, merged, left):
    torch.manual_seed(0)
    block, counting = Block(dtype), counting_few_rows()
    x = torch.randn(rows, 1, 32).to(dtype)
    with torch.inference_mode():
        found, wanted = compiled(block, counting)(x), block(x)
    assert counting.found == [(merged, left)]
    assert (found - wanted).norm() <= 1e-2 * wanted.norm()


@pytest.mark.parametrize(("rows", "dtype"), [(17, torch.bfloat16), (4, torch.float32)])
def test_more_rows_and_fp32_are_left_to_the_compiler(rows, dtype):
    counting = counting_few_rows(only=True)
    with torch.inference_mode(), pytest.raises(BackendCompilerFailed, match="Counted"):
        compiled(Block(dtype), counting)(torch.randn(rows, 1, 32).to(dtype))
    assert counting.found == [([], 7)]


def test_a_weight_that_is_computed_is_left_to_the_compiler():
    counting = counting_few_rows(only=True)
    weight, x = torch.randn(16, 32).bfloat16(), torch.randn(4, 32).bfloat16()
    with pytest.raises(BackendCompilerFailed, match="Counted"):
        compiled(lambda x, w: x @ (2 * w).T, counting)(x, weight)
    assert counting.found == [([], 1)]


if __name__ == "__main__":  # with TRITON_INTERPRET=1, whose products in bf16 are wrong
    for rows, sizes, width in SHAPES:
        x, weights = factors(rows, sizes, width, torch.float16)
        for y, weight in zip(few_rows.run(x, weights), weights, strict=True):
            wanted = x.double() @ weight.double().T
            assert y.shape == wanted.shape
            assert (y - wanted).abs().max() <= 2**-10 * wanted.abs().max(), (rows, sizes, width)
