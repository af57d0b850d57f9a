"""MiniCache, CommonKV and KVSharer: their equations, and what they keep."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F

import cllm
from cllm.errors import UserError
from cllm.hub.export import as_pretrained
from cllm.posthoc.engine import engine_of
from cllm.posthoc.methods.commonkv import factorize
from cllm.posthoc.methods.minicache import slerp
from cllm.posthoc.registry import parse
from cllm.posthoc.stores import SharingSlot


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotated(x, angle):
    """`x` (..., 2 or more) rotated by `angle` in the plane of its first two channels."""
    cos, sin = math.cos(angle), math.sin(angle)
    a, b = x[..., 0], x[..., 1]
    return torch.cat((torch.stack((cos * a - sin * b, sin * a + cos * b), dim=-1), x[..., 2:]), dim=-1)


# ---- MiniCache ------------------------------------------------------------------------------------------------------


def test_slerp_goes_along_the_great_circle():
    one, other = torch.tensor([1.0, 0, 0]), rotated(torch.tensor([1.0, 0, 0]), 0.8)
    for t in (0.0, 0.25, 0.6, 1.0):
        direction, angle = slerp(one, other, t)
        torch.testing.assert_close(direction, rotated(one, 0.8 * t))
        assert angle.item() == pytest.approx(0.8)
    same, angle = slerp(one, one, 0.3)
    assert torch.equal(same, one)
    assert angle == 0


def planted(far=3):
    """Two slots of 12 tokens in a plane, 0.1 to 0.2 rad apart, and one pair, `far`, 2 rad apart."""
    x = F.normalize(torch.cat((noise(1, 12, 1, 2), torch.zeros(1, 12, 1, 2)), dim=-1), dim=-1)
    angles = torch.linspace(0.1, 0.2, 12)
    angles[far] = 2.0
    y = torch.stack([rotated(x[:, t], angle.item()) for t, angle in enumerate(angles)], dim=1)
    return 2 * x, 3 * y


@pytest.mark.parametrize(("name", "kept"), [("minicache", [3]), ("minicache_xkv", [0])])
def test_retention_both_ways_on_a_planted_outlier(name, kept, slot_tensors):
    """The paper keeps the pair that differs most; the variant of xKV's repository the ones that differ least."""
    x, y = planted()
    (lower, upper), _ = parse(f"{name}:gamma=0.004,t=0.5,start=0").encode(
        slot_tensors("k", [x, y]), slot_tensors("v", [x, y])
    )
    assert lower.index.tolist() == [kept]
    assert upper.index is lower.index
    assert upper.direction is lower.direction
    for code, exact in ((lower, x), (upper, y)):
        error = (code.decode() - exact).norm(dim=-1).flatten() / exact.norm(dim=-1).flatten()
        assert error[kept].max() < 1e-6
        others = [t for t in range(12) if t not in kept]
        assert error[others].min() > 0.04
        torch.testing.assert_close(code.decode().norm(dim=-1), exact.norm(dim=-1))  # lengths are kept
    outlier = (lower.decode() - x).norm(dim=-1).flatten()[3] / 2
    assert outlier < 1e-6 if name == "minicache" else outlier > 0.9


def test_merging_starts_in_the_middle(slot_tensors):
    data = [noise(1, 10, 2, 4, seed=i) for i in range(7)]
    codes, _ = parse("minicache").encode(slot_tensors("k", data), slot_tensors("v", data))
    assert [code is None for code in codes] == [True, True, True, False, False, False, False]
    codes, _ = parse("minicache:start=4").encode(slot_tensors("k", data), slot_tensors("v", data))
    assert [code is None for code in codes] == [True, True, True, True, False, False, True]
    with pytest.raises(UserError, match="no two neighbours of one shape from slot 1 on, of 2; allowed: start up to 0"):
        parse("minicache").encode(slot_tensors("k", data[:2]), None)


def test_rope_does_not_matter_to_merging(decoder, tokens, filled):
    """RoPE rotates both of a pair by the same angle, so merging before and after it is the same."""
    engine, cache = filled(decoder(n_layers=2), tokens(1, 12))
    method = parse("minicache:gamma=0.0,start=0,sinks=0")
    found = engine.compress(cache, method).stores[0].prefix.read().k
    cached = engine.compressible(cache)
    ((keys, values),) = cached.tensors(before_rope=True)
    before = cached.rotation(0).redo(method.encode(keys, values)[0][0].decode())
    torch.testing.assert_close(found, before, atol=1e-5, rtol=1e-5)


def test_rows_kept_of_a_batch_and_padding(slot_tensors):
    x, y = planted()
    a, b = planted(far=7)
    plain = torch.cat((x, a)), torch.cat((y, b))
    padded = [torch.cat((noise(2, 3, 1, 4), t), dim=1) for t in plain]
    text = (torch.arange(15) >= 3).expand(2, -1)
    (lower, _), _ = parse("minicache:start=0").encode(slot_tensors("k", padded, text), slot_tensors("v", padded, text))
    assert lower.index.tolist() == [[6], [10]]


def test_bytes_of_minicache(decoder, tokens, filled):
    engine, cache = filled(decoder(n_layers=4), tokens(2, 20))
    compressed = engine.compress(cache, parse("minicache:gamma=0.1"))
    codes = [compressed.stores[2].prefix.k, compressed.stores[2].prefix.v]
    kept = sum(code.index.shape[1] for code in codes)
    exact, merged, sinks = 2 * 2 * 20 * 32 * 4, 2 * 16 * 32 * 4, 2 * 2 * 4 * 32 * 4
    lengths, rows = 2 * 2 * 16 * 4 * 4, kept * (2 * 8 * 4 + 4)
    assert kept > 0
    assert compressed.nbytes() == 2 * (exact + merged + sinks + lengths + rows)


# ---- CommonKV -------------------------------------------------------------------------------------------------------


def fill(model, ids, spec, calibration=None):
    engine, method = engine_of(model), parse(spec)
    method.prepare(engine, ids if calibration is None else calibration)
    cache = engine.new_cache()
    with method.watch(engine):
        for some in ids.split(7, dim=1):
            engine.hidden(some, cache)
    return engine, cache, method


def test_factors_of_stacked_projections():
    layers = [(noise(6, 20, seed=i), noise(6, 20, seed=10 + i)) for i in range(2)]
    left, shared = factorize(layers, None)
    for m, pair in zip(left, layers, strict=True):
        torch.testing.assert_close(m @ shared, torch.cat(pair), atol=1e-5, rtol=1e-4)
    left, shared = factorize(layers, 9)
    stacked = torch.cat([w for pair in layers for w in pair]).double()
    error = (torch.cat(left).double() @ shared.double() - stacked).square().sum()
    assert error.item() == pytest.approx(torch.linalg.svdvals(stacked)[9:].square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"kv": {"preset": "gqa", "n_kv_heads": 1}}, {"kv_bias": True}])
def test_commonkv_without_merging_loses_nothing(options, decoder, tokens):
    model, ids = decoder(**options), tokens(2, 28)
    engine, cache, method = fill(model, ids[:, :20], "commonkv:merge=0.0")
    compressed = engine.compress(cache, method)
    torch.testing.assert_close(engine.logits(ids[:, 20:], compressed), model(ids)[:, 20:], atol=1e-4, rtol=1e-4)
    assert method.weight_bytes() > 0


def test_commonkv_on_a_transformers_model(llama, tokens):
    model, ids = llama("qwen2"), tokens(2, 28)
    engine, cache, method = fill(model, ids[:, :20], "commonkv:group=2,merge=0.0")
    compressed = engine.compress(cache, method)
    torch.testing.assert_close(engine.logits(ids[:, 20:], compressed), model(ids).logits[:, 20:], atol=1e-4, rtol=1e-4)


def test_merged_latents_are_stored_once_and_others_kept(decoder, tokens):
    model, ids = decoder(n_layers=4), tokens(2, 24)
    engine, cache, method = fill(model, ids, "commonkv:merge=0.5,sinks=2,recent=6,weights=equal")
    compressed = engine.compress(cache, method)
    codes = [compressed.stores[slot].prefix.k for slot in range(4)]
    index = codes[0].latents.index
    assert all(code.latents.merged is codes[0].latents.merged for code in codes)
    assert index.shape == (2, 8)  # half of 24 - 2 - 6
    assert index.max() < 16  # the sinks are not among the tokens that are counted here
    cached = engine.compressible(cache)
    ((keys, _),) = cached.tensors(before_rope=True, sinks=cached.sinks(2))
    for row in range(2):
        kept = [t for t in range(22) if t not in index[row].tolist()]
        for slot in range(4):
            found, exact = codes[slot].decode()[row], keys.data[slot][row]
            torch.testing.assert_close(found[kept], exact[kept], atol=1e-4, rtol=1e-4)
            assert (found[index[row].long()] - exact[index[row].long()]).norm() > 0.1
    # d_model 24 is the latents' width: 8 shared ones, 14 for each of 4 slots, in fp32, the index, and two sinks
    assert compressed.nbytes() == 2 * (4 * 24 * (8 + 4 * 14) + 4 * 8 + 4 * 2 * 2 * 32 * 4)


def test_the_most_similar_tokens_of_all_groups_are_merged(decoder, tokens):
    model, ids = decoder(n_layers=7), tokens(1, 24)  # three pairs, and a slot alone
    model.blocks[2].mlp.down_proj.weight.zero_()
    model.blocks[2].attention.o_proj.weight.zero_()  # slots 2 and 3 get the same residual stream
    engine, cache, method = fill(model, ids, "commonkv:group=2,merge=0.5,sinks=2,recent=6,weights=equal")
    alike = []
    for first in (0, 2, 4):
        _, shared = factorize([tuple(p.weight for p in engine.projections(slot)) for slot in (first, first + 1)], None)
        one, other = (torch.cat(method._inputs[slot], dim=1)[0, 2:18] @ shared.T for slot in (first, first + 1))
        alike += [(F.cosine_similarity(one[t], other[t], dim=0).item(), first, t) for t in range(16)]
    best = sorted(alike, reverse=True)[:24]
    compressed = engine.compress(cache, method)
    for slot in range(6):
        index = compressed.stores[slot].prefix.k.latents.index[0].tolist()
        assert index == sorted(t for _, first, t in best if first == slot - slot % 2)
    assert compressed.stores[2].prefix.k.latents.index.shape[1] > 10
    assert compressed.stores[6].prefix.k.latents.index.shape[1] == 0
    engine, cache, method = fill(
        model, ids, "commonkv:group=2,merge=0.5,sinks=2,recent=6,allocation=equal,weights=equal"
    )
    equal = engine.compress(cache, method)
    assert [equal.stores[slot].prefix.k.latents.index.shape[1] for slot in range(7)] == [8] * 6 + [0]
    assert equal.nbytes() == compressed.nbytes()
    engine, cache, method = fill(decoder(), tokens(2, 25), "commonkv:group=2,merge=0.5,recent=6,weights=equal")
    stores = engine.compress(cache, method).stores  # sequences differ, and the total is that of equal shares
    assert sum(stores[slot].prefix.k.latents.index.shape[1] for slot in range(0, 8, 2)) == 4 * 7


def test_merged_latents_are_means_weighed_by_sensitivity(decoder, tokens):
    model, ids = decoder(n_layers=4), tokens(1, 10)
    model.head.weight.mul_(6)
    draw = torch.Generator().manual_seed(0)
    while ids.shape[1] < 20:  # text that the model expects
        ids = torch.cat((ids, torch.multinomial(model(ids)[:, -1].softmax(-1), 1, generator=draw)), dim=1)
    engine, cache, method = fill(model, ids, "commonkv:merge=1.0,sinks=0,recent=0")
    sensitivity = method.facts()["sensitivity"]
    assert list(sensitivity) == ["0", "1", "2", "3"]
    assert max(sensitivity.values()) > 2 * min(sensitivity.values())
    merged = engine.compress(cache, method).stores[0].prefix.k.latents.merged
    projections, inputs = [engine.projections(slot) for slot in range(4)], []
    hooks = [k.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for k, _ in projections]
    model(ids)
    for hook in hooks:
        hook.remove()
    _, shared = factorize([(k.weight, v.weight) for k, v in projections], None)
    weights = [loss / sum(sensitivity.values()) for loss in sensitivity.values()]
    expected = sum(w * F.linear(x, shared) for w, x in zip(weights, inputs, strict=True))
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-5)


def test_commonkv_refuses_what_it_cannot_do(decoder, tokens, filled):
    engine, cache = filled(decoder(), tokens(1, 20))
    method = parse("commonkv")
    with pytest.raises(UserError, match="has not seen the cache being filled"):
        engine.compress(cache, method)
    with (
        pytest.raises(UserError, match="slot 0: its keys are normalised"),
        method.watch(engine_of(decoder(qk_norm=True))),
    ):
        pass
    mla = {"preset": "mla", "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    with pytest.raises(UserError, match="slot 0 is a latent"), method.watch(engine_of(decoder(kv=mla))):
        pass
    engine, cache, method = fill(decoder(), tokens(1, 20), "commonkv:rank=25")
    with pytest.raises(UserError, match="rank=25; allowed for 4 slots: 1 to 24"):
        engine.compress(cache, method)
    method.release()
    with pytest.raises(UserError, match=r"compress it before the next one and before release\(\)"):
        engine.compress(cache, method)
    method = parse("commonkv")
    with method.watch(engine):
        engine.hidden(tokens(1, 20), cache := engine.new_cache())
    with pytest.raises(UserError, match=r"not calibrated: call prepare\(engine, ids\) first, or weights=equal"):
        engine.compress(cache, method)


def test_models_without_projections_of_their_own_are_refused(tokens):
    import transformers

    tiny = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(**tiny, bos_token_id=0, eos_token_id=0)).eval()
    for spec in ("commonkv", "commonkv:weights=equal"):
        with pytest.raises(UserError, match="GPT2LMHeadModel: slot 0 has no projections of its own for keys and"):
            parse(spec).prepare(engine_of(gpt), tokens(1, 20))


@pytest.mark.parametrize("name", ["commonkv", "hf_quantized"])
def test_methods_that_cannot_compress_again_say_so_at_once(name):
    with pytest.raises(UserError, match=f'--posthoc "{name}:recompress=4": recompress=4: .*; allowed: leave it out'):
        parse(f"{name}:recompress=4")


# ---- KVSharer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cllm", "transformers"])
def test_a_dropped_slot_is_read_from_another_and_costs_nothing(kind, decoder, llama, tokens):
    model, ids = decoder(n_layers=4) if kind == "cllm" else llama(), tokens(2, 28)
    engine, cache, method = fill(model, ids[:, :20], "kvsharer:share=1,threshold=0.0")
    ((upper, lower),) = method.shares().items()
    assert lower < upper
    compressed = engine.compress(cache, method)
    assert compressed.nbytes() == engine.nbytes(cache) * 3 // 4
    errors = compressed.outcome.errors
    assert [slot for slot, error in errors.items() if error["k"] > 0] == [upper]
    engine.logits(ids[:, 20:24], compressed)
    assert compressed.nbytes() * 4 == engine.nbytes(cache) // 20 * 24 * 3  # tokens to come are dropped too
    if kind == "cllm":
        assert isinstance(compressed.stores[upper], SharingSlot)
        assert torch.equal(compressed.stores[upper].last(24, 24).k, compressed.stores[lower].last(24, 24).k)


def test_a_sharing_model_is_one_whose_slot_is_replaced(decoder, tokens):
    """Calibration runs the model with slot 2 reading slot 0: as if layer 2 had layer 0's keys and values."""
    model, ids = decoder(n_layers=3), tokens(1, 16)
    shared = engine_of(model).logits(ids, engine_of(model).new_cache({2: 0}))
    share = {"layers": [{"layers": "0-1", "own": {}}, {"layers": "2", "keys": {"share": 0}, "values": {"share": 0}}]}
    twin = decoder(kv=share, n_layers=3)
    twin.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(shared, twin(ids), atol=1e-5, rtol=1e-5)


def test_a_slot_is_shared_inside_a_cycle(decoder, tokens):
    """Layer 0 reads slot 2, which is slot 1, before layer 1 has written it: in the first pass that of past tokens."""
    cycle = {
        "layers": [
            {"layers": 0, "own": {}, "keys": {"share": 2}},
            {"layers": 1, "own": {}, "keys": {"share": 0}, "values": {"fuse": [0, 1]}},
            {"layers": 2, "own": {}, "keys": {"fuse": [1, 2]}},
        ],
        "iterations": {"forward": 15, "backward": 1},
    }
    model, ids = decoder(kv=cycle, n_layers=3), tokens(2, 16)
    engine = engine_of(model)
    whole, parts = engine.new_cache({2: 1}), engine.new_cache({2: 1})
    expected = engine.logits(ids, whole)
    found = torch.cat([engine.logits(part, parts) for part in ids.split(1, dim=1)], dim=1)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, engine.logits(ids, engine.new_cache()), atol=1e-2)
    method = parse("kvsharer:threshold=-1")
    method.prepare(engine, ids)
    assert method.shares()


def test_dissimilar_pairs_are_tried_first_and_the_threshold_holds(decoder, tokens):
    model, ids = decoder(n_layers=4), tokens(2, 20)
    model.blocks[3].attention.owner.v_proj.weight.mul_(50)  # slot 3 is far from all others
    model.blocks[3].attention.o_proj.weight.mul_(0)  # and does not matter
    engine = engine_of(model)
    for threshold in (-1.0, 0.9):  # with -1, the first pair tried is taken
        method = parse(f"kvsharer:threshold={threshold}")
        assert method.facts() == {}
        method.prepare(engine, ids)
        assert list(method.shares()) == [3]
        assert json.loads(json.dumps(method.facts())) == {"reads": {"3": method.shares()[3]}}
    with pytest.raises(UserError, match=r"only \d of share=4 slots can be dropped with threshold=0.9"):
        parse("kvsharer:share=4,threshold=0.9").prepare(engine, ids)
    with pytest.raises(UserError, match="not calibrated"):
        parse("kvsharer").shares()


def test_a_shared_cache_follows_the_batch(decoder, tokens):
    ids = tokens(2, 28)
    engine, cache, method = fill(decoder(n_layers=4), ids[:, :20], "kvsharer:threshold=0.0")
    compressed = engine.compress(cache, method)
    expected = engine.logits(ids[:, 20:], copy.deepcopy(compressed))
    compressed.reorder_cache(torch.tensor([1, 0, 1]))
    found = engine.logits(ids[[1, 0, 1], 20:], compressed)
    torch.testing.assert_close(found, expected[[1, 0, 1]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["minicache", "minicache_xkv", "kvsharer"])
def test_a_model_with_one_slot_has_nothing_to_merge(name, decoder, tokens) -> None:
    """The message offers no option that would not help either."""
    model = as_pretrained(decoder(n_layers=1))
    with pytest.raises(UserError, match=rf"^{name}: no two .*; allowed: models with two") as error:
        cllm.compress(model, tokens(1, 20), name)
    assert "start up to" not in str(error.value)
    assert "share=" not in str(error.value)
