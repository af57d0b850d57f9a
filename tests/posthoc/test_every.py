"""Later tokens join the compressed ones (`every=n`), over four times the prompt's length, against slow references.

Each model decodes with the compressed cache while the exact keys and values of all tokens are recorded. From those the
references compute what the cache must hold at the end: by compressing all tokens at once, by compressing every block by
itself, by least squares on the prompt's basis, or by choosing tokens one by one.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from cllm.cache.cache import KVCache
from cllm.cache.slot import Slot
from cllm.errors import UserError
from cllm.hub.config import CLLMConfig
from cllm.hub.model import CLLMForCausalLM
from cllm.posthoc import hf
from cllm.posthoc.cache import compress_cache
from cllm.posthoc.engine import engine_of
from cllm.posthoc.registry import methods, parse
from cllm.posthoc.stores import CompressedSlot
from cllm.prefix.pack import pack, unpack

PROMPT, EVERY, LATER, SINKS = 16, 8, 64, 2
LENGTH = PROMPT + LATER
KIVI = "bits=4,group=4,residual=4"


@pytest.fixture
def exact(monkeypatch):
    """The exact keys and values (B, n, G, D) of later tokens, slot by slot and pass by pass."""
    found = []
    extend, update = CompressedSlot.extend, hf.CompressedLayer.update

    def record(self, new, step):
        found.append(new)
        return extend(self, new, step)

    def record_states(self, k, v, *args, **kwargs):
        found.append(Slot(k.transpose(1, 2), v.transpose(1, 2)))
        return update(self, k, v, *args, **kwargs)

    monkeypatch.setattr(CompressedSlot, "extend", record)
    monkeypatch.setattr(hf.CompressedLayer, "update", record_states)
    return found


def prompt_cache(model, spec, ids, starts=None):
    """The method, calibrated on other text, and the exact cache of the prompt."""
    engine, method = engine_of(model), parse(spec)
    calibration = torch.randint(32, (1, 40), generator=torch.Generator().manual_seed(7))
    method.prepare(engine, calibration)
    cache = KVCache(model.config)
    with method.watch(engine):
        model.hidden(ids[:, :PROMPT], cache=cache, starts=starts)
    return method, cache


def compress(cache, method, **options) -> Any:
    return compress_cache(cache, method, **options)


def read_on(model, cache, ids, size=EVERY):
    """The logits of the later tokens, `size` in a pass."""
    return torch.cat([model(part, cache=cache) for part in ids.split(size, dim=1)], dim=1)


def all_exact(cache, compressed, exact) -> Any:
    """`cache` of the prompt with the exact later tokens that were recorded."""
    found = copy.deepcopy(cache)
    for i, owner in enumerate(compressed.stores):
        for new in exact[i :: len(compressed.stores)]:
            found.stores[owner].slot = found.stores[owner].slot.join(new)
    found.seen = LENGTH
    found.column.fill_(LENGTH)
    return found


def first_tokens(cache, n) -> Any:
    """`cache` of the first `n` tokens."""
    found = copy.deepcopy(cache)
    found.crop(n)
    return found


def assert_reads(found, expected, first=0, last=LENGTH, atol=1e-5):
    for owner, store in expected.stores.items():
        pair = [s.last(c.seen, c.seen) for s, c in ((found.stores[owner], found), (store, expected))]
        for a, b in zip(*(slot[:2] for slot in pair), strict=True):
            torch.testing.assert_close(a[:, first:last], b[:, first:last], atol=atol, rtol=1e-4)


# ---- methods whose codes do not depend on when a token joins ---------------------------------------------------------

AT_ONCE = [
    ("mha", f"kivi:{KIVI}"),
    ("cla", f"xquant:{KIVI}"),
    ("cla", "xquant:bits=4,group=16,residual=8"),  # the prompt is too short for a group
    ("fusedkv", f"kivi:{KIVI}"),
    ("mha", "turboquant:bits=3,sketch=true"),
    ("mha", "int8:keys=token"),
    ("gqa", "palu:keep=0.5,heads=1,allocation=uniform"),
    ("mha", f"lorc:keep=0.5+kivi:{KIVI}"),
    ("mha", f"vfold:recent=5+kivi:{KIVI}"),
    ("cla", "vfold:recent=20"),
    ("mha", "minicache:gamma=0"),
    ("mha", f"minicache:gamma=0+kivi:{KIVI}"),
    ("mha", "quest:select=16,dense=1"),
    ("gqa", "streaming:tokens=20"),
    ("mla", f"kivi:{KIVI}"),
]


@pytest.mark.parametrize(("name", "spec"), AT_ONCE)
def test_the_cache_is_that_of_all_tokens_at_once(name, spec, design, tokens, exact):
    model, ids = design(name), tokens(2, LENGTH)
    first, plus, coder = spec.partition("+")
    method, cache = prompt_cache(model, f"{first},every={EVERY},sinks={SINKS}{plus}{coder}", ids)
    compressed = compress(cache, method)
    read_on(model, compressed, ids[:, PROMPT:])
    assert compressed.compressed == compressed.seen == LENGTH
    assert all(store.compressed == LENGTH for store in compressed.stores.values())
    expected = compress(all_exact(cache, compressed, exact), method.model_copy(update={"every": None}))
    if "streaming" in spec:
        assert all(store.prefix.sinks.length == 20 for store in compressed.stores.values())
    assert_reads(compressed, expected, atol=2e-5)
    assert compressed.nbytes() == expected.nbytes()


# ---- methods that encode a block like a prompt -----------------------------------------------------------------------

BLOCKS = ["int8", "fp8", "kvquant:bits=3,outliers=0.2", "minicache:gamma=0.3", f"minicache_xkv:gamma=0.3+kivi:{KIVI}"]


@pytest.mark.parametrize("spec", BLOCKS)
def test_a_block_is_coded_like_a_prompt(spec, decoder, tokens, exact):
    model, ids = decoder(kv={"preset": "mha"}, n_layers=4), tokens(2, LENGTH)
    first, plus, coder = spec.partition("+")
    begin = f"{first}{',' if ':' in first else ':'}"
    method, cache = prompt_cache(model, f"{begin}every={EVERY},sinks={SINKS}{plus}{coder}", ids)
    compressed = compress(cache, method)
    start = compressed.nbytes()
    read_on(model, compressed, ids[:, PROMPT:])
    assert (compressed.nbytes() - start) / LATER < cache.nbytes() / PROMPT
    full = all_exact(cache, compressed, exact)
    alone = parse(first)  # without the coder, whose groups span blocks
    for end in range(PROMPT + EVERY, LENGTH + 1, 4 * EVERY):
        block = compress(first_tokens(full, end), alone.model_copy(update={"sinks": end - EVERY}))
        if coder:
            for owner, store in block.stores.items():
                of_block = store.last(end, end).k[:, -EVERY:]
                found = compressed.stores[owner].last(LENGTH, LENGTH).k[:, end - EVERY : end]
                assert (found - of_block).norm() < 0.1 * of_block.norm()
        else:
            assert_reads(first_view(compressed, end), block, end - EVERY, end)


class first_view:
    """The first `n` tokens of a compressed cache, as it is read."""

    def __init__(self, cache, n):
        self.stores = {owner: _Cut(store, cache.seen, n) for owner, store in cache.stores.items()}
        self.seen = n


class _Cut:
    def __init__(self, store, seen, n):
        self.store, self.seen, self.n = store, seen, n

    def last(self, n, past):
        return self.store.last(self.seen, self.seen).map(lambda t: t[:, : self.n])


# ---- low rank: rows on the prompt's basis ----------------------------------------------------------------------------


def before_rope(k, positions, theta=10000.0):
    """Keys (n, G, D) rotated back, in numpy."""
    half = k.shape[-1] // 2
    angles = np.asarray(positions)[:, None] * theta ** (-np.arange(half) / half)
    turned = (k[..., :half] + 1j * k[..., half:]) * np.exp(-1j * angles)[:, None]
    return np.concatenate((turned.real, turned.imag), axis=-1)


def rows_by_hand(x, b):
    """X' = A Bᵀ of the least ‖X - A Bᵀ‖, for X (n, C) and B (C, r)."""
    return x @ np.linalg.pinv(b.T) @ b.T


BASES = [
    ("mha", "svd:rank_k=6,rank_v=9", 1),
    ("gqa", "xkv:group=2,rank_k=6,rank_v=9,svd=power", 2),
    ("cla", f"xkv:group=2,rank_k=6,rank_v=9+{KIVI.replace('bits=4', 'kivi:bits=8')}", 2),
    ("mha", "xkv:group=2,ratio=2,weight=queries", 2),
    ("mha", "eigenattention:keep=0.4,allocation=uniform,basis=prompt", 1),
    ("mha", "shadowkv:rank=9,select=null", 1),
]


@pytest.mark.parametrize(("name", "spec", "group"), BASES)
def test_rows_of_later_tokens_are_the_best_on_the_basis_of_the_prompt(name, spec, group, design, tokens, exact):
    model, ids = design(name), tokens(2, LENGTH)
    first, plus, coder = spec.partition("+")
    method, cache = prompt_cache(model, f"{first},every={EVERY},sinks={SINKS}{plus}{coder}", ids)
    compressed = compress(cache, method)
    start = compressed.nbytes()
    bases = {j: {kind: getattr(s.prefix, kind).factors()[1] for kind in "kv"} for j, s in compressed.stores.items()}
    prompt = {j: store.last(PROMPT, PROMPT) for j, store in compressed.stores.items()}
    read_on(model, compressed, ids[:, PROMPT:])
    full, owners = all_exact(cache, compressed, exact), list(compressed.stores)
    positions = np.arange(PROMPT, LENGTH)
    atol = 0.03 if plus else 2e-5
    for at in range(0, len(owners), group):
        members = owners[at : at + group]
        for row in range(2):
            for kind in "kv":
                tensors = [getattr(full.stores[j].last(LENGTH, LENGTH), kind)[row, PROMPT:].double() for j in members]
                x = [t.numpy() if kind == "v" else before_rope(t.numpy(), positions) for t in tensors]
                b = [  # None: the values themselves
                    np.eye(t.shape[-2:].numel()) if of is None else of[row].double().numpy()
                    for t, of in zip(tensors, [bases[j][kind] for j in members], strict=True)
                ]
                rows = np.concatenate([part.reshape(LATER, -1) for part in x], axis=1)
                expected = np.split(rows_by_hand(rows, np.concatenate(b)), len(members), axis=1)
                for j, part in zip(members, expected, strict=True):
                    found = getattr(compressed.stores[j].last(LENGTH, LENGTH), kind)[row, PROMPT:].double().numpy()
                    found = found if kind == "v" else before_rope(found, positions)
                    np.testing.assert_allclose(found.reshape(LATER, -1), part, atol=atol * np.abs(rows).max())
    for j, store in compressed.stores.items():  # no row of the prompt has changed
        if not plus:
            torch.testing.assert_close(store.last(LENGTH, LENGTH).k[:, :PROMPT], prompt[j].k)
    assert compressed.nbytes() - start < (start - full.nbytes() * SINKS / LENGTH) / (PROMPT - SINKS) * LATER


def test_columns_of_mixed_width_keep_their_widths(decoder, tokens):
    model, ids = decoder(kv={"preset": "mha"}, n_layers=4), tokens(2, LENGTH)
    spec = f"xkv:group=2,ratio=1.5,weight=queries,spread=true,codes=mixed,every={EVERY}"
    method, cache = prompt_cache(model, spec, ids)
    compressed = compress(cache, method)
    a = compressed.stores[0].prefix.k.a
    bits = sum(c.bits * c.step.shape[2] for c in (a.wide, a.four, a.two, a.one) if c is not None)
    read_on(model, compressed, ids[:, PROMPT:])
    for row in compressed.stores[0].prefix.k.a.blocks.tensors():
        assert row.shape[:2] == (2, LATER // EVERY)
    packed = [t for t in compressed.stores[0].prefix.k.a.blocks.tensors() if t.dtype == torch.uint8]
    assert sum(t[0, 0].numel() for t in packed) * 8 == 64 * bits, "a block takes a group of 64 tokens"
    for store in compressed.stores.values():
        assert store.last(LENGTH, LENGTH).k.isfinite().all()


# ---- recomputation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_inputs_of_later_tokens_are_recomputed_from_their_keys_and_values(bias, decoder, tokens):
    model, ids = decoder(kv={"preset": "mha"}, n_layers=4, kv_bias=bias), tokens(2, LENGTH)
    method, cache = prompt_cache(model, f"recompute:every={EVERY}", ids)
    compressed = compress(cache, method)
    found = read_on(model, compressed, ids[:, PROMPT:])
    torch.testing.assert_close(found, model(ids)[:, PROMPT:], atol=1e-4, rtol=1e-4)
    inputs = 4 * 2 * len(model.blocks) * model.config.d_model  # bytes of a token
    assert compressed.nbytes() == cache.nbytes() // PROMPT * method.sinks + (LENGTH - method.sinks) * inputs


def test_a_low_rank_of_inputs_keeps_keys_and_values_relative_to_their_size(decoder, tokens, exact):
    model, ids = decoder(kv={"preset": "mha"}, n_layers=4), tokens(2, LENGTH)
    method, cache = prompt_cache(model, f"recompute:rank=11,group=2,every={EVERY},sinks={SINKS}", ids)
    compressed = compress(cache, method)
    bases = {j: [code.b for code in (s.prefix.k, s.prefix.v)] for j, s in compressed.stores.items()}
    read_on(model, compressed, ids[:, PROMPT:])
    full, end = all_exact(cache, compressed, exact), PROMPT + EVERY
    for row in range(2):
        x = []
        for j in (2, 3):
            slot = full.stores[j].last(LENGTH, LENGTH).map(lambda t: t[:, PROMPT:end])
            x += [before_rope(slot.k[row].double().numpy(), np.arange(PROMPT, end)), slot.v[row].double().numpy()]
        x = [part.reshape(EVERY, -1) for part in x]
        sizes = [np.sqrt((part**2).mean()) for part in x]
        b = [code[row].double().numpy() / s for code, s in zip([*bases[2], *bases[3]], sizes, strict=True)]
        rows = rows_by_hand(np.concatenate([p / s for p, s in zip(x, sizes, strict=True)], axis=1), np.concatenate(b))
        expected = np.split(rows, 4, axis=1)[3] * sizes[3]
        found = compressed.stores[3].last(LENGTH, LENGTH).v[row, PROMPT:end].flatten(1)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


# ---- eviction --------------------------------------------------------------------------------------------------------


def by_hand(kind, q, k, pad, budget, window, sinks):
    """The tokens that every KV head of one sequence keeps, for queries (L, T, H, D) of the layers that read the slot
    and keys (T, G, D), after RoPE. Votes are those of all queries so far, or of the last later ones without `h2o`. With
    `entropy` all heads vote together."""
    _, _, heads, dim = q.shape
    groups = k.shape[1]
    kept = []
    for g in range(groups):
        voters = range(groups) if kind == "entropy" else [g]
        stored = list[int]()
        received = dict.fromkeys(range(LENGTH), 0.0)  # by token, all the attention so far
        for begin, end in zip([0, *range(PROMPT, LENGTH, EVERY)], range(PROMPT, LENGTH + 1, EVERY), strict=True):
            stored += range(begin, end)
            votes = torch.zeros(len(stored))
            for t in range(begin if kind == "h2o" else max(PROMPT if begin else 0, end - window), end):
                seen = torch.tensor([pad <= s <= t for s in stored])
                for i in voters if t >= pad else []:
                    scores = q[:, t, i * heads // groups : (i + 1) * heads // groups] @ k[stored, i].T / dim**0.5
                    votes += scores.masked_fill(~seen, -torch.inf).softmax(-1).sum((0, 1))
            if kind == "h2o":
                for s, vote in zip(stored, votes.tolist(), strict=True):
                    received[s] += vote
                votes = torch.tensor([received[s] for s in stored])
            elif kind == "snapkv":
                bare = votes[: len(stored) - window]
                near = [bare[max(i - 1, 0) : i + 2].max() for i in range(len(bare))]
                votes = torch.tensor([*near, *[0.0] * window])
            if len(stored) <= budget:
                continue
            last = round(0.5 * (budget - sinks)) if kind == "h2o" else window
            padding = sum(s < pad for s in stored)
            always = {*range(padding, padding + sinks), *range(len(stored) - last, len(stored))}
            order = [(stored[i] >= pad, i in always, votes[i].item(), -i) for i in range(len(stored))]
            best = sorted(range(len(stored)), key=lambda i: order[i], reverse=True)[:budget]
            stored = [stored[i] for i in sorted(best)]
        kept.append((stored, [received[s] for s in stored]))
    return kept


def rotated(q, pad, theta=10000.0):
    """Queries (T, H, D) after RoPE."""
    half = q.shape[-1] // 2
    angles = (torch.arange(len(q)) - pad)[:, None] * theta ** (-torch.arange(half) / half)
    turned = torch.complex(q[..., :half], q[..., half:]) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("budget", [PROMPT - 4, PROMPT + 2])
@pytest.mark.parametrize("name", ["gqa", "cla"])
@pytest.mark.parametrize("kind", ["snapkv", "h2o", "entropy"])
def test_later_queries_vote_again(kind, name, budget, design, tokens, exact):
    """H2O: with all attention that a token has received since it came, also from the prompt."""
    model, ids, starts, window = design(name), tokens(2, LENGTH), torch.tensor([0, 3]), 5
    queries = defaultdict(list)
    more = {"snapkv": f",window={window},kernel=3", "entropy": f",window={window}", "h2o": ""}[kind]
    options = f"tokens={budget},sinks={SINKS},every={EVERY}{more}"
    method, cache = prompt_cache(model, f"{kind}:{options}", ids, starts)
    compressed = compress(cache, method)
    for i, block in enumerate(model.blocks):
        block.attention.q_proj.register_forward_hook(lambda _, args, q, i=i: queries[i].append(q))
    model.hidden(ids[:, :PROMPT], cache=KVCache(model.config), starts=starts)
    sizes = []
    for part in ids[:, PROMPT:].split(4, dim=1):
        model(part, cache=compressed)
        sizes.append(compressed.nbytes())
    full = all_exact(cache, compressed, exact)
    budgets = {owner: store.prefix.sinks.length for owner, store in compressed.stores.items()}
    assert sum(budgets.values()) <= budget * len(budgets)
    assert kind == "entropy" or set(budgets.values()) == {budget}
    for owner, store in compressed.stores.items():
        budget = budgets[owner]
        found, k = store.last(budget, LENGTH).k, full.stores[owner].last(LENGTH, LENGTH).k
        layers = [torch.cat(queries[i], dim=1) for i in model.plan.readers("keys")[owner]]
        for row, pad in enumerate(starts.tolist()):
            q = torch.stack([layer[row].unflatten(-1, (-1, k.shape[-1])) for layer in layers])
            kept = by_hand(kind, torch.stack([rotated(q_l, pad) for q_l in q]), k[row], pad, budget, window, SINKS)
            for g, (stored, scores) in enumerate(kept):
                torch.testing.assert_close(found[row, :, g], k[row, stored, g])
                if kind == "h2o":
                    torch.testing.assert_close(store.prefix.scores[row, g], torch.tensor(scores), atol=1e-4, rtol=1e-4)
    assert sizes[5::2] == [sizes[5]] * len(sizes[5::2]), "the budget is one of tokens"
    recorded = sum(t.nbytes for t in compressed.later.tensors())
    per_token = 4 * sum(queries[i][0].shape[2] for i in queries)
    assert recorded == (0 if kind == "h2o" else 2 * window * per_token)
    stored = sum(sum(t.nbytes for t in store.tensors().values()) for store in compressed.stores.values())
    votes = 4 * 2 * sum(budgets[j] * store.prefix.k.decode().shape[2] for j, store in compressed.stores.items())
    votes *= kind == "h2o"  # a number in fp32 for each sequence, token and KV head
    left = full.nbytes() // len(budgets) // LENGTH * sum(budgets.values())
    assert compressed.nbytes() - recorded == stored == left + votes
    numbers = engine_of(model).fp32_numbers(compressed)
    assert 4 * numbers == stored - votes, "scores are fp32 in bf16 caches too"


@pytest.mark.parametrize("name", ["mha", "cla", "fusedkv"])
@pytest.mark.parametrize("spec", ["streaming", "h2o", "snapkv:window=4", "entropy:window=4"])
@pytest.mark.parametrize("more", [EVERY // 2, EVERY])
def test_nothing_is_evicted_before_the_budget_is_used_up(more, spec, name, design, tokens) -> None:
    model, ids, budget = design(name), tokens(2, LENGTH), PROMPT + more
    method, cache = prompt_cache(model, f"{spec}{',' if ':' in spec else ':'}tokens={budget},every={EVERY}", ids)
    compressed, exact = compress(cache, method), copy.deepcopy(cache)
    for i, part in enumerate(ids[:, PROMPT:].split(EVERY, dim=1)):
        logits, wanted = model(part, cache=compressed), model(part, cache=exact)
        stored = {store.kept(compressed.seen) for store in compressed.stores.values()}
        assert stored == {min(PROMPT + EVERY * (i + 1), budget)}
        if PROMPT + EVERY * i <= budget:  # a block is read before it evicts
            torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, wanted, atol=1e-3)


def test_slots_that_are_read_together_share_their_votes(design, tokens):
    """And the votes follow the batch."""
    model, ids = design("fusedkv"), tokens(2, LENGTH)
    method, cache = prompt_cache(model, f"h2o:tokens=12,every={EVERY}", ids)
    compressed = compress(cache, method)
    votes = {id(store.prefix.scores): store.prefix.scores for store in compressed.stores.values()}
    assert len(votes) == len(set(method._unions(engine_of(model).compressible(cache))))
    before = compressed.nbytes()
    groups = next(iter(votes.values())).shape[1]
    without = sum(t.nbytes for store in compressed.stores.values() for t in store.tensors().values() if t.ndim > 3)
    assert before == without + len(votes) * 2 * groups * 12 * 4
    method, cache = prompt_cache(model, f"h2o:ratio=2,sinks=2,every={EVERY}", ids)
    halved = compress(cache, method)
    assert 0 <= cache.nbytes() / 2 - halved.nbytes() < before / 12, "less than a token"
    swapped = copy.deepcopy(compressed)
    swapped.reorder_cache(torch.tensor([1, 0]))
    assert swapped.nbytes() == before
    logits = read_on(model, compressed, ids[:, PROMPT:])
    again = read_on(model, swapped, ids[:, PROMPT:].flip(0))
    torch.testing.assert_close(again.flip(0), logits, atol=1e-4, rtol=1e-4)


# ---- caches ----------------------------------------------------------------------------------------------------------

INVARIANT = [
    "svd:rank_k=4,rank_v=6", "svd:rank_k=4,rank_v=6,weight=queries", "turboquant:bits=4", "minicache",
    "vfold:recent=6", "snapkv:tokens=20,window=6", "h2o:tokens=20",
]  # fmt: skip


@pytest.mark.parametrize("spec", INVARIANT)
def test_padding_and_the_batch_change_nothing(spec, decoder, tokens):
    model, ids, padding = decoder(kv={"preset": "mha"}, n_layers=4), tokens(2, LENGTH), [0, 5]
    spec += f"{',' if ':' in spec else ':'}every={EVERY}"
    method, cache = prompt_cache(model, spec, ids, torch.tensor(padding))
    batch = compress(cache, method)
    found = read_on(model, batch, ids[:, PROMPT:])
    assert batch.exact_tokens == 0
    evicts = method.evicts
    for row in (0,) if evicts else (0, 1):  # a sequence with padding keeps fewer tokens
        engine, alone = engine_of(model), KVCache(model.config)
        with method.watch(engine):
            model.hidden(ids[row : row + 1, padding[row] : PROMPT], cache=alone)
        one = compress(alone, method)
        torch.testing.assert_close(
            found[row : row + 1], read_on(model, one, ids[row : row + 1, PROMPT:]), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("spec", ["h2o:tokens=12", "snapkv:tokens=12,window=6", "entropy:tokens=12,window=6"])
@pytest.mark.parametrize("kv", [{"preset": "mha"}, {"preset": "swiftkv"}], ids=["mha", "swiftkv"])
def test_an_early_exit_leaves_out_no_queries(spec, kv, decoder, tokens):
    """Neither of a prompt that is watched nor of one that is added to the compressed cache."""
    model, ids = decoder(kv=kv, n_layers=4), tokens(2, LENGTH)
    engine, method, found = engine_of(model), parse(f"{spec},every={EVERY}"), []
    for last_only in (False, True):
        cache = engine.new_cache()
        with method.watch(engine):
            model.hidden(ids[:, :PROMPT], cache=cache, last_only=last_only)
        compressed = compress(cache, method)
        for part in ids[:, PROMPT:].split(20, dim=1):
            last = model(part, cache=compressed, last_only=last_only)[:, -1:]
        found.append((last, compressed))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-4, rtol=1e-4)
    assert found[1][1].nbytes() == found[0][1].nbytes()
    seen = []
    model.blocks[-1].mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    model.prefill(ids, KVCache(model.config))
    assert seen == [1], "the next prompt exits early again"


def test_the_tokens_of_a_pass_do_not_matter_and_one_block_joins_once_for_all_readers(design, tokens, monkeypatch):
    model, ids = design("cla"), tokens(2, LENGTH)
    method, cache = prompt_cache(model, f"xkv:group=2,rank_k=6,rank_v=9,every={EVERY}", ids)
    kind, calls = type(method), []
    absorb = kind.absorb

    def counted(self, keys, values, codes):
        calls.append((keys.slots, values.slots, keys.data[0].shape[1]))
        return absorb(self, keys, values, codes)

    monkeypatch.setattr(kind, "absorb", counted)
    logits, sizes = [], []
    for size in (1, EVERY):
        compressed = compress(cache, method)
        logits.append(read_on(model, compressed, ids[:, PROMPT:], size))
        sizes.append(compressed.nbytes())
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    assert sizes[0] == sizes[1]
    slots = tuple(model.plan.slots)
    assert len(slots) < len(model.plan)
    assert calls == [(slots, slots, EVERY)] * (2 * LATER // EVERY)
    read_on(model, compress(cache, method), ids[:, PROMPT:], LATER)
    assert calls == [(slots, slots, EVERY)] * (3 * LATER // EVERY), "a long pass is several blocks"
    assert method.pass_size == EVERY


def test_a_refit_batch_operations_crops_and_files(decoder, tokens, exact):
    model, ids = decoder(kv={"preset": "mha"}, n_layers=4), tokens(3, LENGTH)
    method, cache = prompt_cache(model, f"int8:every={EVERY},recompress={3 * EVERY}", ids)
    compressed = compress(cache, method)
    fitted = []
    for part in ids[:, PROMPT : PROMPT + 5 * EVERY].split(EVERY, dim=1):
        model(part, cache=compressed)
        fitted.append((compressed.fitted, compressed.compressed))
    assert fitted == [(16, 24), (16, 32), (40, 40), (40, 48), (40, 56)]
    model(ids[:, 56:60], cache=compressed)
    assert compressed.exact_tokens == 4
    order, rest = torch.tensor([2, 0, 2]), ids[:, 60:64]
    stored = pack(compressed)
    expected = model(rest, cache=copy.deepcopy(compressed))
    opened: Any = unpack(stored, model.config)
    torch.testing.assert_close(model(rest, cache=opened), expected)
    assert (opened.fitted, opened.compressed) == (64, 64), "the refit is on time"
    moved = copy.deepcopy(compressed)
    moved.reorder_cache(order)
    torch.testing.assert_close(model(rest[order], cache=moved), expected[order], atol=1e-5, rtol=1e-5)
    compressed.crop(58)
    compressed.crop(56)
    with pytest.raises(UserError, match="the first 56 are compressed"):
        compressed.crop(55)


@pytest.mark.parametrize("kind", ["llama", "cllm"])
def test_generation_of_four_times_the_prompt(kind, llama, decoder, tokens, exact):
    """As `model.generate` decodes, one token in a pass."""
    prompt = tokens(1, PROMPT + 1)
    method = parse(f"svd:rank_k=5,rank_v=7,every={EVERY},sinks={SINKS}")
    model = llama() if kind == "llama" else CLLMForCausalLM(CLLMConfig(model=decoder(n_layers=4).config)).eval()
    engine = engine_of(model)
    cache = engine.new_cache()
    engine.hidden(prompt[:, :PROMPT], cache)
    compressed = engine.compress(cache, method)
    start = compressed.nbytes()
    text = model.generate(
        prompt,
        past_key_values=compressed,
        max_new_tokens=LATER + 3,
        min_new_tokens=LATER + 3,
        do_sample=False,
        pad_token_id=0,
    )
    assert text.shape[1] == PROMPT + 1 + LATER + 3
    assert compressed.get_seq_length() == PROMPT + LATER + 3
    slots = engine.compressible(cache).slots
    width = sum(t[0, 0].numel() for slot in slots.values() for t in slot[:2])
    assert compressed.nbytes() - start == 4 * (len(slots) * LATER * (5 + 7) + 3 * width)
    exact_bytes = engine.nbytes(cache) / PROMPT * (LENGTH + 3)
    assert compressed.nbytes() < exact_bytes / 2


def test_a_transformers_cache_is_that_of_all_tokens_at_once(llama, tokens, exact):
    model, ids = llama(), tokens(2, LENGTH)
    engine = engine_of(model)
    for spec in (f"kivi:{KIVI}", "turboquant:bits=4", "streaming:tokens=20"):
        exact.clear()
        cache = engine.new_cache()
        engine.hidden(ids[:, :PROMPT], cache)
        method = parse(f"{spec},every={EVERY}")
        compressed = engine.compress(cache, method)
        for part in ids[:, PROMPT:].split(EVERY, dim=1):
            engine.hidden(part, compressed)
        full = DynamicCache(config=model.config)
        for i, layer in enumerate(cache.layers):
            parts = [Slot(layer.keys.transpose(1, 2), layer.values.transpose(1, 2)), *exact[i :: len(cache.layers)]]
            full.update(*(torch.cat([p[side] for p in parts], dim=1).transpose(1, 2) for side in (0, 1)), i)
        expected = engine.compress(full, method.model_copy(update={"every": None}))
        for found, layer in zip(compressed.layers, expected.layers, strict=True):
            for a, b in zip(found.read(), layer.read(), strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        assert compressed.nbytes() == expected.nbytes()


# ---- refusals --------------------------------------------------------------------------------------------------------

CAN = {
    "asvd", "eigenattention", "entropy", "fp8", "h2o", "int8", "kivi", "kvquant", "lorc", "minicache", "minicache_xkv",
    "palu", "quest", "recompute", "shadowkv", "snapkv", "streaming", "svd", "turboquant", "vfold", "xkv", "xquant",
}  # fmt: skip


def test_methods_that_cannot_refuse_by_name():
    built_in = {name: m for name, m in methods().items() if m.__module__.startswith("cllm.")}
    assert {name for name, method in built_in.items() if method.no_every is None} == CAN
    for name in built_in.keys() - CAN:
        with pytest.raises(UserError, match=f'--posthoc "{name}:every=8": every=8: .*; allowed: leave it out'):
            parse(f"{name}:every=8")


def test_what_no_cache_can_do_is_one_line(decoder, llama, tokens):
    model, ids = decoder(n_layers=4), tokens(1, PROMPT)
    method, cache = prompt_cache(model, f"svd:rank_k=2,rank_v=2,every={EVERY}", ids)
    with pytest.raises(UserError, match=f"svd: every={EVERY} moves tokens .*; allowed: one of the two"):
        compress(cache, method, room=8)
    with pytest.raises(UserError, match=f"svd: every={EVERY}: all 3 tokens are sinks, .*; allowed: sinks below 3"):
        compress(first_tokens(cache, 3), method)
    voting, cache = prompt_cache(model, f"h2o:tokens=20,every={EVERY}", ids)
    with pytest.raises(UserError, match="h2o: every=8 records the queries of later tokens"):
        pack(compress(cache, voting))
    engine = engine_of(llama())
    cache = engine.new_cache()
    with voting.watch(engine):
        engine.hidden(ids, cache)
    with pytest.raises(UserError, match="h2o: every=8: transformers caches do not see the queries"):
        engine.compress(cache, voting)
