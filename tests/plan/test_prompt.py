"""Prompts: which layers compute all tokens, how many the others compute, and that nothing changes by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cllm.cache.cache import KVCache
from cllm.cache.stores import SlotStore
from cllm.plan.prompt import prompt_tail, tail_slots

IDS = torch.randint(32, (2, 40), generator=torch.Generator().manual_seed(3))
PROMPT = 30
WINDOWED: dict[str, Any] = {
    "layers": [
        {"layers": 0, "own": {}},
        {"layers": 1, "own": {"kv_norm": True}, "window": 4},
        {"layers": 2, "own": {"mix": [1]}, "window": 3},
        {"layers": 3, "own": {"tie": "kv"}, "window": 2},
        {"layers": 4, "own": {}, "keys": {"fuse": [1, 2]}, "values": {"share": 2}, "window": 3},
        {"layers": 5, "keys": {"share": 4}, "values": {"fuse": [3, 4]}, "window": 2},
        {"layers": 6, "read": {"gate": [0, {"own": {"input": 0, "window": 3}}]}},
        {"layers": 7, "own": {"input": 0}},
    ]
}
"""The tokens that layers above 0 have to compute, from the top:

- 5 to 7 write no slot of their own input: 1 token;
- 4 caches 3 tokens, of which layer 5 sees 2: 3;
- 3: its output is needed for 3, and with its own window of 2 that is 4;
- 2: its output is needed for 4, and with its own window of 3 that is 6; layer 4 sees 3 of its slot for 3 tokens, 5;
- 1: its output is needed for 6, and with its own window of 4 that is 9; layer 2 mixes in 6.
"""
MIXED_IN: dict[str, Any] = {
    "layers": [
        {"layers": 0, "own": {}},
        {"layers": [1, 2], "own": {"mix": [0]}, "window": 3},
        {"layers": 3, "own": {"input": 0, "mix": [0, 2]}, "window": 3},
        {"layers": 4, "own": {"input": 0, "mix": [3]}, "window": 2},
        {"layers": 5, "own": {"input": 0, "mix": [0]}},
        {"layers": 6, "own": {"input": 0, "tie": "kv"}, "window": 2},
        {"layers": 7, "keys": {"fuse": [4, 3]}, "values": {"fuse": [3, 6]}, "window": 2},
    ]
}
"""Owners that project the output of layer 0. Layers 3 and 4 mix in slots of which a prompt fills the last tokens alone:
the windows of layers 1 and 2 take 2 · 2 + 1. Layer 5 mixes in a slot of all tokens."""
PLANS: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "ced": ({"preset": "ced", "window": 3}, (3, 4 * 2 + 1)),
    "ced, groups": ({"preset": "ced", "window": 4, "group": 2, "n_lower": 2}, (1, 6 * 3 + 1)),
    "ced, windows of one token": ({"preset": "ced", "window": 1}, (3, 2)),
    "hysparse": ({"preset": "hysparse", "window": 3, "n_gated": 3}, (4, 3 * 2 + 1)),
    "windows above the last full layer": ({"preset": "gqa", "window": 5, "full_every": 6}, (5, 2 * 4 + 1)),
    "windows everywhere": ({"preset": "mha", "window": 3}, (0, 7 * 2 + 1)),
    "every kind of window": (WINDOWED, (0, 9)),
    "mixed in": (MIXED_IN, (0, 5)),
    "swiftkv": ({"preset": "swiftkv"}, (3, 1)),
    "yoco": ({"preset": "yoco", "window": 3}, (4, 1)),
    "fusedkv": ({"preset": "fusedkv"}, (3, 1)),
    "mha": ({"preset": "mha"}, (7, 1)),
    "lckv": ({"preset": "lckv", "iterations": {"forward": 30, "backward": 2}}, (7, 1)),
}


@pytest.fixture
def model(request, tiny_config, random_model):
    """A decoder in fp64. Tables of RoPE and gates are fp32."""
    return random_model(tiny_config(kv=PLANS[request.param][0])).double().eval().requires_grad_(False)


@pytest.mark.parametrize("name", PLANS)
def test_the_layer_and_the_tokens_by_hand(name, tiny_config) -> None:
    kv, expected = PLANS[name]
    assert prompt_tail(tiny_config(kv=kv).plan()) == expected


def test_the_published_ced(tiny_config) -> None:
    plan = tiny_config(n_layers=24, kv={"preset": "ced"}).plan()
    assert prompt_tail(plan) == (11, 12 * 127 + 1)


def test_slots_of_which_a_prompt_fills_the_last_tokens(tiny_config) -> None:
    found = {name: sorted(tail_slots(tiny_config(kv=kv).plan())) for name, (kv, _) in PLANS.items()}
    assert found["mixed in"] == [1, 2, 3, 4]
    assert found["every kind of window"] == [1, 2, 3, 4]
    assert found["swiftkv"] == found["mha"] == []


def next_tokens(model, cache: KVCache) -> torch.Tensor:
    return torch.cat([model(IDS[:, t : t + 1], cache=cache) for t in range(PROMPT, 40)], dim=1)


def windows(cache: KVCache) -> list[torch.Tensor]:
    """The cached tokens of every slot."""
    stores = [store for store in cache.stores.values() if isinstance(store, SlotStore)]
    slots = [store.last(store.kept(PROMPT), PROMPT) for store in stores]
    return [tensor for slot in slots for tensor in (slot.k, slot.v)]


@pytest.mark.parametrize("options", [{}, {"max_len": 40}], ids=["growing", "static"])
@pytest.mark.parametrize("chunk", [None, 20, 11, 4])
@pytest.mark.parametrize(
    "model", ["ced", "ced, groups", "ced, windows of one token", "hysparse", "windows everywhere"], indirect=True
)
def test_the_last_token_and_the_cache_are_those_of_full_passes(model, chunk, options) -> None:
    full, exact = model(IDS), KVCache(model.config, **options)
    model(IDS[:, :PROMPT], cache=exact)
    cache = KVCache(model.config, **options)
    last = model.head(model.prefill(IDS[:, :PROMPT], cache, chunk=chunk))
    torch.testing.assert_close(last, full[:, PROMPT - 1 : PROMPT], atol=1e-5, rtol=1e-5)
    for found, wanted in zip(windows(cache), windows(exact), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(next_tokens(model, cache), full[:, PROMPT:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("chunk", [None, 7, 6])
@pytest.mark.parametrize("model", ["every kind of window", "mixed in"], indirect=True)
def test_every_kind_of_window_is_exact(model, chunk) -> None:
    full, cache = model(IDS), KVCache(model.config)
    last = model.head(model.prefill(IDS[:, :PROMPT], cache, chunk=chunk))
    torch.testing.assert_close(last, full[:, PROMPT - 1 : PROMPT], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(next_tokens(model, cache), full[:, PROMPT:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(IDS, last_only=True), full[:, -1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", ["ced", "hysparse", "windows everywhere", "every kind of window"], indirect=True)
def test_one_token_less_would_change_the_cache(model) -> None:
    exact, cache = KVCache(model.config), KVCache(model.config)
    model(IDS[:, :PROMPT], cache=exact)
    top, tail = model._prompt_tail
    model._prompt_tail = top, tail - 1
    model.prefill(IDS[:, :PROMPT], cache)
    pairs = zip(windows(cache), windows(exact), strict=True)
    assert not all(torch.allclose(found, wanted, atol=1e-5, rtol=1e-5) for found, wanted in pairs)


@pytest.mark.parametrize("model", ["ced", "hysparse"], indirect=True)
def test_padding_and_documents(model) -> None:
    starts = torch.tensor([0, 13])
    cache = KVCache(model.config)
    last = model.head(model.prefill(IDS[:, :PROMPT], cache, starts=starts))
    following = next_tokens(model, cache)
    for row, start in enumerate(starts.tolist()):
        alone = model(IDS[row : row + 1, start:])[0]
        torch.testing.assert_close(last[row], alone[PROMPT - start - 1 : PROMPT - start], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(following[row], alone[PROMPT - start :], atol=1e-5, rtol=1e-5)
    documents = torch.arange(40).ge(25).long().expand(2, -1)
    found = model(IDS, document_ids=documents, last_only=True)
    torch.testing.assert_close(found, model(IDS, document_ids=documents)[:, -1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model", ["ced"], indirect=True)
def test_upper_layers_compute_the_last_tokens_alone(model) -> None:
    seen: list[int] = []
    for block in model.blocks:
        block.mlp.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    model.prefill(IDS[:, :PROMPT], KVCache(model.config))
    assert seen == [PROMPT] * 4 + [9] * 3 + [1]
    seen.clear()
    model.prefill(IDS[:, :9], KVCache(model.config))  # all tokens are needed: only the highest layer computes one
    assert seen == [9] * 7 + [1]
