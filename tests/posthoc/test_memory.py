"""A compressed cache keeps alive only the tensors that it counts."""

from __future__ import annotations

import gc

import pytest
import torch

from cllm.errors import UserError
from cllm.posthoc import hf
from cllm.posthoc.engine import engine_of
from cllm.posthoc.registry import parse
from cllm.posthoc.stores import CompressedSlot

PREFIX = 40
SPECS = [
    "none",
    "xkv:group=4,ratio=2",
    "xkv:group=4,ratio=2+kivi:bits=4,group=20,residual=0",
    "svd:ratio=2",
    "svd:ratio=2,recompress=4",
    "minicache",
    "kivi:bits=2,group=8,residual=4,recompress=6",
    "kivi:mean_bits=3,group=8,residual=4,every=4",
    "turboquant:mean_bits=3",
    "svd:ratio=2,every=4",
    "minicache:every=4+kivi:bits=4,group=4,residual=4",
    "int8:every=3",
    "kvsharer:threshold=-1",
    "kvtc:ratio=2",
    "commonkv:recent=4",
]


@pytest.fixture
def new_bytes():
    """The bytes of all tensors that exist now and did not exist at the start."""

    def count():
        gc.collect()
        alive = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}.values())

    def start():
        gc.collect()
        gc.freeze()  # leaves out all objects of now, for good: what the test lets go of is freed all the same
        return count

    return start


def fill_and_compress(engine, method, ids):
    """The uncompressed cache is out of scope afterwards."""
    cache = engine.new_cache()
    with method.watch(engine):
        engine.hidden(ids, cache)
    return engine.compress(cache, method)


@pytest.mark.parametrize("kind", ["cllm", "transformers"])
@pytest.mark.parametrize("spec", SPECS)
def test_nothing_but_the_compressed_cache_stays_alive(spec, kind, decoder, llama, tokens, new_bytes):
    model, ids = decoder() if kind == "cllm" else llama(), tokens(2, PREFIX + 8)
    engine, method = engine_of(model), parse(spec)
    method.prepare(engine, ids[:, :PREFIX])
    fill_and_compress(engine, method, ids[:, :PREFIX])  # factors of weights are the method's, and stay
    method.release()
    count = new_bytes()
    compressed = fill_and_compress(engine, method, ids[:, :PREFIX])
    method.release()
    column = 8 if kind == "cllm" else 0
    assert count() == compressed.nbytes() + column
    compressed.reorder_cache(torch.tensor([1, 0]))
    assert count() == compressed.nbytes() + column
    for token in ids[:, PREFIX:].split(1, dim=1):
        engine.hidden(token, compressed)
    del token
    assert count() == compressed.nbytes() + column


def test_a_compressed_cache_holds_no_inputs_of_projections(decoder, tokens):
    """Even while the method does, with which the watched cache can be compressed again."""
    engine, method = engine_of(decoder()), parse("commonkv:recent=4,weights=equal")
    cache = engine.new_cache()
    with method.watch(engine):
        engine.hidden(tokens(2, PREFIX), cache)
    first, second = (engine.compress(cache, method) for _ in range(2))
    assert first.nbytes() == second.nbytes()
    with pytest.raises(UserError, match="has not seen the cache being filled"):
        engine.compress(cache, first.method)
    with method.watch(engine):  # forgets the inputs recorded before
        pass
    with pytest.raises(UserError, match="has not seen the cache being filled"):
        engine.compress(cache, method)


def test_only_shared_layers_keep_their_keys_and_values(decoder, llama, tokens, monkeypatch):
    """Until the pass ends; those of other layers are freed after their layer."""
    ids = tokens(2, PREFIX + 4)
    for model, kind, extend in ((decoder(), CompressedSlot, "extend"), (llama(), hf.CompressedLayer, "update")):
        engine, method = engine_of(model), parse("kvsharer:threshold=-1")
        kept: list[bool] = []
        method.prepare(engine, ids[:, :PREFIX])
        original = getattr(kind, extend)

        def watched(self, *args, original=original, kept=kept, **kwargs):
            result = original(self, *args, **kwargs)
            kept.append(self.in_pass is not None)
            return result

        monkeypatch.setattr(kind, extend, watched)
        for spec, expected in (("kvsharer:threshold=-1", 1), ("minicache", 0)):
            chosen = method if spec.startswith("kvsharer") else parse(spec)
            compressed = fill_and_compress(engine, chosen, ids[:, :PREFIX])
            kept.clear()
            engine.hidden(ids[:, PREFIX:], compressed)
            assert sum(kept) == expected
            stores = compressed.stores.values() if hasattr(compressed, "stores") else compressed.layers
            assert all(getattr(store, "in_pass", None) is None for store in stores)
