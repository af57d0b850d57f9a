"""Slots of one shape are quantised, merged and voted on together: the same numbers as one by one, in few operations."""

from __future__ import annotations

import itertools

import pytest
import torch

from cllm.cache.cache import KVCache
from cllm.posthoc import slots as slots_module
from cllm.posthoc import votes as votes_module
from tests.posthoc.filled import fill
from tests.posthoc.operators import Operators

QUANTISERS = [
    "int8", "fp8", "kivi:group=8,residual=8", "xquant:group=8,residual=8", "xquant:group=8,residual=8,share_k=2",
    "turboquant:bits=3,sketch=true", "kvquant:bits=3", "kvquant:levels=uniform", "kvquant:levels=fisher",
    "turboquant:mean_bits=2.5", "kivi:mean_bits=3,group=8,residual=8",
]  # fmt: skip
MERGING = ["minicache:start=0", "minicache_xkv:start=0", "minicache:start=0+kivi:group=8,residual=0"]
EVICTING = [
    "streaming:tokens=20", "h2o:tokens=20", "snapkv:tokens=20,window=4", "entropy:tokens=20,window=4",
    "snapkv:tokens=20,window=4+kivi:group=8,residual=0",
]  # fmt: skip
STARTS = torch.tensor([0, 5])


def compressed(decoder, tokens, spec, plan, **padding):
    engine, cache, method = fill(decoder({"preset": plan}), tokens(2, 40), spec, tokens(2, 24, seed=1), **padding)
    return engine.compress(cache, method)


def stored(cache):
    return {f"{slot}.{name}": t for slot, store in cache.stores.items() for name, t in store.tensors().items()}


@pytest.mark.parametrize("padding", [{}, {"starts": STARTS}], ids=["full", "padded"])
@pytest.mark.parametrize(
    ("plan", "spec"),
    [
        *itertools.product(["mha", "cla", "fusedkv"], [*QUANTISERS, *EVICTING, *MERGING]),
        *itertools.product(["mha", "cla"], ["quest:dense=1"]),  # whose steps read one slot
    ],
)
def test_slots_together_are_as_one_by_one(spec, plan, padding, decoder, tokens, monkeypatch):
    together = compressed(decoder, tokens, spec, plan, **padding)
    monkeypatch.setattr(slots_module, "TOGETHER", {"cpu": 1, "cuda": 1})
    monkeypatch.setattr(votes_module, "_SCORES", 2 * 4 * 40)  # one query at a time, of one layer
    alone = compressed(decoder, tokens, spec, plan, **padding)
    assert together.nbytes() == alone.nbytes()
    one, other = stored(together), stored(alone)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("padding", [{}, {"starts": STARTS}], ids=["full", "padded"])
@pytest.mark.parametrize("spec", ["recompute:rank=9", "recompute:rank=9,group=3", "recompute:rank=9,fit=input"])
def test_groups_together_are_factorised_as_one_by_one(spec, padding, decoder, tokens, monkeypatch):
    together = compressed(decoder, tokens, spec, "mha", **padding)
    monkeypatch.setattr(slots_module, "TOGETHER", {"cpu": 1})
    alone = compressed(decoder, tokens, spec, "mha", **padding)
    for slot, store in together.stores.items():
        for part in ("k", "v"):
            one, other = (getattr(s.prefix, part).decode() for s in (store, alone.stores[slot]))
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("spec", "operation", "times"),
    [
        ("int8", "abs", 2), ("kivi:group=8,residual=8", "amin", 2), ("xquant:group=8,residual=8", "amin", 2),
        ("turboquant", "bucketize", 2), ("kvquant", "nanmedian", 2), ("kvquant:levels=uniform", "nanmedian", 2),
        ("kvquant", "cos", 1), ("kvquant:outliers=0.1", "cumsum", 2 + 2), ("quest:dense=0", "amin", 1),
        ("minicache:start=0", "sort", 2),
        ("snapkv:tokens=20,window=4+kivi:group=8,residual=0", "amin", 2),
        ("streaming:tokens=20", "sort", 2), ("snapkv:tokens=20,window=4", "_softmax", 1),
        ("snapkv:tokens=20,window=4", "sort", 2), ("entropy:tokens=20,window=4", "_softmax", 1),
    ],
)  # fmt: skip
def test_an_operation_runs_once_for_all_slots(spec, operation, times, decoder, tokens):
    """Twice for quantisers, of keys and of values, and for the order of tokens by their scores and then by place.
    KVQuant sums up counts and moments of bins for all levels at once, and ranks of outliers of each kind."""
    engine, cache, method = fill(decoder(), tokens(2, 40), spec, tokens(2, 24, seed=1))
    with Operators() as counted:
        engine.compress(cache, method, measure=False)
    assert counted.counts[operation] == times


def test_singular_values_are_read_from_the_device_once(decoder, tokens):
    """Eigen Attention searches for the share of them that a ratio of bytes allows."""
    engine, cache, method = fill(decoder(), tokens(2, 40), "eigenattention:ratio=2", tokens(2, 24, seed=1))
    counts = []
    for _ in range(2):
        with Operators() as counted:
            engine.compress(cache, method, measure=False)
        counts.append(counted.counts["cumsum"])
    assert counts[0] == sum(len(spectrum.widths) for spectrum in method._spectra.values())
    assert counts[1] == 0


@pytest.mark.parametrize(
    "spec",
    ["xkv:ratio=2", "xkv:ratio=2,weight=queries,spread=true,codes=mixed", "palu:ratio=2", "recompute",
     "recompute:ratio=2", "shadowkv:rank=8,select=null", "int8"],
)  # fmt: skip
def test_codes_know_whether_they_have_factors(spec, decoder, tokens):
    for store in compressed(decoder, tokens, spec, "mha").stores.values():
        for code in (store.prefix.k, store.prefix.v):
            assert code.has_factors == (code.factors() is not None)


def test_quantised_factors_are_not_decoded_to_begin_with(decoder, tokens):
    engine, cache, method = fill(decoder(), tokens(2, 40), "xkv:ratio=2+kivi:group=8,residual=0", tokens(2, 24, seed=1))
    with Operators() as counted:
        engine.compress(cache, method, measure=False)
    assert counted.counts["__rshift__"] == 0, "codes are unpacked when they are read"


def test_a_step_copies_the_tokens_of_a_slot_once(decoder, tokens):
    """Sinks, the other tokens of the prefix and later ones: one copy of keys and one of values in each of 4 layers,
    besides the sinks and later tokens, which grow by one."""
    cache = compressed(decoder, tokens, "streaming:tokens=20", "mha")
    with Operators() as counted:
        decoder().hidden(tokens(2, 1), cache=cache)
    with Operators() as exact:
        decoder().hidden(tokens(2, 1), cache=KVCache(decoder().config))
    assert counted.counts["cat"] - exact.counts["cat"] == 2 * len(cache.stores)


def test_a_stack_has_memory_for_all_its_slots_and_no_more(decoder, tokens):
    cache = compressed(decoder, tokens, "kivi:group=8,residual=8", "mha")
    for name, tensor in stored(cache).items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
