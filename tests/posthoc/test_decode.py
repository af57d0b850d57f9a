"""Decode steps over compressed caches: codes are read directly, with the logits of reconstructed keys and values."""

from __future__ import annotations

import pytest
import torch

from cllm.cache.cache import KVCache
from cllm.errors import UserError
from cllm.kernels.selection import chosen_tokens
from cllm.posthoc import deferred
from cllm.posthoc.cache import compress_cache
from cllm.posthoc.code import Prefix
from cllm.posthoc.hf import compress_dynamic
from cllm.posthoc.landmarks import make_landmarks
from cllm.posthoc.registry import parse
from cllm.posthoc.stores import CompressedSlot

PREFIX, LENGTH = 21, 28
DESIGNS = ["mha", "gqa", "cla", "yoco", "fusedkv", "fusedkv_lite", "lckv", "trailing"]
LOSSY = "xkv:group=2,rank_k=5,rank_v=7"


def compressed(model, ids, spec, *, starts=None, storage="model", **options):
    """A compressed cache of `ids[:, :PREFIX]`."""
    cache = KVCache(model.config, storage=storage)
    model(ids[:, :PREFIX], cache=cache, starts=starts)
    return compress_cache(cache, parse(spec), **options)


def steps(model, cache, ids):
    """Logits of the tokens from `PREFIX` on, one at a time."""
    return torch.cat([model(token, cache=cache) for token in ids[:, PREFIX:].split(1, dim=1)], dim=1)


def making(cache):
    """`cache`, changed to reconstruct keys and values in every pass."""
    slots = [store for store in cache.stores.values() if isinstance(store, CompressedSlot)]
    assert all(slot.defers for slot in slots)
    for slot in slots:
        slot.defers = False
    return cache


@pytest.fixture
def nothing_is_made(monkeypatch):
    """`Prefix.read` fails from here on."""

    def refuse():
        monkeypatch.setattr(Prefix, "read", lambda self: pytest.fail("the prefix was made"))

    return refuse


# ---- all tokens -----------------------------------------------------------------------------------------------------


CODED = LOSSY + "+kivi:bits=4,residual=0,group=7"
CASES = [*((name, LOSSY) for name in DESIGNS), ("mha", CODED), ("fusedkv", CODED)]


@pytest.mark.parametrize("starts", [None, [0, 5]])
@pytest.mark.parametrize(("name", "spec"), CASES)
def test_same_logits_as_from_keys_and_values(name, spec, starts, design, tokens, nothing_is_made):
    model, ids = design(name), tokens(2, LENGTH)
    starts = None if starts is None else torch.tensor(starts)
    expected = steps(model, making(compressed(model, ids, spec, starts=starts)), ids)
    cache = compressed(model, ids, spec, starts=starts)
    nothing_is_made()
    torch.testing.assert_close(steps(model, cache, ids), expected, atol=1e-4, rtol=1e-4)


def test_a_windowed_reader_is_served_from_made_keys(random_model, tokens, tiny_config):
    layers = [{"layers": 0, "own": {}}, {"layers": "1-3", "keys": {"share": 0}, "values": {"share": 0}, "window": 6}]
    model = random_model(tiny_config(n_layers=4, kv={"layers": layers})).eval().requires_grad_(False)
    ids = tokens(2, LENGTH)
    expected = steps(model, making(compressed(model, ids, "svd:rank_k=5,rank_v=7")), ids)
    found = steps(model, compressed(model, ids, "svd:rank_k=5,rank_v=7"), ids)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_passes_of_any_length_follow_each_other(decoder, tokens):
    model, ids = decoder(), tokens(2, LENGTH)
    cache = compressed(model, ids, "xkv:energy=1.0")
    found = torch.cat([model(part, cache=cache) for part in ids[:, PREFIX:].split([1, 3, 1, 2], dim=1)], dim=1)
    torch.testing.assert_close(found, model(ids)[:, PREFIX:], atol=1e-4, rtol=1e-4)


# ---- a static cache -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [LOSSY, LOSSY + ",select=8,chunk=4,outliers=1,local=0", "kivi:group=4,residual=0"])
@pytest.mark.parametrize("name", ["mha", "yoco with retention", "yoco", "trailing"])
def test_room_changes_no_logits_and_no_address(name, spec, design, tokens):
    model, ids, starts = design(name), tokens(2, LENGTH), torch.tensor([0, 5])
    expected = steps(model, compressed(model, ids, spec, starts=starts), ids)
    cache = compressed(model, ids, spec, starts=starts, room=LENGTH - PREFIX)
    assert cache.is_static

    def addresses():
        return [t.data_ptr() for store in cache.stores.values() for t in store.tensors().values()]

    before, nbytes = addresses(), cache.nbytes()
    torch.testing.assert_close(steps(model, cache, ids), expected, atol=1e-5, rtol=1e-5)
    assert (addresses(), cache.nbytes(), cache.exact_tokens) == (before, nbytes, LENGTH - PREFIX)
    with pytest.raises(UserError, match="28 tokens stored and 1 to come, but it was made for max_len 28"):
        model(ids[:, :1], cache=cache)


def test_longer_passes_and_crops_of_a_static_cache(decoder, tokens):
    model, ids = decoder(), tokens(2, LENGTH)
    cache = compressed(model, ids, "xkv:energy=1.0", room=LENGTH - PREFIX)
    expected = model(ids)[:, PREFIX:]
    for parts in ([3, 4], [1, 2, 4], [2, 1, 3, 1]):
        found = torch.cat([model(part, cache=cache) for part in ids[:, PREFIX:].split(parts, dim=1)], dim=1)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        cache.crop(PREFIX)


def test_a_static_cache_follows_the_batch(decoder, tokens):
    model, ids, starts = decoder(), tokens(3, LENGTH), torch.tensor([0, 3, 5])
    spec, order = LOSSY + ",select=8,chunk=4,outliers=1,local=0", torch.tensor([2, 0, 0])
    expected = steps(model, compressed(model, ids, spec, starts=starts), ids)
    cache = compressed(model, ids, spec, starts=starts, room=LENGTH - PREFIX)
    cache.reorder_cache(order)
    torch.testing.assert_close(steps(model, cache, ids[order]), expected[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", [LOSSY, LOSSY + ",select=8,chunk=4,outliers=1,local=0"])
def test_a_step_compiles_whole_and_once(spec, decoder, tokens):
    """A compiled decoder has no graph break in a block and does not recompile in later steps."""
    model, ids = decoder(), tokens(2, LENGTH)
    expected = steps(model, compressed(model, ids, spec, room=LENGTH - PREFIX), ids)
    torch._dynamo.reset()
    model._compiled = tuple(
        torch.compile(m, dynamic=False, fullgraph=True, backend="eager") for m in (*model.blocks, model.norm)
    )
    cache = compressed(model, ids, spec, room=LENGTH - PREFIX)
    tokens_in = ids[:, PREFIX:].split(1, dim=1)
    with torch._dynamo.config.patch(recompile_limit=64):
        found = [model(token, cache=cache) for token in tokens_in[:2]]
    with torch._dynamo.config.patch(error_on_recompile=True):
        found += [model(token, cache=cache) for token in tokens_in[2:]]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


# ---- chosen tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("starts", [None, [0, 5]])
@pytest.mark.parametrize("name", ["mha", "gqa", "cla", "fusedkv_lite"])
def test_a_budget_of_all_tokens_equals_all(name, starts, design, tokens):
    """At full rank, where the exact keys of outliers equal the reconstructed ones."""
    model, ids = design(name), tokens(2, LENGTH)
    starts = None if starts is None else torch.tensor(starts)
    expected = steps(model, compressed(model, ids, "xkv:group=2,energy=1.0", starts=starts), ids)
    for select, outliers in ((24, 0), (16, 2), (400, 48)):
        spec = f"xkv:group=2,energy=1.0,select={select},chunk=4,outliers={outliers},local=0"
        found = steps(model, compressed(model, ids, spec, starts=starts), ids)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    spec = "xkv:group=2,energy=1.0,select=4,chunk=4,outliers=0,local=0"
    few = steps(model, compressed(model, ids, spec, starts=starts), ids)
    assert (few - expected).abs().max() > 1e-2


def test_only_passes_of_one_token_choose(decoder, tokens):
    model, ids = decoder(), tokens(2, LENGTH)
    every = model(ids[:, PREFIX:], cache=compressed(model, ids, LOSSY))
    chosen = model(ids[:, PREFIX:], cache=compressed(model, ids, LOSSY + ",select=4,chunk=4,outliers=0,local=0"))
    assert torch.equal(every, chosen)


def test_padding_takes_no_part(decoder, tokens):
    """Padding of entire chunks: the same tokens are selected as for the sequence alone."""
    model, ids, spec = decoder(), tokens(2, LENGTH), "xkv:energy=1.0,select=4,chunk=4,outliers=1,local=0"
    found = steps(model, compressed(model, ids, spec, starts=torch.tensor([0, 8])), ids)
    cache = KVCache(model.config)
    model(ids[1:, 8:PREFIX], cache=cache)
    alone = steps(model, compress_cache(cache, parse(spec)), ids[1:])
    torch.testing.assert_close(found[1:], alone, atol=1e-4, rtol=1e-4)


def test_landmarks_find_a_needle():
    """A few keys that the query attends to, among thousands of others; the budget reads 1 of 64 chunks."""
    draw = torch.Generator().manual_seed(0)
    k, q = torch.randn(2, 512, 2, 16, generator=draw), torch.randn(2, 4, 16, generator=draw)
    places = [[37, 5], [0, 63]]  # of a sequence and a KV head
    for b, row in enumerate(places):
        for g, chunk in enumerate(row):
            k[b, chunk * 8 : chunk * 8 + 8, g] += 2 * q[b, 2 * g + 1]  # the second query head of two is after it
    marks = make_landmarks(k, None, chunk=8, budget=8, outliers=0, local=0)
    scores = torch.einsum("bghd,bcgd->bghc", q.unflatten(1, (2, 2)), marks.landmarks).flatten(1, 2)
    found = chosen_tokens(scores, marks)
    for b, row in enumerate(places):
        for g, chunk in enumerate(row):
            assert sorted(found[b, g].tolist()) == list(range(chunk * 8, chunk * 8 + 8))


def test_outliers_are_chunks_unlike_their_landmark_and_stay_exact():
    draw = torch.Generator().manual_seed(0)
    k = torch.ones(1, 40, 2, 16) + 0.1 * torch.randn(1, 40, 2, 16, generator=draw)
    k[0, 13, 0] *= -1  # chunk 3 of head 0
    k[0, 38, 1] *= -1  # chunk 9 of head 1
    text = torch.arange(40)[None] >= 5
    k[0, 2, :] *= -1  # padding
    marks = make_landmarks(k, text, chunk=4, budget=4, outliers=1, local=0)
    assert marks.outliers.tolist() == [[[3], [9]]]
    assert torch.equal(marks.outlier_keys[0, :, 0], k[0, 12:16, 0])
    assert torch.equal(marks.outlier_keys[0, :, 1], k[0, 36:40, 1])
    torch.testing.assert_close(marks.landmarks[0, 1], k[0, 5:8].mean(0))  # token 4 is padding
    assert not marks.landmarks[0, 0].any()


def test_the_last_chunks_are_always_read_and_exact():
    draw = torch.Generator().manual_seed(0)
    k = torch.ones(1, 38, 2, 16) + 0.1 * torch.randn(1, 38, 2, 16, generator=draw)  # 9 chunks of 4, and 2 tokens
    k[0, 13] *= -1  # chunk 3
    marks = make_landmarks(k, None, chunk=4, budget=8, outliers=1, local=2)
    for head in range(2):
        assert set(marks.outliers[0, head].tolist()) == {3, 7, 8, 9}
        places = (marks.outliers[0, head][:, None] * 4 + torch.arange(4)).flatten()
        kept = marks.outlier_keys[0, :, head]
        assert torch.equal(kept[places < 38], k[0, places[places < 38], head])
    scores = torch.zeros(1, 4, 10)
    scores[:, :, :2] = 5.0
    assert set(chosen_tokens(scores, marks)[0, 0].tolist()) == {*range(8), *range(12, 16), *range(28, 40)}
    assert make_landmarks(k, None, chunk=4, budget=8, outliers=99, local=2).outliers.shape[-1] == 10


@pytest.mark.parametrize(("options", "outliers"), [("select=2048", 48), ("select=512", 12), ("select=8,outliers=3", 3)])
def test_outliers_by_the_rule_of_shadowkv(options, outliers):
    k = torch.randn(1, 1024, 1, 4, generator=torch.Generator().manual_seed(0))
    assert parse(f"xkv:ratio=2,{options}").landmarks(k, None).outliers.shape[-1] == outliers + 4


def test_bytes_of_what_is_stored_beside(decoder, tokens):
    model, ids = decoder(), tokens(2, LENGTH)
    options = ",select=8,chunk=4,outliers=2,local="
    plain, chosen, near = (compressed(model, ids, LOSSY + more) for more in ("", options + "0", options + "1"))
    groups, dim, slots, sinks = 4, 8, len(plain.stores), 4
    chunks = -(-(PREFIX - sinks) // 4)
    for cache, read in ((chosen, 2), (near, 2 + 1 + 1)):  # outliers, the last full chunk, the token after it
        numbers = (chunks + read * 4) * groups * dim
        assert cache.nbytes() - plain.nbytes() == slots * 2 * (4 * numbers + 8 * groups * read)
    roomy = compressed(model, ids, LOSSY, room=10)
    assert roomy.nbytes() - plain.nbytes() == slots * 2 * 2 * 4 * 10 * groups * dim
    tensors = [t for store in chosen.stores.values() for t in store.tensors().values()]
    assert chosen.nbytes() == sum({t.data_ptr(): t.nbytes for t in tensors if t.numel()}.values())


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_caches_that_cannot_choose(design, tokens, llama):
    spec = "xkv:group=2,rank_k=5,rank_v=7,select=8"
    with pytest.raises(UserError, match=r"select: the keys of layer \d are made of the slots \[0, 3\]; allowed: plans"):
        compressed(design("fusedkv"), tokens(2, LENGTH), spec)
    with pytest.raises(UserError, match="select=8: the slots are latents; allowed: keys and values"):
        compressed(design("mla"), tokens(2, LENGTH), spec)
    from transformers.cache_utils import DynamicCache

    model = llama()
    cache = DynamicCache(config=model.config)
    model(tokens(1, PREFIX), past_key_values=cache)
    with pytest.raises(UserError, match="select: transformers' attention reads all tokens"):
        compress_dynamic(cache, parse(spec), model)


def test_room_that_cannot_be(decoder, tokens):
    model, ids = decoder(), tokens(1, LENGTH)
    with pytest.raises(UserError, match="room of a compressed cache is 0; allowed: 1 or more"):
        compressed(model, ids, LOSSY, room=0)
    with pytest.raises(UserError, match="recompress=4 makes a cache anew"):
        compressed(model, ids, LOSSY + ",recompress=4", room=8)


def test_the_kernel_is_what_decodes(decoder, tokens, monkeypatch):
    """One call for each layer and step, with RoPE of the tokens behind the sinks."""
    model, ids, calls, behind = decoder(), tokens(2, LENGTH), [], []
    dim = model.config.resolved_head_dim
    frequencies = 10_000.0 ** (-torch.arange(dim // 2) / (dim // 2))

    def count(*arguments, **options):
        calls.append(options["selection"] is not None)
        table = arguments[3]
        angles = torch.arange(PREFIX - len(table.cos), PREFIX)[:, None] * frequencies
        behind.append(PREFIX - len(table.cos))
        torch.testing.assert_close(table.cos, angles.cos(), atol=1e-5, rtol=0)
        torch.testing.assert_close(table.sin, angles.sin(), atol=1e-5, rtol=0)
        assert table.turn == pytest.approx(frequencies[dim // 4].item())
        return kernel(*arguments, **options)

    kernel = deferred.lowrank_decode
    monkeypatch.setattr(deferred, "lowrank_decode", count)
    for spec, chooses, sinks in ((LOSSY, False, 4), (LOSSY + ",select=8", True, 4), (LOSSY + ",sinks=0", False, 0)):
        calls.clear()
        behind.clear()
        steps(model, compressed(model, ids, spec), ids)
        assert calls == [chooses] * (LENGTH - PREFIX) * len(model.blocks)
        assert set(behind) == {sinks}
