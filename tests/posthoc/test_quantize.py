"""Quantisers against their closed form, and the bytes of their codes."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from cllm.errors import UserError
from cllm.posthoc.engine import engine_of
from cllm.posthoc.lowrank import LowRank
from cllm.posthoc.quantize import Quantized, pack, unpack
from cllm.posthoc.registry import parse


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 16])
def test_codes_are_packed_without_a_spare_bit(bits, count):
    codes = torch.randint(2**bits, (3, count), generator=torch.Generator().manual_seed(0))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, -(-count * bits // 8))
    assert torch.equal(unpack(packed, bits, count), codes.to(torch.uint8))


def closed_form(x, bits):
    """A group (..., m) quantised and back."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    return ((x - low) / scale).round() * scale + low


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_kivi_is_its_closed_form(bits, slot_tensors):
    k, v = noise(2, 29, 2, 8), noise(2, 29, 2, 8, seed=1)
    method = parse(f"kivi:bits={bits},group=8,residual=4")
    (found_k,), (found_v,) = method.encode(slot_tensors("k", [k]), slot_tensors("v", [v]))
    assert torch.equal(found_k.decode()[:, 24:], k[:, 24:])  # 25 may be quantised, 24 are three groups
    assert torch.equal(found_v.decode()[:, 24:], v[:, 24:])
    for group in range(3):  # of 8 tokens, for each channel
        tokens = slice(8 * group, 8 * group + 8)
        expected = closed_form(k[:, tokens].flatten(2).mT, bits).mT
        torch.testing.assert_close(found_k.decode()[:, tokens].flatten(2), expected, atol=1e-5, rtol=1e-5)
    expected = closed_form(v[:, :24], bits)  # a head's 8 channels, for each token
    torch.testing.assert_close(found_v.decode()[:, :24], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("sinks", "coded"), [(0, 32), (4, 24)])
def test_bytes_of_kivi(sinks, coded, decoder, tokens, filled):
    engine, cache = filled(decoder(n_layers=3), tokens(2, 40))
    compressed = engine.compress(cache, parse(f"kivi:bits=2,group=8,residual=8,sinks={sinks}"))
    # codes, scale and zero, exact tokens
    per_tensor = coded * 32 * 2 // 8 + 2 * 4 * coded * 32 // 8 + 4 * (40 - coded) * 32
    assert compressed.nbytes() == 2 * 3 * 2 * per_tensor


def test_padding_does_not_widen_a_group(slot_tensors):
    k = noise(2, 16, 1, 8)
    padded = torch.cat((1e3 * torch.ones(2, 8, 1, 8), k), dim=1)
    text = (torch.arange(24) >= 8).expand(2, -1)
    method = parse("kivi:bits=4,group=12,residual=0")  # the first group has 4 tokens of text
    found = method.encode(slot_tensors("k", [padded], text), None)[0][0].decode()[:, 8:]
    assert (found - k).abs().max() < (k.max() - k.min()) / 15


def test_xquant_shares_codes_of_pairs_and_keeps_scales(slot_tensors):
    data = [noise(2, 32, 2, 8, seed=i) for i in range(5)]
    codes, _ = parse("xquant:bits=2,group=8,residual=0,eta=0.1").encode(
        slot_tensors("k", data), slot_tensors("v", data)
    )
    shared = [a.packed is b.packed for a, b in itertools.pairwise(codes)]
    assert shared == [True, False, True, False]
    # A shared slot: the pair's codes, drawn in endpoints of its own.
    lower, upper = (x.flatten(2).unflatten(1, (-1, 8)) for x in data[:2])  # B, groups, 8, C
    low, high = lower.amin(2, keepdim=True), lower.amax(2, keepdim=True)
    q = ((lower - low) / ((high - low) / 3)).round()
    for x, code in ((lower, codes[0]), (upper, codes[1])):
        low, high = x.amin(2, keepdim=True), x.amax(2, keepdim=True)
        scale = (high - low) / 3
        expected = q * (1 - 0.2) * scale + low + 0.1 * 3 * scale
        torch.testing.assert_close(code.decode().flatten(2).unflatten(1, (-1, 8)), expected, atol=1e-5, rtol=1e-5)
    late, _ = parse("xquant:group=8,residual=0,share_k=2").encode(slot_tensors("k", data), slot_tensors("v", data))
    assert [a.packed is b.packed for a, b in itertools.pairwise(late)] == [False, False, True, False]


def bits_per_element(codes, *, scales):
    """Bits of the quantised tokens of `codes` per element, shared codes counted once."""
    coded = [code for code in codes if isinstance(code, Quantized)]
    elements = sum(code.scale.numel() * code.size for code in coded)
    packed = {id(code.packed): code.packed.nbytes for code in coded}
    extra = sum(code.scale.nbytes + code.zero.nbytes for code in coded) if scales else 0
    return 8 * (sum(packed.values()) + extra) / elements


def test_xquant_is_below_1_4_bits_with_its_scales(slot_tensors):
    data = [noise(1, 256, 2, 64, seed=i).bfloat16() for i in range(4)]
    for method, codes_alone, with_scales in (("kivi", 2.0, 2.25), ("xquant", 1.0, 1.25)):
        for codes in parse(f"{method}:bits=2,group=128,residual=0").encode(
            slot_tensors("k", data), slot_tensors("v", data)
        ):
            assert bits_per_element(codes, scales=False) == codes_alone
            assert bits_per_element(codes, scales=True) == with_scales


def test_a_quantiser_on_top_of_factors(slot_tensors, decoder, tokens, filled):
    data = [noise(2, 64, 2, 8, seed=i) for i in range(4)]
    keys, values = slot_tensors("k", data), slot_tensors("v", data)
    plain, _ = parse("xkv:group=4,rank_k=16,rank_v=16").encode(keys, values)
    coded, _ = parse("xkv:group=4,rank_k=16,rank_v=16+kivi:bits=8,group=32,residual=0").encode(keys, values)
    assert all(isinstance(code, LowRank) and code.a is coded[0].a for code in coded)
    assert coded[0].a.packed.dtype == torch.uint8
    assert torch.equal(coded[1].b, plain[1].b)
    a = plain[0].a.decode().unflatten(1, (2, 32))
    expected = closed_form(a.transpose(2, 3), 8).transpose(2, 3).flatten(1, 2)
    torch.testing.assert_close(coded[0].a.decode(), expected, atol=1e-5, rtol=1e-5)
    engine, cache = filled(decoder(n_layers=2), tokens(1, 40))
    small = engine.compress(cache, parse("svd:rank_k=8,rank_v=8,sinks=0+kivi:bits=4,group=40,residual=0"))
    assert small.nbytes() == 4 * (40 * 8 // 2 + 2 * 4 * 8 + 4 * 32 * 8)


def test_a_quantiser_on_top_of_merged_slots(slot_tensors):
    """Directions, kept rows and the slots below the middle are coded."""
    data = [noise(2, 64, 2, 16, seed=i) for i in range(4)]
    merged, rest = "minicache:gamma=0.3", "group=16,residual=0"
    plain, fine, coarse = (
        parse(merged + coder).encode(slot_tensors("k", data), slot_tensors("v", data))[0]
        for coder in ("", f"+kivi:bits=8,{rest}", f"+kivi:bits=4,{rest}")
    )
    assert coarse[2].direction is coarse[3].direction
    assert torch.equal(coarse[2].index, plain[2].index)
    kept = plain[2].index.shape[1]
    coded = kept // 16 * 16  # rows
    tensor = 64 * 32 // 2 + 4 * 2 * 64 * 32 // 16  # codes, scale and zero
    rows = coded * 16 // 2 + 4 * 2 * coded + 4 * 16 * (kept - coded)
    expected = 3 * tensor + 2 * 4 * 64 * 2 + 2 * rows + 4 * kept  # two slots and directions, lengths, rows, places
    nbytes = {id(t): t.nbytes for code in coarse for t in code.tensors()}
    assert sum(nbytes.values()) == 2 * expected
    for i in range(4):
        exact = data[i] if plain[i] is None else plain[i].decode()
        errors = [((codes[i].decode() - exact).norm() / exact.norm()).item() for codes in (fine, coarse)]
        assert 0 < errors[0] < 0.01
        assert 5 * errors[0] < errors[1] < 0.2


def test_minicache_with_4_bits_is_near_the_ratio_of_its_paper(slot_tensors):
    """5.02x."""
    data = [noise(1, 512, 2, 128, seed=i).bfloat16() for i in range(8)]
    codes, _ = parse("minicache:gamma=0.0+kivi:bits=4,group=128,residual=0").encode(
        slot_tensors("k", data), slot_tensors("v", data)
    )
    nbytes = {id(t): t.nbytes for code in codes for t in code.tensors()}
    assert 4.8 < sum(t.nbytes for t in data) / sum(nbytes.values()) < 5.1


def test_padding_does_not_widen_a_group_of_directions(slot_tensors):
    data = [noise(1, 24, 1, 8, seed=i) / 10 + 3 for i in range(2)]
    padded = [torch.cat((-torch.ones(1, 8, 1, 8), t), dim=1) for t in data]
    text = (torch.arange(32) >= 8)[None]
    exact, found = (
        parse("minicache:start=0,gamma=0.0" + coder).encode(slot_tensors("k", padded, text), None)[0][0].decode()[:, 8:]
        for coder in ("", "+kivi:bits=4,group=32,residual=0")
    )
    assert (found - exact).abs().max() < 0.1


SHORT = "group=8,residual=8"
"""With 4 sinks, the first group is complete at 20 tokens."""


@pytest.mark.parametrize(("kind", "starts"), [("decoder", None), ("decoder", [0, 2]), ("llama", None)])
@pytest.mark.parametrize("length", [3, 5, 19, 20])
@pytest.mark.parametrize(
    "spec",
    [
        f"kivi:{SHORT}",
        f"xquant:{SHORT}",
        f"xkv:rank_k=2,rank_v=2+kivi:{SHORT}",
        f"minicache+xquant:{SHORT}",
        f"streaming:tokens=20+kivi:{SHORT}",
        f"vfold:recent=20+kivi:{SHORT}",
        f"lorc:keep=0.5+kivi:{SHORT}",
    ],
)
def test_of_a_prompt_too_short_for_a_group_nothing_is_quantised(
    spec, length, kind, starts, decoder, llama, tokens
) -> None:
    model, ids = decoder() if kind == "decoder" else llama(), tokens(2, length + 4)
    engine, found = engine_of(model), []
    starts = None if starts is None or length < 5 else torch.tensor(starts)
    for text in (spec, spec.partition("+")[0] if "+" in spec else "none"):
        method, cache = parse(text), engine.new_cache()
        method.prepare(engine, tokens(1, 40, seed=1))
        if starts is None:
            engine.hidden(ids[:, :length], cache)
        else:
            model.hidden(ids[:, :length], cache=cache, starts=starts)
        compressed = engine.compress(cache, method)
        errors = [error for slot in compressed.outcome.errors.values() for error in slot.values()]
        found.append((compressed.nbytes(), errors, engine.logits(ids[:, length:], compressed)))
    coded, plain = found
    if length < 20:
        assert coded[0] == plain[0]
        assert coded[1] == pytest.approx(plain[1], abs=1e-6)
        torch.testing.assert_close(coded[2], plain[2], atol=1e-5, rtol=1e-5)
    else:
        assert coded[0] < plain[0]
        assert not torch.allclose(coded[2], plain[2], atol=1e-3)


def test_bad_options_are_refused(slot_tensors, decoder, tokens, filled, llama):
    keys = slot_tensors("k", [noise(1, 20, 1, 12)])
    with pytest.raises(UserError, match="group=8 does not divide the 12 channels of a token"):
        parse("kivi:group=8,residual=0").encode(keys, slot_tensors("v", keys.data))
    with pytest.raises(UserError, match="bits: Input should be 1, 2, 4 or 8 got 3"):
        parse("kivi:bits=3")
    engine, cache = filled(decoder(), tokens(1, 20))
    with pytest.raises(UserError, match="serves transformers models only; for cllm models: kivi"):
        engine.compress(cache, parse("hf_quantized"))


@pytest.mark.parametrize(("backend", "package"), [("quanto", "optimum.quanto"), ("hqq", "hqq")])
@pytest.mark.parametrize(("bits", "most"), [(2, 0.6), (4, 0.15)])
def test_transformers_quantised_cache(backend, package, bits, most, llama, tokens, filled):
    pytest.importorskip(package)
    model, ids = llama(), tokens(2, 44)
    engine, cache = filled(model, ids[:, :36])
    quantized = engine.compress(cache, parse(f"hf_quantized:backend={backend},bits={bits},group=16,residual=4"))
    assert quantized.get_seq_length() == 36
    errors = [error for slot in quantized.outcome.errors.values() for error in slot.values()]
    assert most / 6 < min(errors) <= max(errors) < most
    number = (4 * 32 + 32 * (bits + 2 * 32 / 16)) / 36  # bits: 4 sinks in fp32; codes, scale and zero in fp32
    assert quantized.nbytes() == engine.nbytes(cache) * number / 32
    expected = engine.logits(ids[:, 36:], cache)
    logits = torch.cat([engine.logits(part, quantized) for part in ids[:, 36:].split([1, 5, 2], dim=1)], dim=1)
    assert quantized.get_seq_length() == 44
    assert 0 < (logits - expected).norm() / expected.norm() < 5 * most


@pytest.mark.parametrize(("bits", "packed"), [(1, 8), (2, 4), (3, 1), (4, 2), (8, 1)])
@pytest.mark.parametrize("group", [8, 16])
@pytest.mark.parametrize("length", [17, 18, 21, 36])
def test_hqq_packs_any_number_of_tokens(bits, packed, group, length, llama, tokens, filled):
    """hqq packs up to 8 groups together. A group is a token of one of two heads here, or two tokens of a head."""
    pytest.importorskip("hqq")
    ids = tokens(1, length + 9)
    engine, cache = filled(llama(), ids[:, :length])
    exact = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    quantized = engine.compress(cache, parse(f"hf_quantized:backend=hqq,bits={bits},group={group},residual=4"))
    groups = -(-(length - 4) * 16 // (group * packed)) * packed
    stored = -(-groups // 10) * 4 * group if bits == 3 else groups * group * bits / 8  # 10 numbers of 3 bits in 4 bytes
    assert quantized.nbytes() == 4 * 2 * (4 * 16 * 4 + stored + groups * 2 * 4)  # of a tensor: sinks, codes, scales
    for layer, tensors in zip(quantized.layers, exact, strict=True):
        for codes, x in zip((layer._quantized_keys, layer._quantized_values), tensors, strict=True):
            read = layer._dequantize(codes)
            assert read.shape == x[:, :, 4:].shape
            if group == 8:
                steps = (x[:, :, 4:].amax(3) - x[:, :, 4:].amin(3)) / (2**bits - 1)
                assert ((read - x[:, :, 4:]).abs().amax(3) <= 1.05 * steps).all()
    for part in ids[:, length:].split([1, 4, 3, 1], dim=1):  # coded again after four and after eight tokens
        engine.logits(part, quantized)
    assert quantized.get_seq_length() == length + 9


def test_codes_of_hqq_are_those_of_a_batch(llama, tokens, filled):
    """So suites quantise one context at a time."""
    pytest.importorskip("hqq")
    method, ids = parse("hf_quantized:backend=hqq,bits=3,group=8"), tokens(3, 37)
    read = []
    for of in (ids, ids[1:2]):
        engine, cache = filled(llama(), of)
        layer = engine.compress(cache, method).layers[0]
        read.append(layer._dequantize(layer._quantized_keys)[-2 if len(of) == 3 else 0])
    assert not torch.equal(*read)
    assert method.chooses_for_batch
    assert not parse("hf_quantized:backend=quanto").chooses_for_batch


@pytest.mark.parametrize("later", [0, 2])
@pytest.mark.parametrize(("backend", "package"), [("quanto", "optimum.quanto"), ("hqq", "hqq")])
def test_sequences_of_a_transformers_quantised_cache_are_rearranged(backend, package, later, llama, tokens, filled):
    """The reference is the exact cache of the rearranged sequences with the quantised tokens in it."""
    pytest.importorskip(package)
    model, ids, length = llama(), tokens(3, 44), 36 + later
    engine, exact = filled(model, ids[:, :36])
    quantized = engine.compress(exact, parse(f"hf_quantized:backend={backend},bits=4,group=16,residual=8"))
    if later:
        engine.logits(ids[:, 36:length], quantized)
    for layer, (sinks_k, sinks_v), stored in zip(exact.layers, quantized.sinks, quantized.layers, strict=True):
        for name, first, codes, rest in (
            ("keys", sinks_k, stored._quantized_keys, stored.keys),
            ("values", sinks_v, stored._quantized_values, stored.values),
        ):
            setattr(layer, name, torch.cat((first, stored._dequantize(codes), *([rest] if later else [])), dim=-2))
    changes = [
        lambda x: x.reorder_cache(torch.tensor([2, 0, 0])),
        lambda x: x.batch_select_indices(torch.tensor([2, 0])),
        lambda x: x.batch_repeat_interleave(2),
    ]
    first = copy.deepcopy(quantized) if backend == "hqq" else None  # tensors of quanto cannot be copied
    rows = torch.tensor([2, 0, 0])[[2, 0]].repeat_interleave(2)
    for change in changes:
        change(quantized)
        change(exact)
    for n in range(length, 39):
        logits = engine.logits(ids[rows, n : n + 1], quantized)
        torch.testing.assert_close(logits, engine.logits(ids[rows, n : n + 1], exact))
    assert quantized.get_seq_length() == 39
    engine.logits(ids[rows, 39:], quantized)  # all tokens are quantised again
    assert all(layer.sequences is None and layer.exact_tokens == 0 for layer in quantized.layers)
    assert first is None or len(engine.logits(ids[:, length:], first)) == 3, "a copy stays as it was"


def test_a_transformers_quantised_cache_is_cropped_down_to_its_codes(llama, tokens, filled):
    pytest.importorskip("hqq")
    ids = tokens(2, 42)
    engine, cache = filled(llama(), ids[:, :36])
    quantized = engine.compress(cache, parse("hf_quantized:backend=hqq,group=16,residual=8"))
    expected = engine.logits(ids[:, 36:42], copy.deepcopy(quantized))
    engine.logits(ids[:, 36:40], quantized)
    quantized.crop(-3)
    assert quantized.get_seq_length() == 37
    torch.testing.assert_close(engine.logits(ids[:, 37:42], quantized), expected[:, 1:])
    with pytest.raises(UserError, match="cannot drop 7 tokens: the first 36 of 42 are quantised; allowed: up to 6"):
        quantized.crop(-7)
    quantized.crop(-6)
    torch.testing.assert_close(engine.logits(ids[:, 36:42], quantized), expected)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_bits_that_the_backend_lacks_are_refused_when_the_spec_is_read(bits):
    with pytest.raises(
        UserError,
        match=f'"hf_quantized:bits={bits}": bits={bits}: backend=quanto has 2 or 4 bits; allowed: one of these, or '
        "backend=hqq$",
    ):
        parse(f"hf_quantized:bits={bits}")
    assert parse(f"hf_quantized:bits={bits},backend=hqq").model_dump()["bits"] == bits


@pytest.mark.parametrize("group", [7, 16, 1000])
def test_quanto_codes_any_number_of_tokens(group, llama, tokens, filled):
    """Its groups fill a sequence, so the last token is repeated where they would not."""
    pytest.importorskip("optimum.quanto")
    ids = tokens(2, 45)
    engine, cache = filled(llama(), ids[:, :37])
    exact = [layer.keys.clone() for layer in cache.layers]
    quantized = engine.compress(cache, parse(f"hf_quantized:group={group},residual=4"))
    for layer, x in zip(quantized.layers, exact, strict=True):
        read = layer._dequantize(layer._quantized_keys)
        assert read.shape == x[:, :, 4:].shape
        assert (read - x[:, :, 4:]).norm() < 0.2 * x.norm()
    for part in ids[:, 37:].split([1, 4, 3], dim=1):  # coded again after later tokens
        engine.logits(part, quantized)
    assert quantized.get_seq_length() == 45


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_a_library_that_is_missing_is_named(backend, llama, tokens, filled, monkeypatch):
    for name in ("is_optimum_quanto_available", "is_hqq_available"):
        monkeypatch.setattr(f"transformers.cache_utils.{name}", lambda: False)
    engine, cache = filled(llama(), tokens(2, 40))
    with pytest.raises(UserError, match=f"backend={backend} is not installed: pip install"):
        engine.compress(cache, parse(f"hf_quantized:backend={backend}"))
