"""Continuous batching and stored prefixes on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import cllm
from cllm.config import ModelConfig
from cllm.hub.export import as_pretrained
from cllm.model.sizes import build_decoder

DESIGNS: dict[str, dict[str, Any]] = {
    "mha": {"preset": "mha"},
    "gqa": {"preset": "gqa", "n_kv_heads": 2},
    "cla": {"preset": "cla"},
    "yoco": {"preset": "yoco", "window": 24, "n_kv_heads": 4},
    "fusedkv": {"preset": "fusedkv"},
    "fusedkv_lite": {"preset": "fusedkv_lite"},
}
NEW = 4


def build(kv: dict[str, Any], device: torch.device) -> Any:
    """A model with random weights in fp32."""
    config = ModelConfig(vocab_size=64, d_model=128, n_layers=8, n_heads=4, d_ff=256, max_seq_len=256, kv=kv)
    torch.manual_seed(0)
    decoder = build_decoder(config)
    decoder.init_weights()
    return as_pretrained(decoder).to(device).eval()


@pytest.mark.parametrize("name", DESIGNS)
def test_a_prefix_is_the_same_in_every_tier(name, gpu, tmp_path) -> None:
    model = build(DESIGNS[name], gpu)
    ids = torch.randint(64, (1, 100), device=gpu)

    def tokens(cache: Any) -> list[int]:
        return model.generate(ids, past_key_values=cache, max_new_tokens=NEW, do_sample=False)[0].tolist()

    expected = tokens(cllm.PrefixStore(model, tmp_path, host_bytes=0).prefill(ids, salt="a"))
    for tier, budgets in (
        ("disk", {"host_bytes": 0}),
        ("host", {"host_bytes": 2**30}),
        ("device", {"device_bytes": 2**30, "host_bytes": 0}),
    ):
        store = cllm.PrefixStore(model, tmp_path, **budgets)
        store.find(ids, salt="a")  # moves it from the folder to the tier
        assert store.nbytes[tier] > 0
        cache, length = store.find(ids, salt="a")
        assert cache is not None
        assert length == 99
        assert {t.device.type for slot in cache.stores.values() for t in slot.tensors().values()} == {gpu.type}
        assert tokens(cache) == expected


@pytest.mark.parametrize("name", DESIGNS)
def test_continuous_batching_gives_the_tokens_of_generate(name, gpu) -> None:
    model = build(DESIGNS[name], gpu)
    drawn = [torch.randint(64, (1, n), device=gpu) for n in (1, 17, 90, 53)]
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False)
    batching = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    found = model.generate_batch([ids[0].tolist() for ids in drawn], config, continuous_batching_config=batching)
    expected = [model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, ids.shape[1] :].tolist() for ids in drawn]
    assert [output.generated_tokens for output in found.values()] == expected
