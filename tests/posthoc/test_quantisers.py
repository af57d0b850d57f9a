"""int8, fp8, TurboQuant, KVQuant and KVTC against slow references, their papers' bounds and bytes, and in caches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicCache

from cllm.cache.cache import KVCache
from cllm.cache.copies import copy_store
from cllm.errors import UserError
from cllm.posthoc.bit_planes import pack_codes, planes, unpack_codes
from cllm.posthoc.cache import compress_cache
from cllm.posthoc.engine import engine_of
from cllm.posthoc.entropy import Streams, compress, decompress, shared_streams
from cllm.posthoc.hf import compress_dynamic
from cllm.posthoc.methods.kvquant import fit_levels
from cllm.posthoc.methods.turboquant import levels, projection, rotation
from cllm.posthoc.registry import parse
from cllm.posthoc.sensitivity import sensitivities
from cllm.prefix.at_rest import method_at_rest

CPU = torch.device("cpu")
PREFIX, LENGTH = 40, 48
SPECS = [
    "int8", "fp8:keys=token", "turboquant:bits=3", "turboquant:bits=2,sketch=true", "kvquant:bits=3,outliers=0.06",
    "kvtc:ratio=1.5,group=2,recent=3",
]  # fmt: skip

NEAR = {"kvquant": 0.03, "kvtc": 0.4}
"""Largest relative difference of a padded sequence and the same alone: levels of KVQuant are fitted to counts in bins,
which rounding changes; KVTC's budget counts padding."""


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nbytes(codes):
    return sum({id(t): t.nbytes for code in codes for t in code.tensors()}.values())


# ---- packed and entropy-coded numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_any_width_are_packed_in_planes(bits):
    codes = torch.randint(2**bits, (3, 21), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (3, sum(-(-21 * width // 8) for width in planes(bits)))
    assert sum(planes(bits)) == bits
    assert torch.equal(unpack_codes(packed, bits, 21), codes)


def test_numbers_are_entropy_coded_near_their_entropy():
    wide = torch.tensor([[0, -1, 1, 127, -128, 128, 40000, -(2**30), 2**30], [0] * 9], dtype=torch.int32)
    for numbers in (wide, wide.T, wide[:, :0], wide[:0], torch.zeros(5, 3, dtype=torch.int32)):
        assert torch.equal(decompress(compress(numbers) + b"\0\0\0"), numbers)
    for deviation in (0.3, 0.5, 1.0, 5.0):
        q = (noise(2000, 60) * deviation).round().int()
        shares = q.unique(return_counts=True)[1] / q.numel()
        entropy = -(shares * shares.log2()).sum().item()
        assert entropy < 8 * len(compress(q)) / q.numel() < 1.07 * entropy + 0.01
    streams = [Streams.of([[compress(wide[:1]), compress(wide)], [compress(wide[:1])] * 2], CPU) for _ in range(3)]

    def decompress_rows(codes: Streams) -> list[torch.Tensor]:
        return codes.each_row(1, lambda row, numbers: numbers)

    with shared_streams():
        first = [decompress_rows(stream)[0] for stream in streams]
        assert all(torch.equal(numbers, wide) for numbers in first)
        assert decompress_rows(streams[2])[0] is first[2]
        assert decompress_rows(streams[0])[0] is not first[0]  # only two are kept
    assert decompress_rows(streams[0])[0] is not decompress_rows(streams[0])[0]
    data = compress(wide)
    for damaged in (data[:6], data[:-3], data[:9] + b"\xff\xff" + data[11:]):
        with pytest.raises(ValueError, match="an entropy code is damaged"):
            decompress(damaged)


# ---- int8 and fp8 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "largest"), [("int8", 127), ("fp8", 448)])
def test_numbers_of_8_bits_have_the_scale_of_their_channel_or_token(name, largest, slot_tensors):
    k, v = noise(2, 9, 2, 4), noise(2, 9, 2, 4, seed=1)
    (found_k,), (found_v,) = parse(name).encode(slot_tensors("k", [k]), slot_tensors("v", [v]))
    for x, code, axis in ((k, found_k, 1), (v, found_v, 3)):
        vectors, decoded = x.movedim(axis, -1).reshape(-1, x.shape[axis]), code.decode().movedim(axis, -1)
        for vector, found in zip(vectors, decoded.reshape(vectors.shape), strict=True):
            scale = vector.abs().max() / largest
            for number, got in zip(vector.tolist(), found.tolist(), strict=True):
                most = scale / 2 if name == "int8" else max(abs(number) / 16, scale * 2**-10)
                assert abs(number - got) <= most * 1.0001
    assert nbytes([found_k, found_v]) == 2 * 2 * 9 * 8 + 4 * (2 * 8 + 2 * 9 * 2)  # numbers, and scales in fp32


# ---- TurboQuant -----------------------------------------------------------------------------------------------------


def test_levels_are_those_of_lloyd_and_max():
    """Of a normal variable (Max, 1960) in many dimensions; in few, each level is the mean of its cell."""
    for bits, error in ((1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)):
        table = levels(2048, bits, CPU) * math.sqrt(2048)
        x = noise(200_000)
        assert (x[:, None] - table).abs().amin(1).square().mean() == pytest.approx(error, rel=0.02)
    table, x = levels(6, 2, CPU), torch.nn.functional.normalize(noise(200_000, 6), dim=1)[:, 0]
    cell = (x[:, None] - table).abs().argmin(1)
    means = torch.stack([x[cell == i].mean() for i in range(4)])
    torch.testing.assert_close(table, means, atol=3e-3, rtol=0)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_turboquant_is_within_its_bound_for_any_direction(bits, slot_tensors):
    """Theorem 1, for one channel alone, equal channels, and few large ones; without a rotation they exceed it."""
    dim, bound = 64, math.sqrt(3) * math.pi / 2 * 4**-bits
    one = torch.eye(dim)
    equal = torch.sign(noise(dim, dim))
    large = noise(dim, dim) * (1 + 50 * (torch.arange(dim) < 3))
    for x in (one, equal, large):
        code = parse(f"turboquant:bits={bits}").encode(slot_tensors("k", [x[None, :, None]]), None)[0][0]
        error = ((code.decode()[0, :, 0] - x).norm(dim=1) / x.norm(dim=1)).square().mean().item()
        assert 4**-bits < error < bound
        assert nbytes([code]) == dim * (dim * bits // 8 + 4)


@pytest.mark.parametrize("sketch", [False, True])
def test_turboquant_is_its_equations(sketch, slot_tensors):
    x, bits, dim = noise(2, 3, 2, 8), 3, 8
    spec = f"turboquant:bits={bits},seed=5,sketch={str(sketch).lower()}"
    (code,), (values,) = parse(spec).encode(slot_tensors("k", [x]), slot_tensors("v", [x]))
    assert values.bits == 3  # no sketch of values
    pi, s = rotation(dim, 5, CPU), projection(dim, 5, CPU)
    torch.testing.assert_close(pi @ pi.T, torch.eye(dim), atol=1e-6, rtol=0)
    table, found = levels(dim, bits - sketch, CPU).tolist(), code.decode()
    for b, n, h in np.ndindex(2, 3, 2):
        vector = x[b, n, h]
        u = pi @ vector / vector.norm()
        near = torch.tensor([min(table, key=lambda level: abs(level - value)) for value in u.tolist()])
        if sketch:
            rest = u - near
            near = near + rest.norm() * math.sqrt(math.pi / 2) / dim * s.T @ torch.sign(s @ rest)
        torch.testing.assert_close(found[b, n, h], vector.norm() * pi.T @ near, atol=1e-5, rtol=1e-5)


def test_a_sketch_makes_products_unbiased(slot_tensors):
    """Theorem 2, over rotations; levels alone shrink products, by 2 / π at one bit."""
    dim, bits, seeds = 16, 2, 150
    x, y = noise(dim), noise(dim, seed=1)
    y = y + 2 * x
    means = {}
    keys = slot_tensors("k", [x.view(1, 1, 1, -1)])
    for name, spec in (("sketch", f"bits={bits},sketch=true"), ("levels", "bits=1")):
        products = torch.stack([
            parse(f"turboquant:{spec},seed={seed}").encode(keys, None)[0][0].decode()
            for seed in range(seeds)
        ]).flatten(1) @ y  # fmt: skip
        means[name], variance = (products.mean() / (x @ y)).item(), products.var().item()
        if name == "sketch":
            bound = math.sqrt(3) * math.pi**2 * (y.norm() * x.norm()).item() ** 2 * 4**-bits / dim
            assert variance < bound
            assert abs(products.mean() - x @ y) < 4 * math.sqrt(variance / seeds)
    assert means["levels"] == pytest.approx(2 / math.pi, abs=0.04)


# ---- KVQuant --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kmeans", "uniform"])
def test_kvquant_is_its_equations(kind, slot_tensors):
    k, v = noise(2, 50, 2, 8) ** 3, noise(2, 50, 2, 8, seed=1) ** 3
    method = parse(f"kvquant:bits=3,outliers=0.1,levels={kind}")
    (of_k,), (of_v,) = method.encode(slot_tensors("k", [k]), slot_tensors("v", [v]))
    equal = of_k.levels.diff(dim=1)
    assert torch.allclose(equal, torch.tensor(2 / 7)) == (kind == "uniform")
    for x, code, count in ((k.flatten(2).mT, of_k, 5), (v.flatten(2), of_v, 2)):
        found = code.decode().flatten(2)
        found = found.mT if code.per_channel else found
        for b, i in np.ndindex(x.shape[:2]):
            vector, got = x[b, i], found[b, i]
            order = (vector - vector.median()).abs().argsort(descending=True)
            assert set(order[:count].tolist()) == set(code.index[b, i].tolist())
            assert torch.equal(got[order[:count]], vector[order[:count]])
            rest = vector[order[count:]]
            middle, half = (rest.max() + rest.min()) / 2, (rest.max() - rest.min()) / 2
            values = middle + half * code.levels[b]
            nearest = values[(rest[:, None] - values).abs().argmin(1)]
            torch.testing.assert_close(got[order[count:]], nearest, atol=1e-5, rtol=1e-5)
    # codes of 3 bits, middle and half of each vector, levels, and outliers of 4 bytes with positions of one
    assert nbytes([of_k]) == 2 * (50 * 16 * 3 // 8 + 4 * (2 * 16 + 8) + 16 * 5 * (4 + 1))
    assert nbytes([of_v]) == 2 * (50 * 16 * 3 // 8 + 4 * (2 * 50 + 8) + 50 * 2 * (4 + 1))


def test_levels_are_the_means_of_their_cells():
    unit = (noise(2, 4000) / 5).clamp(-1, 1) * torch.tensor([[1.0], [0.3]])
    counted = torch.arange(4000) % 3 > 0
    table = fit_levels(unit, counted.expand(2, -1), 3)
    for row in range(2):
        x = unit[row, counted]
        cell = (x[:, None] - table[row]).abs().argmin(1)
        means = torch.stack([x[cell == i].mean() for i in range(8)])
        torch.testing.assert_close(table[row], means, atol=4e-3, rtol=0)  # 2048 bins
    assert table[1].abs().max() < 0.5 * table[0].abs().max()  # each sequence has its own


def test_gradients_of_keys_and_values_are_those_of_the_loss(decoder, tokens):
    """Against differences of the loss; in cla two layers read each slot."""
    model, ids = decoder({"preset": "cla"}, n_layers=4).double(), tokens(1, 12)
    engine = engine_of(model)
    (found,) = sensitivities(engine, ids, "levels=fisher")
    assert {slot for slot, _ in found} == set(model.plan.slots)
    for place in ((0, "k"), (0, "v"), (2, "k")):
        linear = engine.projections(place[0])[place[1] == "v"]
        for token, channel in ((1, 3), (7, 9)):
            losses = []
            for step in (5e-3, -5e-3):

                def change(_, args, y, step=step, token=token, channel=channel):
                    y = y.clone()
                    y[0, token, channel] += step
                    return y

                handle = linear.register_forward_hook(change)
                logits = model(ids[:, :-1])[0]
                handle.remove()
                losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item())
            expected = (losses[0] - losses[1]) / 1e-2
            assert found[place].gradient[0, token, channel].item() == pytest.approx(
                expected, rel=1e-2, abs=1e-3
            )  # RoPE is fp32
    assert not any(p.requires_grad for p in model.parameters())


def test_levels_weighted_by_gradients(decoder, tokens):
    """KVQuant's: one table for each slot and kind, the means of their cells with the weights (h ∂loss/∂x)²."""
    model, text, ids = decoder({"preset": "cla"}), tokens(1, 120, seed=3), tokens(2, PREFIX)
    model.head.weight.mul_(4)
    engine, spec = engine_of(model), "kvquant:bits=2,bits_v=3,outliers=0.05,sinks=2"
    method: Any = parse(f"{spec},levels=fisher")
    method.prepare(engine, text)
    (found,) = sensitivities(engine, text, "")
    for (slot, kind), of in found.items():
        levels, weighted, total = method._tables[slot, kind], [], []
        x, g = (t[0, 2:].T if kind == "k" else t[0, 2:] for t in (of.x, of.gradient))  # vectors
        for vector, gradient in zip(x, g, strict=True):
            count = round(0.05 * len(vector))
            kept = (vector - vector.median()).abs().argsort(descending=True, stable=True)[count:]
            rest = vector[kept]
            middle, half = (rest.max() + rest.min()) / 2, (rest.max() - rest.min()) / 2
            weighted.append((rest - middle) / half)
            total.append((gradient[kept] * half).double().square())
        unit, weight = torch.cat(weighted), torch.cat(total)
        assert len(levels) == (4 if kind == "k" else 8)
        cell = (unit[:, None] - levels).abs().argmin(1)
        for i, level in enumerate(levels):
            mean = (weight * unit)[cell == i].sum() / weight[cell == i].sum()
            assert level.item() == pytest.approx(mean.item(), abs=4e-3)  # 2048 bins
    cache = engine.new_cache()
    engine.hidden(ids, cache)
    plain, fisher = (engine.compress(cache, m) for m in (parse(spec), method))
    assert fisher.nbytes() == plain.nbytes()
    for slot, store in fisher.stores.items():
        for part in "kv":
            code = getattr(store.prefix, part)
            assert torch.equal(code.levels, method._tables[slot, part].expand(2, -1))
    assert method.weight_bytes() == 0, "levels are in the cache"


def test_weighted_levels_lower_the_weighted_error(decoder, tokens):
    model, text = decoder(), tokens(1, 200, seed=3)
    model.head.weight.mul_(4)
    engine, errors = engine_of(model), []
    cache = engine.new_cache()
    engine.hidden(text[:, :-1], cache)
    (found,) = sensitivities(engine, text, "")
    for kind in ("kmeans", "fisher"):
        method = parse(f"kvquant:bits=2,outliers=0,sinks=0,levels={kind}")
        method.prepare(engine, text)
        compressed = engine.compress(cache, method)
        total = 0.0
        for (slot, part), of in found.items():
            read = getattr(compressed.stores[slot].prefix, part).decode().flatten(2)
            total += ((read - of.x) * of.gradient).square().sum().item()
        errors.append(total)
    assert errors[1] < 0.95 * errors[0]


def test_later_blocks_have_the_calibrated_levels(decoder, tokens):
    model, ids = decoder(), tokens(2, LENGTH)
    engine = engine_of(model)
    method: Any = parse("kvquant:bits=3,levels=fisher,every=4")
    method.prepare(engine, tokens(1, 60, seed=1))
    cache = engine.new_cache()
    engine.hidden(ids[:, :PREFIX], cache)
    compressed = engine.compress(cache, method)
    object.__setattr__(compressed.method, "_tables", {})  # as in a cache that was stored
    engine.logits(ids[:, PREFIX:], compressed)
    for slot, store in compressed.stores.items():
        grown = store.prefix.v
        assert grown.blocks.levels.shape == (2, 2, 8)
        assert torch.equal(grown.blocks.levels, method._tables[slot, "v"].expand(2, 2, -1))


def test_what_weighted_levels_refuse(decoder, design, tokens):
    method, text = parse("kvquant:levels=fisher"), tokens(1, 30)
    engine = engine_of(decoder())
    cache = engine.new_cache()
    engine.hidden(text, cache)
    with pytest.raises(UserError, match="kvquant: levels=fisher is not calibrated for slot 0: call prepare"):
        engine.compress(cache, method)
    for model in (decoder(qk_norm=True), design("mla")):
        with pytest.raises(UserError, match=r"kvquant: levels=fisher needs gradients of keys before RoPE: .*allowed"):
            method.prepare(engine_of(model), text)
    with pytest.raises(UserError, match="4 calibration tokens, and sinks=4 are left out"):
        method.prepare(engine, text[:, :4])
    with pytest.raises(UserError, match="levels=fisher takes pieces of 256 tokens, all of them sinks"):
        parse("kvquant:levels=fisher,sinks=300").prepare(engine, tokens(1, 320))


# ---- KVTC -----------------------------------------------------------------------------------------------------------


def test_kvtc_rounds_principal_components(slot_tensors):
    base = noise(2, 120, 6)
    data = [
        (base @ noise(2, 6, 16, seed=i) + 0.1 * noise(2, 120, 16, seed=i + 9) + 3).unflatten(2, (2, 8)) for i in (1, 2)
    ]
    keys, values = slot_tensors("k", data), slot_tensors("v", data[::-1])
    codes, coded_values = parse("kvtc:ratio=12,group=2").encode(keys, values)
    assert codes[0].components is codes[1].components
    for row in range(2):
        x = [t.flatten(2)[row].double() for t in data]
        x = [(t - t.mean(0)) / (t - t.mean(0)).square().mean().sqrt() for t in x]
        _, _, vt = np.linalg.svd(torch.cat(x, 1).numpy(), full_matrices=False)
        a, step = codes[0].components.decode()[row][0], codes[0].components.step[row]
        exact = torch.cat(x, 1).float() @ torch.from_numpy(vt.T).float()[:, : a.shape[1]]
        signs = torch.sign((a * exact).sum(0))
        assert 5 < a.shape[1] < 16
        assert (a - exact * signs).abs().max() <= step * 0.51
        for i, code in enumerate(codes):
            steps = step / a.norm(dim=0)
            b = code.components.streams.numbers(row, code.place).float() * steps
            of_slot = torch.from_numpy(vt.T).float()[16 * i : 16 * i + 16, : a.shape[1]] * signs
            assert ((b - of_slot).abs() / steps).max() <= 0.51
            wanted = (a @ b.T) * code.scale[row] + code.mean[row]
            torch.testing.assert_close(code.decode()[row].flatten(1), wanted)
    uncompressed = 2 * sum(t.nbytes for t in data)
    assert 0.95 < 12 * nbytes([*codes, *coded_values]) / uncompressed <= 1
    errors = [
        (parse(f"kvtc:ratio={ratio}").encode(keys, values)[0][0].decode() - data[0]).norm() for ratio in (2, 4, 8, 12)
    ]
    assert errors == sorted(errors)
    assert errors[0] < errors[1] / 3


@pytest.mark.parametrize("ratio", [3, 6])
@pytest.mark.parametrize("starts", [None, [0, 7, 90]])
def test_no_sequence_of_a_batch_exceeds_the_ratio_of_kvtc(ratio, starts, decoder, tokens):
    """Though they differ in what they need: random tokens, one token again and again, and two in turn."""
    model = decoder({"preset": "cla"})
    ids = torch.stack((tokens(1, 120)[0], torch.full((120,), 3), torch.arange(120) % 2))
    cache, spec = KVCache(model.config), f"kvtc:group=2,ratio={ratio}"
    model(ids, cache=cache, starts=None if starts is None else torch.tensor(starts))
    compressed = compress_cache(cache, parse(spec))
    assert compressed.nbytes() <= cache.nbytes() / ratio
    if starts is not None:
        return
    for row in range(3):
        alone = KVCache(model.config)
        model(ids[row : row + 1], cache=alone)
        single = compress_cache(alone, parse(spec))
        assert single.nbytes() <= alone.nbytes() / ratio
        for owner in single.stores:  # the same numbers, whatever the others of the batch need
            stores: Any = single.stores[owner], compressed.stores[owner]
            wanted, found = (store.last(120, 120) for store in stores)
            torch.testing.assert_close(found.k[row : row + 1], wanted.k, atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(found.v[row : row + 1], wanted.v, atol=1e-3, rtol=1e-3)


def test_bytes_of_kvtc_by_hand(slot_tensors):
    """Three slots in groups of two, of 2 x 8 channels: a sequence stores, for keys and values each, the means and last
    tokens of 3 slots, 3 scales, and 5 codes (2 of A, 3 of B) with 4 bytes for the size of each; and one step."""
    data = [noise(2, 60, 2, 8, seed=i) for i in range(3)]
    codes = parse("kvtc:ratio=3,group=2,recent=5").encode(slot_tensors("k", data), slot_tensors("v", data))
    streams = codes[0][0].components.streams
    assert streams.sizes.shape == (2, 10)
    assert streams.data.shape[1] == streams.sizes.sum(1).max()
    fixed = 2 * 3 * (16 + 5 * 16 + 1) * 4 + 10 * 4 + 4
    assert nbytes([*codes[0], *codes[1]]) == 2 * (fixed + streams.data.shape[1])
    assert fixed + streams.data.shape[1] <= 2 * 3 * 60 * 16 * 4 / 3


def test_kvtc_on_the_basis_of_a_model(decoder, tokens):
    """Against the principal components of the calibration text, computed from its keys and values."""
    model, text, ids = decoder({"preset": "cla"}, n_layers=8), tokens(2, 60, seed=1), tokens(2, 90)
    engine = engine_of(model)
    method: Any = parse("kvtc:basis=calibration,group=3,ratio=5,recent=6")
    method.prepare(engine, text)
    caches = [engine.new_cache(), engine.new_cache()]
    engine.hidden(text, caches[0])
    engine.hidden(ids, caches[1])
    compressed: Any = engine.compress(caches[1], method)
    of_text, of_ids = (engine.compressible(cache).tensors(before_rope=True) for cache in caches)
    owners, streams = list(model.plan.slots), None
    assert owners == [0, 2, 4, 6]
    weights = 0
    for kind, calibration, prompt in zip("kv", of_text[0], of_ids[0], strict=True):
        for group in (owners[:3], owners[3:]):
            of_group = [owners.index(j) for j in group]
            parts = [calibration.data[i][:, 4:].flatten(2).flatten(0, 1).double() for i in of_group]
            means = [x.mean(0) for x in parts]
            scales = [(x - m).square().mean().sqrt() for x, m in zip(parts, means, strict=True)]
            joined = torch.cat([(x - m) / s for x, m, s in zip(parts, means, scales, strict=True)], dim=1)
            vectors = torch.linalg.svd(joined, full_matrices=True)[2].mT.float()
            weights += 4 * (vectors.numel() + sum(len(m) + 1 for m in means))
            for row in range(2):
                rows = [prompt.data[i][row, 4:84].flatten(1).double() for i in of_group]
                x = torch.cat([(t - m) / s for t, m, s in zip(rows, means, scales, strict=True)], dim=1).float()
                code = getattr(compressed.stores[group[0]].prefix, kind)
                streams, place = code.components.streams, code.components.place
                kept = streams.numbers(row, place + 1)[:, 0] == -1
                step = code.components.step[row]
                numbers = streams.numbers(row, place)
                assert kept.sum() == numbers.shape[1]
                signs = (vectors * code.basis.vectors).sum(0).sign()  # of eigenvectors, which have either
                exact = (x @ vectors * signs)[:, kept]
                inside = torch.arange(len(kept))[kept] < min(joined.shape) - 1
                assert (numbers * step - exact)[:, inside].abs().max() <= 0.51 * step
                wanted = numbers * step @ code.basis.vectors[:, kept].T
                for n, (j, m, s) in enumerate(zip(group, means, scales, strict=True)):
                    width = len(m)
                    read = getattr(compressed.stores[j].prefix, kind).decode()[row].flatten(1)
                    y = wanted[:, n * width : (n + 1) * width] * s.float() + m.float()
                    torch.testing.assert_close(read[:80], y, atol=1e-4, rtol=1e-4)
    assert method.weight_bytes() == weights
    # sinks, recent tokens, one step, and for each of four groups two codes with their sizes
    assert compressed.nbytes() == 2 * (8 * 32 * (4 + 6) * 4 + 4 + 8 * 4 + streams.data.shape[1])
    assert compressed.nbytes() <= caches[1].nbytes() / 5
    prompts = engine.compress(caches[1], parse("kvtc:group=3,ratio=5,recent=6"))
    errors = [max(e["k"] for e in c.outcome.errors.values()) for c in (compressed, prompts)]
    assert errors[0] < errors[1], "the bytes of the bases serve the components"


def test_a_basis_of_a_model_holds_all_of_a_prompt(decoder, tokens):
    """Though the calibration text has fewer tokens than the group has channels; also of padded prompts."""
    model, ids = decoder(), tokens(2, 60)
    engine, method = engine_of(model), parse("kvtc:basis=calibration,ratio=1.2")
    method.prepare(engine, tokens(1, 20, seed=1))
    cache = KVCache(model.config)
    model(ids, cache=cache, starts=torch.tensor([0, 7]))
    compressed = compress_cache(cache, method)
    assert max(max(e.values()) for e in compressed.outcome.errors.values()) < 1e-3
    assert compressed.nbytes() <= cache.nbytes() / 1.2


def test_a_basis_of_a_model_is_not_stored_with_a_prefix(decoder, design, tokens):
    engine, text = engine_of(decoder()), tokens(1, 40)
    cache = engine.new_cache()
    engine.hidden(text, cache)
    method: Any = parse("kvtc:basis=calibration")
    with pytest.raises(UserError, match="kvtc: basis=calibration is not calibrated for slot 0: call prepare"):
        engine.compress(cache, method)
    with pytest.raises(UserError, match="4 calibration tokens, and sinks=4 are left out"):
        method.prepare(engine, text[:, :4])
    for spec in ("kvtc:basis=calibration", "kvquant:levels=fisher"):
        with pytest.raises(UserError, match=f"at_rest is {spec}, which calibrates on tokens; allowed: another method"):
            method_at_rest(spec, "store")
    for spec in ("kvtc", "kvquant"):
        method_at_rest(spec, "store")
    latent = engine_of(design("mla"))  # latents have components too
    latents = latent.new_cache()
    latent.hidden(text, latents)
    method = parse("kvtc:basis=calibration,ratio=1.5")
    method.prepare(latent, tokens(1, 80, seed=1))
    assert latent.compress(latents, method).nbytes() <= latent.nbytes(latents) / 1.5


def test_what_kvtc_cannot_store_is_refused(slot_tensors):
    keys = slot_tensors("k", [noise(1, 40, 1, 8)])
    with pytest.raises(UserError, match=r"kvtc: 40 tokens without sinks, of which recent=39 .*; allowed: 41 tokens"):
        parse("kvtc:recent=39").encode(keys, None)
    with pytest.raises(UserError, match=r"kvtc: ratio=8: at 40 tokens 29% .* allowed: below 3\.48"):
        parse("kvtc:recent=10").encode(keys, None)
    with pytest.raises(UserError, match=r"kvtc: ratio=25: 40 tokens do not fit even without components"):
        parse("kvtc:ratio=25").encode(keys, None)


# ---- in caches ------------------------------------------------------------------------------------------------------


def decoded(cache):
    """A `KVCache` without codes, whose slots are those that `cache` decodes to."""
    plain = KVCache(cache.config)
    plain.batch, plain.seen, plain.starts, plain.column = cache.batch, cache.seen, cache.starts, cache.column.clone()
    plain.stores = {owner: copy_store(store, cache.seen, None) for owner, store in cache.stores.items()}
    return plain


@pytest.mark.parametrize("name", ["cla", "yoco", "fusedkv", "mla"])
@pytest.mark.parametrize("spec", SPECS)
def test_every_reader_gets_the_tensors_of_the_slot(spec, name, design, tokens, filled):
    """Also layers that read a slot of another layer: what they compute is that of a plain cache of the same tensors."""
    model, ids = design(name), tokens(2, LENGTH)
    _, cache = filled(model, ids[:, :PREFIX])
    compressed = compress_cache(cache, parse(spec))
    assert compressed.nbytes() < 0.9 * cache.nbytes()
    assert 0 < max(max(e.values()) for e in compressed.outcome.errors.values()) < 1
    plain = decoded(compressed)
    for part in ids[:, PREFIX:].split([5, 1, 2], dim=1):
        torch.testing.assert_close(model(part, cache=compressed), model(part, cache=plain), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spec", SPECS)
def test_padding_is_left_out(spec, decoder, tokens):
    """A padded sequence is coded as it is alone; KVTC's budget counts padding, so that its code is finer."""
    model, ids, starts = decoder(), tokens(2, LENGTH), torch.tensor([0, 7])
    cache, alone = KVCache(model.config), KVCache(model.config)
    model(ids[:, :PREFIX], cache=cache, starts=starts)
    model(ids[1:, 7:PREFIX], cache=alone)
    padded, single = compress_cache(cache, parse(spec)), compress_cache(alone, parse(spec))
    for owner in (0, 7):
        stores: Any = padded.stores[owner], single.stores[owner]
        found, wanted = stores[0].last(PREFIX, PREFIX), stores[1].last(PREFIX - 7, PREFIX - 7)
        for a, b in ((found.k, wanted.k), (found.v, wanted.v)):
            difference = (a[1:, 7:] - b).norm() / b.norm()
            assert difference < NEAR.get(spec.partition(":")[0], 1e-4)


@pytest.mark.parametrize("outliers", [0.1, 0.3, 0.45])
def test_the_outliers_of_a_padded_sequence_are_as_many_as_alone(outliers, slot_tensors):
    for padding in (1, 2, 7, 29):
        is_text = torch.arange(30) >= torch.tensor([[0], [padding]])
        keys = noise(2, 30, 1, 8)
        method = parse(f"kvquant:bits=2,outliers={outliers}")
        (padded,), _ = method.encode(slot_tensors("k", [keys], is_text), None)
        (alone,), _ = method.encode(slot_tensors("k", [keys[1:, padding:]]), None)
        torch.testing.assert_close(padded.decode()[1:, padding:], alone.decode())


def test_of_equal_outliers_the_first_ones_are_taken_whatever_the_padding(slot_tensors):
    rows = noise(2, 300, 2, 32).mul(2).round()  # many equal distances to the median
    is_text = torch.arange(300) >= torch.tensor([[0], [129]])
    method, codes = parse("kvquant:bits=2,outliers=0.1"), []
    for of, mask in ((rows, is_text), (rows[1:, 129:], None)):
        codes.append(method.encode(*(slot_tensors(kind, [of], mask) for kind in "kv")))
    for (padded,), (alone,) in zip(*codes, strict=True):
        torch.testing.assert_close(padded.decode()[1:, 129:], alone.decode())
        assert not torch.equal(alone.decode(), rows[1:, 129:])


@pytest.mark.parametrize("spec", [*SPECS, "kivi:bits=4,group=4,residual=0", "palu:keep=0.5,bits=4"])
def test_fp64_caches_are_coded(spec, decoder, tokens):
    """Padding is 0, and so is its scale, unless it has a least value that fp32 can represent."""
    model, ids = decoder(n_layers=2).double(), tokens(2, LENGTH)
    cache = KVCache(model.config)
    method = parse(spec)
    method.prepare(engine_of(model), ids)
    model(ids[:, :PREFIX], cache=cache, starts=torch.tensor([0, 12]))
    found = model(ids[:, PREFIX:], cache=compress_cache(cache, method))
    assert found.dtype == torch.float64
    assert found.isfinite().all()


@pytest.mark.parametrize("spec", SPECS)
def test_padding_of_transformers_caches_is_left_out(spec, llama, tokens):
    model, ids, logits = llama(), tokens(2, LENGTH), []
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for rows, first in ((slice(None), 0), (slice(1, 2), 7)):
        cache = DynamicCache(config=model.config)
        of, text, places = (t[rows, first:] for t in (ids, mask, positions))
        count = PREFIX - first
        prefix = {"attention_mask": text[:, :count], "position_ids": places[:, :count]}
        model(of[:, :count], past_key_values=cache, **prefix)
        small = compress_dynamic(cache, parse(spec), model, starts=None if first else torch.tensor([0, 7]))
        rest = {"attention_mask": text, "position_ids": places[:, count:]}
        logits.append(model(of[:, count:], past_key_values=small, **rest).logits[-1])
    padded, alone = logits
    assert (padded - alone).norm() / alone.norm() < NEAR.get(spec.partition(":")[0], 1e-3)


@pytest.mark.parametrize("spec", SPECS)
def test_bf16_caches_and_batch_operations(spec, decoder, tokens, filled):
    model = decoder().bfloat16()
    _, cache = filled(model, tokens(3, PREFIX))
    compressed = compress_cache(cache, parse(spec))
    ids, order = tokens(3, 4, seed=1), torch.tensor([2, 0, 0])
    expected = model(ids, cache=decoded(compressed))
    assert expected.dtype == torch.bfloat16
    compressed.reorder_cache(order)
    torch.testing.assert_close(model(ids[order], cache=compressed), expected[order], atol=0.05, rtol=0.05)
