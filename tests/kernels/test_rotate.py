"""RoPE of many keys as one kernel, against `apply_rope`."""

from __future__ import annotations

import pytest
import torch

from cllm.config import Rope
from cllm.errors import UserError
from cllm.kernels.rotate import rotate
from cllm.model.rope import apply_rope, rope_table


def compare(kernel: str) -> None:
    """Sizes that are no multiples of a tile, padding, stacks of batches, and keys behind sinks."""
    draw = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for dim, heads, tokens, starts, stack in (
            (16, 1, 5, None, 1), (64, 3, 70, [0, 3], 1), (128, 2, 33, [0, 3], 3), (32, 2, 40, None, 4),
        ):  # fmt: skip
            columns = torch.arange(2, 2 + tokens)[None]
            positions = columns if starts is None else (columns - torch.tensor(starts)[:, None]).clamp(min=0)
            table = rope_table(Rope(), dim, positions)
            batch = stack * (2 if starts is None else len(starts))
            k = torch.randn(batch, tokens + 4, heads, dim, generator=draw).to(dtype)[:, 4:]
            found = rotate(k, *table, kernel=kernel)
            repeated = [part.repeat(batch // len(part), 1, 1, 1, 1) for part in table]
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, apply_rope(k.float(), tuple(repeated)), atol=1e-6, rtol=1e-6)


def test_plain_torch_is_the_definition():
    compare("reference")


def test_what_the_kernel_cannot_compute_is_computed_by_torch():
    k, table = torch.randn(1, 5, 1, 12).double(), rope_table(Rope(), 12, torch.arange(5)[None])
    torch.testing.assert_close(rotate(k, *table), apply_rope(k.float(), table))
    with pytest.raises(UserError, match='rotate: kernel is "triton", which cannot'):
        rotate(k, *table, kernel="triton")


def test_triton_kernel_interpreted_is_the_definition(run_interpreted):
    run_interpreted(__file__)


if __name__ == "__main__":
    torch.set_num_threads(1)
    compare("triton")
