"""A decoder's first weights."""

from __future__ import annotations

import pytest
import torch

from cllm.model import sizes
from cllm.model.decoder import Decoder
from cllm.model.sizes import build_decoder, model_d_ff


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("mha", {"qk_norm": True, "q_bias": True}),
        ("gqa", {"kv_bias": True}),
        ("mla", {}),
        ("yoco with retention", {}),
        ("fusedkv", {"tie_embeddings": True}),
        ("fusedkv_lite", {"match_params": True}),
        ("lckv", {}),
    ],
)
def test_all_weights_are_drawn_and_what_is_tied_stays_tied(name, more, preset_config, monkeypatch):
    """What `init_weights` gives a decoder that torch has begun, whatever is in memory before."""
    config = preset_config(name, **more)
    wanted = Decoder(config, d_ff=model_d_ff(config))
    torch.manual_seed(3)
    wanted.init_weights()
    empty = torch.empty
    monkeypatch.setattr(sizes.torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(torch.nan))
    torch.manual_seed(3)
    found = build_decoder(config)
    assert list(found.state_dict()) == list(wanted.state_dict())
    for key, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key
    assert (found.head.weight is found.embed.weight) == config.tie_embeddings
    assert [p.requires_grad for p in found.parameters()] == [p.requires_grad for p in wanted.parameters()]
    assert len(list(found.parameters())) == len(list(wanted.parameters()))
