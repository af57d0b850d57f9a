"""ShadowKV's values in host memory: the same numbers as with values beside the keys, and other bytes."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from cllm.cache.cache import KVCache
from cllm.errors import UserError
from cllm.evaluate.pareto import points
from cllm.evaluate.tasks.caches import fork
from cllm.kernels import gather
from cllm.posthoc import deferred
from cllm.posthoc.cache import compress_cache
from cllm.posthoc.engine import engine_of
from cllm.posthoc.host_rows import HostRows
from cllm.posthoc.registry import compose, parse
from cllm.prefix.pack import pack

SPEC = "shadowkv:rank=8,select=8,chunk=4,outliers=1,local=1"
HOST = SPEC + ",values=host"
PREFIX, LENGTH, SINKS = 40, 46, 4
PLANS = ["mha", "gqa", "mqa", "cla", "yoco", "fusedkv_lite"]


def prefilled(model, ids, starts=None) -> KVCache:
    cache = KVCache(model.config)
    model.hidden(ids[:, :PREFIX], cache=cache, starts=starts)
    return cache


def logits(model, cache, ids) -> torch.Tensor:
    """Of the tokens after the prefix, one a pass."""
    return torch.cat([model(ids[:, i : i + 1], cache=cache) for i in range(cache.seen, ids.shape[1])], 1)


@pytest.mark.parametrize("room", [None, LENGTH - PREFIX])
@pytest.mark.parametrize("starts", [None, (0, 7)])
@pytest.mark.parametrize("plan", PLANS)
def test_steps_are_those_with_values_beside_the_keys_to_the_bit(plan, starts, room, design, tokens, monkeypatch):
    model, ids = design(plan), tokens(2, LENGTH)
    cache = prefilled(model, ids, None if starts is None else torch.tensor(starts))
    calls, kernel = [], deferred.lowrank_decode

    def keep(*arguments, **options):
        calls.append(arguments[2][0])
        return kernel(*arguments, **options)

    monkeypatch.setattr(deferred, "lowrank_decode", keep)
    found, wanted = (logits(model, compress_cache(cache, parse(spec), room=room), ids) for spec in (HOST, SPEC))
    assert torch.equal(found, wanted)
    assert calls, "no step reads selected tokens"
    assert all(values.b is None for values in calls)
    every = logits(model, compress_cache(cache, parse("shadowkv:rank=8,select=null"), room=room), ids)
    assert not torch.equal(found, every), "all tokens are read"


def test_passes_of_several_tokens_read_all_values(decoder, tokens):
    model, ids = decoder(), tokens(2, LENGTH)
    cache = prefilled(model, ids)
    found, wanted = (model(ids[:, PREFIX:], cache=compress_cache(cache, parse(spec))) for spec in (HOST, SPEC))
    assert torch.equal(found, wanted)


def test_bytes_are_counted_by_where_they_are(decoder, tokens):
    model, ids = decoder(), tokens(2, LENGTH)
    cache = prefilled(model, ids)
    engine = engine_of(model)
    beside, apart = (engine.compress(cache, parse(spec)) for spec in (SPEC, HOST))
    values = 8 * 2 * (PREFIX - SINKS) * 32 * 4  # slots, sequences, tokens, channels, bytes of a number
    assert (beside.host_nbytes(), apart.host_nbytes()) == (0, values)
    assert engine.nbytes(apart) == apart.nbytes() == beside.nbytes() - values
    assert sum(store.nbytes() for store in apart.stores.values()) == apart.nbytes()
    assert engine.fp32_numbers(apart) == engine.fp32_numbers(beside) - values // 4
    for store, other in zip(apart.stores.values(), beside.stores.values(), strict=True):
        assert isinstance(store.prefix.v, HostRows)
        assert torch.equal(store.prefix.v.decode(), other.prefix.v.decode())
    assert apart.outcome.errors == beside.outcome.errors
    logits(model, apart, ids)
    assert apart.host_nbytes() == values, "later values are on the device"


def test_sequences_are_rearranged_and_tokens_dropped(decoder, tokens):
    model, ids = decoder(), tokens(3, LENGTH)
    cache = prefilled(model, ids, torch.tensor([0, 5, 2]))

    def changed(spec):
        compressed = compress_cache(cache, parse(spec))
        model(ids[:, PREFIX : PREFIX + 1], cache=compressed)
        forked, copied = fork(compressed), copy.deepcopy(compressed)
        compressed.crop(PREFIX)
        compressed.reorder_cache(torch.tensor([2, 0, 1]))
        compressed.batch_select_indices(torch.tensor([1, 2]))
        compressed.batch_repeat_interleave(2)
        return [
            logits(model, cache, rows)
            for cache, rows in ((compressed, ids[[0, 0, 1, 1]]), (forked, ids), (copied, ids))
        ]

    for found, wanted in zip(changed(HOST), changed(SPEC), strict=True):
        assert torch.equal(found, wanted)
    with pytest.raises(UserError, match="the first 40 are compressed"):
        compress_cache(cache, parse(HOST)).crop(PREFIX - 1)


def test_rows_of_tokens_that_do_not_exist_are_zero():
    source = torch.randn(2, 9, 3, 4)
    source[1, :2] = torch.nan
    index = torch.tensor([[[0, 8, 11], [3, 3, 9], [7, 1, 0]], [[0, 8, 11], [3, 2, 9], [7, 1, 2]]])
    rows = gather.gather_rows(source, index, torch.tensor([0, 2]))
    for b, g, n in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(3)).tolist():
        token = index[b, g, n]
        exists = (0, 2)[b] <= token < 9
        assert torch.equal(rows[b, n, g], source[b, token, g] if exists else torch.zeros(4))


def test_what_cannot_have_values_in_host_memory(decoder, llama, tokens, filled):
    engine, cache = filled(llama(), tokens(1, 20))
    with pytest.raises(UserError, match="select: transformers' attention reads all tokens"):
        engine.compress(cache, parse(HOST))
    engine, cache = filled(decoder(), tokens(1, 20))
    with pytest.raises(UserError, match=r"shadowkv: 16,384 bytes of the cache are in host memory.*values=device"):
        pack(engine.compress(cache, parse(HOST)))
    pack(engine.compress(cache, parse(SPEC)))
    with pytest.raises(ValueError, match="values=host stores exact values"):
        compose(parse(HOST), parse("kivi:bits=4"))


def test_records_have_the_bytes_of_both_places(run, evaluate, capsys):
    made, _ = run("a")
    specs = [SPEC, HOST]
    assert evaluate("--run", made.path, "--device", "cpu", "--posthoc", SPEC, "--posthoc", HOST) == 0
    printed = capsys.readouterr().out
    found = [json.loads(file.read_text()) for file in (made.path / "evaluation").rglob("*shadowkv*.json")]
    beside, apart = records = [record for spec in specs for record in found if record["spec"] == spec]
    values = 4 * (24 - SINKS) * 16 / 24  # slots, tokens, channels, of a prefix of 24 tokens
    assert (beside["host_bytes_per_token"], apart["host_bytes_per_token"]) == (0, pytest.approx(4 * values))
    assert apart["bf16_host_bytes_per_token"] == pytest.approx(2 * values)
    for key, size in (("bytes_per_token", 4), ("bf16_bytes_per_token", 2)):
        assert beside[key] - apart[key] == pytest.approx(size * values)
    assert apart["loss"] == beside["loss"]
    assert apart["ratio_to_own"] > beside["ratio_to_own"]
    assert f"values=host (and {4 * values:,.0f} bytes/token in host memory)" in printed
    (point,) = [p for p in points(records) if "host" in p.spec]
    assert point.host_bytes_per_token == pytest.approx(2 * values)
