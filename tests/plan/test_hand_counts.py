"""Bytes of caches and of decoding steps, and weights, of the newer presets: 8 layers, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cllm.cache.accounting import kv_bytes
from cllm.cache.cache import KVCache
from cllm.model.decoder import Decoder
from cllm.plan.presets import preset_names

HALF = 4 * 8
"""Numbers of the keys, or of the values, of one token: 4 heads of 8."""
LATENT = {"qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
TOKENS, WINDOW = 40, 16
# Options; slots of all tokens and of windows, in halves; the same for what a step reads; projections.
PRESETS: dict[str, tuple[dict[str, Any], tuple[int, int], tuple[int, int], int]] = {
    "swiftkv": ({}, (16, 0), (16, 0), 16),
    "swiftkv, groups of two": ({"group": 2}, (8 + 4, 0), (16, 0), 12),
    "svformer": ({}, (2 + 7, 0), (16, 0), 9),
    "kv_tie": ({}, (8, 0), (8, 0), 8),
    "yoco_pp": ({}, (8, 0), (16, 0), 8),
    "yoco_pp, windows": ({"window": WINDOW}, (2, 6), (2 * 5, 6), 8),
    "ced": ({"window": WINDOW}, (8 + 8, 8), (16, 8), 24),
    "ced, one group": ({"window": WINDOW, "group": 4}, (8 + 2, 8), (16, 8), 18),
    "hysparse": ({"window": WINDOW, "n_gated": 3}, (4, 12), (16, 12), 16),
    "resformer": ({}, (16, 0), (2 + 7 * 3, 0), 16),
    "yoco_u": ({"window": WINDOW, "times": 2, "n_lower": 2}, (2, 8), (8, 8), 4 + 2),  # two of four have weights
    "fusedkv": ({"keys": "complex", "values": "matrix"}, (8, 0), (8 + 4 * 4, 0), 8),
}
LATENTS = {
    "xmla": ({"factor": 4, "kv_lora_rank": 10, **LATENT}, 2 * 14, 8 * 14),
    "mlra": ({"kv_lora_rank": 12, "blocks": 3, **LATENT}, 8 * 16, 8 * 16),
}


@pytest.mark.parametrize("name", PRESETS)
def test_slots_of_keys_and_values(name: str, tiny_config) -> None:
    options, stored, read, projections = PRESETS[name]
    config = tiny_config(kv={"preset": name.partition(",")[0], **options})
    found = kv_bytes(config, context=TOKENS)
    assert round(found.resident * TOKENS) == 2 * HALF * (stored[0] * TOKENS + stored[1] * WINDOW)
    assert found.written == 2 * HALF * sum(stored)
    assert round(found.read * TOKENS) == 2 * HALF * (read[0] * TOKENS + read[1] * WINDOW)
    model = Decoder(config)
    for storage, numbers in (("model", 4 * HALF), ("fp8", HALF + 4 * 2)):  # fp8: a factor of 2 bytes for each head
        cache = KVCache(config, storage=storage)
        with torch.no_grad():
            model.prefill(torch.zeros(3, TOKENS, dtype=torch.long), cache)
        assert cache.nbytes() == 3 * numbers * (stored[0] * TOKENS + stored[1] * WINDOW)
    names = ("k_proj.weight", "v_proj.weight", "kv_proj.weight")
    found_projections = [p for key, p in model.named_parameters() if key.endswith(names)]
    assert [p.shape for p in found_projections] == [(HALF, 24)] * projections


@pytest.mark.parametrize("name", LATENTS)
def test_latents(name: str, tiny_config) -> None:
    options, stored, read = LATENTS[name]
    found = kv_bytes(tiny_config(kv={"preset": name, **options}), context=TOKENS)
    assert (found.resident, found.written, found.read) == (2 * stored, 2 * stored, 2 * read)


def test_every_preset_exists() -> None:
    assert {name.partition(",")[0] for name in (*PRESETS, *LATENTS)} <= {*preset_names()}
