"""`svd=power`: errors for spectra that are hard, and what its steps promise."""

from __future__ import annotations

import pytest
import torch

from cllm.posthoc import group, power, products
from cllm.posthoc.lowrank import right_vectors
from cllm.posthoc.registry import parse
from tests.posthoc.operators import Operators

C = 160


def steps(large: dict[int, float], slope: float) -> torch.Tensor:
    """i^-slope, in which the first singular values up to each index are multiplied by a factor."""
    values = torch.arange(1, C + 1, dtype=torch.float64) ** -slope
    for until, factor in large.items():
        values[:until] *= factor
    return values


SPECTRA = {
    "slow": steps({}, 0.1),
    "i^-1/4": steps({}, 0.25),
    "i^-1": steps({}, 1.0),
    "one 100 times": steps({1: 100}, 0.5),
    "eight 30 times": steps({8: 30}, 0.25),
    "two steps": steps({4: 10, 1: 10}, 0.5),
}


def matrix(values: torch.Tensor, tokens: int = 400) -> torch.Tensor:
    """Two matrices with these singular values and other singular vectors."""
    draw = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(2, n, n, generator=draw, dtype=torch.float64)).Q for n in (tokens, len(values))
    )
    return (left[:, :, : len(values)] * values @ right).float()


def lost(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    x, v = x.double(), v.double()
    return (x - x @ v @ v.mT).flatten(1).norm(dim=1)


def least(x: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.linalg.svdvals(x.double())[:, rank:].norm(dim=1)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
def test_errors_are_near_the_least(spectrum, precision):
    x = matrix(SPECTRA[spectrum])
    x = x.bfloat16() if precision == "bf16" else x
    for rank in (16, 60):
        v = right_vectors(x, "power", rank, precision)[0]
        limit = 1.012 if spectrum == "slow" else 1.01
        assert (lost(x, v) < limit * least(x, rank)).all()
        torch.testing.assert_close(v.mT @ v, torch.eye(rank).expand(2, -1, -1), atol=2e-5, rtol=0)


@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
def test_fewer_tokens_than_channels(precision):
    x = matrix(SPECTRA["i^-1"]).mT[:, :100]
    x = x.bfloat16() if precision == "bf16" else x
    v = right_vectors(x, "power", 24, precision)[0]
    rounding = 2**-9 * x.float().norm() if precision == "bf16" else 0
    assert (lost(x, v) < 1.01 * least(x, 24) + rounding).all()


@pytest.mark.parametrize("precision", ["tf32", "fp32"])
def test_a_matrix_of_lower_rank_is_exact_and_zeros_are_finite(precision):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 200, 5, generator=draw) @ torch.randn(3, 5, 64, generator=draw)
    x[1] = 0
    x[2, :, 1:] = 0  # one channel
    v = right_vectors(x, "power", 9, precision)[0]
    assert v.isfinite().all()
    assert (lost(x, v) <= 1e-5 * x.flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize("scale", [1e-6, 1e5])
def test_the_scale_does_not_matter(scale):
    x = matrix(SPECTRA["one 100 times"])
    v = right_vectors(scale * x, "power", 24, "tf32")[0]
    assert (lost(x, v) < 1.01 * least(x, 24)).all()


def test_a_batch_is_what_each_matrix_is_alone():
    x = torch.cat((matrix(SPECTRA["slow"]), matrix(SPECTRA["one 100 times"])))
    v = right_vectors(x, "power", 24, "tf32")[0]
    for part, of_batch in zip(x, v, strict=True):
        alone = right_vectors(part[None], "power", 24, "tf32")[0][0]
        torch.testing.assert_close(of_batch @ of_batch.T, alone @ alone.T, atol=2e-3, rtol=0)


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_first_columns_are_a_basis_of_lower_rank(spectrum):
    x = matrix(SPECTRA[spectrum])
    v = right_vectors(x, "power", 60, "tf32")[0][:, :, :40]
    assert (lost(x, v) < 1.01 * least(x, 40)).all()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_keys_and_values_in_one_batch_have_the_errors_of_each_alone(precision, slot_tensors, monkeypatch):
    x = matrix(SPECTRA["i^-1"])  # 2, 400, 160
    data = [part.unflatten(2, (2, -1)).contiguous() for part in x.split(16, dim=2)]
    tensors = slot_tensors("k", data[:6]), slot_tensors("v", data[4:])
    made, launches = [], []
    for most in (0, 2**20):
        monkeypatch.setattr(group, "_JOINT", most)
        method = parse(f"xkv:group=2,rank_k=6,rank_v=9,svd=power,products={precision},batched=true")
        with Operators() as counted:
            made.append(method.encode(*tensors))
        launches.append(counted.count)
    assert launches[1] < 0.7 * launches[0]
    for exact, alone, together in zip((data[:6], data[4:]), *made, strict=True):
        assert [code.b.shape for code in together] == [code.b.shape for code in alone]
        errors = [
            torch.stack([code.decode() - x for code, x in zip(codes, exact, strict=True)]).norm()
            for codes in (alone, together)
        ]
        assert 0.99 * errors[0] < errors[1] < 1.01 * errors[0]


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_half_of_the_squares_is_all_of_them(precision, monkeypatch):
    monkeypatch.setattr(products, "_BLOCK", 36)
    x = matrix(SPECTRA["i^-1/4"])
    squares = products.gram(x, precision)
    assert torch.equal(squares, squares.mT)
    x = x.bfloat16().float() if precision == "bf16" else x
    torch.testing.assert_close(squares, x.mT @ x, atol=1e-6, rtol=1e-6)


def test_a_split_matrix_multiplies_as_exactly_as_fp32():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 64, 64, generator=draw), torch.randn(2, 64, 8, generator=draw)
    split = products.Split(x)
    assert torch.equal(split.high + split.low, x)
    torch.testing.assert_close(split.multiply(y).double(), x.double() @ y.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 8, 9])
@pytest.mark.parametrize("rows", [7, 40, 96])
def test_columns_become_orthonormal_in_order(batch, rows):
    """Also where the rows of a small batch are cut into pieces, and for a column of zeros."""
    y = torch.randn(batch, rows, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.qr(y.double())
    torch.testing.assert_close(
        power._orthonormal(y).double(), expected.Q * expected.R.diagonal(dim1=1, dim2=2).sign()[:, None]
    )
    y[:, :, 3] = 0
    q = power._orthonormal(y)
    torch.testing.assert_close(q.mT @ q, torch.eye(5).index_fill(0, torch.tensor(3), 0).expand(batch, -1, -1))


def test_deflated_bases_span_what_they_did(monkeypatch):
    monkeypatch.setattr(power, "_DEFLATED", 4)
    draw = torch.Generator().manual_seed(0)
    before, y = torch.randn(2, 50, 12, generator=draw), torch.randn(2, 50, 12, generator=draw)
    combined, made = power._deflated(before, y)
    squares = made[:, :, :4].mT @ made
    lengths = y[:, :, :4].norm(dim=1).diag_embed()
    torch.testing.assert_close(squares[:, :, :4], lengths.square(), atol=1e-4, rtol=1e-5)
    assert squares[:, :, 4:].abs().max() < 1e-4
    mixed = torch.linalg.lstsq(y, made).solution  # the same combination of columns for both
    torch.testing.assert_close(y @ mixed, made, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(before @ mixed, combined, atol=1e-4, rtol=1e-4)
