"""Groups that are factorised as one batch, and the ranks of factors that decoding reads fast."""

from __future__ import annotations

import pytest
import torch

from cllm.posthoc import group
from cllm.posthoc.group import as_one_batch
from cllm.posthoc.methods.xkv import XKV
from cllm.posthoc.registry import parse
from tests.posthoc.operators import Operators


def noise(layers: int, tokens: int, dim: int, dtype=torch.float32) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    falling = 0.9 ** torch.arange(dim)
    return [(torch.randn(2, tokens, 2, dim, generator=draw) * falling).to(dtype) for _ in range(layers)]


@pytest.mark.parametrize(("svd", "fewer"), [("gram", 1.2), ("random", 2), ("power", 2), ("power,products=bf16", 2)])
@pytest.mark.parametrize("padded", [False, True])
def test_one_batch_gives_the_factors_of_each_group_with_fewer_launches(svd, fewer, padded, slot_tensors, monkeypatch):
    monkeypatch.setattr(group, "_JOINT", 0)  # keys and values of one batch have other factors (`test_power.py`)
    data = noise(9, 40, 8)  # four groups of two, and one of one
    text = (torch.arange(40) >= torch.tensor([[0], [5]])) if padded else None
    tensors = slot_tensors("k", data, text), slot_tensors("v", data[::-1], text)
    codes, launches = [], []
    for batched in (False, True):
        with Operators() as counted:
            codes.append(parse(f"xkv:group=2,rank_k=6,rank_v=9,svd={svd},batched={batched}".lower()).encode(*tensors))
        launches.append(counted.count)
    assert launches[1] < launches[0] / fewer
    for alone, batched in zip(*(made[0] + made[1] for made in codes), strict=True):
        assert alone.b.shape == batched.b.shape
        torch.testing.assert_close(batched.decode(), alone.decode(), atol=2e-3 if "bf16" in svd else 2e-5, rtol=0)


@pytest.mark.parametrize("svd", ["exact", "gram", "random", "power"])
def test_groups_are_one_batch_by_rule_where_it_is_faster(svd):
    for device in (torch.device("cuda"), torch.device("cpu")):
        fast = svd in ("random", "power") and device.type == "cuda"
        wanted = {"": fast, ",batched=null": fast, ",batched=true": True, ",batched=false": False}
        for option, batched in wanted.items():
            method = parse(f"xkv:group=2,rank_k=6,rank_v=9,svd={svd}{option}")
            assert isinstance(method, XKV)
            assert as_one_batch(method.batched, method.svd, device) is batched


def test_a_batch_with_an_energy_has_a_rank_for_each_group(slot_tensors):
    data = [*noise(2, 40, 8), *(t.round() for t in noise(2, 40, 8))]
    ranks = []
    for batched in (False, True):
        codes = parse(f"xkv:group=2,energy=0.9,batched={batched}".lower()).encode(
            slot_tensors("k", data), slot_tensors("v", data)
        )
        ranks.append([code.b.shape[2] for code in codes[0]])
    assert ranks[0] == ranks[1]
    assert ranks[0][0] != ranks[0][2]


def test_factors_of_16_bits_have_rows_of_whole_16_bytes(slot_tensors):
    """Zeros fill up a given rank, and change nothing; a ratio gives a rank that needs none, and is kept."""
    data = noise(2, 200, 64, torch.bfloat16)
    wide = [t.float() for t in data]
    for rank, stored in ((70, 72), (72, 72), (61, 61)):
        method = parse(f"xkv:group=2,rank_k={rank},rank_v={rank},svd=gram")  # one solver for both dtypes
        (code, _), _ = method.encode(slot_tensors("k", data), slot_tensors("v", data))
        assert code.b.shape[2] == code.a.decode().shape[2] == stored
        assert not code.b[..., rank:].any()
        assert not code.a.decode()[..., rank:].any()
        (exact, _), _ = method.encode(slot_tensors("k", wide), slot_tensors("v", wide))
        assert exact.b.shape[2] == rank, "numbers of 4 bytes have no such kernel"
        cut = (exact.a.decode().bfloat16() @ exact.b.bfloat16().mT).view_as(data[0])
        torch.testing.assert_close(code.decode(), cut, atol=2**-7, rtol=2**-7)
    for spec in ("xkv:group=2,ratio=1.6", "xkv:group=2,ratio=1.6+kivi:bits=4,group=20,residual=0"):
        codes = parse(spec).encode(slot_tensors("k", data), slot_tensors("v", data))
        assert all(code.b.shape[2] % 8 == 0 for part in codes for code in part)
        tensors = {id(t): t.nbytes for part in codes for code in part for t in code.tensors()}
        assert sum(tensors.values()) <= 4 * data[0].nbytes / 1.6
