"""Stored prefixes and faults of the machine: full disks, folders that are gone, and files of other kinds."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
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
from cllm.files import marked_as
from cllm.hub.export import as_pretrained

resource = pytest.importorskip("resource")
IDS = torch.randint(32, (1, 30), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model(tiny_config, random_model):
    """A tiny model of mha with the context 128."""
    return as_pretrained(random_model(tiny_config(kv={"preset": "mha"}, max_seq_len=128))).eval()


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file can be longer than 200 bytes, not even the one that pytest prints to."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def _greedy(model: Any, cache: KVCache | None = None) -> list[int]:
    return model.generate(IDS, past_key_values=cache, max_new_tokens=5, do_sample=False)[0].tolist()


def test_a_full_disk_costs_no_prompt(model, tmp_path, caplog) -> None:
    folder = tmp_path / "prefixes"
    store, expected = cllm.PrefixStore(model, folder, host_bytes=0), _greedy(model)
    with full_disk():
        cache = store.prefill(IDS, salt="")
        assert "cannot be written: OSError: [Errno 27]" in caplog.text
        assert os.listdir(folder) == [".cllm"], "nothing is left half written"
        ids = IDS[:, :-1]
        for fails in (
            lambda: store.put(cache, ids, salt=""),
            lambda: cllm.save_prefix(tmp_path / "one", cache, model, ids),
        ):
            with pytest.raises(UserError, match=r"cannot be written: OSError: \[Errno 27\]"):
                fails()
    assert _greedy(model, cache) == expected
    in_memory = cllm.PrefixStore(model, folder)
    in_memory.prefill(IDS, salt="")
    assert in_memory.find(ids, salt="")[1] == 29


def test_a_store_goes_on_when_its_folder_is_gone(model, tmp_path, caplog) -> None:
    folder = tmp_path / "prefixes"
    store = cllm.PrefixStore(model, folder, host_bytes=0)
    store.prefill(IDS, salt="")
    shutil.rmtree(folder)
    assert store.find(IDS[:, :-1], salt="") == (None, 0)
    assert store.nbytes["disk"] == 0
    assert caplog.text.count("no stored prefix is found") == 1, "once"
    store.prefill(IDS, salt="")
    assert marked_as(folder) == "prefixes"
    assert store.find(IDS[:, :-1], salt="")[1] == 29
    shutil.rmtree(folder)
    folder.write_text("something else")
    assert _greedy(model, store.prefill(IDS, salt="")) == _greedy(model)


def test_a_tier_on_disk_without_bytes_is_left_out(model, tmp_path) -> None:
    cllm.PrefixStore(model, tmp_path / "prefixes").prefill(IDS, salt="")
    store = cllm.PrefixStore(model, tmp_path / "prefixes", disk_bytes=0)
    assert store.find(IDS[:, :-1], salt="") == (None, 0)
    cllm.PrefixStore(model, tmp_path / "new", disk_bytes=0)
    assert not (tmp_path / "new").exists()


def test_entries_of_other_kinds_are_left_alone(model, tmp_path, caplog) -> None:
    folder = tmp_path / "prefixes"
    cllm.PrefixStore(model, folder, host_bytes=0).prefill(IDS, salt="")
    pipe, loop, gone, sub, empty = (folder / f"{letter * 64}.safetensors" for letter in "abcde")
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    gone.symlink_to("nowhere")
    sub.mkdir()
    empty.touch()
    store = cllm.PrefixStore(model, folder, host_bytes=0)
    assert store.find(IDS[:, :-1], salt="")[1] == 29
    assert caplog.text.count("is no stored prefix and is left alone") == 4
    with pytest.raises(UserError, match="is no regular file"):
        cllm.load_prefix(pipe, model)


def _forge(file: Path, change: Any) -> None:
    """Change the header of a file, and its hash with it."""
    with safe_open(file, "pt") as opened:
        header = json.loads(opened.metadata()["cllm.prefix"])
    text = json.dumps(change(header))
    save_file(load_file(file), file, {"cllm.prefix": text, "sha256": sha256(text.encode()).hexdigest()})


@pytest.mark.parametrize(
    "change",
    [
        lambda header: [],
        lambda header: None,
        lambda header: {**header, "chain": None},
        lambda header: {**header, "sha256": None},
        lambda header: {**header, "salt": []},
        lambda header: {**header, "layout": []},
        lambda header: {**header, "layout": {**header["layout"], "seen": None}},
        lambda header: {**header, "layout": {**header["layout"], "owners": {}}},
        lambda header: {**header, "layout": {**header["layout"], "orders": {"0.k": [5, 6]}}},
    ],
)
def test_a_store_counts_what_it_cannot_open_as_missing(change, model, tmp_path) -> None:
    folder = tmp_path / "prefixes"
    cllm.PrefixStore(model, folder, host_bytes=0).prefill(IDS, salt="")
    (file,) = folder.glob("*.safetensors")
    _forge(file, change)
    with pytest.raises(UserError, match=r"damaged|format version None"):
        cllm.load_prefix(file, model)
    for budget in (0, 2**30):
        store = cllm.PrefixStore(model, folder, host_bytes=budget)
        assert store.find(IDS[:, :-1], salt="") == (None, 0)
        assert _greedy(model, store.prefill(IDS, salt="")) == _greedy(model)
        assert cllm.load_prefix(file, model)[0].seen == 29, "it is stored again"
        _forge(file, change)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, f: cllm.PrefixStore(m, f / "file" / "sub"), "sub: cannot be made a folder of stored prefixes"),
        (lambda m, f: cllm.PrefixStore(m, "a\0b"), "cannot be made a folder of stored prefixes: ValueError"),
        (lambda m, f: cllm.save_prefix(f / "file" / "x", m.cache, m, IDS), "x: cannot be written: FileExistsError"),
        (lambda m, f: cllm.save_prefix(f, m.cache, m, IDS), "cannot be written: IsADirectoryError"),
        (lambda m, f: cllm.save_prefix("", m.cache, m, IDS), "cannot be written: ValueError"),
        (lambda m, f: cllm.PrefixStore(m).find(IDS, salt="\ud800"), r"salt is '\\ud800', which cannot be written"),
        (lambda m, f: cllm.PrefixStore(m).prefill(IDS, salt="", max_len="90"), "max_len of a cache is '90'"),
        (lambda m, f: cllm.PrefixStore(m).prefill(IDS, salt="", max_len=9.5), "max_len of a cache is 9.5"),
        (lambda m, f: cllm.load_prefix(f / "one", m, max_len="90"), "max_len of a cache is '90'; allowed: 1 or more"),
    ],
)
def test_refused_paths_salts_and_lengths(call, message, model, tmp_path) -> None:
    (tmp_path / "file").touch()
    model.cache = KVCache(model.model.config)
    with torch.no_grad():
        model.model.prefill(IDS, model.cache)
    cllm.save_prefix(tmp_path / "one", model.cache, model, IDS)
    with pytest.raises(UserError, match=message):
        call(model, tmp_path)
