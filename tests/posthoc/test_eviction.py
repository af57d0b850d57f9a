"""Evicting methods against a dense reference, which computes all tokens and hides the evicted ones by masks.

The reference runs the uncached model with a slow attention in the place of the kernels. In a first pass over the prompt
it records every attention weight, from which tokens are chosen one by one as the papers say. In a second pass over the
entire text, later queries do not see the others. Positions are those of the text.
"""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cllm.cache.cache import KVCache
from cllm.errors import UserError
from cllm.posthoc.cache import compress_cache
from cllm.posthoc.engine import engine_of
from cllm.posthoc.hf import compress_dynamic
from cllm.posthoc.pages import make_pages, select_tokens
from cllm.posthoc.registry import parse
from cllm.posthoc.stores import CompressedSlot
from cllm.prefix.pack import pack, unpack
from tests.posthoc.reading import assert_read_as_alone, compressed_cache, read_on
from tests.posthoc.slow_attention import replace_attention

PREFIX, LENGTH, TOKENS, SINKS, WINDOW = 20, 28, 11, 2, 3
SPECS = {
    "streaming": f"streaming:tokens={TOKENS},sinks={SINKS}",
    "h2o": f"h2o:tokens={TOKENS},sinks={SINKS},recent=0.34",
    "snapkv": f"snapkv:tokens={TOKENS},sinks={SINKS},window={WINDOW},kernel=3",
    "snapkv_mean": f"snapkv:tokens={TOKENS},sinks={SINKS},window={WINDOW},kernel=5,pool=mean",
    "entropy": f"entropy:tokens={TOKENS},sinks={SINKS},window={WINDOW}",
}
CASES = [(kind, name) for kind in SPECS for name in ("gqa", "cla", "fusedkv")]
CASES += [(kind, name) for kind in ("h2o", "entropy") for name in ("yoco", "lckv", "trailing")]
CASES += [("streaming", "mla")]


class Dense:
    """Slow attention with every weight at hand."""

    def __init__(self):
        self.layer, self.weights, self.hidden, self.select, self.dense = 0, {}, {}, None, 0

    def __call__(self, q, k, v, *, window=None, exclude_self=False):
        """(B, T, H, D) for q (B, T, H, D) and k, v (B, T, G, D)."""
        tokens, groups = q.shape[1], q.shape[2] // k.shape[2]
        k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
        t, s = torch.arange(tokens)[:, None], torch.arange(tokens)
        seen = (s < t if exclude_self else s <= t) & (t - s < (window or tokens))
        if self.select is not None and self.layer >= self.dense:
            self.hidden[self.layer] = self.select(q, k[:, :PREFIX, ::groups])
        if self.layer in self.hidden:  # (B, G, T, T)
            seen = seen & ~self.hidden[self.layer].repeat_interleave(groups, dim=1)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
        self.weights[self.layer] = weights
        return torch.einsum("bhts,bshd->bthd", weights, v)


@pytest.fixture
def dense(monkeypatch):
    """`dense(model)`: the reference attention, in the place of the model's."""
    found = Dense()

    def install(model):
        replace_attention(model, found, monkeypatch)
        return found

    yield install
    monkeypatch.undo()


def unions(reads, slots):
    """Slots that some layer reads together, until nothing changes."""
    found = [{slot} for slot in slots]
    for _ in slots:
        for together in reads.values():
            touched = [union for union in found if union & set(together)]
            if touched:
                found = [union for union in found if union not in touched] + [set().union(*touched)]
    return found


def chosen(kind, weights, groups, budget, window=WINDOW):
    """The kept tokens of each sequence and KV head, as sets; weights (B, H, P, P) of all layers that read a slot."""
    total = torch.stack(weights).sum(0)
    batch, heads, n, _ = total.shape
    kept: list[list[set[int]]] = [[set() for _ in range(groups)] for _ in range(batch)]
    for b in range(batch):
        for g in range(groups):
            rows = total[b, g * heads // groups : (g + 1) * heads // groups].sum(0)  # P, P
            if kind == "entropy":
                rows = total[b].sum(0)
            last = {"streaming": budget - SINKS, "h2o": round(0.34 * (budget - SINKS))}.get(kind, window)
            first = 0 if kind == "h2o" else n - window
            votes = [sum(rows[t, s].item() for t in range(first, n)) for s in range(n)]
            if kind.startswith("snapkv"):
                half, bare = (2 if kind == "snapkv_mean" else 1), votes[: n - window]
                near = [bare[max(s - half, 0) : s + half + 1] for s in range(len(bare))]
                votes = [sum(x) / 5 if kind == "snapkv_mean" else max(x) for x in near] + [0] * window
            kept[b][g] = {*range(SINKS), *range(n - last, n)}
            for s in sorted(range(n), key=lambda s: (-votes[s], s)):
                if len(kept[b][g]) < budget:
                    kept[b][g].add(s)
    return kept


def entropies(weights, window=WINDOW):
    """The mean entropy of the last queries of a layer, in nats."""
    rows = weights[:, :, -window:].flatten(0, 2)
    return sum(-sum(a * torch.tensor(a).log().item() for a in row.tolist() if a > 0) for row in rows) / len(rows)


def hide(kept, length):
    """(B, G, T, T): which tokens of the prompt later queries do not see."""
    hidden = torch.zeros(len(kept), len(kept[0]), length, length, dtype=torch.bool)
    for b, heads in enumerate(kept):
        for g, tokens in enumerate(heads):
            for s in set(range(PREFIX)) - tokens:
                hidden[b, g, PREFIX:, s] = True
    return hidden


def evict_slowly(ids, kind, dense, reads, groups, slots):
    """The kept tokens of each slot, after a pass over the prompt; later passes of the reference do not see others."""
    weights, found = dict(dense.weights), unions(reads, slots)
    budgets = [TOKENS] * len(found)
    layers = [[i for i, own in reads.items() if union & set(own)] for union in found]
    if kind == "entropy":
        spread = [sum(entropies(weights[i]) for i in own) / len(own) for own in layers]
        factors = sorted(n / x + 1e-9 for n in range(PREFIX + 1) for x in spread)  # where a number of tokens changes
        sizes = [len(union) for union in found]

        def counts(factor):
            return [min(max(int(factor * x), SINKS + WINDOW), PREFIX) for x in spread]

        fits = [f for f in factors if sum(n * c for n, c in zip(sizes, counts(f), strict=True)) <= TOKENS * sum(sizes)]
        budgets = counts(fits[-1])
    kept_by: dict[int, list[list[set[int]]]] = {}
    for union, own, budget in zip(found, layers, budgets, strict=True):
        kept = chosen(kind, [weights[i] for i in own], groups, budget)
        kept_by |= dict.fromkeys(union, kept)
        dense.hidden |= dict.fromkeys(own, hide(kept, ids.shape[1]))
    return kept_by


def test_budgets_and_scores_of_entropy_take_one_pass_of_votes(decoder, tokens, monkeypatch):
    import cllm.posthoc.evicting as module

    layers, votes = list[int](), module.layer_votes

    def count(*words, **options):
        layers.extend(words[0])
        return votes(*words, **options)

    monkeypatch.setattr(module, "layer_votes", count)
    compressed_cache(engine_of(decoder()), tokens(2, PREFIX), SPECS["entropy"])
    assert layers
    assert sorted(layers) == sorted(set(layers))


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_later_tokens_see_what_the_papers_keep_at_true_positions(kind, name, design, tokens, dense):
    model, ids = design(name), tokens(2, LENGTH)
    engine, runs = engine_of(model), []
    for parts in ([1] * 8, [5, 1, 2]):
        compressed, cache = compressed_cache(engine, ids[:, :PREFIX], SPECS[kind])
        runs.append(read_on(engine, compressed, ids[:, PREFIX:], parts))
    slots = [j for j, store in compressed.stores.items() if isinstance(store, CompressedSlot)]
    groups = 1 if name == "mla" else compressed.stores[slots[0]].tail.slot.k.shape[2]
    reads = {i: [j for j in model.plan.reads(i) if j in slots] for i in range(len(model.plan))}
    reads = {i: own for i, own in reads.items() if own}
    reference = dense(model)
    model(ids[:, :PREFIX])
    kept = evict_slowly(ids, kind, reference, reads, groups, slots)
    logits = model(ids)[:, PREFIX:]
    for found in runs:
        torch.testing.assert_close(found, logits, atol=2e-4, rtol=2e-4)
    for slot in slots:  # K and V of the kept tokens, and nothing else
        exact, count = cache.stores[slot].slot, len(kept[slot][0][0])
        per_token = exact.k[:, :1].nbytes + exact.v[:, :1].nbytes
        assert compressed.stores[slot].nbytes() == per_token * (count + 8)
        for part, full in (("k", exact.k[:, :PREFIX]), ("v", exact.v[:, :PREFIX])):
            error = compressed.outcome.errors[slot][part]
            full = full if full.ndim == 4 else full[:, :, None]  # latents have no heads
            left = torch.zeros_like(full)
            for b, heads in enumerate(kept[slot]):
                for g, columns in enumerate(heads):
                    left[b, sorted(columns), g] = full[b, sorted(columns), g]
            rest, lost = (x[:, SINKS:].flatten(1).norm(dim=1) for x in (full, full - left))
            assert error == pytest.approx((lost / rest).mean().item(), abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", ["streaming", "h2o", "snapkv"])
def test_transformers_models_see_the_same(kind, family, llama, tokens):
    model, ids = llama(family), tokens(2, LENGTH)
    engine, runs = engine_of(model), []
    for parts in ([1] * 8, [5, 1, 2]):
        compressed, _ = compressed_cache(engine, ids[:, :PREFIX], SPECS[kind])
        assert compressed.get_seq_length() == PREFIX
        runs.append(read_on(engine, compressed, ids[:, PREFIX:], parts))
    assert compressed.layers[0].keys.shape[2] + compressed.layers[0].prefix.sinks.rest == TOKENS + 8
    reference = Dense()

    def attend(module, q, k, v, *_, **__):
        reference.layer = module.layer_idx
        return reference(*(t.transpose(1, 2) for t in (q, k, v))), None

    ALL_ATTENTION_FUNCTIONS.register("dense", attend)
    model.set_attn_implementation("dense")
    model(ids[:, :PREFIX])
    layers = range(model.config.num_hidden_layers)
    evict_slowly(ids, kind, reference, {i: [i] for i in layers}, model.config.num_key_value_heads, layers)
    logits = model(ids).logits[:, PREFIX:]
    for found in runs:
        torch.testing.assert_close(found, logits, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("spec", [*SPECS.values(), SPECS["snapkv"] + "+kivi:bits=2,group=4,residual=0"])
def test_padded_sequences_keep_what_they_keep_alone(spec, design, tokens):
    """One of them has fewer tokens than are kept, and one fewer than are always kept."""
    model, ids, starts = design("cla"), tokens(4, LENGTH), torch.tensor([0, 3, PREFIX - 8, PREFIX - 1])
    engine = engine_of(model)
    if "entropy" in spec:  # the budgets of a batch are one
        ids, starts = ids[1:2], starts[1:2]
    if "+" in spec:  # padding that is left shifts the groups of a code
        ids, starts = ids[:2], starts[:2]
    found = []
    for parts in ([8], [1, 5, 1, 1]):
        compressed, _ = compressed_cache(engine, ids[:, :PREFIX], spec, starts=starts)
        found.append(read_on(engine, compressed, ids[:, PREFIX:], parts))
    assert_read_as_alone(engine, ids, PREFIX, starts, spec, found, 1e-4)


def test_errors_of_a_sequence_that_loses_nothing_are_numbers(decoder, tokens) -> None:
    """It has few tokens beside one of many. Sums of squares before and after eviction differ by rounding, in either
    direction."""
    for seed in range(6):
        model, ids = decoder(n_layers=8), tokens(2, 48, seed=seed)
        cache = KVCache(model.config)
        model.hidden(ids[:, :40], cache=cache, starts=torch.tensor([0, 38]))
        compressed = compress_cache(cache, parse("streaming:tokens=16,every=8"))
        found = [compressed.outcome.errors]
        model.hidden(ids[:, 40:], cache=compressed)
        found.append(compressed.outcome.errors)
        assert all(0 < error < 1 for errors in found for slot in errors.values() for error in slot.values())


@pytest.mark.parametrize("start", [4, 12])
def test_padded_sequences_of_transformers_models(start, llama, tokens):
    model, ids = llama(), tokens(2, LENGTH)
    starts, mask = torch.tensor([0, start]), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :start] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # as `generate` counts them
    engine, method, cache = engine_of(model), parse(SPECS["snapkv"]), DynamicCache(config=model.config)
    first, rest = ({"position_ids": p} for p in positions.split([PREFIX, LENGTH - PREFIX], dim=1))
    with method.watch(engine):
        model(ids[:, :PREFIX], attention_mask=mask[:, :PREFIX], past_key_values=cache, **first)
    compressed = compress_dynamic(cache, method, model, starts=starts)
    found = model(ids[:, PREFIX:], attention_mask=mask, past_key_values=compressed, **rest).logits
    assert_read_as_alone(engine, ids, PREFIX, starts, SPECS["snapkv"], [found], 1e-4)


@pytest.mark.parametrize("name", ["streaming", "h2o", "snapkv", "entropy"])
def test_a_budget_of_everything_changes_nothing(name, design, llama, tokens):
    ids = tokens(2, LENGTH)
    for model in (design("gqa"), llama()):
        engine = engine_of(model)
        for budget in (f"tokens={PREFIX}", "tokens=999", "ratio=1"):
            compressed, cache = compressed_cache(engine, ids[:, :PREFIX], f"{name}:{budget}")
            assert engine.nbytes(compressed) == engine.nbytes(cache)
            assert {error for slot in compressed.outcome.errors.values() for error in slot.values()} == {0}
            assert torch.equal(engine.logits(ids[:, PREFIX:], compressed), engine.logits(ids[:, PREFIX:], cache))


@pytest.mark.parametrize("name", ["streaming", "h2o", "snapkv:window=3", "entropy:window=3"])
def test_a_ratio_is_one_of_bytes(name, design, tokens):
    for preset, ratio in (("cla", 2), ("yoco", 1.2), ("fusedkv", 2.7)):
        engine, method = engine_of(design(preset)), f"{name}{',' if ':' in name else ':'}sinks=1,ratio={ratio}"
        compressed, cache = compressed_cache(engine, tokens(2, 40), method)
        slots = engine.compressible(cache).slots.values()
        token = sum((slot.k.nbytes + slot.v.nbytes) // 40 for slot in slots)
        assert 0 <= cache.nbytes() / ratio - compressed.nbytes() < token


def test_a_quantiser_after_eviction_codes_what_is_left(design, tokens):
    engine, bits, group = engine_of(design("gqa")), 4, 4
    spec = f"snapkv:tokens=18,sinks=2,window=3+kivi:bits={bits},group={group},residual=0"
    compressed, cache = compressed_cache(engine, tokens(2, 40), spec)
    batch, _, heads, dim = cache.stores[0].slot.k.shape
    numbers, slots = 2 * batch * 16 * heads * dim, len(cache.stores)  # keys and values of the 16 tokens without sinks
    exact = 4 * 2 * batch * 2 * heads * dim
    assert compressed.nbytes() == slots * (numbers * bits // 8 + 2 * 4 * numbers // group + exact)
    alone, _ = compressed_cache(engine, tokens(2, 40), spec.partition("+")[0])
    for slot, error in compressed.outcome.errors.items():
        assert alone.outcome.errors[slot]["k"] < error["k"] < alone.outcome.errors[slot]["k"] + 0.1
        left, exact = (cache.stores[slot].last(18, 40).k for cache in (compressed, alone))
        assert 0 < (left - exact).norm() / exact.norm() < 0.1


def test_a_prefill_in_pieces_gives_the_same_votes(design, tokens):
    """Layers of which only the last token is computed have one vote."""
    model, ids = design("yoco"), tokens(2, PREFIX)
    engine, kept = engine_of(model), []
    for chunk in (None, 7):
        method, cache = parse(SPECS["snapkv"].replace("window=3", "window=2")), engine.new_cache()
        with method.watch(engine):
            model.prefill(ids, cache, chunk=chunk)
        kept.append(method.kept(engine.compressible(cache)).entries)
    assert kept[0]
    assert kept[0].keys() == kept[1].keys()
    assert all(torch.equal(kept[0][slot], kept[1][slot]) for slot in kept[0])


# ---- pages ----------------------------------------------------------------------------------------------------------


def test_quest_reads_the_pages_of_the_largest_bounds(design, tokens, dense):
    """Alone, padded by a page and in a static cache; of the first slot all tokens are read."""
    page, budget, sinks, starts = 4, 2, 2, torch.tensor([0, 0, 4])
    spec = f"quest:select={page * budget},page={page},sinks={sinks},dense=1"
    model, ids = design("cla"), tokens(3, LENGTH)
    engine = engine_of(model)
    compressed, cache = compressed_cache(engine, ids[:, :PREFIX], spec)
    for slot, store in compressed.stores.items():
        bounds = 0 if slot == min(compressed.stores) else 2 * 5 * store.prefix.k.decode()[:, :1].nbytes
        assert store.nbytes() == cache.stores[slot].nbytes() + bounds  # 18 tokens besides the sinks are five pages
    static = compress_cache(cache, parse(spec), room=8)
    found = read_on(engine, compressed, ids[:, PREFIX:], [1] * 8)
    torch.testing.assert_close(read_on(engine, static, ids[:, PREFIX:], [1] * 8), found, atol=1e-5, rtol=1e-5)
    padded, _ = compressed_cache(engine, ids[:, :PREFIX], spec, starts=starts)
    alone, _ = compressed_cache(engine, ids[2:, 4:PREFIX], spec)
    read = read_on(engine, padded, ids[:, PREFIX:], [1] * 8)
    torch.testing.assert_close(read[:2], found[:2], atol=1e-5, rtol=1e-5)
    expected = read_on(engine, alone, ids[2:, PREFIX:], [1] * 8)
    torch.testing.assert_close(read[2:], expected, atol=1e-4, rtol=1e-4)

    def select(q, k):
        hidden = torch.zeros(len(k), k.shape[2], LENGTH, LENGTH, dtype=torch.bool)
        for b, g, t in itertools.product(range(len(k)), range(k.shape[2]), range(PREFIX, LENGTH)):
            heads = q[b, t].unflatten(0, (k.shape[2], -1))[g]
            pages = k[b, sinks:, g].split(page)  # page, D
            bounds = [max(torch.maximum(h * p.amin(0), h * p.amax(0)).sum().item() for h in heads) for p in pages]
            best = sorted(range(len(pages)), key=lambda i: -bounds[i])[:budget]
            for i in set(range(len(pages))) - set(best):
                hidden[b, g, t, sinks + page * i : min(sinks + page * (i + 1), PREFIX)] = True
        return hidden

    reference = dense(model)
    reference.select = select
    reference.dense = max(model.plan.readers("keys")[min(compressed.stores)]) + 1
    torch.testing.assert_close(found, model(ids)[:, PREFIX:], atol=2e-4, rtol=2e-4)


def test_pages_of_padding_are_selected_last():
    k, is_text = -torch.ones(1, 6, 1, 2), torch.tensor([[False, False, True, True, True, True]])
    pages = make_pages(k, is_text, page=2, budget=2)
    chosen, is_token = select_tokens(torch.ones(1, 1, 1, 2), pages, is_text)
    assert sorted(chosen.flatten().tolist()) == [2, 3, 4, 5]
    assert is_token.all()


# ---- caches ---------------------------------------------------------------------------------------------------------


def test_an_evicted_cache_is_reordered_cropped_and_stored(design, tokens):
    model, ids, starts = design("cla"), tokens(3, LENGTH), torch.tensor([0, 3, PREFIX - 8])
    engine, more = engine_of(model), tokens(3, 8, seed=1)
    for spec in (SPECS["snapkv"], SPECS["entropy"] + "+kivi:bits=4,group=2,residual=0"):
        compressed, _ = compressed_cache(engine, ids[:, :PREFIX], spec, starts=starts)
        expected = engine.logits(more, copy.deepcopy(compressed))
        engine.logits(more.flip(1), compressed)
        compressed.crop(PREFIX)
        with pytest.raises(UserError, match=f"cannot go back from {PREFIX} to 19 tokens: the first {PREFIX} are compr"):
            compressed.crop(PREFIX - 1)
        engine.logits(more[:, :3], compressed)
        restored = unpack(pack(compressed), model.config)
        order = torch.tensor([2, 0, 0, 1])
        assert restored.nbytes() == compressed.nbytes()
        for cache in (compressed, restored):
            cache.reorder_cache(order)
            found = engine.logits(more[order, 3:], cache)
            torch.testing.assert_close(found, expected[order, 3:], atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="max_len of a cache is 64, and tokens of the stored prefix were evicted"):
        unpack(pack(restored), model.config, max_len=64)


def test_a_window_moves_over_four_times_the_prompt(design, tokens, dense):
    """Every n tokens those that left the window are evicted; the bytes stay the same."""
    model, every, length = design("gqa"), 8, 5 * PREFIX
    ids, engine = tokens(2, length), engine_of(model)
    compressed, _ = compressed_cache(engine, ids[:, :PREFIX], SPECS["streaming"] + f",recompress={every}")
    before = compressed.nbytes()
    found = read_on(engine, compressed, ids[:, PREFIX:], [every] * 4 + [3, 5] + [1] * every * 5)
    assert compressed.nbytes() == before
    assert compressed.get_seq_length() == length
    reference = dense(model)
    t, s = torch.arange(length)[:, None], torch.arange(length)
    last = PREFIX + (t - PREFIX) // every * every  # tokens at the last compression before a query
    hidden = (t >= PREFIX) & (s >= SINKS) & (s < last - (TOKENS - SINKS))
    reference.hidden = {i: hidden.expand(2, 2, -1, -1) for i in range(len(model.plan))}
    torch.testing.assert_close(found, model(ids)[:, PREFIX:], atol=2e-4, rtol=2e-4)


def test_codes_do_not_drift_over_four_times_the_prompt(design, tokens):
    model, ids = design("gqa"), tokens(2, 5 * PREFIX)
    engine = engine_of(model)
    compressed, _ = compressed_cache(engine, ids[:, :PREFIX], "kivi:bits=4,group=4,residual=4,recompress=8")
    first = {slot: store.prefix.k.packed.clone() for slot, store in compressed.stores.items()}
    read_on(engine, compressed, ids[:, PREFIX:], [8] * 10)
    for slot, store in compressed.stores.items():
        assert store.compressed == 5 * PREFIX
        codes = store.prefix.k.packed
        assert torch.equal(codes[:, : first[slot].shape[1]], first[slot])
        assert codes.shape[1] > 5 * first[slot].shape[1]


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        (
            "mha",
            "snapkv:tokens=8,window=7",
            "snapkv: tokens=8: sinks=4 and the last tokens .* are 11; allowed: 11 tokens",
        ),
        ("mha", "entropy:ratio=4", "entropy: ratio=4: 5 tokens are left: sinks=4 and .* are 36; allowed: 36 tokens"),
        ("yoco", "streaming:ratio=99", "streaming: ratio=99: at 20 tokens .* of the cache stay as they are"),
        ("mla", "h2o:ratio=2", "h2o: the queries that meet .* layer 0 reads slot 0 through LatentAttention"),
    ],
)
def test_what_does_not_fit_a_cache_is_refused(name, spec, message, design, tokens):
    with pytest.raises(UserError, match=message):
        compressed_cache(engine_of(design(name)), tokens(2, PREFIX), spec)


def test_other_caches_are_refused(design, decoder, llama, tokens, filled):
    engine, cache = filled(design("mha"), tokens(2, PREFIX))
    with pytest.raises(UserError, match="snapkv: the queries of the prompt were not recorded: fill the cache inside"):
        engine.compress(cache, parse("snapkv:tokens=9,window=2"))
    with pytest.raises(UserError, match="streaming: room=8: a static cache finds tokens by their columns"):
        compress_cache(cache, parse("streaming:tokens=9"), room=8)
    evicted, method = compress_cache(cache, parse("streaming:tokens=9")), parse("snapkv:tokens=7,window=2")
    with pytest.raises(UserError, match="xkv: tokens of the cache were evicted, and those that are left are not the"):
        compress_cache(evicted, parse("xkv:ratio=2"))
    with method.watch(engine):
        engine.hidden(tokens(2, PREFIX), engine.new_cache())
    with pytest.raises(UserError, match="snapkv: tokens of the cache were evicted before, for which no query can vote"):
        compress_cache(evicted, method)
    with pytest.raises(UserError, match="quest: select: the keys of layer 4 are made of the slots"):
        compressed_cache(engine_of(design("fusedkv")), tokens(2, PREFIX), "quest:select=4,page=4,dense=0")
    with pytest.raises(UserError, match="quest: select: transformers' attention reads all tokens"):
        compressed_cache(engine_of(llama()), tokens(2, PREFIX), "quest:select=4,page=4")
    with pytest.raises(UserError, match="entropy: transformers makes one mask for all layers"):
        compressed_cache(engine_of(llama()), tokens(2, PREFIX), SPECS["entropy"])
