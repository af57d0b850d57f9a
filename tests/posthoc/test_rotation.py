"""RoPE of compressed keys: undone for many slots at once."""

from __future__ import annotations

import functools

import pytest
import torch

from cllm.config import Rope
from cllm.model.rope import apply_rope, rope_table
from cllm.posthoc import code
from cllm.posthoc.code import Rotation
from tests.posthoc.operators import Operators

TABLE = functools.partial(rope_table, Rope(), 8)


@pytest.mark.parametrize("stacked", [0, 2**24])
@pytest.mark.parametrize("starts", [None, [0, 3]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_keys_of_several_slots_are_rotated_back(stacked, starts, dtype, monkeypatch):
    monkeypatch.setattr(code, "_STACKED", stacked)
    draw = torch.Generator().manual_seed(0)
    keys = [torch.randn(2, 10, 3, 8, generator=draw) for _ in range(4)]
    rotation = Rotation(TABLE, 2, 10, None if starts is None else torch.tensor(starts))
    made = rotation.undo_all([rotation.redo(k).to(dtype) for k in keys])
    for k, undone in zip(keys, made, strict=True):
        assert undone.dtype == torch.float32
        torch.testing.assert_close(undone, k, atol=3e-2 if dtype.itemsize == 2 else 1e-5, rtol=1e-2)
        cos, sin = TABLE(torch.arange(2, 12)[None]) if starts is None else (None, None)
        if cos is not None and dtype.itemsize == 2:
            torch.testing.assert_close(undone, apply_rope(rotation.redo(k).to(dtype).float(), (cos, -sin)))


def test_small_keys_take_few_operators():
    keys = [torch.randn(1, 10, 3, 8).bfloat16() for _ in range(12)]
    counts = []
    for part in (keys[:1], keys):
        with Operators() as counted:
            Rotation(TABLE, 0, 10, None).undo_all(part)
        counts.append(counted.count)
    assert counts[1] < counts[0] + 6
