"""Low rank of the tokens that are left after eviction, `snapkv:...+xkv:...`, against a slow reference.

The reference chooses tokens one by one from the weights of a slow attention, one choice for all KV heads of a slot and
all slots of a group. It factorises what is left in numpy, with keys before RoPE by the columns of the text, writes the
result into the exact cache, and lets the slow attention read on without the evicted columns.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cllm.cache.cache import KVCache
from cllm.errors import UserError
from cllm.posthoc import deferred
from cllm.posthoc.cache import compress_cache
from cllm.posthoc.engine import engine_of
from cllm.posthoc.hf import compress_dynamic
from cllm.posthoc.registry import parse
from cllm.posthoc.stores import CompressedSlot
from cllm.prefix.pack import pack, unpack
from tests.posthoc.reading import assert_read_as_alone, compressed_cache, read_on
from tests.posthoc.slow_attention import replace_attention

PREFIX, LENGTH, TOKENS, SINKS, WINDOW = 20, 28, 13, 2, 3
EVICT = {
    "streaming": f"streaming:tokens={TOKENS},sinks={SINKS}",
    "h2o": f"h2o:tokens={TOKENS},sinks={SINKS},recent=0.25",
    "snapkv": f"snapkv:tokens={TOKENS},sinks={SINKS},window={WINDOW},kernel=3",
    "entropy": f"entropy:tokens={TOKENS},sinks={SINKS},window={WINDOW}",
}
GROUPS = {"xkv:group=2,rank_k=5,rank_v=7": (2, 5, 7), "svd:rank_k=4,rank_v=6": (1, 4, 6)}
XKV, SVD = GROUPS
CASES = [(kind, XKV, name) for kind in EVICT for name in ("gqa", "cla", "fusedkv")]
CASES += [("h2o", SVD, "gqa"), ("streaming", SVD, "mla"), ("snapkv", XKV, "trailing"), ("entropy", XKV, "yoco")]
CASES += [("h2o", "xkv:group_k=3,group_v=2,rank_k=5,rank_v=7", "gqa")]


class Slow:
    """Attention of the last tokens, with every weight at hand, from which columns can be hidden."""

    def __init__(self):
        self.layer, self.weights, self.hidden = 0, {}, {}

    def __call__(self, q, k, v, *, window=None, exclude_self=False):
        """(B, T, H, D) for q (B, T, H, D) and k, v (B, S, G, D)."""
        groups = q.shape[2] // k.shape[2]
        k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
        t, s = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None], torch.arange(k.shape[1])
        seen = (s < t if exclude_self else s <= t) & (t - s < (window or k.shape[1]))
        seen = seen.expand(len(q), 1, -1, -1).clone()
        if self.layer in self.hidden:
            seen[..., :PREFIX] &= ~self.hidden[self.layer][:, None, None]
        scores = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
        self.weights[self.layer] = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
        return torch.einsum("bhts,bshd->bthd", self.weights[self.layer], v)


@pytest.fixture
def slow(monkeypatch):
    """`slow(model)`: the reference attention, in the place of the model's."""
    found = Slow()

    def install(model):
        if not hasattr(model, "blocks"):

            def attend_hf(module, q, k, v, *_, **__):
                found.layer = module.layer_idx
                return found(*(t.transpose(1, 2) for t in (q, k, v))), None

            ALL_ATTENTION_FUNCTIONS.register("slow", attend_hf)
            model.set_attn_implementation("slow")
            return found
        replace_attention(model, found, monkeypatch)
        return found

    return install


# ---- the reference ---------------------------------------------------------------------------------------------------


def together(slots, reads, groups):
    """Slots that some layer reads together or that share rows, until nothing changes."""
    found = [{slot} for slot in slots]
    shared = [set(slots[i : i + size]) for size in groups for i in range(0, len(slots), size)]
    for _ in slots:
        for joined in [*map(set, reads.values()), *shared]:
            touched = [union for union in found if union & joined]
            found = [union for union in found if union not in touched] + ([set().union(*touched)] if touched else [])
    return found


def choose(kind, rows, budget):
    """The kept tokens, ascending, for the attention (T, P) of the prompt's queries, summed over all heads."""
    n = rows.shape[1]
    last = {"streaming": budget - SINKS, "h2o": round(0.25 * (budget - SINKS))}.get(kind, WINDOW)
    votes = rows[0 if kind == "h2o" else n - WINDOW :].sum(0).tolist()
    if kind == "snapkv":
        bare = votes[: n - WINDOW]
        votes = [max(bare[max(s - 1, 0) : s + 2]) for s in range(len(bare))] + [0.0] * WINDOW
    kept = {*range(SINKS), *range(n - last, n)}
    for s in sorted(range(n), key=lambda s: (-votes[s], s)):
        if len(kept) < budget:
            kept.add(s)
    return sorted(kept)


def budgets_of(kind, weights, layers, sizes):
    if kind != "entropy":
        return [TOKENS] * len(layers)
    spread = []
    for own in layers:
        of_layer = [torch.special.entr(weights[i][:, :, -WINDOW:]).sum(-1).mean().item() for i in own]
        spread.append(sum(of_layer) / len(of_layer))

    def counts(factor):
        return [min(max(int(factor * x), SINKS + WINDOW), PREFIX) for x in spread]

    factors = sorted(n / x + 1e-9 for n in range(PREFIX + 1) for x in spread)
    fits = [f for f in factors if sum(n * c for n, c in zip(sizes, counts(f), strict=True)) <= TOKENS * sum(sizes)]
    return counts(fits[-1])


def turned(k, columns, sign, theta=10000.0):
    """Keys (n, G, D) rotated by `sign` times the angles of `columns`, in numpy."""
    half = k.shape[-1] // 2
    angles = sign * np.asarray(columns)[:, None] * theta ** (-np.arange(half) / half)
    z = (k[..., :half] + 1j * k[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate((z.real, z.imag), axis=-1)


def low_rank(tensors, rank):
    """The best approximation of `tensors` (n, width...) side by side, with `rank` directions."""
    rows = np.concatenate([x.reshape(len(x), -1) for x in tensors], axis=1)
    u, s, vt = np.linalg.svd(rows, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    parts = np.split(best, np.cumsum([x[0].size for x in tensors])[:-1], axis=1)
    return [part.reshape(x.shape) for part, x in zip(parts, tensors, strict=True)]


def replace(slots, kept, then, latent):
    """Overwrite the kept tokens of `slots` ({owner: (k, v) (B, P, ...)}) by their low-rank approximation."""
    owners = list(slots)
    method: Any = parse(then)
    sizes = (method.group_k or method.group, method.group_v or method.group)
    ranks = (method.rank_k, method.rank_v)
    for part in range(1 if latent else 2):
        for at in range(0, len(owners), sizes[part]):
            members = owners[at : at + sizes[part]]
            for row in range(len(slots[owners[0]][0])):
                columns = kept[members[0]][row][SINKS:]
                assert all(kept[j][row][SINKS:] == columns for j in members)
                tensors = [slots[j][part][row, columns].double().numpy() for j in members]
                rotated = part == 0 and not latent
                tensors = [turned(x, columns, -1) if rotated else x for x in tensors]
                for j, x in zip(members, low_rank(tensors, ranks[part]), strict=True):
                    x = turned(x, columns, 1) if rotated else x
                    slots[j][part][row, columns] = torch.from_numpy(x).to(slots[j][part].dtype)


@pytest.mark.parametrize(("kind", "then", "name"), CASES)
def test_later_tokens_read_what_is_left_at_true_positions(kind, then, name, design, tokens, slow):
    model, ids = design(name), tokens(2, LENGTH)
    engine, runs = engine_of(model), []
    for parts in ([1] * 8, [5, 1, 2]):
        compressed, cache = compressed_cache(engine, ids[:, :PREFIX], f"{EVICT[kind]}+{then}")
        runs.append(read_on(engine, compressed, ids[:, PREFIX:], parts))
    slots = [j for j, store in compressed.stores.items() if isinstance(store, CompressedSlot)]
    reads = {i: [j for j in model.plan.reads(i) if j in slots] for i in range(len(model.plan))}
    reads = {i: own for i, own in reads.items() if own}
    method: Any = parse(then)
    unions = together(slots, reads, (method.group_k or method.group, method.group_v or method.group))
    reference = slow(model)
    model(ids[:, :PREFIX])
    weights = dict(reference.weights)
    layers = [[i for i, own in reads.items() if union & set(own)] for union in unions]
    kept: dict[int, list[list[int]]] = {}
    budgets = budgets_of(kind, weights, layers, [len(union) for union in unions])
    for union, own, budget in zip(unions, layers, budgets, strict=True):
        total = sum(weights[i].sum(1) for i in own)  # B, P, P
        choice = [choose(kind, rows, budget) for rows in total]
        kept |= dict.fromkeys(sorted(union), choice)
        hidden = torch.tensor([[s not in of_row for s in range(PREFIX)] for of_row in choice])
        reference.hidden |= dict.fromkeys(own, hidden)
    exact = copy.deepcopy(cache)
    replace({j: exact.stores[j].slot[:2] for j in slots}, kept, then, name == "mla")
    for j in slots:
        store = compressed.stores[j]
        for x, found in zip(exact.stores[j].slot[:2], store.last(store.kept(LENGTH), LENGTH)[:2], strict=True):
            expected = torch.stack([x[row, columns] for row, columns in enumerate(kept[j])])
            torch.testing.assert_close(found[:, : expected.shape[1]], expected, atol=1e-4, rtol=1e-4)
    logits = model(ids[:, PREFIX:], cache=exact)
    for found in runs:
        torch.testing.assert_close(found, logits, atol=5e-4, rtol=5e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", ["streaming", "h2o", "snapkv"])
def test_transformers_models_read_the_same(kind, family, llama, tokens, slow):
    model, ids = llama(family), tokens(2, LENGTH)
    engine, runs = engine_of(model), []
    for parts in ([1] * 8, [5, 1, 2]):
        compressed, cache = compressed_cache(engine, ids[:, :PREFIX], f"{EVICT[kind]}+{XKV}")
        runs.append(read_on(engine, compressed, ids[:, PREFIX:], parts))
    reference, layers = slow(model), range(model.config.num_hidden_layers)
    model(ids[:, :PREFIX])
    weights, kept = dict(reference.weights), dict[int, list[list[int]]]()
    for union in ([0, 1], [2, 3]):
        choice = [choose(kind, rows, TOKENS) for rows in sum(weights[i].sum(1) for i in union)]
        kept |= dict.fromkeys(union, choice)
        hidden = torch.tensor([[s not in of_row for s in range(PREFIX)] for of_row in choice])
        reference.hidden |= dict.fromkeys(union, hidden)
    exact = DynamicCache(config=model.config)
    for i in layers:
        exact.update(*(t.clone() for t in (cache.layers[i].keys, cache.layers[i].values)), i)
    slots = {i: [t.transpose(1, 2) for t in (exact.layers[i].keys, exact.layers[i].values)] for i in layers}
    replace(slots, kept, XKV, False)
    logits = model(ids[:, PREFIX:], past_key_values=exact).logits
    for found in runs:
        torch.testing.assert_close(found, logits, atol=5e-4, rtol=5e-4)


# ---- positions, padding ---------------------------------------------------------------------------------------------

FEW = 3
"""Different tokens of a text whose first layer's keys, before RoPE, and values have that rank."""


@pytest.mark.parametrize("kind", EVICT)
def test_keys_of_few_different_tokens_are_stored_exactly_if_their_positions_are_right(kind, design, tokens):
    """Slot 0 is that of the first layer, whose keys before RoPE are those of the embeddings: as many different ones as
    tokens. At wrong positions they have no such rank."""
    model, ids = design("gqa"), tokens(3, PREFIX) % FEW
    starts = None if kind == "entropy" else torch.tensor([0, 3, 11])  # which has one budget for a batch
    options = {} if starts is None else {"starts": starts}
    spec = f"{EVICT[kind]}+svd:rank_k={FEW},rank_v={FEW}"
    compressed, _ = compressed_cache(engine_of(model), ids, spec, **options)
    alone, _ = compressed_cache(engine_of(model), ids, f"{EVICT[kind]}+xkv:group=1,energy=1", **options)
    for part in ("k", "v"):
        error = compressed.outcome.errors[0][part]
        assert error == pytest.approx(alone.outcome.errors[0][part], abs=1e-5)
        assert error > 0.1  # evicted tokens
        assert compressed.outcome.errors[1][part] > alone.outcome.errors[1][part] + 1e-3
    if kind == "streaming":
        assert compressed.stores[0].prefix.rotation.columns is None


@pytest.mark.parametrize("kind", ["streaming", "h2o", "snapkv"])
@pytest.mark.parametrize("then", [*GROUPS, f"{XKV}+kivi:bits=8,group=2,residual=0"])
def test_padded_sequences_keep_what_they_keep_alone(kind, then, design, tokens):
    """One of them has fewer tokens than are kept."""
    model, ids, starts = design("cla"), tokens(3, LENGTH), torch.tensor([0, 3, PREFIX - 10])
    ids, starts = (ids[:2], starts[:2]) if "+" in then else (ids, starts)  # padding shifts the groups of a code
    engine, spec, found = engine_of(model), f"{EVICT[kind]}+{then}", []
    for parts in ([8], [1, 5, 1, 1]):
        compressed, _ = compressed_cache(engine, ids[:, :PREFIX], spec, starts=starts)
        found.append(read_on(engine, compressed, ids[:, PREFIX:], parts))
    assert_read_as_alone(engine, ids, PREFIX, starts, spec, found, 2e-4)


def test_padded_sequences_of_transformers_models(llama, tokens):
    model, ids = llama(), tokens(2, LENGTH)
    starts, mask, spec = torch.tensor([0, 4]), torch.ones(2, LENGTH, dtype=torch.long), f"{EVICT['h2o']}+{XKV}"
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # as `generate` counts them
    engine, method, cache = engine_of(model), parse(spec), DynamicCache(config=model.config)
    first, rest = ({"position_ids": p} for p in positions.split([PREFIX, LENGTH - PREFIX], dim=1))
    with method.watch(engine):
        model(ids[:, :PREFIX], attention_mask=mask[:, :PREFIX], past_key_values=cache, **first)
    compressed = compress_dynamic(cache, method, model, starts=starts)
    found = model(ids[:, PREFIX:], attention_mask=mask, past_key_values=compressed, **rest).logits
    assert_read_as_alone(engine, ids, PREFIX, starts, spec, [found], 2e-4)


# ---- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVICT)
def test_bytes_are_those_of_the_factors_the_sinks_and_the_columns(kind, decoder, tokens):
    """Of a group: (m - s) r numbers of A and r C of each B, s exact tokens a slot, and an int32 a token for columns."""
    model, group, rank_k, rank_v = decoder(kv={"preset": "gqa", "n_kv_heads": 2}, n_layers=4), 2, 5, 7
    spec = f"{EVICT[kind]}+xkv:group={group},rank_k={rank_k},rank_v={rank_v}"
    batch = 1 if kind == "entropy" else 2
    compressed, cache = compressed_cache(engine_of(model), tokens(batch, PREFIX), spec)
    width, slots = 2 * 8, list(cache.stores)
    left = [compressed.stores[j].prefix.sinks.length for j in slots]
    assert sum(left) <= TOKENS * len(slots)
    factors = sum((left[at] - SINKS + group * width) * (rank_k + rank_v) for at in range(0, len(slots), group))
    exact = len(slots) * SINKS * 2 * width
    columns = 0 if kind == "streaming" else sum(left[at] - SINKS for at in range(0, len(slots), group))
    assert compressed.nbytes() == 4 * batch * (factors + exact + columns)


@pytest.mark.parametrize("kind", ["streaming", "h2o", "snapkv:window=3", "entropy:window=3"])
@pytest.mark.parametrize(("preset", "ratios"), [("gqa", (2, 1.5)), ("cla", (1.5, 1.5)), ("yoco", (1.2, 1.1))])
def test_ratios_multiply(kind, preset, ratios, design, tokens):
    """The second is one of the bytes that are left, columns included; windows count in both."""
    engine, begin = engine_of(design(preset)), f"{kind}{',' if ':' in kind else ':'}sinks=1,ratio={ratios[0]}"
    compressed, cache = compressed_cache(engine, tokens(2, 60), f"{begin}+xkv:group=2,ratio={ratios[1]}")
    budget = cache.nbytes() / (ratios[0] * ratios[1])
    assert 0.8 * budget < compressed.nbytes() <= budget  # a rank is a tenth of these small groups


def test_a_quantiser_codes_the_factors_of_what_is_left(design, tokens):
    engine, ids, spec = engine_of(design("gqa")), tokens(2, 40), f"snapkv:tokens=18,sinks=2,window=3+{XKV}"
    plain, _ = compressed_cache(engine, ids, spec)
    coded, _ = compressed_cache(engine, ids, spec + "+kivi:bits=4,group=4,residual=0")
    numbers = 2 * 16 * (5 + 7)  # of a group's A, for 2 sequences of 16 tokens
    saved = sum(4 * numbers - numbers // 2 - 2 * 4 * numbers // 4 for _ in range(len(plain.stores) // 2))
    assert plain.nbytes() - coded.nbytes() == saved
    for slot, error in plain.outcome.errors.items():
        assert 0 < abs(coded.outcome.errors[slot]["k"] - error["k"]) < 0.1


# ---- later tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["streaming", "h2o", "snapkv"])
def test_later_tokens_join_at_true_positions(kind, design, tokens):
    """Over four times the prompt; of few different tokens the first slot's keys stay exact however often they are
    factorised again."""
    model, every, length = design("gqa"), 8, 5 * PREFIX
    ids, engine = tokens(2, length) % FEW, engine_of(model)
    spec = f"{EVICT[kind]},every={every}+svd:rank_k={FEW},rank_v={FEW}"
    compressed, _ = compressed_cache(engine, ids[:, :PREFIX], spec)
    before = compressed.nbytes()
    exact: Any = KVCache(model.config)
    model.hidden(ids, cache=exact)
    for part in ids[:, PREFIX:].split([every] * 5 + [1] * every * 5, dim=1):
        engine.logits(part, compressed)
    store = compressed.stores[0]
    assert (store.compressed, store.prefix.sinks.length) == (length, TOKENS)
    queries = 0 if compressed.later is None else sum(t.nbytes for t in compressed.later.tensors())
    assert compressed.nbytes() - queries == before
    columns = store.prefix.columns(TOKENS)[:, SINKS:]
    found = store.last(TOKENS, length)
    for row in range(2):
        of_row = columns[row if len(columns) > 1 else 0]
        assert of_row.tolist() == sorted(set(of_row.tolist()))
        for a, b in zip(found[:2], exact.stores[0].slot[:2], strict=True):
            torch.testing.assert_close(a[row, SINKS:], b[row, of_row], atol=2e-4, rtol=2e-4)
            torch.testing.assert_close(a[row, :SINKS], b[row, :SINKS])
    if kind == "streaming":
        assert columns[0].tolist() == [*range(length - TOKENS + SINKS, length)]
    else:
        assert columns[0].tolist() != [*range(length - TOKENS + SINKS, length)]


# ---- caches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "batch", "starts", "calls"),
    [
        ("streaming", 2, None, 8),
        ("streaming", 2, [0, 3], 0),
        ("h2o", 1, None, 8),
        ("h2o", 2, None, 0),
        ("h2o", 1, [3], 0),
    ],
)
def test_steps_read_factors_if_all_sequences_have_the_same_positions(
    kind, batch, starts, calls, design, tokens, monkeypatch
):
    model, ids = design("fusedkv"), tokens(batch, LENGTH)
    engine, spec, found = engine_of(model), f"{EVICT[kind]}+{XKV}", []
    options = {} if starts is None else {"starts": torch.tensor(starts)}
    seen, read = [], deferred.lowrank_decode

    def count(*words, **options):
        table = words[3]
        assert table.turn is None, "a kernel must not take the difference of two rows for that of two positions"
        seen.append(1)
        return read(*words, **options)

    monkeypatch.setattr(deferred, "lowrank_decode", count)
    for parts in ([1] * 8, [8]):
        compressed, _ = compressed_cache(engine, ids[:, :PREFIX], spec, **options)
        found.append(read_on(engine, compressed, ids[:, PREFIX:], parts))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    assert len(seen) == calls * len(model.plan)


def test_a_cache_is_reordered_cropped_and_stored(design, tokens):
    model, ids, starts = design("cla"), tokens(3, LENGTH), torch.tensor([0, 3, PREFIX - 8])
    engine, more, order = engine_of(model), tokens(3, 8, seed=1), torch.tensor([2, 0, 0, 1])
    for spec in (f"{EVICT['snapkv']}+{XKV}", f"{EVICT['entropy']}+{SVD}+kivi:bits=4,group=2,residual=0"):
        compressed, _ = compressed_cache(engine, ids[:, :PREFIX], spec, starts=starts)
        expected = engine.logits(more, copy.deepcopy(compressed))
        engine.logits(more.flip(1), compressed)
        compressed.crop(PREFIX)
        engine.logits(more[:, :3], compressed)
        restored: Any = unpack(pack(compressed), model.config)
        assert restored.nbytes() == compressed.nbytes()
        assert repr(restored.method.after_plus) == repr(compressed.method.after_plus)
        for cache in (compressed, restored):
            cache.reorder_cache(order)
            found = engine.logits(more[order, 3:], cache)
            torch.testing.assert_close(found, expected[order, 3:], atol=1e-5, rtol=1e-5)


def test_a_stored_prefix_goes_on_evicting_and_factorising(design, tokens):
    model, ids = design("gqa"), tokens(2, 44)
    engine = engine_of(model)
    compressed, _ = compressed_cache(engine, ids[:, :PREFIX], f"{EVICT['streaming']},every=8+{XKV}")
    restored = unpack(pack(compressed), model.config)
    found = [read_on(engine, cache, ids[:, PREFIX:], [8] * 3) for cache in (compressed, restored)]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    assert compressed.stores[0].prefix.sinks.length == TOKENS


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_a_cache_is_refused(design, tokens, filled):
    _, cache = filled(design("gqa"), tokens(2, PREFIX))
    evicted = compress_cache(cache, parse(EVICT["streaming"]))
    with pytest.raises(UserError, match="xkv: tokens of the cache were evicted before, and the positions of those"):
        compress_cache(evicted, parse(f"streaming:tokens=9+{XKV}"))
    with pytest.raises(UserError, match="xkv: ratio=9: at 13 tokens 15% of the cache stay as they are"):
        compress_cache(cache, parse(f"{EVICT['streaming']}+xkv:group=2,ratio=9"))
    with pytest.raises(UserError, match="streaming: room=8: a static cache finds tokens by their columns"):
        compress_cache(cache, parse(f"{EVICT['streaming']}+{XKV}"), room=8)
    with pytest.raises(UserError, match="xkv: rank_k=14: 2 slots of 16 channels have 13 tokens; allowed: 1 to 13"):
        compress_cache(cache, parse(f"{EVICT['streaming']}+xkv:group=2,rank_k=14,rank_v=7"))
