"""Ways of `svd=power` to iterate: errors for spectra that are hard, and what the steps promise."""

from __future__ import annotations

import pytest
import torch

from cllm.posthoc import group, power, products
from cllm.posthoc.lowrank import right_vectors
from cllm.posthoc.registry import parse

C = 160
WAYS = [name for name in power.WAYS if name != "plain"]
DEFLATING = [name for name, way in power.WAYS.items() if way is not None and way.deflated]


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


@pytest.fixture
def way(request, monkeypatch):
    monkeypatch.setattr(power, "WAY", request.param)
    return request.param


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
def test_errors_are_near_the_least(way, spectrum, precision):
    x = matrix(SPECTRA[spectrum])
    x = x.bfloat16() if precision == "bf16" else x
    for rank in (16, 60):
        v = right_vectors(x, "power", rank, precision)[0]
        limit = 1.012 if spectrum == "slow" else 1.01
        assert (lost(x, v) < limit * least(x, rank)).all()
        torch.testing.assert_close(v.mT @ v, torch.eye(rank).expand(2, -1, -1), atol=2e-5, rtol=0)


@pytest.mark.parametrize("way", ["plain", *DEFLATING], indirect=True)
@pytest.mark.parametrize("precision", ["bf16", "tf32", "fp32"])
def test_fewer_tokens_than_channels(way, precision):
    x = matrix(SPECTRA["i^-1"]).mT[:, :100]
    x = x.bfloat16() if precision == "bf16" else x
    v = right_vectors(x, "power", 24, precision)[0]
    rounding = 2**-9 * x.float().norm() if precision == "bf16" else 0
    assert (lost(x, v) < 1.01 * least(x, 24) + rounding).all()


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("precision", ["tf32", "fp32"])
def test_a_matrix_of_lower_rank_is_exact_and_zeros_are_finite(way, precision):
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 200, 5, generator=draw) @ torch.randn(3, 5, 64, generator=draw)
    x[1] = 0
    x[2, :, 1:] = 0  # one channel
    v = right_vectors(x, "power", 9, precision)[0]
    assert v.isfinite().all()
    assert (lost(x, v) <= 1e-5 * x.flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize("way", ["plain", *WAYS], indirect=True)
@pytest.mark.parametrize("scale", [1e-6, 1e5])
def test_the_scale_does_not_matter(way, scale):
    x = matrix(SPECTRA["one 100 times"])
    v = right_vectors(scale * x, "power", 24, "tf32")[0]
    assert (lost(x, v) < 1.01 * least(x, 24)).all()


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_a_batch_is_what_each_matrix_is_alone(way):
    x = torch.cat((matrix(SPECTRA["slow"]), matrix(SPECTRA["one 100 times"])))
    v = right_vectors(x, "power", 24, "tf32")[0]
    for part, of_batch in zip(x, v, strict=True):
        alone = right_vectors(part[None], "power", 24, "tf32")[0][0]
        torch.testing.assert_close(of_batch @ of_batch.T, alone @ alone.T, atol=2e-3, rtol=0)


@pytest.mark.parametrize("way", WAYS, indirect=True)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_first_columns_are_a_basis_of_lower_rank(way, spectrum):
    x = matrix(SPECTRA[spectrum])
    v = right_vectors(x, "power", 60, "tf32")[0][:, :, :40]
    assert (lost(x, v) < 1.01 * least(x, 40)).all()


@pytest.mark.parametrize("svd", ["power,products=bf16", "random", "gram"])
def test_keys_and_values_in_one_batch_get_the_factors_of_each_alone(svd, slot_tensors, monkeypatch):
    monkeypatch.setattr(power, "WAY", "134d128")
    x = matrix(SPECTRA["i^-1"])  # 2, 400, 160
    data = [part.unflatten(2, (2, -1)).contiguous() for part in x.split(16, dim=2)]
    tensors = slot_tensors("k", data[:6]), slot_tensors("v", data[4:])
    made = []
    for joint in (False, True):
        monkeypatch.setattr(group, "JOINT", joint)
        made.append(parse(f"xkv:group=2,rank_k=6,rank_v=9,svd={svd},batched=true").encode(*tensors))
    for exact, alone, together in zip((data[:6], data[4:]), *made, strict=True):
        assert [code.b.shape for code in together] == [code.b.shape for code in alone]
        errors = [
            torch.stack([code.decode() - x for code, x in zip(codes, exact, strict=True)]).norm()
            for codes in (alone, together)
        ]
        assert 0.99 * errors[0] < errors[1] < 1.01 * errors[0]


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_half_of_the_squares_is_all_of_them(precision, monkeypatch):
    monkeypatch.setattr(products, "_BLOCK", 48)
    x = matrix(SPECTRA["i^-1/4"])
    whole = products.gram(x, precision)
    assert torch.equal(whole, whole.mT) or precision == "tf32"
    torch.testing.assert_close(products.gram(x, precision, halved=True), whole, atol=1e-6, rtol=1e-6)


def test_a_split_matrix_multiplies_as_exactly_as_fp32():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 64, 64, generator=draw), torch.randn(2, 64, 8, generator=draw)
    split = products.Split(x)
    assert torch.equal(split.high + split.low, x)
    torch.testing.assert_close(split.multiply(y).double(), x.double() @ y.double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("panel", [0, 5, 8])
def test_cholesky_factors_in_panels(panel):
    y = torch.randn(3, 40, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y[:, :, 7] = 0
    gram = y.mT @ y
    factor = power._cholesky(gram.clone(), panel)
    torch.testing.assert_close(factor @ factor.mT, gram, atol=1e-10, rtol=1e-10)
    assert torch.equal(factor, factor.tril())


def test_deflated_bases_span_what_they_did():
    draw = torch.Generator().manual_seed(0)
    before, y = torch.randn(2, 50, 12, generator=draw), torch.randn(2, 50, 12, generator=draw)
    combined, made = power._deflated(before, y, 4)
    squares = made[:, :, :4].mT @ made
    lengths = y[:, :, :4].norm(dim=1).diag_embed()
    torch.testing.assert_close(squares[:, :, :4], lengths.square(), atol=1e-4, rtol=1e-5)
    assert squares[:, :, 4:].abs().max() < 1e-4
    mixed = torch.linalg.lstsq(y, made).solution  # the same combination of columns for both
    torch.testing.assert_close(y @ mixed, made, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(before @ mixed, combined, atol=1e-4, rtol=1e-4)
