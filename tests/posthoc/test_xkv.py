"""xKV: its factors, their bytes, and decoding from them."""

from __future__ import annotations

import pytest
import torch

from cllm.config import Rope
from cllm.errors import UserError
from cllm.model.rope import apply_rope, rope_table
from cllm.posthoc.code import Rotation
from cllm.posthoc.lowrank import (
    energy_rank,
    factor_elements,
    ranks_for_budget,
    right_vectors,
)
from cllm.posthoc.registry import parse


def decaying(tokens, channels, seed=0, batch=2):
    """(B, n, C) with singular values that fall like 0.9^i."""
    draw = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(batch, tokens, min(tokens, channels), generator=draw)).Q
    v = torch.linalg.qr(torch.randn(batch, channels, min(tokens, channels), generator=draw)).Q
    return (u * 0.9 ** torch.arange(u.shape[-1])) @ v.mT


def slots(layers, tokens, seed=0, heads=2, dim=8):
    x = decaying(tokens, layers * heads * dim, seed).chunk(layers, dim=-1)
    return [t.unflatten(-1, (heads, dim)).contiguous() for t in x]


def squared_error(codes, data):
    return sum((code.decode() - t).double().square().sum().item() for code, t in zip(codes, data, strict=True))


# ---- the factors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [40, 100])
def test_the_error_of_exact_svd_is_the_discarded_singular_values(slot_tensors, tokens):
    keys, values = slots(4, tokens), slots(4, tokens, seed=1)
    codes, coded = parse("xkv:group=4,rank_k=10,rank_v=13,svd=exact").encode(
        slot_tensors("k", keys), slot_tensors("v", values)
    )
    for data, found, rank in ((keys, codes, 10), (values, coded, 13)):
        x = torch.cat([t.flatten(2) for t in data], dim=-1).double()
        discarded = torch.linalg.svdvals(x)[:, rank:].square().sum().item()
        assert squared_error(found, data) == pytest.approx(discarded, rel=1e-4)


@pytest.mark.parametrize("algorithm", ["gram", "random"])
@pytest.mark.parametrize("tokens", [40, 100, 300])
def test_fast_paths_are_within_a_percent_of_exact(slot_tensors, algorithm, tokens):
    keys, values = slots(4, tokens), slots(4, tokens, seed=1)
    errors = [
        squared_error(
            parse(f"xkv:rank_k=10,rank_v=10,svd={name}").encode(slot_tensors("k", keys), slot_tensors("v", values))[0],
            keys,
        )
        for name in ("exact", algorithm)
    ]
    assert errors[0] <= errors[1] * (1 + 1e-4)
    assert errors[1] <= errors[0] * 1.01


def test_results_repeat(slot_tensors):
    keys, values = slot_tensors("k", slots(4, 60)), slot_tensors("v", slots(4, 60))
    for algorithm in ("exact", "gram", "random"):
        once, again = (parse(f"xkv:rank_k=9,rank_v=9,svd={algorithm}").encode(keys, values)[0][1] for _ in range(2))
        assert torch.equal(once.decode(), again.decode())


def test_groups_of_one_are_svd(slot_tensors):
    keys, values = slot_tensors("k", slots(3, 30)), slot_tensors("v", slots(3, 30, seed=1))
    one = parse("xkv:group=1,rank_k=5,rank_v=7").encode(keys, values)
    other = parse("svd:rank_k=5,rank_v=7").encode(keys, values)
    for found, expected in zip(one, other, strict=True):
        assert all(torch.equal(a.decode(), b.decode()) for a, b in zip(found, expected, strict=True))
    with pytest.raises(UserError, match="group: Input should be less than or equal to 1"):
        parse("svd:group=2,ratio=2")


def test_the_last_group_may_be_short_and_keys_and_values_may_differ(slot_tensors):
    keys, values = slots(5, 80), slots(5, 80, seed=1)
    codes, coded = parse("xkv:group_k=2,group_v=3,rank_k=6,rank_v=8").encode(
        slot_tensors("k", keys), slot_tensors("v", values)
    )
    for found, groups in ((codes, [0, 0, 1, 1, 2]), (coded, [0, 0, 0, 1, 1])):
        for i, code in enumerate(found):
            assert [code.a is other.a for other in found] == [groups[i] == group for group in groups]


def test_grouping_never_hurts_on_planted_shared_subspaces(slot_tensors):
    """Four layers in one subspace of 6 dimensions over tokens: rank 6 for all is as good as rank 6 for each."""
    draw = torch.Generator().manual_seed(0)
    basis = torch.randn(1, 100, 6, generator=draw)
    data = [(basis @ torch.randn(1, 6, 16, generator=draw)).unflatten(-1, (2, 8)) for _ in range(4)]
    noisy = [t + 0.01 * torch.randn(t.shape, generator=draw) for t in data]
    empty = slot_tensors("v", [torch.zeros_like(t) for t in data])
    grouped = parse("xkv:group=4,rank_k=6,rank_v=1").encode(slot_tensors("k", noisy), empty)[0]
    single = parse("svd:rank_k=6,rank_v=1").encode(slot_tensors("k", noisy), empty)[0]
    assert squared_error(grouped, data) < squared_error(single, data)
    alone, together = (  # equal total rank: 4 · 2 = 1 · 8
        squared_error(parse(spec).encode(slot_tensors("k", noisy), empty)[0], noisy)
        for spec in ("svd:rank_k=2,rank_v=1", "xkv:group=4,rank_k=8,rank_v=1")
    )
    assert together < alone


def test_energy_chooses_the_smallest_rank_that_keeps_it(slot_tensors):
    values = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).double()  # squares 9, 4, 1 of 14
    assert [energy_rank(values, e) for e in (0.5, 9 / 14, 0.65, 13 / 14, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]
    keys = slots(4, 60)
    codes = parse("xkv:energy=0.95").encode(slot_tensors("k", keys), slot_tensors("v", keys))[0]
    total = sum(t.double().square().sum().item() for t in keys)
    assert squared_error(codes, keys) <= 0.05 * total
    rank = codes[0].b.shape[-1]
    less = parse(f"xkv:rank_k={rank - 1},rank_v=1").encode(slot_tensors("k", keys), slot_tensors("v", keys))[0]
    assert squared_error(less, keys) > 0.05 * total * 0.999


def test_padding_does_not_weigh_in(slot_tensors):
    keys = slots(2, 40)
    padded = [torch.cat((1e3 * torch.ones(2, 7, 2, 8), t), dim=1) for t in keys]
    text = (torch.arange(47) >= 7).expand(2, -1)
    method = parse("xkv:rank_k=6,rank_v=6")
    plain = method.encode(slot_tensors("k", keys), slot_tensors("v", keys))[0]
    found = method.encode(slot_tensors("k", padded, text), slot_tensors("v", padded, text))[0]
    for a, b in zip(plain, found, strict=True):
        torch.testing.assert_close(b.decode()[:, 7:], a.decode(), atol=1e-5, rtol=1e-4)


# ---- RoPE -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [None, {"type": "yarn", "factor": 4.0, "original_max_seq_len": 16}])
def test_keys_are_rotated_back_to_what_they_were(scaling, tiny_config):
    rope = Rope.model_validate({"scaling": scaling})
    starts = torch.tensor([0, 3])
    k = torch.randn(2, 20, 2, 8, generator=torch.Generator().manual_seed(0))
    positions = (torch.arange(20)[None] - starts[:, None]).clamp(min=0)
    rotated = apply_rope(k, rope_table(rope, 8, positions))
    rotation = Rotation(lambda p: rope_table(rope, 8, p), 0, 20, starts)
    torch.testing.assert_close(rotation.undo(rotated), k, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotation.redo(k), rotated)


def test_keys_are_compressed_before_rope(decoder, tokens, filled):
    """Equal tokens have equal keys before RoPE in the first layer: rank 1, whatever their positions."""
    model = decoder(n_layers=1)
    engine, cache = filled(model, torch.full((1, 30), 7))
    compressed = engine.compress(cache, parse("svd:rank_k=1,rank_v=1"))
    assert compressed.outcome.errors[0]["k"] < 1e-4
    after = torch.linalg.svdvals(cache.stores[0].slot.k.flatten(2)[0])
    assert after[1] > 0.1 * after[0]


# ---- ranks ----------------------------------------------------------------------------------------------------------


def test_the_papers_ratios():
    """Elements of the cache over elements of its factors at 64k: xKV, table 1 and the ranks of its scripts."""

    def ratio(layers, width, group, rank_k, rank_v, tokens=65536):
        factors = layers // group * sum(factor_elements(tokens, group, width, r) for r in (rank_k, rank_v))
        return 2 * layers * tokens * width / factors

    assert ratio(32, 1024, 4, 384, 576) == pytest.approx(8.03, abs=0.005)
    assert ratio(32, 1024, 1, 96, 144) == pytest.approx(8.40, abs=0.005)
    assert ratio(28, 512, 4, 256, 384) == pytest.approx(6.2, abs=0.05)
    assert ratio(32, 1024, 4, 384, 576, tokens=4096) == pytest.approx(4.27, abs=0.005)


def ranks_for_ratio(ratio, tokens, sizes):
    """Ranks for keys and values in groups of the same (layers, width)."""
    uncompressed = sum(2 * tokens * n * w for n, w in sizes)
    return ranks_for_budget(uncompressed / ratio, tokens, sizes, sizes, keys_to_values=1.5)


def test_a_ratio_gives_the_papers_ranks_at_the_papers_length():
    found_k, found_v = ranks_for_ratio(8.03, 65536, [(4, 1024)] * 8)
    assert set(found_k) <= {383, 384}
    assert set(found_v) <= {575, 576}


def test_a_short_last_group_gets_rank_1_at_least():
    """9 slots in groups of 8: an eighth of a full group's rank is below 1."""
    sizes = [(8, 256), (1, 256)]
    found = ranks_for_ratio(8, 64, sizes)
    assert found[0][1] == found[1][1] == 1 < found[0][0]
    numbers = sum(factor_elements(64, n, w, r) for ranks in found for (n, w), r in zip(sizes, ranks, strict=True))
    assert numbers <= 2 * 64 * 9 * 256 / 8
    least = sum(2 * factor_elements(64, n, w, 1) for n, w in sizes)
    assert ranks_for_budget(least, 64, sizes, sizes, keys_to_values=1.5) == ([1, 1], [1, 1])
    assert ranks_for_budget(least - 1, 64, sizes, sizes, keys_to_values=1.5) is None


@pytest.mark.parametrize("ratio", [1.3, 2.0, 4.0])
@pytest.mark.parametrize("sizes", [[(4, 16)] * 2, [(4, 16), (1, 16)], [(1, 16)] * 3])
def test_a_ratio_is_kept_and_nearly_used_up(ratio, sizes):
    tokens = 200
    ranks = ranks_for_ratio(ratio, tokens, sizes)
    pairs = list(zip((*ranks[0], *ranks[1]), sizes * 2, strict=True))
    numbers = sum(factor_elements(tokens, n, w, r) for r, (n, w) in pairs)
    budget = sum(2 * tokens * n * w for n, w in sizes) / ratio
    assert numbers <= budget
    assert numbers + sum(factor_elements(tokens, n, w, 1) for n, w in sizes * 2) > min(
        budget, sum(factor_elements(tokens, n, w, min(tokens, n * w)) for n, w in sizes * 2)
    )


def test_a_group_of_several_shapes_is_refused(slot_tensors):
    data = [torch.randn(1, 20, 2, 8), torch.randn(1, 20, 1, 8)]
    with pytest.raises(UserError, match=r"group=2: a group mixes shapes: slot 1 has \(1, 8\) a token, slot 0 has"):
        parse("xkv:group=2,ratio=2").encode(slot_tensors("k", data), slot_tensors("v", data))
    assert parse("xkv:group=1,ratio=1.2").encode(slot_tensors("k", data), slot_tensors("v", data))[0][
        1
    ].decode().shape == (1, 20, 1, 8)


def test_right_vectors_are_orthonormal():
    for x in (decaying(20, 48), decaying(80, 48)):
        for algorithm in ("exact", "gram", "random"):
            v, _ = right_vectors(x, algorithm, 12)
            torch.testing.assert_close(v.mT @ v, torch.eye(12).expand(2, -1, -1), atol=1e-5, rtol=0)
