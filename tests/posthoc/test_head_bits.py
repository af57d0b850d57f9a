"""Quantisers whose heads have their own widths, by the weighted errors that their codes make."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from cllm.errors import UserError
from cllm.posthoc.cache import compress_cache
from cllm.posthoc.head_bits import HeadCodes, choose_bits
from cllm.posthoc.readers import RecordedQueries
from cllm.posthoc.registry import parse
from tests.posthoc.filled import fill

SPECS = ["turboquant:mean_bits=2.5", "turboquant:mean_bits=2,sketch=true", "kivi:mean_bits=3,group=4,residual=4"]


def watched(model, ids, spec, **options) -> Any:
    """The method, its engine and a filled cache; its weights, keys and values."""
    engine, cache, method = fill(model, ids, spec, ids, **options)
    slots = engine.compressible(cache)
    keys, values = slots.tensors(before_rope=False, sinks=slots.sinks(method.sinks))[0]
    return method, engine, cache, method.error_weights(keys.before_rope(), values), keys, values


def bits_of(cache) -> dict[str, list[list[int]]]:
    """The width of every head of every slot."""
    found: dict[str, list[list[int]]] = {"k": [], "v": []}
    for store in (s for s in cache.stores.values() if hasattr(s, "prefix")):
        for kind, of_kind in found.items():
            code = getattr(store.prefix, kind)
            of_head = {h: b for b, heads in zip(code.bits, code.heads, strict=True) for h in heads}
            of_kind.append([of_head[h] for h in sorted(of_head)])
    return found


def flat(bits) -> list[int]:
    return [b for kind in "kv" for slot in bits[kind] for b in slot]


# ---- the choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(1, 2, 3, 4), (1, 2, 4, 8)])
@pytest.mark.parametrize("mean", [1, 1.7, 2.5, 3.9])
def test_no_choice_of_as_many_bits_is_better(widths, mean):
    """Of all of them, one by one; errors may grow with bits, units differ in size, and two have a least width."""
    draw = torch.Generator().manual_seed(int(10 * mean) + widths[-1])
    for _ in range(5):
        errors = (torch.rand(5, 4, generator=draw) * torch.tensor([1.0, 0.5, 0.3, 0.2])).tolist()
        numbers = [8, 8, 16, 8, 24]
        least = [max(b for b in widths if b <= mean)] * 2 + [1] * 3
        chosen = choose_bits(errors, numbers, widths, mean, least)

        def spent(bits, numbers=numbers):
            return sum(n * b for n, b in zip(numbers, bits, strict=True))

        def total(bits, errors=errors):
            return sum(of[widths.index(b)] for of, b in zip(errors, bits, strict=True))

        assert spent(chosen) <= mean * sum(numbers)
        allowed = itertools.product(*([b for b in widths if b >= smallest] for smallest in least))
        as_many = [bits for bits in allowed if spent(bits) <= spent(chosen)]
        assert tuple(chosen) in as_many
        assert total(chosen) <= min(map(total, as_many)) + 1e-12


def test_records_have_the_chosen_widths(decoder, tokens):
    ids = tokens(1, 40)
    engine, cache, method = fill(decoder(), ids, "turboquant:mean_bits=2.5", ids)
    assert method.facts() == {}
    compressed = engine.compress(cache, method)
    assert method.facts() == {"bits": bits_of(compressed)}
    assert parse("turboquant:bits=2").facts() == {}


def test_bits_that_save_nothing_are_not_spent():
    assert choose_bits([[1.0, 1.0, 2.0], [1.0, 0.5, 0.5]], [4, 4], (1, 2, 4), 4, [1, 1]) == [1, 2]
    assert choose_bits([[1.0, 0.9, 0.0]], [4], (1, 2, 4), 4, [1]) == [4]  # over the hull, not step by step


# ---- the errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kv", "spec"), [("mha", "turboquant:mean_bits=2,sinks=3"), ("fusedkv", "turboquant:mean_bits=2,sinks=3")]
)
def test_errors_are_those_of_a_slow_reference(kv, spec, decoder, tokens):
    """One head, query and token at a time, for a padded batch and a plan whose layers read several slots."""
    model, ids, starts = decoder(kv={"preset": kv}, n_layers=4), tokens(2, 20), [0, 6]
    method, engine, cache, weights, keys, values = watched(model, ids, spec, starts=torch.tensor(starts))
    inputs: dict[int, Any] = {}
    streams: dict[int, Any] = {}
    for i, block in enumerate(model.blocks):
        block.attention.q_proj.register_forward_hook(lambda _, a, y, i=i: inputs.__setitem__(i, y))
        block.mlp_norm.register_forward_pre_hook(lambda _, a, i=i: streams.__setitem__(i, a[0].double()))
    model.hidden(ids, starts=torch.tensor(starts), cache=engine.new_cache())
    found = method.errors(weights, keys, values)
    rotation, readers = keys.rotations()[keys.slots[0]], {j: engine.readers(j) for j in keys.slots}
    changes, scaled = [], []
    for tensors, of_slot in ((keys, weights.of_keys()), (values, weights.of_values())):
        kind = tensors.kind
        exact = {j: getattr(cache.stores[j].last(20, 20), kind).double() for j in keys.slots}
        table = torch.zeros(len(keys.slots), 4, 8, dtype=torch.double)
        coded = {}
        for n, bits in enumerate(range(1, 9)):
            for i, (j, code) in enumerate(zip(keys.slots, method.code_slots(tensors, bits), strict=True)):
                decoded = code.decode()
                error = decoded - tensors.data[i]
                error = rotation.undo(error) if kind == "k" else error
                form = (of_slot[j].root @ of_slot[j].root).double()
                for b, start in enumerate(starts):
                    received = of_slot[j].attention[b].double()
                    power = received.sqrt() / received[start:].sqrt().mean() + 0.1
                    for g, t in itertools.product(range(4), range(start, 17)):
                        e = error[b, t, g].double()
                        table[i, g, n] += power[t] * (e @ form[b, g] @ e) / 2
                if bits == 2:
                    coded[j] = exact[j].clone()
                    for b, start in enumerate(starts):
                        coded[j][b, start + 3 :] = decoded[b, start:].double()
        changes.append(coded)
        scaled.append(table)
    total = {"k": 0.0, "v": 0.0}
    exact = {kind: {j: getattr(cache.stores[j].last(20, 20), kind).double() for j in keys.slots} for kind in "kv"}
    for layer in range(4):
        parts = [(r, j) for j in keys.slots for r in readers[j] if r.layer == layer]
        read = [sum(x[j] * r.keys for r, j in parts if r.keys is not None) for x in (exact["k"], changes[0])]
        read += [sum(x[j] * r.values for r, j in parts if r.values is not None) for x in (exact["v"], changes[1])]
        for b, start in enumerate(starts):
            queries = inputs[layer][b].unflatten(-1, (4, 8)).double()
            turned = [rotated(model, queries[t], t - start) for t in range(20)]
            lost, squares = {"k": 0.0, "v": 0.0}, streams[layer][b].square().sum(-1)
            for t in range(start, 20):
                change: dict[str, Any] = {"k": 0.0, "v": 0.0}
                for h in range(4):
                    k, other, v, coded_v = (x[b, start : t + 1, h * x.shape[2] // 4] for x in read)
                    a, a_other = ((x @ turned[t][h] / math.sqrt(8)).softmax(0) for x in (k, other))
                    w = model.blocks[layer].attention.o_proj.weight.double()[:, h * 8 : h * 8 + 8]
                    change["k"] = change["k"] + w @ ((a_other - a) @ v)
                    change["v"] = change["v"] + w @ (a @ (coded_v - v))
                for kind in "kv":
                    lost[kind] += change[kind].square().sum() / squares[t] / (20 - start)
            for kind in "kv":
                total[kind] += lost[kind] / 2
    expected = [table * total[kind] / table[:, :, 1].sum() for kind, table in zip("kv", scaled, strict=True)]
    torch.testing.assert_close(torch.stack(found), torch.cat(expected), rtol=2e-3, atol=1e-9)


def rotated(model, q, position):
    from cllm.model.rope import apply_rope, rope_table

    return apply_rope(q.float()[None, None], rope_table(model.config.rope, 8, torch.tensor([[position]])))[
        0, 0
    ].double()


def test_a_cache_has_the_best_of_all_widths(decoder, tokens):
    """Of all choices in which no keys have fewer than 2 bits, with the errors of the codes that the cache stores."""
    model, ids = decoder(n_layers=2, n_heads=2), tokens(1, 60)
    spec = "kivi:mean_bits=3,group=4,residual=4"
    method, engine, cache, weights, keys, values = watched(model, ids, spec)
    errors = torch.cat(method.errors(weights, keys, values))
    bits = flat(bits_of(engine.compress(cache, method)))
    assert len(errors) == len(bits) == 8
    assert len(set(bits)) > 1
    sums, spent = torch.zeros(1, dtype=torch.double), torch.zeros(1)
    for unit, of in enumerate(errors):
        smallest = int(unit < 4)  # the index of the least width of keys, and of values
        sums = (sums[:, None] + of[smallest:]).flatten()
        spent = (spent[:, None] + torch.tensor([1.0, 2, 4, 8])[smallest:]).flatten()
    own = sum(of[method.widths.index(b)].item() for of, b in zip(errors, bits, strict=True))
    assert sum(bits) <= 3 * 8
    assert own == pytest.approx(sums[spent <= sum(bits)].min().item(), rel=1e-9)


@pytest.mark.parametrize(("spec", "least"), [("turboquant:mean_bits=2", 2), ("kivi:mean_bits=3,group=4,residual=4", 2)])
def test_no_keys_have_fewer_bits_than_with_equal_widths(spec, least, decoder, tokens):
    """Though the prompt's own last queries do not need those of two layers."""
    model, ids = decoder(n_layers=4), tokens(1, 60)
    for block in model.blocks[1:3]:
        block.attention.o_proj.weight.mul_(1e-3)
    engine, cache, method = fill(model, ids, spec, None)
    bits = bits_of(engine.compress(cache, method))
    assert min(b for slot in bits["k"] for b in slot) == least
    assert min(b for slot in bits["v"] for b in slot) == 1


def test_sums_of_errors_are_below_those_of_equal_widths(decoder, tokens):
    method, engine, cache, weights, keys, values = watched(decoder(), tokens(2, 60), "turboquant:mean_bits=3")
    errors = torch.cat(method.errors(weights, keys, values))
    bits = torch.tensor(flat(bits_of(engine.compress(cache, method))))
    assert errors.gather(1, bits[:, None] - 1).sum() < 0.9 * errors[:, 2].sum()


# ---- caches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("spec", "plain"), [("turboquant", 3), ("kivi:group=4,residual=4", 2)])
def test_bytes_are_those_of_the_widths(spec, plain, decoder, tokens):
    """84 tokens with 4 sinks, 4 slots, 4 heads of 8 channels, in fp32; compared with `plain` bits everywhere."""
    model, mean = decoder(n_layers=4), 3
    join = "," if ":" in spec else ":"
    engine, cache, method = fill(model, tokens(1, 84), f"{spec}{join}mean_bits={mean}", None)
    found = engine.compress(cache, method)
    bits, coded = flat(bits_of(found)), 80 if "turbo" in spec else 76
    heads = 2 * 4 * 4
    assert len(set(bits)) > 1
    assert mean * heads - 4 <= sum(bits) <= mean * heads
    sinks = 4 * 8 * 4 * heads
    scales = {"turboquant": 80 * heads * 4, "kivi": 76 * 8 * heads // 4 * 2 * 4 + 4 * 8 * heads * 4}[method.name]
    assert found.nbytes() == sum(bits) * coded * 8 // 8 + scales + sinks
    equal = engine.compress(cache, parse(f"{spec}{join}bits={plain}"))
    assert found.nbytes() - equal.nbytes() == (sum(bits) - plain * heads) * coded


@pytest.mark.parametrize("kv", ["mha", "gqa", "cla", "fusedkv", "yoco"])
@pytest.mark.parametrize("spec", SPECS)
def test_heads_are_decoded_in_their_order(kv, spec, design, tokens):
    """Each as the plain method codes it in its width; plans that share have one code a slot, not one a layer."""
    model = design(kv)
    engine, cache, method = fill(model, tokens(2, 60), spec, None)
    found = engine.compress(cache, method)
    plain = {b: engine.compress(cache, method.model_copy(update={"mean_bits": None, "bits": b})) for b in method.widths}
    bits = bits_of(found)
    assert len(set(flat(bits))) > 1
    compressed = [j for j, store in found.stores.items() if hasattr(store, "prefix")]
    for n, j in enumerate(compressed):
        store = found.stores[j]
        assert isinstance(store.prefix.k, HeadCodes)
        for kind in "kv":
            read = getattr(store.last(60, 60), kind)
            for head, b in enumerate(bits[kind][n]):
                expected = getattr(plain[b].stores[j].last(60, 60), kind)[:, :, head]
                assert torch.equal(read[:, :, head], expected)


@pytest.mark.parametrize("kv", ["mha", "fusedkv", "yoco"])
@pytest.mark.parametrize("spec", SPECS[:2])
def test_padding_changes_nothing(kv, spec, design, tokens):
    model, ids, later = design(kv), tokens(1, 40), tokens(1, 3, seed=1)
    outs, widths = [], []
    for padding in (0, 9):
        columns = torch.cat((torch.zeros(1, padding, dtype=torch.long), ids), dim=1)
        options = {"starts": torch.tensor([padding])} if padding else {}
        engine, cache, method = fill(model, columns, spec, None, **options)
        compressed = engine.compress(cache, method)
        widths.append(bits_of(compressed))
        outs.append(engine.logits(later, compressed))
    assert widths[0] == widths[1]
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("spec", ["turboquant:{}", "kivi:{},group=4,residual=4"])
def test_transformers_caches(family, spec, llama, tokens):
    model = llama(family)
    engine, cache, method = fill(model, tokens(2, 80), spec.format("mean_bits=3"), None)
    found = engine.compress(cache, method)
    equal = sum(engine.compress(cache, parse(spec.format(f"bits={b}"))).nbytes() for b in (2, 4)) / 2  # of 3 bits
    step = 80 * 8 * 2 * 4 / 8  # a head of two sequences, from 4 to 8 bits
    assert 0 <= equal - found.nbytes() < step
    codes = [layer.prefix.k for layer in found.layers]
    assert len({b for code in codes for b in code.bits}) > 1
    assert engine.logits(tokens(2, 3, seed=1), found).isfinite().all()


def test_a_static_cache_gives_the_same(decoder, tokens):
    engine, cache, method = fill(decoder(), tokens(2, 40), "turboquant:mean_bits=2.5", None)
    later = tokens(2, 1, seed=1)
    outs = [engine.logits(later, compress_cache(cache, method, room=room)) for room in (None, 4)]
    torch.testing.assert_close(outs[1], outs[0])


@pytest.mark.parametrize("spec", SPECS)
def test_later_tokens_get_the_widths_that_heads_have(spec, decoder, tokens):
    """The codes of all tokens at once, in the widths that the prompt has chosen."""
    model, ids = decoder(n_layers=4), tokens(2, 72)
    engine, cache, method = fill(model, ids[:, :40], f"{spec},every=8", None)
    compressed = engine.compress(cache, method)
    bits, exact = bits_of(compressed), engine.new_cache()
    method.release()
    for block in ids[:, 40:].split(8, dim=1):
        engine.hidden(block, compressed)
    assert compressed.compressed == 72
    assert bits_of(compressed) == bits
    # Layers above the first read what codes have changed, so only its own keys and values are known.
    engine.hidden(ids, exact)
    for kind in "kv":
        read = getattr(compressed.stores[0].last(72, 72), kind)
        for head, b in enumerate(bits[kind][0]):
            plain = method.model_copy(update={"mean_bits": None, "bits": b, "every": None})
            expected = getattr(engine.compress(exact, plain).stores[0].last(72, 72), kind)[:, :, head]
            torch.testing.assert_close(read[:, :, head], expected, atol=1e-5, rtol=1e-4)


def test_a_prompt_too_short_for_codes_gives_later_tokens_equal_widths(decoder, tokens):
    engine, cache, method = fill(decoder(), tokens(1, 12), "kivi:mean_bits=3,group=8,residual=8,every=4", None)
    compressed = engine.compress(cache, method)
    assert set(flat(bits_of(compressed))) == {2}
    assert max(error for of in compressed.outcome.errors.values() for error in of.values()) == 0


def test_sequences_are_rearranged_with_their_codes(decoder, tokens):
    engine, cache, method = fill(decoder(), tokens(2, 40), "turboquant:mean_bits=2.5,every=2", None)
    one, other = (engine.compress(cache, method) for _ in range(2))
    for step in tokens(2, 4, seed=1).split(2, dim=1):
        engine.hidden(step, one)
        engine.hidden(step, other)
    one.reorder_cache(torch.tensor([1, 0]))
    for j, store in one.stores.items():
        for a, b in zip(store.last(44, 44)[:2], other.stores[j].last(44, 44)[:2], strict=True):
            assert torch.equal(a, b.flip(0))


def test_a_batch_has_one_choice():
    assert parse("turboquant:mean_bits=2").chooses_for_batch
    assert parse("kivi:mean_bits=2").chooses_for_batch
    assert not parse("turboquant:bits=2").chooses_for_batch
    assert not parse("turboquant:bits=2").watches


def test_what_cannot_be_weighted_says_why(decoder, design, tokens, filled):
    engine, cache = filled(decoder(), tokens(1, 40))
    method = parse("turboquant:mean_bits=3")
    with pytest.raises(UserError, match="mean_bits=3: the queries of the prompt were not recorded"):
        engine.compress(cache, method)
    engine, cache, narrow = fill(decoder(), tokens(1, 40), "kivi:mean_bits=3,group=16,residual=0", None)
    with pytest.raises(UserError, match="group=16 does not divide the 8 channels of a head"):
        engine.compress(cache, narrow)
    engine, cache = filled(design("mla"), tokens(1, 40))
    with pytest.raises(UserError, match=r"turboquant: mean_bits=3: .*LatentAttention"), method.watch(engine):
        pass
    with pytest.raises(UserError, match=r"turboquant: mean_bits=3: the slots are latents; .* or bits"):
        engine.compress(cache, method)


def test_queries_are_those_of_the_option(decoder, tokens):
    engine, _, method = fill(decoder(), tokens(1, 40), "turboquant:mean_bits=3", None)
    assert isinstance(method._queries, RecordedQueries)
    method.release()
    with pytest.raises(UserError, match="mean_bits=3: the queries"):
        engine.compress(fill(decoder(), tokens(1, 40), "none", None)[1], method)
