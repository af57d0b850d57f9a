"""Facts that hold for every registered method, on cllm caches, plans that share, and transformers caches.

A method is applied to a padded prompt and to the same prompt without padding. Either it cannot apply, and one line says
why, or both caches read the same tokens and give the same logits, and those are the logits of an exact cache that holds
what the compressed one reads.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from cllm.cache.cache import KVCache
from cllm.errors import UserError
from cllm.posthoc import lowrank
from cllm.posthoc.cache import compress_cache
from cllm.posthoc.engine import engine_of
from cllm.posthoc.hf import SharingLayer, compress_dynamic
from cllm.posthoc.registry import methods, parse
from cllm.posthoc.stores import CompressedSlot, SharingSlot

PADDING, PROMPT, LATER = 8, 32, 5
SPECS = {
    "none": "none",
    "xkv": "xkv:group=2,rank_k=5,rank_v=7",
    "svd": "svd:rank_k=5,rank_v=7",
    "minicache": "minicache:gamma=0.2",
    "minicache_xkv": "minicache_xkv:gamma=0.2",
    "commonkv": "commonkv:group=2,recent=4,merge=1,weights=equal",  # of fewer, padding is merged first
    "kivi": "kivi:bits=4,group=4,residual=4",  # groups of tokens begin at a multiple of the padding
    "xquant": "xquant:bits=4,group=4,residual=4",
    "int8": "int8",
    "fp8": "fp8",
    "turboquant": "turboquant:bits=3,sketch=true",
    "kvquant": "kvquant:bits=3",
    "kvtc": "kvtc:group=2,ratio=1.8",
    "palu": "palu:keep=0.5,allocation=uniform,heads=1",
    "asvd": "asvd:keep=0.5,heads=1",
    "lorc": "lorc:keep=0.5,heads=1",
    "eigenattention": "eigenattention:keep=0.5,heads=1",
    "shadowkv": "shadowkv:rank=9,select=null",
    "recompute": "recompute:rank=9",
    "vfold": "vfold:recent=5",
    "streaming": "streaming:tokens=12",
    "h2o": "h2o:tokens=12",
    "snapkv": "snapkv:tokens=12,window=3,kernel=3",
    "entropy": "entropy:tokens=12,window=3",
    "quest": "quest:select=8,page=4",
    "kvsharer": "kvsharer:threshold=-1.0,share=1",
    "hf_quantized": "hf_quantized",
}
MODELS = ["mha", "cla", "fusedkv", "yoco", "mla", "llama", "qwen3", "deepseek_v3"]
TRANSFORMERS = ["llama", "qwen3", "deepseek_v3"]
LATENTS = ["mla", "deepseek_v3"]
REFUSALS = {
    "minicache": {"yoco": "no two neighbours of one shape"},
    "minicache_xkv": {"yoco": "no two neighbours of one shape"},
    "commonkv": {
        "qwen3": "its keys are normalised",
        "yoco": "of 1 slots no two are merged",
        **dict.fromkeys(LATENTS, "slot 0 is a latent"),
    },
    **dict.fromkeys(["palu", "asvd", "lorc"], dict.fromkeys(LATENTS, "slot 0 is a latent")),
    **dict.fromkeys(
        ["eigenattention", "shadowkv"], dict.fromkeys(LATENTS, "the slots are latents, which are low rank")
    ),
    "recompute": dict.fromkeys(LATENTS, "the slots are latents, which keys are computed from"),
    "vfold": {"yoco": "the model has 1 slot", **dict.fromkeys(LATENTS, "slot 0 is a latent, which has no values")},
    **dict.fromkeys(["h2o", "snapkv"], dict.fromkeys(LATENTS, "the queries that meet a slot's keys are needed")),
    "entropy": {
        "llama": "transformers makes one mask for all layers",  # the budgets of the other model are equal
        **dict.fromkeys(LATENTS, "the queries that meet a slot's keys are needed"),
    },
    "quest": {
        "fusedkv": "the keys of layer 4 are made of the slots",
        **dict.fromkeys(["llama", "qwen3"], "transformers' attention reads all tokens"),
        **dict.fromkeys(LATENTS, "the slots are latents, whose keys are not stored"),
    },
    "kvsharer": {"yoco": "no two of 1 slots have one shape"},
    "hf_quantized": dict.fromkeys(MODELS[:5], "serves transformers models only"),
}
"""By method and model: why the method cannot apply."""
COUNTS_PADDING = ("kvtc",)
"""Methods with nothing but a ratio, which padding raises in a batch: a padded sequence gets more bytes than alone."""
OTHER_SOLVERS = (
    "xkv:group=2,ratio=1.5", "xkv:group=2,energy=0.9", "xkv:group=2,ratio=1", "svd:ratio=1.5,svd=exact",
    "svd:ratio=1.5,svd=random", "snapkv:tokens=12,window=3+svd:ratio=1.5", "recompute",
    "recompute:rank=9,fit=input", "recompute:rank=9+kivi:group=4,residual=4", "shadowkv:rank=9,select=8",
    "eigenattention:keep=0.5,basis=prompt", "kvtc:group=2,ratio=1.8,basis=calibration",
    "palu:keep=0.5,heads=1,whiten=false", "turboquant:mean_bits=3",
)  # fmt: skip
"""Specs of which the solver depends on options, or stands after `+`."""
OTHER_DECOMPOSITIONS = {
    "cllm.posthoc.weighting": "the roots of forms",
    "cllm.model.value_folds": "the nearest orthogonal matrix, and the inverse root of a covariance",
}
"""Modules with decompositions of full rank, which are not those of a method."""
LOSSLESS = ("quest",)
"""Methods whose passes of several tokens read the exact cache."""
CASES = [(method, model) for method in SPECS for model in MODELS]
CASES = [case for case in CASES if case not in [("hf_quantized", model) for model in TRANSFORMERS]]  # an own cache


def test_every_method_is_tested_here():
    built_in = {name for name, method in methods().items() if method.__module__.startswith("cllm.")}
    assert built_in == SPECS.keys()


@pytest.fixture
def model_of(design, llama):
    return lambda name: llama(name) if name in TRANSFORMERS else design(name)


def prompt_cache(engine, name, ids, padding, calibration) -> Any:
    """The calibrated method, and the compressed and the exact cache of the prompt after `padding` columns."""
    method = parse(SPECS[name])
    method.prepare(engine, calibration)
    model, cache, starts = engine.model, engine.new_cache(), torch.tensor([padding]) if padding else None
    ids = torch.cat((torch.zeros(1, padding, dtype=torch.long), ids), dim=1)
    with method.watch(engine):
        if isinstance(cache, KVCache):
            model.hidden(ids, cache=cache, starts=starts)
            return method, compress_cache(cache, method), cache
        mask = (torch.arange(ids.shape[1]) >= padding).long()[None]
        positions = (torch.arange(ids.shape[1]) - padding).clamp(min=0)[None]
        model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        return method, compress_dynamic(cache, method, model, starts=starts), cache


def read_on(engine, cache, ids, padding):
    """Logits of the later tokens."""
    if isinstance(cache, KVCache):
        return engine.model(ids, cache=cache)
    columns = padding + PROMPT + ids.shape[1]
    mask = (torch.arange(columns) >= padding).long()[None]
    positions = torch.arange(PROMPT, PROMPT + ids.shape[1])[None]
    return engine.model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


def tokens_read(cache):
    """The keys (or latents) and the values of the prompt as attention reads them, (1, n, ...) for each slot."""
    if isinstance(cache, KVCache):
        stores = {j: s for j, s in cache.stores.items() if isinstance(s, CompressedSlot | SharingSlot)}
        sources = {j: s.source if isinstance(s, SharingSlot) else s for j, s in stores.items()}
        return {j: source.last(source.kept(cache.seen), cache.seen)[:2] for j, source in sources.items()}
    layers = {i: layer.source if isinstance(layer, SharingLayer) else layer for i, layer in enumerate(cache.layers)}
    return {i: tuple(t.transpose(1, 2) for t in layer.read()) for i, layer in layers.items()}


def filled_with(cache, read) -> Any:
    """The exact `cache` with the tokens that a compressed one reads."""
    found = copy.deepcopy(cache)
    for j, (k, v) in read.items():
        if isinstance(cache, KVCache):
            found.stores[j].slot = found.stores[j].slot._replace(k=k, v=v)
        else:
            found.layers[j].keys, found.layers[j].values = k.transpose(1, 2), v.transpose(1, 2)
    return found


def difference(found, expected):
    """Relative to the length of `expected`: a number at the border of two codes may have the other one."""
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(("method_name", "name"), CASES)
def test_padded_and_not_a_method_applies_or_says_why(method_name, name, model_of, tokens):
    model, ids, reason = model_of(name), tokens(1, PROMPT + LATER), REFUSALS.get(method_name, {}).get(name)
    engine, found = engine_of(model), []
    for padding in (0, PADDING):
        if reason is not None:
            with pytest.raises(UserError, match=f"^{method_name}: .*{reason}"):
                prompt_cache(engine, method_name, ids[:, :PROMPT], padding, tokens(2, 60, seed=1))
            continue
        method, compressed, cache = prompt_cache(engine, method_name, ids[:, :PROMPT], padding, tokens(2, 60, seed=1))
        read = tokens_read(compressed)
        found.append((read, read_on(engine, compressed, ids[:, PROMPT:], padding)))
        if not method.evicts and not method.shares():
            expected = read_on(engine, filled_with(cache, read), ids[:, PROMPT:], padding)
            torch.testing.assert_close(found[-1][1], expected, atol=1e-4, rtol=1e-4)
        if method_name != "none":
            exact = read_on(engine, cache, ids[:, PROMPT:], padding)
            assert method_name in LOSSLESS or difference(found[-1][1], exact) > 1e-5
    if reason is None and method_name not in COUNTS_PADDING:
        (alone, logits), (padded, of_padded) = found
        for slot, pair in alone.items():
            for part, of_padding in zip(pair, padded[slot], strict=True):
                assert difference(of_padding[:, -part.shape[1] :], part) < 1e-2
        assert difference(of_padded, logits) < 2e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "spec", [*(SPECS[name] for name in SPECS if "mha" not in REFUSALS.get(name, {})), *OTHER_SOLVERS]
)
def test_a_method_that_factorises_names_its_solver(spec, dtype, model_of, tokens, monkeypatch):
    """Also of a method whose decompositions bypass `Factorising`. A sweep measures a record again forever if
    `needed_facts` has more than `facts`."""
    used = set()

    def watch(owner, function, algorithm):
        real = getattr(owner, function)

        def seen(*args, **options):
            if sys._getframe(1).f_globals["__name__"] not in OTHER_DECOMPOSITIONS:
                used.add(algorithm)
            return real(*args, **options)

        monkeypatch.setattr(owner, function, seen)

    for owner, function, algorithm in (
        (torch.linalg, "svd", "exact"), (torch.linalg, "eigh", "gram"), (lowrank, "power", "power"),
        (lowrank, "_subspace", "random"),
    ):  # fmt: skip
        watch(owner, function, algorithm)
    engine, method = engine_of(model_of("mha").to(dtype)), parse(spec)
    method.prepare(engine, tokens(2, 60, seed=1))
    cache = engine.new_cache()
    with method.watch(engine):
        engine.hidden(tokens(2, PROMPT), cache)
    engine.compress(cache, method)
    facts = method.facts()
    assert method.needed_facts <= facts.keys()
    assert used or "svd" not in facts
    if used:
        assert facts["svd"] in used
        assert facts["products"] in ("fp32", "tf32", "bf16")


def test_a_cache_of_its_own_knows_no_padding(llama, tokens):
    pytest.importorskip("hqq")
    model, cache = llama(), DynamicCache()
    model(tokens(2, 36), past_key_values=cache)
    method = parse("hf_quantized:backend=hqq,group=16,residual=4")
    assert compress_dynamic(cache, method, model, starts=torch.tensor([0, 0])).get_seq_length() == 36
    with pytest.raises(UserError, match="hf_quantized: _QuantizedWithSinks knows no padding, and 3 tokens are padding"):
        compress_dynamic(cache, method, model, starts=torch.tensor([0, 3]))
