"""Errors weighted by what they change in attention's output, and what xKV makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cllm.errors import UserError
from cllm.model.rope import apply_rope, rope_table
from cllm.posthoc.engine import engine_of
from cllm.posthoc.lowrank import water_filling
from cllm.posthoc.mixed import GROUP, WIDTHS, choose_widths, code_columns, column_bits
from cllm.posthoc.readers import WINDOW, RecordedQueries
from cllm.posthoc.registry import parse
from cllm.posthoc.weighting import ErrorWeights, rotated_moment, row_weights

WEIGHTED = "weight=queries,spread=true"


@pytest.fixture(scope="module")
def watched():
    """`watched(model, ids)`: engine, filled cache, and the weights of its slots' errors."""

    def fill(model, ids, sinks=4, last=WINDOW, **options):
        engine = engine_of(model)
        cache, queries = engine.new_cache(), RecordedQueries(last)
        readers = {slot: engine.readers(slot) for slot in engine.slots()}
        with queries.record(readers):
            model.hidden(ids, cache=cache, **options) if options else engine.hidden(ids, cache)
        slots = engine.compressible(cache)
        keys, values = slots.tensors(before_rope=True, sinks=slots.sinks(sinks))[0]
        return engine, cache, ErrorWeights(keys, values, readers, queries)

    return fill


def compressed(engine, model, ids, spec, **options):
    method, cache = parse(spec), engine.new_cache()
    with method.watch(engine):
        model.hidden(ids, cache=cache, **options) if options else engine.hidden(ids, cache)
    return cache, engine.compress(cache, method), engine.compress(cache, method)


# ---- the weights ----------------------------------------------------------------------------------------------------


def test_the_moment_of_rotated_queries_is_the_mean_over_relative_positions(decoder):
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(50, 3, 8, generator=draw) + 1
    rope, offsets = decoder().config.rope, torch.arange(1, 40)
    cos, sin = rope_table(rope, 8, offsets)
    expected = torch.zeros(3, 8, 8, dtype=torch.double)
    for offset in offsets:
        turned = apply_rope(q[None], rope_table(rope, 8, offset.expand(50)[None]))[0].double()
        expected += torch.einsum("mhd,mhe->hde", turned, turned) / len(q) / len(offsets)
    found = rotated_moment(torch.einsum("mhd,mhe->hde", q, q) / len(q), cos[:, 0, 0], sin[:, 0, 1])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_weights_are_those_of_a_slow_reference(decoder, tokens, watched):
    """One head and one token at a time, from the model's own modules, for two layers that fuse and one that shares."""
    model = decoder(kv={"preset": "fusedkv"}, n_heads=4)
    ids = tokens(1, 40)
    _, cache, weights = watched(model, ids)
    plan, dim = model.plan, model.config.resolved_head_dim
    inputs: dict[int, Any] = {}
    streams: dict[int, Any] = {}
    for i, block in enumerate(model.blocks):
        block.attention.q_proj.register_forward_hook(lambda _, a, y, i=i: inputs.__setitem__(i, y[0]))
        block.mlp_norm.register_forward_pre_hook(lambda _, a, i=i: streams.__setitem__(i, a[0][0]))
    model.hidden(ids)
    slot = plan.owners[-1]
    stored = {j: store.last(40, 40) for j, store in cache.stores.items()}
    heads = stored[slot].k.shape[2]
    form, attention = torch.zeros(heads, dim, dim, dtype=torch.double), torch.zeros(36, dtype=torch.double)
    layers = plan.readers("keys")[slot]
    for i in layers:
        module, q = model.blocks[i].attention, inputs[i].unflatten(-1, (4, dim)).double()
        factor: dict[str, dict[int, Any]] = {part: {} for part in ("keys", "values")}
        for part in factor:
            read, reader = getattr(plan, part)(i), getattr(module, part)
            for n, j in enumerate(read.layers):
                own = reader.channel_weights()[n] if len(read.layers) > 1 else torch.ones(1, 1)
                factor[part][j] = own.expand(heads, dim).double()
        k = sum(f * stored[j].k[0].double() for j, f in factor["keys"].items())
        squares = streams[i].double().square().sum(-1)
        received = torch.zeros(4, 36, dtype=torch.double)
        for h in range(4):
            g = h * heads // 4
            w = module.o_proj.weight.double()[:, h * dim : (h + 1) * dim]
            spread = torch.zeros(dim, dim, dtype=torch.double)
            for j, f in factor["values"].items():
                spread += torch.cov((f[g] * stored[j].v[0, 4:, g].double()).T, correction=0)
            unit = (w @ spread @ w.T).trace() / dim
            moment = (q[:, h] / squares[:, None]).T @ q[:, h] / 40
            turned = torch.zeros(dim, dim, dtype=torch.double)
            for offset in range(1, 41):
                r = apply_rope(
                    torch.eye(dim)[None, :, None], rope_table(model.config.rope, dim, torch.full((1, dim), offset))
                )
                r = r[0, :, 0].double()
                turned += r.T @ moment @ r / 40
            form[g] += factor["keys"][slot][g][:, None] * turned * unit * factor["keys"][slot][g]
            for t in range(40):
                at = apply_rope(
                    q[t, h].float()[None, None, None], rope_table(model.config.rope, dim, torch.tensor([[t]]))
                )
                a = (k[: t + 1, g] @ at.flatten().double() / dim**0.5).softmax(0)[4:]
                received[h, : len(a)] += a.square()
            received[h] /= torch.arange(36, 0, -1)
        attention += (received / received.mean(1, keepdim=True)).mean(0) / len(layers)
    found = weights.of_keys()[slot]
    product = (found.root @ found.root)[0].double()
    torch.testing.assert_close(product, form, rtol=1e-3, atol=3e-4 * form.abs().max().item())
    torch.testing.assert_close(found.attention[0].double(), attention, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.inverse @ found.root, torch.eye(dim).expand(1, heads, -1, -1), rtol=0, atol=1e-3)


def test_padding_changes_no_weight(decoder, tokens, watched):
    model, ids = decoder(kv={"preset": "cla"}), tokens(1, 30)
    padded = torch.cat((torch.zeros(1, 9, dtype=torch.long), ids), dim=1)
    _, _, alone = watched(model, ids)
    _, _, after = watched(model, padded, starts=torch.tensor([9]))
    for one, other in zip((alone.of_keys(), alone.of_values()), (after.of_keys(), after.of_values()), strict=True):
        for slot in one:
            torch.testing.assert_close(other[slot].attention[:, 9:], one[slot].attention, rtol=1e-3, atol=1e-4)
            assert not other[slot].attention[:, :9].any()
    for slot, weights in alone.of_values().items():
        torch.testing.assert_close(after.of_values()[slot].root, weights.root, rtol=1e-3, atol=1e-5)


def test_a_massive_activation_of_the_first_token_leaves_the_weights_of_layers_above_it(decoder, tokens, watched):
    """In trained models the residual stream of the first token is thousands of times as long from some layer on. A
    short prompt records its query too. It counts as one of 40 then, and does not decide what layers above are worth."""
    model, ids = decoder(n_layers=4), tokens(1, 40)
    added = 1e3 * torch.randn(model.config.d_model, generator=torch.Generator().manual_seed(0))
    first = (torch.arange(40) == 0).float()[None, :, None]
    model.blocks[1].mlp.register_forward_hook(lambda _, args, out: out + first * added)
    _, _, short = watched(model, ids)
    _, _, without_first = watched(model, ids, last=39)
    for found, expected in ((short.of_keys(), without_first.of_keys()), (short.of_values(), without_first.of_values())):
        for slot, weights in found.items():
            change = weights.root.square().sum() / expected[slot].root.square().sum()
            assert change == pytest.approx(1, abs=0.1), slot


WINDOWS_ABOVE = {
    "layers": [
        {"layers": "0-3", "own": {}},
        {"layers": [4, 6], "own": {}, "window": 3},
        {"layers": [5, 7], "keys": {"share": 3}, "values": {"share": 3}},
    ]
}


@pytest.mark.parametrize(
    "kv", [{"preset": "mha"}, {"preset": "swiftkv", "group": 2}, WINDOWS_ABOVE], ids=["mha", "swiftkv", "windows above"]
)
def test_a_prompt_in_pieces_has_the_weights_of_one_piece(kv, decoder, tokens):
    model, ids = decoder(kv=kv), tokens(2, 30)
    engine, outs = engine_of(model), []
    for fill in (None, 7), ("hidden", 7), ("prefill", None), ("prefill", 7):
        method, cache = parse("xkv:group=2,ratio=2,weight=queries,spread=true"), engine.new_cache()
        with method.watch(engine):
            if fill[0] == "prefill":  # would compute only the last tokens in the highest layers
                model.prefill(ids, cache, chunk=fill[1])
            else:
                for part in ids.split(fill[1] if fill[0] else 30, dim=1):
                    engine.hidden(part, cache)
        outs.append(engine.logits(ids[:, :1], engine.compress(cache, method)))
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], atol=1e-3, rtol=1e-3)


# ---- factors under the weights --------------------------------------------------------------------------------------


def weighted_error(weights, cache, exact, group):
    """Σ over groups of the weighted squared errors of keys and values."""
    total = 0.0
    for tensors, of_slot, part in ((weights.keys, weights.of_keys(), "k"), (weights.values, weights.of_values(), "v")):
        for indices in tensors.groups(group):
            slots = [tensors.slots[i] for i in indices]
            rows = row_weights([of_slot[j] for j in slots])
            for i, j in zip(indices, slots, strict=True):
                code = getattr(cache.stores[j].prefix, part)
                error = (code.decode() - tensors.data[i]).flatten(2)
                total += (of_slot[j].weigh(error) * rows).double().square().sum().item()
    return total


def test_each_option_lowers_the_weighted_error(decoder, tokens, watched):
    model, ids = decoder(n_layers=4), tokens(1, 200)
    engine, exact, weights = watched(model, ids)
    errors = []
    specs = ("", ",weight=queries", f",{WEIGHTED}", f",{WEIGHTED},codes=mixed")
    for spec in specs:
        _, cache, _ = compressed(engine, model, ids, f"xkv:group=2,ratio=3{spec}")
        assert exact.nbytes() / cache.nbytes() >= 3
        errors.append(weighted_error(weights, cache, exact, 2))
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.5 * errors[2]


def lost_by_rank(rows, parts):
    """The squared error of the rows (n, C) at every rank up to C, for the best ranks of `parts` blocks of channels."""
    blocks = rows.double().chunk(parts, dim=1)
    squares = torch.cat([torch.linalg.svdvals(block).square() for block in blocks]).sort(descending=True).values
    return rows.double().square().sum() - squares.cumsum(0)


def test_ranks_of_single_heads_never_lose_less_than_joint_ones(decoder, tokens, watched):
    """At as many columns of A, by the weighted error: of a group of two slots with 4 heads of 8 channels each."""
    model, ids = decoder(n_layers=2), tokens(1, 150)
    engine, _, weights = watched(model, ids)
    random = torch.randn(146, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -1, 64)
    groups, tails = [random], 0.0
    for tensors, of_slot, rank in ((weights.keys, weights.of_keys(), 20), (weights.values, weights.of_values(), 30)):
        rows = torch.cat([of_slot[j].weigh(tensors.flat(i)) for i, j in enumerate(tensors.slots)], dim=-1)
        groups.append((rows * row_weights(list(of_slot.values())))[0])
        tails += lost_by_rank(groups[-1], 1)[rank - 1].item()
    for rows in groups:
        joint, heads = lost_by_rank(rows, 1), lost_by_rank(rows, 8)
        total = rows.double().square().sum()
        assert (joint <= heads + 1e-9 * total).all()
        assert (joint[:40] < heads[:40] - 1e-3 * total).any()
    _, cache, _ = compressed(engine, model, ids, "xkv:group=2,rank_k=20,rank_v=30,weight=queries")
    assert weighted_error(weights, cache, None, 2) == pytest.approx(tails, rel=1e-3)


def test_water_filling_is_the_best_of_all_ranks():
    draw = torch.Generator().manual_seed(0)
    squares = [torch.rand(4, generator=draw).sort(descending=True).values for _ in range(3)]
    best = water_filling(squares, [5, 5, 5], 36)
    assert best is not None
    assert sum(best) == 7
    ranks = [(a, b, c) for a in range(1, 5) for b in range(1, 5) for c in range(1, 5) if a + b + c == 7]
    kept = {r: sum(s[:n].sum().item() for s, n in zip(squares, r, strict=True)) for r in ranks}
    assert kept[tuple(best)] == pytest.approx(max(kept.values()))
    assert water_filling(squares, [5, 5, 5], 14) is None


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_of_columns_are_those_of_a_slow_reference(bits):
    x = torch.randn(1, 70, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 100.0, 1e-3])
    x[0, 5, 1] = 2000
    columns = code_columns(x, bits, GROUP, torch.float32)
    decoded, half = columns.decode(), 2 ** (bits - 1)
    assert columns.packed.numel() == 2 * GROUP * 3 * bits // 8
    for c in range(3):
        for first in (0, GROUP):
            part = torch.zeros(GROUP)
            rows = x[0, first : first + GROUP, c]
            part[: len(rows)] = rows
            errors = []
            normal = {1: 1.5958, 2: 0.9957, 4: 0.3352, 8: 0.0308}[bits] * part.square().mean().sqrt()
            for step in (normal, part.abs().max() / (half - 0.5)):
                rounded = [min(max(round(v / step.item() - 0.5), -half), half - 1) for v in part.tolist()]
                levels = torch.tensor(rounded) + 0.5
                fitted = (part * levels).sum() / levels.square().sum()
                errors.append(((levels * fitted - part)[: len(rows)]).square().sum().item())
            found = (decoded[0, first : first + GROUP, c] - rows).square().sum().item()
            assert found == pytest.approx(min(errors), rel=0.05, abs=1e-9)


def test_widths_fit_the_budget_and_fall_with_the_energy():
    draw = torch.Generator().manual_seed(0)
    energies = [10 ** (3 * torch.rand(12, generator=draw)).sort(descending=True).values for _ in range(2)]
    costs = [column_bits(200, 1, (2, 8), 2), column_bits(200, 3, (2, 8), 2)]
    budget = 0.3 * sum(12.0 * cost[8] for cost in costs)
    widths = choose_widths(energies, energies, costs, budget)
    assert widths is not None
    spent = sum(cost[int(b)] for w, cost in zip(widths, costs, strict=True) for b in w)
    largest = max(cost[8] for cost in costs)
    assert budget - largest < spent <= budget
    assert not any((w.diff() > 0).any().item() for w in widths)
    assert choose_widths(energies, energies, costs, 10) is None


# ---- caches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["mha", "cla", "fusedkv", "yoco"])
@pytest.mark.parametrize("options", [WEIGHTED, f"{WEIGHTED},codes=mixed"])
def test_plans_that_share_and_padded_batches_decode_like_their_reconstruction(decoder, tokens, kv, options):
    from cllm.posthoc.engine import engine_of

    model = decoder(kv={"preset": kv})
    engine, starts = engine_of(model), torch.tensor([0, 11])
    exact, cache, twin = compressed(engine, model, tokens(2, 60), f"xkv:group=2,ratio=1.2,{options}", starts=starts)
    assert exact.nbytes() / cache.nbytes() >= 1.2
    two = tokens(2, 2, seed=1)
    together = model.hidden(two, cache=twin)  # several tokens: keys and values are reconstructed
    steps = torch.cat([model.hidden(two[:, t : t + 1], cache=cache) for t in range(2)], dim=1)
    torch.testing.assert_close(steps, together, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_transformers_caches(llama, tokens, family):
    from cllm.posthoc.engine import engine_of

    model = llama(family)
    engine, ids = engine_of(model), tokens(2, 80)
    exact, plain, _ = compressed(engine, model, ids, "xkv:group=2,ratio=2")
    _, mixed, _ = compressed(engine, model, ids, f"xkv:group=2,ratio=2,{WEIGHTED},codes=mixed")
    assert engine.nbytes(exact) / mixed.nbytes() >= 2
    logits = [engine.logits(tokens(2, 3, seed=1), cache) for cache in (exact, plain, mixed)]
    assert (logits[2] - logits[0]).norm() < 0.5 * (logits[1] - logits[0]).norm()


def test_full_budget_loses_only_rounding(decoder, tokens):
    from cllm.posthoc.engine import engine_of

    model = decoder()
    engine, ids = engine_of(model), tokens(1, 100)
    _, cache, _ = compressed(engine, model, ids, "xkv:group=1,energy=1,weight=queries")
    assert max(max(e.values()) for e in cache.outcome.errors.values()) < 1e-4


def test_what_cannot_be_weighted_says_why(decoder, design, tokens, filled):
    engine, cache = filled(decoder(), tokens(1, 40))
    with pytest.raises(UserError, match="were not recorded"):
        engine.compress(cache, parse("xkv:ratio=2,weight=queries"))
    model = design("mla")
    with pytest.raises(UserError, match="LatentAttention"):
        compressed(filled(model, tokens(1, 4))[0], model, tokens(1, 40), "xkv:ratio=2,weight=queries")
    model = decoder()
    with pytest.raises(UserError, match="even at rank 1"):
        compressed(filled(model, tokens(1, 4))[0], model, tokens(1, 40), f"xkv:group=4,ratio=8,{WEIGHTED}")
