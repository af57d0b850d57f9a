"""Compressed caches: a model continues from them, their bytes are as reported, and batch operations work."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.cache_utils import DynamicCache

import cllm
from cllm.cache.cache import KVCache
from cllm.cache.stores import SlotStore
from cllm.errors import UserError
from cllm.hub.export import as_pretrained
from cllm.posthoc.cache import compress_cache
from cllm.posthoc.compress import mean_errors
from cllm.posthoc.engine import engine_of
from cllm.posthoc.hf import compress_dynamic, layer_tensors
from cllm.posthoc.registry import parse
from cllm.posthoc.stores import CompressedSlot
from tests.posthoc.reading import read_on

PREFIX, LENGTH, PADDING = 20, 28, [0, 3]
FULL = "xkv:group=2,energy=1.0"
DESIGNS = ["mha", "gqa", "cla", "yoco", "yoco with retention", "fusedkv", "fusedkv_lite", "mla", "lckv", "trailing"]
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "deepseek_v2", "deepseek_v3"]


def real_bytes(tensors):
    """Bytes of the memory behind `tensors`, so that a view of a larger tensor counts in full."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())


def stored(cache):
    if isinstance(cache, KVCache):
        return [tensor for store in cache.stores.values() for tensor in store.tensors().values()]
    return [tensor for layer in cache.layers for tensor in layer_tensors(layer)]


# ---- cllm models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DESIGNS)
def test_full_rank_reproduces_the_logits(name, design, tokens):
    model, ids = design(name), tokens(2, LENGTH)
    engine = engine_of(model)
    for parts in ([8], [1] * 8, [5, 1, 2]):
        cache = engine.new_cache()
        engine.hidden(ids[:, :PREFIX], cache)
        compressed = engine.compress(cache, parse(FULL))
        assert any(isinstance(store, CompressedSlot) for store in compressed.stores.values())
        found = read_on(engine, compressed, ids[:, PREFIX:], parts)
        torch.testing.assert_close(found, model(ids)[:, PREFIX:], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            read_on(engine, cache, ids[:, PREFIX:], parts), model(ids)[:, PREFIX:], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("name", ["mha", "fusedkv", "mla", "yoco"])
def test_left_padding(name, design, tokens):
    model, ids, starts = design(name), tokens(2, LENGTH), torch.tensor(PADDING)
    cache = KVCache(model.config)
    model(ids[:, :PREFIX], cache=cache, starts=starts)
    compressed = compress_cache(cache, parse(FULL))
    found = model(ids[:, PREFIX:], cache=compressed)
    for row, start in enumerate(PADDING):
        alone = model(ids[row : row + 1, start:])[0, PREFIX - start :]
        torch.testing.assert_close(found[row], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{"max_len": 32}, {"max_len": 32, "storage": "fp8"}, {"storage": "fp8"}])
def test_static_and_fp8_caches_are_compressed_as_attention_reads_them(options, decoder, tokens):
    model, ids = decoder(), tokens(2, LENGTH)
    cache = KVCache(model.config, **options)
    model(ids[:, :PREFIX], cache=cache)
    compressed = compress_cache(cache, parse(FULL))
    assert max(max(e.values()) for e in compressed.outcome.errors.values()) < 1e-5
    expected = model(ids[:, PREFIX:], cache=cache)
    tolerance = 1e-4 if "storage" not in options else 1e-3
    torch.testing.assert_close(model(ids[:, PREFIX:], cache=compressed), expected, atol=tolerance, rtol=tolerance)


def test_windows_states_and_rope_keys_are_left_alone(design, tokens, filled):
    engine, cache = filled(design("yoco"), tokens(2, PREFIX))
    compressed = engine.compress(cache, parse("xkv:rank_k=1,rank_v=1"))
    kinds = [isinstance(store, CompressedSlot) for store in compressed.stores.values()]
    windows = [layer.window for layer in engine.model.plan.layers if layer.own is not None]
    assert kinds == [window is None for window in windows]
    engine, cache = filled(design("mla"), tokens(2, PREFIX))
    compressed = engine.compress(cache, parse("xkv:rank_k=1,rank_v=1"))
    for slot, error in compressed.outcome.errors.items():
        assert error["v"] == 0 < error["k"]
        assert torch.equal(compressed.stores[slot].last(PREFIX, PREFIX).v, cache.stores[slot].slot.v)


def test_the_cache_follows_the_batch(decoder, tokens):
    model, ids, starts = decoder(), tokens(3, LENGTH), torch.tensor([0, 3, 5])
    cache = KVCache(model.config)
    model(ids[:, :PREFIX], cache=cache, starts=starts)
    compressed = compress_cache(cache, parse("xkv:group=4,rank_k=9,rank_v=9"))
    order = torch.tensor([2, 0, 0, 1])
    expected = model(ids[:, PREFIX:], cache=copy.deepcopy(compressed))
    before = compressed.nbytes()
    compressed.reorder_cache(order)
    assert compressed.nbytes() == before // 3 * 4 == real_bytes(stored(compressed))  # bases are still shared
    torch.testing.assert_close(model(ids[order, PREFIX:], cache=compressed), expected[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", ["xkv:group=4,rank_k=3,rank_v=3", "streaming:ratio=2", "int8"])
def test_errors_are_means_over_sequences(spec, decoder, tokens):
    """Not that of all sequences as one tensor, which is the root of a mean of squares."""
    model, method = decoder(), parse(spec)
    ids = torch.stack((tokens(1, PREFIX)[0], torch.arange(PREFIX) % 2, torch.arange(PREFIX) % 5))
    cache = KVCache(model.config)
    model(ids, cache=cache)
    for store in cache.stores.values():
        assert isinstance(store, SlotStore)
        for tensor in (store.slot.k, store.slot.v):
            tensor[1, 5 : PREFIX // 2] *= 0.01  # what eviction drops is small in this sequence
    found, alone = compress_cache(cache, method).outcome.errors, []
    for row in range(3):
        one = copy.deepcopy(cache)
        one.batch_select_indices(torch.tensor([row]))
        alone.append(compress_cache(one, method).outcome.errors)
    assert alone[0][0]["k"] > 1.1 * alone[1][0]["k"]
    for owner in cache.stores:
        for part in ("k", "v"):
            mean = sum(errors[owner][part] for errors in alone) / 3
            assert found[owner][part] == pytest.approx(mean, rel=1e-4)


def test_errors_of_batches_count_by_their_sequences():
    two, one = {3: {"k": 0.1, "v": 0.4}}, {3: {"k": 0.4, "v": 0.1}}
    assert mean_errors([two, one], [2, 1]) == {"3": {"k": pytest.approx(0.2), "v": pytest.approx(0.3)}}
    assert mean_errors([], []) == {}


def test_tokens_since_can_be_dropped_and_compressed_ones_not(decoder, tokens, filled):
    engine, cache = filled(decoder(), tokens(2, PREFIX))
    compressed = engine.compress(cache, parse(FULL))
    ids = tokens(2, 8, seed=1)
    expected = read_on(engine, copy.deepcopy(compressed), ids, [8])
    engine.logits(ids[:, :5].flip(1), compressed)
    compressed.crop(PREFIX)
    torch.testing.assert_close(read_on(engine, compressed, ids, [8]), expected)
    with pytest.raises(UserError, match="cannot go back from 28 to 19 tokens: the first 20 are compressed"):
        compressed.crop(PREFIX - 1)


def test_recompression_every_n_tokens(decoder, tokens, filled):
    engine, cache = filled(decoder(), tokens(2, PREFIX))
    compressed = engine.compress(cache, parse("xkv:energy=1.0,recompress=4"))
    ids = tokens(2, 11, seed=1)
    expected = engine.logits(ids, copy.deepcopy(cache))
    sizes = []
    found = []
    for i in range(11):
        found.append(engine.logits(ids[:, i : i + 1], compressed))
        sizes.append(compressed.exact_tokens)
    assert sizes == [1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]
    assert compressed.stores[0].compressed == PREFIX + 8
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spec", ["none", "xkv:group=4,rank_k=9,rank_v=5", "svd:ratio=1.5"])
def test_bytes_are_those_of_the_memory_held(spec, decoder, tokens, filled):
    engine, cache = filled(decoder(), tokens(2, PREFIX))
    compressed = engine.compress(cache, parse(spec))
    for _ in range(2):
        assert compressed.nbytes() == real_bytes(stored(compressed))
        engine.logits(tokens(2, 3), compressed)


@pytest.mark.parametrize("sinks", [0, 4])
def test_bytes_of_xkv(sinks, decoder, tokens, filled):
    engine, cache = filled(decoder(n_layers=5), tokens(2, PREFIX))
    compressed = engine.compress(cache, parse(f"xkv:group=4,rank_k=9,rank_v=5,sinks={sinks}"))
    # two groups, of 4 slots and of 1, of 4 heads of 8 channels, in fp32; both A and every layer's B; and exact sinks
    assert compressed.nbytes() == 2 * 4 * ((9 + 5) * (2 * (PREFIX - sinks) + 5 * 32) + 5 * 2 * 32 * sinks)
    assert cache.nbytes() == 2 * 4 * 5 * 2 * 32 * PREFIX


def test_bf16_caches_are_stored_in_bf16(decoder, tokens, filled):
    engine, cache = filled(decoder().bfloat16(), tokens(2, PREFIX))
    compressed = engine.compress(cache, parse("xkv:group=4,rank_k=16,rank_v=16"))
    assert {tensor.dtype for tensor in stored(compressed)} == {torch.bfloat16}
    assert compressed.nbytes() == 2 * 2 * ((16 + 16) * (2 * (PREFIX - 4) + 8 * 32) + 8 * 2 * 32 * 4)
    assert 1e-4 < max(max(error.values()) for error in compressed.outcome.errors.values()) < 0.01
    assert engine.logits(tokens(2, 3), compressed).dtype == torch.bfloat16


def test_generation_goes_on_from_a_compressed_cache(decoder, tokens):
    small = decoder()
    model = as_pretrained(small)
    ids = tokens(1, PREFIX)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    cache = KVCache(small.config)
    small(ids[:, :-1], cache=cache)
    found = model.generate(ids, past_key_values=compress_cache(cache, parse(FULL)), max_new_tokens=6, do_sample=False)
    assert torch.equal(found, expected)


# ---- transformers models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_reproduces_the_logits_of_transformers_models(family, llama, tokens):
    model, ids = llama(family), tokens(2, LENGTH)
    engine = engine_of(model)
    expected = model(ids).logits[:, PREFIX:]
    for parts in ([8], [5, 1, 2]):
        cache = engine.new_cache()
        engine.hidden(ids[:, :PREFIX], cache)
        before = engine.nbytes(cache)
        compressed = engine.compress(cache, parse(FULL))
        assert compressed.nbytes() == real_bytes(stored(compressed))
        found = read_on(engine, compressed, ids[:, PREFIX:], parts)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert engine.nbytes(cache) == before


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_compressed_of_transformers_models(family, llama, tokens, filled):
    engine, cache = filled(llama(family), tokens(2, PREFIX))
    compressed = engine.compress(cache, parse("xkv:group=2,rank_k=3,rank_v=3"))
    latent = family.startswith("deepseek")
    for error in compressed.outcome.errors.values():
        assert error["k"] > 0.01
        assert (error["v"] == 0) == latent  # the RoPE key
    if latent:
        sinks, rest = 4, PREFIX - 4
        assert compressed.nbytes() == 2 * 4 * (3 * (2 * rest + 4 * 16) + 4 * (sinks * 16 + PREFIX * 8))


def test_left_padding_of_transformers_models(llama, tokens):
    model, ids = llama(), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    options = {"attention_mask": mask[:, :PREFIX], "position_ids": positions[:, :PREFIX]}
    model(ids[:, :PREFIX], past_key_values=cache, **options)
    compressed = compress_dynamic(cache, parse(FULL), model, starts=torch.tensor([0, 5]))
    rest = {"attention_mask": mask, "position_ids": positions[:, PREFIX:]}
    found = model(ids[:, PREFIX:], past_key_values=compressed, **rest).logits
    alone = model(ids[1:, 5:]).logits[0, PREFIX - 5 :]
    torch.testing.assert_close(found[1], alone, atol=1e-4, rtol=1e-4)


def test_transformers_generate_and_reorder(llama, tokens):
    model, ids = llama("qwen3"), tokens(2, PREFIX)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    engine = engine_of(model)
    cache = engine.new_cache()
    engine.hidden(ids[:, :-1], cache)
    compressed = engine.compress(cache, parse(FULL))
    found = model.generate(ids, past_key_values=compressed, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, expected)
    compressed = engine.compress(cache, parse("xkv:group=4,rank_k=9,rank_v=9"))
    one = engine.logits(ids[:, -1:], copy.deepcopy(compressed))
    compressed.reorder_cache(torch.tensor([1, 0, 1]))
    assert compressed.nbytes() == real_bytes(stored(compressed))
    found = engine.logits(ids[[1, 0, 1], -1:], compressed)
    torch.testing.assert_close(found, one[[1, 0, 1]], atol=1e-5, rtol=1e-5)


def test_transformers_recompression_and_crop(llama, tokens, filled):
    engine, cache = filled(llama(), tokens(2, PREFIX))
    compressed = engine.compress(cache, parse("xkv:energy=1.0,recompress=4"))
    ids = tokens(2, 6, seed=1)
    expected = engine.logits(ids, copy.deepcopy(cache))
    found = read_on(engine, compressed, ids, [1] * 6)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert compressed.layers[0].compressed == PREFIX + 4
    compressed.crop(-2)
    assert compressed.get_seq_length() == PREFIX + 4
    with pytest.raises(UserError, match="cannot drop 1 tokens: the first 24 of 24 are compressed; allowed: up to 0"):
        compressed.crop(-1)


# ---- ratios ---------------------------------------------------------------------------------------------------------

WIDE = {"kv_lora_rank": 48, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
WINDOWS = {"layers": [{"layers": "0-1", "own": {}, "window": 8}, {"layers": "2-7", "own": {}}]}
CHOOSING = ",select=16,outliers=1,local=1"


@pytest.mark.parametrize(
    ("kv", "ratio", "more", "storage"),
    [
        ({"preset": "mha"}, 3.0, "", "model"),
        ({"preset": "mha"}, 2.0, CHOOSING, "model"),
        ({"preset": "mha"}, 1.5, "", "fp8"),
        (WINDOWS, 3.0, "", "model"),
        (WINDOWS, 2.0, CHOOSING, "model"),
        ({"preset": "mla", **WIDE}, 1.5, "", "model"),
        ({"preset": "mla", **WIDE}, 3.0, "", "model"),
    ],
)
def test_a_ratio_is_that_of_the_whole_cache(kv, ratio, more, storage, decoder, tokens):
    """Uncompressed slots count, so the others are compressed more; free room of a static cache does not count."""
    model, ids = decoder(kv=kv), tokens(2, 160)
    growing, static = (KVCache(model.config, storage=storage, max_len=size) for size in (None, 200))
    for cache in (growing, static):
        model(ids, cache=cache)
        compressed = compress_cache(cache, parse(f"xkv:group=4,ratio={ratio}{more}"))
        assert ratio <= growing.nbytes() / compressed.nbytes() < 1.06 * ratio


def test_a_ratio_of_transformers_caches(llama, tokens):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "sliding_window": 16}
    gemma = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads)).eval().requires_grad_(False)
    for model, ratio in ((gemma, 2.5), (llama("deepseek_v2"), 1.5), (llama("llama"), 3.0)):
        engine = engine_of(model)
        cache = engine.new_cache()
        engine.hidden(tokens(2, 120), cache)
        compressed = engine.compress(cache, parse(f"xkv:group=2,ratio={ratio}"))
        assert ratio <= engine.nbytes(cache) / compressed.nbytes() < 1.1 * ratio


def test_a_ratio_that_what_stays_exceeds_is_refused(decoder, tokens):
    def full(kv):
        model = decoder(kv=kv)
        cache = KVCache(model.config)
        model(tokens(2, 24), cache=cache)
        return cache

    message = r"ratio=20: at 24 tokens 10% of the cache stay as they are \(windows, .* allowed: below 10\.00"
    with pytest.raises(UserError, match=message):  # 2 windows of 8 tokens besides 6 slots of 24
        compress_cache(full(WINDOWS), parse("xkv:ratio=20,sinks=0"))
    with pytest.raises(UserError, match=r"at 24 tokens 25% of the cache stay .* sinks\) .* allowed: below 4\.00"):
        compress_cache(full(WINDOWS), parse("xkv:ratio=20"))
    with pytest.raises(UserError, match=r"ratio=3: at 24 tokens .* or are landmarks; allowed: below"):
        compress_cache(full({"preset": "mha"}), parse("xkv:ratio=3,select=8,chunk=1,sinks=0"))
    with pytest.raises(UserError, match="the bases of 4 slots and the 10% of the cache that stay exceed it"):
        compress_cache(full(WINDOWS), parse("xkv:ratio=9.5,sinks=0"))
    with pytest.raises(UserError, match="ratio=60: at 24 tokens the bases of 4 slots alone exceed it, even at rank 1"):
        compress_cache(full({"preset": "mha"}), parse("xkv:ratio=60,sinks=0"))


# ---- bad input ------------------------------------------------------------------------------------------------------


def test_what_cannot_be_compressed_is_refused(decoder, llama, tokens):
    with pytest.raises(UserError, match="xkv: the cache is empty"):
        compress_cache(KVCache(decoder().config), parse(FULL))
    with pytest.raises(UserError, match="allowed: a DynamicCache, filled"):
        compress_dynamic(DynamicCache(), parse(FULL), llama())
    layers = [{"layers": "0-7", "own": {}, "window": 4}]
    model = decoder(kv={"layers": layers})
    cache = KVCache(model.config)
    model(tokens(1, 9), cache=cache)
    with pytest.raises(UserError, match="nothing to compress: all slots have a window or are recurrent states"):
        compress_cache(cache, parse(FULL))


@pytest.mark.parametrize("spec", ["kivi:bits=4,group=8,residual=8", "int8", "kvsharer:threshold=-1"])
def test_a_transformers_model_with_heads_of_several_sizes(spec, tokens):
    """Gemma 4: larger heads in layers without a window."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    kinds = ["sliding_attention", "full_attention"] * 3
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "layer_types": kinds}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16}
    config = Gemma4TextConfig(**sizes, **heads, hidden_size_per_layer_input=0, sliding_window=64)
    model = Gemma4ForCausalLM(config).eval().requires_grad_(False)
    compressed = cllm.compress(model, tokens(1, 30), spec)
    engine = engine_of(model)
    assert engine.mha_nbytes(tokens=30, batch=1, element=4) == 3 * 4 * (2 * 8 + 2 * 16) * 30 * 4
    exact = engine.new_cache()
    engine.hidden(tokens(1, 30), exact)
    assert engine.nbytes(compressed) < engine.nbytes(exact)
    assert engine.logits(torch.tensor([[3]]), compressed).isfinite().all()


def test_a_cache_with_heads_of_another_size_is_of_another_model(tokens):
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    def gemma(large: int):
        kinds = ["sliding_attention", "full_attention"]
        sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": large}
        config = Gemma4TextConfig(**sizes, **heads, layer_types=kinds, hidden_size_per_layer_input=0)
        return Gemma4ForCausalLM(config).eval().requires_grad_(False)

    one, other = gemma(16), gemma(24)
    cache = engine_of(other).new_cache()
    engine_of(other).hidden(tokens(1, 9), cache)
    with pytest.raises(UserError, match="it has 2 heads of 24, the model 2 of 16"):
        cllm.compress(one, cache, "int8")


CALIBRATED = [
    "palu:keep=0.5", "palu:keep=0.5,allocation=fisher", "palu:keep=0.5,allocation=search", "asvd:ratio=1.5",
    "lorc:keep=0.5", "eigenattention:keep=0.5", "eigenattention:keep=0.5,allocation=errors",
    "kvquant:levels=fisher", "kvtc:basis=calibration", "commonkv",
    "kvsharer:share=1", "xkv:ratio=2,weight=queries", "h2o:ratio=2", "recompute", "kivi", "vfold", "kivi:mean_bits=2",
]  # fmt: skip


@pytest.mark.parametrize("spec", CALIBRATED)
def test_a_model_with_windows_only_is_refused_in_one_line(spec, decoder, tokens):
    """By methods that calibrate or watch too, which look for slots before they get a cache."""
    engine, method = engine_of(decoder(kv={"preset": "mha", "window": 5}, n_layers=3)), parse(spec)

    def compress() -> None:
        cache = engine.new_cache()
        method.prepare(engine, tokens(2, 30))
        with method.watch(engine):
            engine.hidden(tokens(1, 20), cache)
        engine.compress(cache, method)

    with pytest.raises(UserError, match=f"{method.name}: .*nothing to compress|{method.name}: .*allowed"):
        compress()


@pytest.mark.parametrize(
    "spec",
    ["h2o:ratio=2", "snapkv:ratio=2", "entropy:ratio=2", "xkv:ratio=2,weight=queries", "turboquant:mean_bits=3"],
)
def test_queries_of_a_second_own_slot_are_refused_in_one_line(spec, decoder):
    join = {"join": [{"own": {"window": 4}}, {"own": {}}]}
    engine = engine_of(decoder(kv={"layers": [{"layers": "0-1", "read": join}]}, n_layers=2))
    with pytest.raises(UserError, match=r"layer 0 reads slot 2 through JointAttention"), parse(spec).watch(engine):
        pass
