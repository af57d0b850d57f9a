"""Compression on a GPU, which factors groups in parallel on separate streams, or as one batch."""

from __future__ import annotations

import pytest
import torch

from cllm.config import Rope
from cllm.kernels.rotate import rotate
from cllm.model.rope import apply_rope, rope_table
from cllm.posthoc.lowrank import LowRank, right_vectors
from cllm.posthoc.parallel import run_in_parallel
from cllm.posthoc.registry import parse
from cllm.posthoc.slots import SlotTensors

LAYERS, GROUP, TOKENS = 12, 2, 700


def part(kind: str, device: torch.device, layers: range) -> SlotTensors:
    draw = torch.Generator(device).manual_seed(0)
    every = [torch.randn(2, TOKENS, 4, 32, device=device, generator=draw) for _ in range(LAYERS)]
    data = tuple(every[i].cumsum(-1).bfloat16() for i in layers)
    return SlotTensors(kind, tuple(layers), data, torch.bfloat16)


@pytest.mark.parametrize("batched", ["true", "false"])
@pytest.mark.parametrize("spec", ["svd=auto", "svd=power", "svd=power,products=bf16", "svd=random", "svd=gram"])
def test_groups_run_together_are_what_each_is_alone(gpu: torch.device, spec: str, batched: str) -> None:
    method = parse(f"xkv:group={GROUP},rank_k=40,rank_v=56,{spec},batched={batched}")
    for _ in range(3):  # memory of one call is used again in the next
        keys, values = method.encode(part("k", gpu, range(LAYERS)), part("v", gpu, range(LAYERS)))
    for first in range(0, LAYERS, GROUP):
        layers = range(first, first + GROUP)
        alone_k, alone_v = method.encode(part("k", gpu, layers), part("v", gpu, layers))
        for i, k, v in zip(layers, alone_k, alone_v, strict=True):
            for found, expected in ((keys[i], k), (values[i], v)):
                assert found is not None
                assert expected is not None
                torch.testing.assert_close(found.decode(), expected.decode(), atol=2e-2, rtol=2e-2)


def test_what_one_job_raises_is_raised_after_the_others(gpu: torch.device) -> None:
    made: list[torch.Tensor] = []

    def work() -> None:
        assert not torch.is_grad_enabled()
        made.append(torch.linalg.cholesky_ex(torch.eye(64, device=gpu)).L.sum())

    def fail() -> None:
        raise ValueError("no")

    with torch.no_grad():
        with pytest.raises(ValueError, match="no"):
            run_in_parallel([fail, *[work] * 20], gpu)
        made.clear()
        run_in_parallel([work] * 20, gpu)
    assert torch.stack(made).tolist() == [64.0] * 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [16, 64, 128])
def test_keys_are_rotated_by_one_kernel(gpu: torch.device, dtype: torch.dtype, dim: int) -> None:
    positions = torch.arange(1000, device=gpu)[None] + torch.tensor([[0], [7]], device=gpu)
    table = rope_table(Rope(), dim, positions)
    k = torch.randn(6, 1004, 3, dim, device=gpu).to(dtype)[:, 4:]
    expected = apply_rope(k.float(), (table[0].repeat(3, 1, 1, 1, 1), table[1].repeat(3, 1, 1, 1, 1)))
    torch.testing.assert_close(rotate(k, *table, kernel="triton"), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("products", ["fp32", "tf32", "bf16"])
def test_power_is_near_the_least_error(gpu: torch.device, products: str) -> None:
    draw = torch.Generator(gpu).manual_seed(0)
    x = torch.randn(1, 2000, 512, device=gpu, generator=draw) * torch.arange(1, 513, device=gpu) ** -0.5

    def lost(v: torch.Tensor) -> float:
        wide = x.double()
        return (wide - wide @ v.double() @ v.double().mT).norm().item()

    least = lost(right_vectors(x, "exact", 96)[0])
    assert lost(right_vectors(x, "power", 96, products)[0]) < 1.01 * least


@pytest.mark.parametrize("first", [1, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_default_solver_is_near_the_least_error(gpu: torch.device, dtype: torch.dtype, first: float) -> None:
    """With the products of tensor cores, also where one direction is much larger than the others."""
    draw = torch.Generator(gpu).manual_seed(0)
    sizes = torch.arange(1, 513, device=gpu) ** -0.5
    sizes[0] *= first
    mixed = torch.linalg.qr(torch.randn(512, 512, device=gpu, generator=draw)).Q
    k = (torch.randn(1, 2000, 512, device=gpu, generator=draw) * sizes @ mixed).unflatten(2, (8, 64)).to(dtype)
    wide, errors = k.flatten(2).double(), []
    for svd in ("exact", "auto"):
        method = parse(f"svd:rank_k=96,rank_v=96,svd={svd}")
        (code,), _ = method.encode(SlotTensors("k", (0,), (k,), dtype), SlotTensors("v", (0,), (k,), dtype))
        assert isinstance(code, LowRank)
        errors.append((code.a.decode().double() @ code.b.double().mT - wide).norm())
    assert errors[1] < 1.01 * errors[0]
