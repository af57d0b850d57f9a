"""Caches read layer by layer, as other libraries do."""

from __future__ import annotations

import pytest
import torch

from cllm.cache.cache import KVCache
from cllm.cache.stores import SlotStore
from cllm.errors import UserError

IDS = torch.tensor([[5, 9, 1, 30, 7, 2, 11], [4, 4, 8, 21, 3, 17, 6]])


def _filled(random_model, config, **options) -> KVCache:
    cache = KVCache(config, **options)
    with torch.no_grad():
        model = random_model(config)
        model.hidden(IDS[:, :6], cache=cache)
        model.hidden(IDS[:, 6:], cache=cache)
    return cache


@pytest.mark.parametrize("options", [{}, {"max_len": 9}])
def test_a_layer_shows_what_it_reads(options, random_model, tiny_config) -> None:
    cache = _filled(random_model, tiny_config(kv={"preset": "cla", "n_kv_heads": 2}, n_layers=4), **options)
    assert len(cache.layers) == len(cache) == 4
    for i, layer in enumerate(cache.layers):
        store = cache.stores[i - i % 2]
        assert isinstance(store, SlotStore)
        slot = store.slot
        assert layer.keys.shape == layer.values.shape == (2, 2, 7, 8)
        assert torch.equal(layer.keys, slot.k[:, :7].transpose(1, 2))
        assert torch.equal(layer.values, slot.v[:, :7].transpose(1, 2))
        assert (layer.get_seq_length(), layer.is_initialized, layer.is_sliding) == (7, True, False)
    assert KVCache(cache.config).layers[0].keys is None
    cache.crop(5)
    assert cache.layers[3].keys.shape == (2, 2, 5, 8)


def test_keys_and_values_of_different_owners(random_model, tiny_config) -> None:
    cache = _filled(random_model, tiny_config(kv={"preset": "fusedkv_lite"}, n_layers=4))
    last = cache.layers[3]
    assert torch.equal(last.keys, cache.layers[1].keys)
    assert torch.equal(last.values, cache.layers[0].values)


@pytest.mark.parametrize("options", [{}, {"max_len": 9}])
def test_a_window_shows_its_last_tokens_in_order(options, random_model, tiny_config) -> None:
    window = tiny_config(kv={"preset": "mha", "window": 3}, n_layers=2)
    entire = _filled(random_model, tiny_config(kv={"preset": "mha"}, n_layers=2))
    keys = _filled(random_model, window, **options).layers[0].keys
    torch.testing.assert_close(keys, entire.layers[0].keys[:, :, -3:])


def test_fp8_is_shown_as_the_numbers_that_it_stands_for(random_model, tiny_config) -> None:
    config = tiny_config(kv={"preset": "mha"}, n_layers=2)
    exact, stored = _filled(random_model, config), _filled(random_model, config, storage="fp8")
    torch.testing.assert_close(stored.layers[0].values, exact.layers[0].values, atol=0.0, rtol=1 / 16)


def test_what_is_not_stored_cannot_be_read(random_model, tiny_config, preset_config) -> None:
    fused = _filled(random_model, tiny_config(kv={"preset": "fusedkv"}, n_layers=4))
    with pytest.raises(UserError, match=r"cache\.layers\[2\]\.keys: the layer fuses keys of the layers \[0, 1\]"):
        _ = fused.layers[2].keys
    latent = _filled(random_model, preset_config("mla"))
    with pytest.raises(UserError, match=r"cache\.layers\[0\]\.values: the layer reads a latent, and no values"):
        _ = latent.layers[0].values
