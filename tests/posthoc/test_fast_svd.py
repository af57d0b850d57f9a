"""The fast algorithms for a basis: their errors relative to exact SVD, also with products in less than fp32."""

from __future__ import annotations

import pytest
import torch

from cllm.posthoc.lowrank import right_vectors


def decaying(tokens: int, channels: int, power: float) -> torch.Tensor:
    """Two matrices with singular values 1, 2^-power, 3^-power, ..."""
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(2, n, n, generator=draw)).Q for n in (tokens, channels))
    size = min(tokens, channels)
    values = torch.arange(1, size + 1) ** -power
    return left[:, :, :size] * values @ right[:, :size]


def loss(x: torch.Tensor, v: torch.Tensor) -> float:
    """||X - X V Vᵀ||."""
    return (x.double() - x.double() @ v.double() @ v.double().mT).norm().item()


@pytest.mark.parametrize("products", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("algorithm", ["random", "power"])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(300, 96), (60, 96)])
def test_errors_are_near_the_least(algorithm, products, power, shape):
    x = decaying(*shape, power)
    for rank in (8, 24):
        v, spectrum = right_vectors(x, algorithm, rank, products)
        least = loss(x, right_vectors(x, "exact", rank)[0])
        rounding = (x - x.bfloat16()).norm().item() if products == "bf16" else 0
        assert loss(x, v) < 1.01 * least + rounding, "a hundredth more, and what rounding X itself would lose"
        assert spectrum is None
        torch.testing.assert_close(v.mT @ v, torch.eye(rank).expand(2, -1, -1), atol=2e-5, rtol=0)


@pytest.mark.parametrize("algorithm", ["random", "power"])
@pytest.mark.parametrize("power", [0.25, 0.5])
def test_slow_spectra_and_high_ranks(algorithm, power):
    """Rank 3/8 of all directions, with little difference between the last values kept and the first dropped."""
    x = decaying(600, 256, power)[:1]
    for rank in (48, 96):
        least = loss(x, right_vectors(x, "exact", rank)[0])
        assert loss(x, right_vectors(x, algorithm, rank)[0]) < 1.01 * least


@pytest.mark.parametrize("algorithm", ["random", "power"])
def test_a_spike_hides_nothing_from_fp32(algorithm):
    x = decaying(400, 128, 0.5)[:1]
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    s[:, 0] *= 1000
    x = u * s[:, None] @ vt
    least = loss(x, right_vectors(x, "exact", 24)[0])
    assert loss(x, right_vectors(x, algorithm, 24)[0]) < 1.01 * least
    assert 1.1 * least < loss(x, right_vectors(x, algorithm, 24, "bf16")[0]) < 2 * least  # as the docs say


@pytest.mark.parametrize("algorithm", ["random", "power"])
def test_the_shift_lets_nothing_small_grow(algorithm):
    """Half of the singular values are 0: too large a shift would make those directions the largest."""
    x = decaying(300, 96, 0.1)[:1, :, :48] @ torch.eye(48, 96)
    for rank in (12, 36):
        least = loss(x, right_vectors(x, "exact", rank)[0])
        assert loss(x, right_vectors(x, algorithm, rank)[0]) < 1.022 * least


@pytest.mark.parametrize("algorithm", ["random", "power"])
def test_fewer_directions_than_asked_for(algorithm):
    """A matrix of rank 5, and one of zeros: the result is exact and has no NaN."""
    x = torch.randn(2, 40, 5, generator=torch.Generator().manual_seed(0)) @ torch.randn(2, 5, 24)
    x[1] = 0
    v, _ = right_vectors(x, algorithm, 9)
    assert v.isfinite().all()
    assert loss(x, v) < 1e-5 * x.norm()


def test_the_same_in_every_call():
    x = decaying(80, 48, 1.0)
    assert torch.equal(right_vectors(x, "power", 9, "bf16")[0], right_vectors(x, "power", 9, "bf16")[0])


def test_precision_of_other_products_is_left_as_it_was():
    before = torch.get_float32_matmul_precision()
    right_vectors(decaying(80, 48, 1.0), "power", 9, "tf32")
    assert torch.get_float32_matmul_precision() == before
