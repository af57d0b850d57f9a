"""Stored prefixes: bit-exact files of every kind of cache, refusals, tiers, and who is served whose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cllm
from cllm.cache.cache import KVCache
from cllm.errors import UserError
from cllm.files import partial_path
from cllm.hub.export import as_pretrained
from cllm.plan.presets import preset_names
from cllm.posthoc.cache import CompressedKVCache
from cllm.prefix.file import read_header

IDS = torch.randint(32, (1, 30), generator=torch.Generator().manual_seed(3))
NEXT = torch.tensor([[7]])


@pytest.fixture(scope="module")
def model(tiny_config, random_model):
    """A tiny model of mha with the context 128."""
    return as_pretrained(random_model(tiny_config(kv={"preset": "mha"}, max_seq_len=128))).eval()


def _any(value: Any) -> Any:
    """`value`, for arguments of a wrong type."""
    return value


def _filled(model: Any, ids: torch.Tensor = IDS, starts: torch.Tensor | None = None, **options: Any) -> KVCache:
    cache = KVCache(model.model.config, **options)
    with torch.no_grad():
        model.model.prefill(ids, cache, starts=starts)
    return cache


def _step(model: Any, cache: KVCache) -> torch.Tensor:
    with torch.no_grad():
        return model.model(NEXT.expand(cache.batch, 1), cache=cache)


def _tokens(store: Any) -> Any:
    """The stored tensors, in the order of their tokens; a static slot's without its free room."""
    return store.last(store.kept(30), 30) if hasattr(store, "slot") else store.tensors().values()


def _assert_same(one: KVCache, other: KVCache) -> None:
    """The same stored bits, and the same bits computed from them."""
    assert one.nbytes() == other.nbytes()
    for owner, store in one.stores.items():
        assert type(other.stores[owner]) is type(store)
        for a, b in zip(_tokens(store), _tokens(other.stores[owner]), strict=True):
            assert (a is None) == (b is None)
            if a is not None and a.numel():
                assert a.dtype == b.dtype
                assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("name", preset_names())
def test_every_plan_round_trips_bit_exactly(name, preset_config, random_model, tmp_path) -> None:
    config = preset_config(name, max_seq_len=128)
    if config.plan().iterations is not None:
        iterations = config.kv.iterations.model_copy(update={"forward": 2})
        config = config.model_copy(update={"kv": config.kv.model_copy(update={"iterations": iterations})})
    model, file = as_pretrained(random_model(config)).eval(), tmp_path / "prefix.safetensors"
    for options in ({"max_len": 40}, {"storage": "fp8"}):
        cache = _filled(model, **options)
        cllm.save_prefix(file, cache, model, IDS)
        again, tokens = cllm.load_prefix(file, model, max_len=options.get("max_len"))
        assert torch.equal(tokens, IDS)
        _assert_same(cache, again)
        assert torch.equal(_step(model, cache), _step(model, again))


@pytest.mark.parametrize(
    "spec",
    [
        "none",
        "xkv:group=4,ratio=1.5,sinks=2",
        "xkv:group=4,ratio=1.5,select=8,chunk=2,outliers=1,local=1",
        "svd:ratio=1.5",
        "kivi:bits=4,group=8,residual=8",
        "xquant:bits=2,group=8,residual=8",
        "minicache",
        "kvsharer",
        "minicache+kivi:bits=4,group=8,residual=8",
        "fp8",
        "turboquant:bits=3,sketch=true",
        "turboquant:mean_bits=2.5",
        "kvquant:bits=3,outliers=0.05",
        "kvtc:ratio=1.5",
    ],
)
def test_every_method_round_trips_bit_exactly(spec, model, tmp_path) -> None:
    cache = cllm.compress(model, IDS, spec)
    cllm.save_prefix(tmp_path / "p", cache, model, IDS)
    again, _ = cllm.load_prefix(tmp_path / "p", model)
    _assert_same(cache, again)
    assert isinstance(again, CompressedKVCache)
    assert again.outcome == cache.outcome
    for _ in range(2):
        assert torch.equal(_step(model, cache), _step(model, again))
    static, _ = cllm.load_prefix(tmp_path / "p", model, max_len=40)
    torch.testing.assert_close(_step(model, static), _step(model, cllm.load_prefix(tmp_path / "p", model)[0]))


@pytest.mark.parametrize("preset", ["fusedkv", "yoco", "mla"])
def test_prefixes_are_coded_at_rest_and_decoded_when_loaded(preset, preset_config, random_model, tmp_path) -> None:
    model = as_pretrained(random_model(preset_config(preset, max_seq_len=128))).eval()
    ids, spec = torch.arange(90)[None] * 7 % 32, "kvtc:ratio=2"
    cache = _filled(model, ids)
    cllm.save_prefix(tmp_path / "coded", cache, model, ids, at_rest=spec)
    saved = sum(tensor.nbytes for name, tensor in load_file(tmp_path / "coded").items() if name != "tokens")
    assert 0.4 < saved / cache.nbytes() <= 0.505
    again, _ = cllm.load_prefix(tmp_path / "coded", model)
    compressed = cllm.compress(model, ids, spec)
    assert type(again) is KVCache
    for owner, store in again.stores.items():
        if hasattr(store, "slot"):
            stores = _any(store), _any(compressed.stores[owner])
            for a, b in zip(*(s.last(s.kept(90), 90)[:2] for s in stores), strict=True):
                torch.testing.assert_close(a, b)
    torch.testing.assert_close(_step(model, again), _step(model, compressed))
    static, _ = cllm.load_prefix(tmp_path / "coded", model, max_len=100)
    torch.testing.assert_close(_step(model, static), _step(model, cllm.load_prefix(tmp_path / "coded", model)[0]))
    with pytest.raises(UserError, match="max_len of a cache is 50, and the stored prefix has 90 tokens"):
        cllm.load_prefix(tmp_path / "coded", model, max_len=50)
    prefixes = cllm.PrefixStore(model, tmp_path / "store", block=16, at_rest=spec)
    prefixes.prefill(ids, salt="")
    assert prefixes.nbytes["host"] < 0.55 * cache.nbytes()
    other = torch.cat((ids[:, :70], ids[:, :9]), dim=1)
    for opened in (prefixes, cllm.PrefixStore(model, tmp_path / "store", block=16, at_rest=spec)):
        found, count = opened.find(other, salt="")
        assert count == (0 if preset == "yoco" else 64)  # windows cannot be cropped
        if found is not None:
            entire = _any(opened.find(ids, salt="")[0]).stores[0].slot.k
            torch.testing.assert_close(_any(found).stores[0].slot.k, entire[:, :64])
            assert opened.prefill(other, salt="", max_len=80).seen == 78
    assert cllm.PrefixStore(model, tmp_path / "store", block=16).find(ids, salt="") == (None, 0)


def test_what_is_stored_exactly_at_rest_or_refused(model, tmp_path, caplog) -> None:
    store = cllm.PrefixStore(model, tmp_path / "store", at_rest="kvtc:ratio=8,recent=40")
    with caplog.at_level("INFO", logger="cllm.prefix"):
        store.prefill(IDS, salt="")
    assert "a prefix of 29 tokens is stored exactly: kvtc: 25 tokens without sinks" in caplog.text
    found, count = store.find(IDS[:, :29], salt="")
    assert count == 29
    assert torch.equal(_any(found).stores[0].slot.k, _any(_filled(model, IDS[:, :29])).stores[0].slot.k)
    for options, message in (
        ({"at_rest": "commonkv"}, "PrefixStore: at_rest is commonkv, which calibrates on tokens"),
        (
            {"at_rest": "streaming:ratio=2"},
            "PrefixStore: at_rest is streaming:ratio=2, which drops tokens; allowed",
        ),
        ({"at_rest": "kivi", "posthoc": "kivi"}, "PrefixStore: at_rest is kivi and posthoc kivi; allowed: one of the"),
        ({"at_rest": "kivi", "storage": "fp8"}, "at_rest is kivi and storage fp8"),
        ({"at_rest": "kvtc:recompress=8"}, "recompress has no meaning for a stored prefix"),
        ({"at_rest": 3}, "at_rest is a int; allowed: a method such as kvtc:ratio=8"),
    ):
        with pytest.raises(UserError, match=message):
            cllm.PrefixStore(model, **options)
    compressed = cllm.compress(model, IDS, "kivi:group=8,residual=0")
    with pytest.raises(UserError, match="the cache is compressed by kivi already"):
        cllm.save_prefix(tmp_path / "p", compressed, model, IDS, at_rest="kvtc")


def test_padding_batches_and_a_cropped_window(model, tiny_config, random_model, tmp_path) -> None:
    ids, starts = IDS.view(2, 15), torch.tensor([3, 0])
    cache = _filled(model, ids, starts)
    cllm.save_prefix(tmp_path / "p", cache, model, ids)
    again, _ = cllm.load_prefix(tmp_path / "p", model)
    assert torch.equal(_step(model, cache), _step(model, again))
    windowed = as_pretrained(random_model(tiny_config(kv={"preset": "gqa", "n_kv_heads": 2, "window": 8})))
    for options in ({}, {"max_len": 40}):
        cache = _filled(windowed, **options)
        cache.crop(29)
        cllm.save_prefix(tmp_path / "p", cache, windowed, IDS[:, :29])
        again, _ = cllm.load_prefix(tmp_path / "p", windowed, **options)
        with pytest.raises(UserError, match="has forgotten tokens"):
            again.crop(28)
        assert torch.equal(_step(windowed, cache), _step(windowed, again))


def test_what_is_not_stored_or_not_read(model, tiny_config, random_model, tmp_path) -> None:
    file, cache = tmp_path / "p.safetensors", _filled(model)
    cllm.save_prefix(file, cache, model, IDS, salt="alice")
    written = file.read_bytes()
    other = as_pretrained(random_model(tiny_config(kv={"preset": "mha"}, max_seq_len=128), seed=1)).eval()
    with pytest.raises(UserError, match="is the cache of another model: other weights"):
        cllm.load_prefix(file, other, salt="alice")
    cla = as_pretrained(random_model(tiny_config(kv={"preset": "cla"})))
    with pytest.raises(UserError, match="of mha, 8 layers, d_model 24, and this one is of cla"):
        cllm.load_prefix(file, cla, salt="alice")
    with pytest.raises(UserError, match="was stored with another salt"):
        cllm.load_prefix(file, model)
    with pytest.raises(UserError, match="max_len of a cache is 20, and the stored prefix has 30"):
        cllm.load_prefix(file, model, salt="alice", max_len=20)
    for position in (40, len(written) // 2, len(written) - 1):  # in the header, in a tensor, in the last one
        damaged = bytearray(written)
        damaged[position] ^= 4
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"p\.safetensors: (damaged|cannot be read|is no stored prefix)"):
            cllm.load_prefix(file, model, salt="alice")
    file.write_bytes(written[:-100])
    with pytest.raises(UserError, match=r"p\.safetensors: cannot be read"):
        cllm.load_prefix(file, model, salt="alice")
    save_file({"a": torch.zeros(1)}, file)
    with pytest.raises(UserError, match="is no stored prefix"):
        cllm.load_prefix(file, model)
    with pytest.raises(UserError, match="the cache is empty"):
        cllm.save_prefix(file, KVCache(model.model.config), model, IDS)
    with pytest.raises(UserError, match=r"tokens is \(1, 29\); allowed: those of the cache, \(1, 30\)"):
        cllm.save_prefix(file, cache, model, IDS[:, 1:])
    with pytest.raises(UserError, match=r"Projected\.weight is a Weight"):
        cllm.save_prefix(file, cllm.compress(model, IDS, "commonkv"), model, IDS)


@pytest.mark.parametrize(
    "forged", [{"version": 2}, {"layout": {}}, {"layout": {"owners": {"0": {"kind": "os.system"}}}}]
)
def test_a_consistent_forgery_is_one_line_of_error(forged, model, tmp_path) -> None:
    file = tmp_path / "p.safetensors"
    cllm.save_prefix(file, _filled(model), model, IDS)
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["cllm.prefix"])
    for key, value in forged.items():
        header[key] = {**header[key], **value} if isinstance(value, dict) and value else value
    text = json.dumps(header)
    metadata = {"cllm.prefix": text, "sha256": sha256(text.encode()).hexdigest()}
    save_file(load_file(file), file, metadata)
    with pytest.raises(UserError, match=r"damaged|format version 2; allowed: 1"):
        cllm.load_prefix(file, model)


# ---- the store -------------------------------------------------------------------------------------------------------


def _greedy(model: Any, ids: torch.Tensor, cache: KVCache | None = None) -> list[int]:
    return model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)[0].tolist()


def test_a_prompt_is_computed_once_and_served_to_its_salt_only(model, tmp_path) -> None:
    store = cllm.PrefixStore(model, tmp_path / "prefixes", block=8)
    expected, lengths = _greedy(model, IDS), []
    hook = model.model.blocks[0].register_forward_pre_hook(lambda block, inputs: lengths.append(inputs[0].shape[1]))
    assert _greedy(model, IDS, store.prefill(IDS, salt="alice")) == expected
    assert max(lengths) == 29
    lengths.clear()
    fresh = cllm.PrefixStore(model, tmp_path / "prefixes", host_bytes=0, block=8)  # another process, from disk
    for again in (store, fresh):
        assert _greedy(model, IDS, again.prefill(IDS, salt="alice")) == expected
    assert max(lengths) == 1, "only the last token, and new ones"
    longer = torch.cat((IDS[:, :25], IDS), dim=1)  # 24 tokens, three blocks, are shared
    assert fresh.find(longer, salt="alice")[1] == 24
    for again in (store, fresh):
        assert [again.find(longer, salt=salt) for salt in ("bob", "")] == [(None, 0)] * 2
    lengths.clear()
    assert _greedy(model, longer, fresh.prefill(longer, salt="alice", max_len=90)) == _greedy(model, longer)
    assert lengths[0] == 54 - 24
    hook.remove()


def test_other_weights_find_nothing(model, tmp_path) -> None:
    store = cllm.PrefixStore(model, tmp_path / "prefixes")
    store.prefill(IDS, salt="")
    weight = model.model.blocks[0].attention.owner.k_proj.weight
    with torch.no_grad():
        weight.mul_(2)
        assert store.find(IDS[:, :-1], salt="") == (None, 0)
        weight.mul_(0.5)
    assert store.find(IDS[:, :-1], salt="")[1] == 29


def test_budgets_evict_the_least_recently_used(model, tmp_path) -> None:
    (entry,) = {cllm.load_prefix(p, model)[0].nbytes() for p in [_saved(model, tmp_path)]}
    file_bytes = (tmp_path / "one").stat().st_size + 1500  # the chain of names in the header
    store = cllm.PrefixStore(model, tmp_path / "prefixes", host_bytes=entry * 2, disk_bytes=file_bytes * 3, block=16)
    prompts = [IDS.roll(n) for n in range(4)]
    for n, prompt in enumerate(prompts):
        store.put(_filled(model, prompt), prompt, salt="")
        for path in (tmp_path / "prefixes").glob("*.safetensors"):  # clocks of file systems are coarse
            os.utime(path, ns=(os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns - 10**9))
        if n == 2:
            assert store.find(prompts[0], salt="")[1] == 30  # used: prompt 1 is the oldest now
    assert store.nbytes["host"] <= entry * 2
    assert store.nbytes["disk"] <= file_bytes * 3
    assert [store.find(prompt, salt="")[1] for prompt in prompts] == [30, 0, 30, 30]


def _saved(model: Any, folder: Path) -> Path:
    cllm.save_prefix(folder / "one", _filled(model), model, IDS)
    return folder / "one"


def test_only_our_files_are_deleted_and_damaged_ones_are_a_miss(model, tmp_path, caplog) -> None:
    folder = tmp_path / "prefixes"
    store = cllm.PrefixStore(model, folder, host_bytes=0)
    foreign = folder / f"{'a' * 64}.safetensors"
    killed = partial_path(folder / f"{'b' * 64}.safetensors")
    killed = killed.with_name(killed.name.replace(str(os.getpid()), "999999999"))
    save_file({"a": torch.zeros(4)}, foreign)
    killed.write_bytes(b"half")
    cllm.PrefixStore(model, folder, host_bytes=0)
    assert not killed.exists()
    store.prefill(IDS, salt="")
    (mine,) = set(folder.glob("*.safetensors")) - {foreign}
    assert read_header(mine).layout["seen"] == 29
    content = bytearray(mine.read_bytes())
    content[-1] ^= 1
    mine.write_bytes(content)
    again = cllm.PrefixStore(model, folder, host_bytes=0)
    assert again.find(IDS[:, :-1], salt="") == (None, 0)
    assert "has another sha256" in caplog.text
    again.prefill(IDS, salt="")
    assert cllm.PrefixStore(model, folder).find(IDS[:, :-1], salt="")[1] == 29, "it is written again"
    small = cllm.PrefixStore(model, folder, host_bytes=0, disk_bytes=mine.stat().st_size + 10)
    small.prefill(IDS.flip(1), salt="")
    assert foreign.exists()
    assert not mine.exists()
    with pytest.raises(UserError, match="is no folder of stored prefixes"):
        cllm.PrefixStore(model, tmp_path)


def test_compressed_windowed_and_cyclic_prefixes_are_found_entirely_or_not(model, preset_config, random_model) -> None:
    store = cllm.PrefixStore(model, posthoc="kivi:bits=4,group=8,residual=8", block=8)
    first = store.prefill(IDS, salt="")
    assert _greedy(model, IDS, store.prefill(IDS, salt="")) == _greedy(model, IDS, first)
    assert store.find(IDS[:, :20], salt="") == (None, 0)
    with pytest.raises(UserError, match="the cache is exact, and the store is for compressed by"):
        store.put(_filled(model), IDS, salt="")
    for name in ("yoco", "lckv"):
        other = as_pretrained(random_model(preset_config(name, max_seq_len=128))).eval()
        store = cllm.PrefixStore(other, block=8)
        whole = _greedy(other, IDS, store.prefill(IDS, salt=""))
        assert _greedy(other, IDS, store.prefill(IDS, salt="")) == whole
        longer = torch.cat((IDS, IDS), dim=1)
        assert _greedy(other, longer, store.prefill(longer, salt="")) == _greedy(
            other, longer, cllm.PrefixStore(other).prefill(longer, salt="")
        )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: cllm.PrefixStore(torch.nn.Linear(1, 1)), "model is a Linear; allowed: a model of cllm"),
        (lambda m: cllm.PrefixStore(m, host_bytes=-1), "host_bytes is -1"),
        (lambda m: cllm.PrefixStore(m, device_bytes=9), "device_bytes is 9, but the model is on the CPU"),
        (lambda m: cllm.PrefixStore(m, posthoc="kvsharer"), "kvsharer: calibrates on tokens"),
        (lambda m: cllm.PrefixStore(m, posthoc="nope"), '^PrefixStore: posthoc "nope": unknown method "nope"'),
        (lambda m: cllm.PrefixStore(m, at_rest="nope"), '^PrefixStore: at_rest "nope": unknown method "nope"'),
        (lambda m: cllm.PrefixStore(m).prefill([5], salt=""), "a prompt of one token"),
        (lambda m: cllm.PrefixStore(m).prefill([5, 32], salt=""), "tokens has 32; allowed: token ids from 0 to 31"),
        (lambda m: cllm.PrefixStore(m).prefill("text", salt=""), "tokens is a str"),
        (lambda m: cllm.PrefixStore(m).prefill([], salt=""), "tokens is empty"),
        (lambda m: cllm.PrefixStore(m, 3), "folder is a int; allowed: a path"),
        (lambda m: cllm.PrefixStore(m).prefill(_any([[1, 2], [3, 4]]), salt=""), r"tokens is \(2, 2\)"),
        (lambda m: cllm.PrefixStore(m).prefill(_any([1.0, 2.0]), salt=""), r"tokens is \(2,\) float32"),
        (lambda m: cllm.PrefixStore(m).prefill([1] * 129, salt=""), "a prompt of 129, but the model's context"),
        (lambda m: cllm.PrefixStore(m).prefill([1, 2], salt=3), "salt is a int; allowed: text"),
    ],
)
def test_refused_stores_and_prompts(call, message, model) -> None:
    with pytest.raises(UserError, match=message):
        call(model)


def test_a_killed_writer_loses_nothing(model, tmp_path) -> None:
    file = _saved(model, tmp_path)
    before = file.read_bytes()
    script = (
        "import os, signal, sys; from pathlib import Path; from cllm import files\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.write_atomic(Path(sys.argv[1]), b'x' * 1000)"
    )
    assert subprocess.run([sys.executable, "-c", script, file], check=False).returncode == -9
    assert file.read_bytes() == before
