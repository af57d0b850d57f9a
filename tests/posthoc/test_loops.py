"""Methods that record what layers compute, in a model whose layers share modules: a loop's turns have slots of their
own, and what is recorded for one is not that of another."""

from __future__ import annotations

import pytest
import torch

from tests.posthoc.filled import fill

LAYERS = {"layers": [{"layers": "0-4", "own": {"n_kv_heads": 2}}]}
LOOP = {"layers": "1-2", "times": 2}
PREFIX, LENGTH = 20, 28


@pytest.mark.parametrize(
    "spec",
    [
        "palu:keep=0.5,allocation=uniform",
        "asvd:keep=0.5",
        "asvd:keep=0.6,allocation=search",
        "eigenattention:keep=0.6,allocation=errors",
        "kvquant:bits=3,levels=fisher",
        "commonkv:group=2",
        "recompute",
        "recompute:rank=12,fit=input",
        "h2o:tokens=10",
        "snapkv:tokens=10,window=4",
        "snapkv:tokens=10,window=4,every=4",
        "xkv:group=1,ratio=2,weight=queries",
    ],
)
def test_a_loop_is_compressed_as_the_model_whose_turns_have_copies_of_its_weights(
    spec, tiny_config, random_model, tokens
):
    config = tiny_config(kv={**LAYERS, "loop": LOOP}, n_layers=5, max_seq_len=256)
    looped = random_model(config).eval().requires_grad_(False)
    copied = random_model(tiny_config(kv=LAYERS, n_layers=5, max_seq_len=256)).eval().requires_grad_(False)
    for name in ("embed", "norm", "head"):
        getattr(copied, name).load_state_dict(getattr(looped, name).state_dict())
    for block, other in zip(copied.blocks, looped.blocks, strict=True):
        block.load_state_dict(other.state_dict())
    ids, text, found = tokens(2, LENGTH), tokens(2, 40, seed=1), []
    for model in (looped, copied):
        engine, cache, method = fill(model, ids[:, :PREFIX], spec, text)
        compressed = engine.compress(cache, method)
        steps = [engine.logits(ids[:, i : i + 1], compressed) for i in range(PREFIX, LENGTH)]
        found.append((torch.cat(steps, 1), compressed.nbytes()))
    (logits, size), (wanted, expected) = found
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)
    assert size == expected
