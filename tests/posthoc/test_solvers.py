"""`svd=auto`: the solver for each dtype of a cache, and its errors, also with the TF32 products of a GPU."""

from __future__ import annotations

import pytest
import torch

from cllm.posthoc import lowrank
from cllm.posthoc.lowrank import Solver, choose_solver, right_vectors
from cllm.posthoc.registry import parse
from tests.posthoc.filled import fill
from tests.posthoc.operators import Operators
from tests.posthoc.tensor_cores import TensorCores, nearest_tf32

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
C = 160


def falling(slope: float, first: float = 1) -> torch.Tensor:
    """i^-slope, the first one multiplied."""
    values = torch.arange(1, C + 1, dtype=FP64) ** -slope
    values[0] *= first
    return values


SPECTRA = {
    "i^-1/4": falling(0.25),
    "i^-1/2": falling(0.5),
    "one 100 times": falling(0.5, 100),
    "one 1000 times": falling(0.25, 1000),
}


def matrix(values: torch.Tensor) -> torch.Tensor:
    """(1, 400, C) fp64 with these singular values, and numbers of the size of cached ones."""
    draw = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(1, n, n, generator=draw, dtype=FP64)).Q for n in (400, C))
    x = left[:, :, :C] * values @ right
    return x / x.abs().mean()


def slots(x: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """`x` (1, n, C) as two slots (1, n, 2, C / 4)."""
    return [part.unflatten(2, (2, -1)).to(dtype).contiguous() for part in x.chunk(2, dim=2)]


def encode(spec, slot_tensors, data):
    method = parse(spec)
    with TensorCores() as cores:
        codes = method.encode(slot_tensors("k", data), slot_tensors("v", data))
    return method, codes[0] + codes[1], cores.rounded


@pytest.mark.parametrize(
    ("dtype", "solver"),
    [
        (BF16, Solver("power", "tf32")),
        (FP16, Solver("power", "fp32")),
        (FP32, Solver("gram", "fp32")),
        (FP64, Solver("gram", "fp32")),
    ],
)
def test_the_solver_for_a_dtype(dtype, solver):
    assert choose_solver(dtype) == solver
    assert choose_solver(dtype, spectrum=True) == Solver("gram", "fp32")


@pytest.mark.parametrize(
    ("dtype", "options", "same"),
    [
        (BF16, "", "svd=power,products=tf32"),
        (BF16, ",svd=auto", "svd=power,products=tf32"),
        (BF16, ",products=fp32", "svd=power"),
        (FP16, "", "svd=power"),
        (FP32, "", "svd=gram"),
        (FP32, ",products=fp32", "svd=gram"),
    ],
)
@pytest.mark.parametrize("size", ["rank_k=16,rank_v=24", "ratio=3"])
def test_auto_is_that_solver_to_the_bit(dtype, options, same, size, slot_tensors):
    data = slots(matrix(SPECTRA["i^-1/2"]), dtype)
    method, auto, rounded = encode(f"xkv:group=2,{size}{options}", slot_tensors, data)
    other, given, _ = encode(f"xkv:group=2,{size},{same}", slot_tensors, data)
    for one, two in zip(auto, given, strict=True):
        assert torch.equal(one.a.decode(), two.a.decode())
        assert torch.equal(one.b, two.b)
    assert (rounded > 0) == ("tf32" in same)
    assert method.facts() == other.facts() == {"svd": other.svd, "products": other.products or "fp32"}


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("svd", ["gram", "exact", "random", "power", "power,products=bf16", "power,products=tf32"])
def test_a_given_solver_is_taken(svd, dtype, slot_tensors):
    algorithm, _, products = svd.partition(",products=")
    data = slots(matrix(SPECTRA["i^-1/2"]), dtype)
    _, codes, _ = encode(f"xkv:group=2,rank_k=16,rank_v=16,svd={svd}", slot_tensors, data)
    rows = torch.cat([part.flatten(2) for part in data], dim=2).to(BF16 if products == "bf16" else FP32)
    with TensorCores():
        vectors = right_vectors(rows, algorithm, 16, products or "fp32")[0]
    assert torch.equal(torch.cat([code.b for code in codes[:2]], dim=1), vectors.to(dtype))


@pytest.mark.parametrize("options", ["energy=0.9", "ratio=2,weight=queries,spread=true",
                                     "ratio=3,weight=queries,spread=true,codes=mixed"])  # fmt: skip
def test_all_singular_values_need_gram(options, decoder, tokens):
    model, ids = decoder().to(BF16), tokens(1, 48)
    engine, cache, method = fill(model, ids, f"xkv:group=2,{options}", ids)
    engine.compress(cache, method)
    assert method.facts() == {"svd": "gram", "products": "fp32"}


def test_weighted_errors_alone_do_not(decoder, tokens):
    model, ids = decoder().to(BF16), tokens(1, 48)
    for after in ("", "streaming:ratio=1.5+"):
        spec = f"{after}xkv:group=2,ratio=2" + ("" if after else ",weight=queries")
        engine, cache, method = fill(model, ids, spec, ids)
        assert method.facts() == {}
        engine.compress(cache, method)
        assert method.facts() == {"svd": "power", "products": "tf32"}


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("rank", [16, 60])
def test_stored_factors_are_as_good_as_exact_ones(spectrum, dtype, rank, slot_tensors):
    data = slots(matrix(SPECTRA[spectrum]), dtype)
    errors = []
    for svd in ("exact", "auto"):
        _, codes, _ = encode(f"xkv:group=2,rank_k={rank},rank_v={rank},svd={svd}", slot_tensors, data)
        made = torch.stack([code.a.decode().double() @ code.b.mT.double() for code in codes[:2]])
        errors.append((made - torch.stack([part.flatten(2) for part in data])).norm())
    assert errors[1] < 1.01 * errors[0]


@pytest.mark.parametrize("rotated", [False, True], ids=["values", "keys"])
@pytest.mark.parametrize("first", [100, 1000])
@pytest.mark.parametrize("slope", [0.25, 0.5, 1.0])
def test_more_is_lost_than_by_gram_but_less_than_by_rounding_the_cache(slope, first, rotated):
    """The last ranks are where fp32 squares no longer resolve singular values next to the largest."""
    exact = matrix(falling(slope, first))
    for dtype in (BF16, FP16):
        x = rotate(rotate(exact, 1).to(dtype).double(), -1).float() if rotated else exact.to(dtype).float()
        rounding = (x - exact).norm()
        for rank in (16, 60):
            with TensorCores():
                lost = residual(x, choose_solver(dtype).right_vectors(x, rank)[0])
            least = torch.linalg.svdvals(x.double())[0, rank:].norm()
            assert lost < 1.01 * least or (lost.square() - least.square()).sqrt() < 0.5 * rounding


def test_tf32_products_lose_more_than_rounding_to_fp16():
    """Why fp16 has fp32 products."""
    exact = matrix(falling(0.5, 1000))
    x, lost = exact.half().float(), []
    for products in ("fp32", "tf32"):
        with TensorCores():
            lost.append(residual(x, right_vectors(x, "power", 60, products)[0]))
    least = torch.linalg.svdvals(x.double())[0, 60:].norm()
    assert lost[0] < 1.01 * least
    assert (lost[1].square() - least.square()).sqrt() > (x - exact).norm()


def residual(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    x, v = x.double(), v.double()
    return (x - x @ v @ v.mT).norm()


def rotate(x: torch.Tensor, sign: int) -> torch.Tensor:
    """RoPE of four heads of 40 channels, forwards or backwards."""
    first, second = x.unflatten(2, (4, 2, 20)).unbind(3)
    angles = torch.outer(torch.arange(x.shape[1]), 1e4 ** -(torch.arange(20, dtype=FP64) / 20))[:, None]
    cos, sin = angles.cos(), sign * angles.sin()
    return torch.stack((first * cos - second * sin, first * sin + second * cos), dim=3).flatten(2)


def test_the_nearest_number_in_tf32():
    x = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 2**-11 - 2**-20, -1 - 3 * 2**-11, 0.0])
    assert nearest_tf32(x).tolist() == [1.0, 1 + 2**-10, 1 + 2**-10, 1.0, -1 - 2**-9, 0.0]
    draw = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for dtype in (BF16, FP16):
        assert torch.equal(nearest_tf32(draw.to(dtype).float()), draw.to(dtype).float())


# ---- other methods ---------------------------------------------------------------------------------------------------

OTHERS = ["shadowkv:rank=9,select=null", "shadowkv:rank=9,select=null+kivi:bits=4,residual=0", "recompute:rank=9",
          "recompute:rank=9,group=2", "recompute:rank=9,fit=input",
          "eigenattention:keep=0.4,allocation=uniform,basis=prompt"]  # fmt: skip


@pytest.mark.parametrize("spec", OTHERS)
def test_methods_with_bases_of_a_prompt_use_the_same_rule(spec, decoder, tokens, monkeypatch):
    ids = tokens(2, 48)
    for dtype, fast in ((BF16, True), (FP16, True), (FP32, False)):
        engine, cache, method = fill(decoder().to(dtype), ids, spec, ids)
        errors, solved = [], []
        for narrow in (lowrank._NARROW, {}):  # by rule, and by `gram`
            with monkeypatch.context() as patched, Operators() as counted:
                patched.setattr(lowrank, "_NARROW", narrow)
                made = engine.compress(cache, method).outcome.errors.values()
            errors.append(torch.tensor([list(each.values()) for each in made]))
            solved.append(counted.counts["_linalg_eigh"])
        assert solved[1] > 0
        assert solved[0] == (0 if fast else solved[1])
        torch.testing.assert_close(errors[0].norm(), errors[1].norm(), atol=0, rtol=0.01 if fast else 0)
