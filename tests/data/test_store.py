"""The shards of a split read as one sequence."""

from __future__ import annotations

import os
import pickle
import resource
import shutil

import numpy as np
import pytest

from cllm.data.manifest import Counts, Manifest
from cllm.data.prepare.shards import ShardWriter
from cllm.data.store import OPEN_FILES, TokenStore
from cllm.data.vocabulary import tokenizer_sha256
from cllm.errors import DataError


@pytest.fixture(scope="module")
def store(prepared) -> TokenStore:
    return TokenStore(prepared, "train")


@pytest.fixture(scope="module")
def flat(prepared) -> np.ndarray:
    """The same tokens, read plainly."""
    return np.concatenate([np.fromfile(path, dtype="<u2") for path in sorted(prepared.glob("train-*.bin"))])


def test_reads_across_shards(store, flat):
    assert len(store) == len(flat)
    assert len(store.manifest.splits["train"].shards) >= 3
    assert np.array_equal(store.read(0, len(store)), flat)
    draw = np.random.default_rng(0)
    for start, stop in np.sort(draw.integers(0, len(flat) + 1, size=(200, 2))):
        assert np.array_equal(store.read(int(start), int(stop)), flat[start:stop])
    assert store.read(5, 5).dtype == np.int64


def test_documents_agree_with_a_walk_over_the_tokens(store, flat):
    draw = np.random.default_rng(1)
    boundary = store.manifest.splits["train"].shards[0].tokens
    windows = [(0, len(flat)), (boundary, boundary + 9), (boundary - 9, boundary), (boundary - 1, boundary + 1)]
    windows += [(int(start), int(stop)) for start, stop in np.sort(draw.integers(0, len(flat) + 1, size=(200, 2)))]
    for start, stop in windows:
        document_ids, positions = store.documents(start, stop)
        expected_ids, expected_positions, document, position = [], [], 0, 0
        for token in flat[start:stop]:
            expected_ids.append(document)
            expected_positions.append(position)
            document, position = (document + 1, 0) if token == store.eos_id else (document, position + 1)
        assert document_ids.tolist() == expected_ids
        assert positions.tolist() == expected_positions


def test_outside_the_split(store):
    for start, stop in [(-1, 3), (0, len(store) + 1), (5, 4)]:
        with pytest.raises(IndexError):
            store.read(start, stop)


def test_pickles_as_a_name(store, flat):
    store.read(0, 10)
    raw = pickle.dumps(store)
    assert len(raw) < 500
    assert np.array_equal(pickle.loads(raw).read(0, 10), flat[:10])


def test_no_such_split(prepared):
    with pytest.raises(DataError, match="has no test split, only train, validation"):
        TokenStore(prepared, "test")


@pytest.fixture
def many_shards(prepared, tmp_path, monkeypatch):
    """A folder of 300 shards of one to three documents each, and its tokens."""
    monkeypatch.setattr("cllm.data.prepare.shards.os.fsync", lambda _: None)
    folder = tmp_path / "many"
    shutil.copytree(prepared / "tokenizer", folder / "tokenizer")
    writer = ShardWriter(folder, "train", "uint16", shard_tokens=30)
    draw = np.random.default_rng(0)
    documents = []
    while len(writer.progress.shards) < 300:
        documents.append(np.append(draw.integers(1, 320, draw.integers(8, 20)), 0).astype(np.uint16))
        writer.add(documents[-1], 10)
    Manifest(
        name="many",
        dtype="uint16",
        vocab_size=320,
        eos_id=0,
        tokenizer_sha256=tokenizer_sha256(folder / "tokenizer"),
        splits={"train": writer.finish()},
        counts=Counts(),
        recipe={},
        source_sha256="",
        versions={},
    ).save(folder)
    return folder, np.concatenate(documents)


def test_many_shards_take_few_descriptors(many_shards):
    folder, tokens = many_shards
    before = len(os.listdir("/proc/self/fd"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + OPEN_FILES + 5, limits[1]))
    try:
        store = TokenStore(folder)
        assert len(store.manifest.splits["train"].shards) == 301
        for start in np.random.default_rng(1).permutation(len(tokens) // 16 - 1) * 16:
            window = tokens[start : start + 17]
            assert np.array_equal(store.read(start, start + 17), window)
            ids, _ = store.documents(start, start + 17)
            assert np.array_equal(ids, np.cumsum(window == 0) - (window == 0))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_folder_replaced_under_one_name_is_read_anew(many_shards, prepared):
    folder, tokens = many_shards
    assert np.array_equal(TokenStore(folder).read(0, 20), tokens[:20])
    folder.rename(folder.with_name("old"))
    shutil.copytree(prepared, folder)
    assert np.array_equal(TokenStore(folder).read(0, 20), TokenStore(prepared).read(0, 20))


def test_a_file_cut_short_under_a_run_is_an_error(many_shards):
    folder, _ = many_shards
    store = TokenStore(folder)
    path = folder / store.manifest.splits["train"].shards[0].file
    store.read(0, 3)
    os.truncate(path, 4)
    with pytest.raises(DataError, match=r"train-00000\.bin: damaged: it ends at byte 4, before byte 6"):
        store.read(0, 3)
    with pytest.raises(DataError, match=r"train-00000\.bin: damaged: expected \d+ bytes, found 4"):
        TokenStore(folder)
    later = folder / store.manifest.splits["train"].shards[200].file
    os.truncate(later, 2)
    with pytest.raises(DataError, match=r"train-00200\.bin: has 2 bytes, not \d+ as when the folder was opened"):
        store.read(sum(shard.tokens for shard in store.manifest.splits["train"].shards[:200]), len(store))


def test_a_long_index_is_searched(prepared, tmp_path):
    """More documents in a shard than are read at once, windows anywhere."""
    folder = tmp_path / "long"
    shutil.copytree(prepared / "tokenizer", folder / "tokenizer")
    writer = ShardWriter(folder, "train", "uint16", shard_tokens=10**6)
    lengths = np.random.default_rng(0).integers(1, 4, 5000)
    tokens = np.concatenate([np.append(np.ones(n, dtype=np.uint16), np.uint16(0)) for n in lengths])
    for n in lengths:
        writer.add(np.append(np.ones(n, dtype=np.uint16), np.uint16(0)), 1)
    record = Manifest.read(prepared).model_copy(update={"splits": {"train": writer.finish()}, "checksums": None})
    record.save(folder)
    store = TokenStore(folder)
    expected = np.cumsum(tokens == 0) - (tokens == 0)
    starts = [*np.random.default_rng(1).integers(0, len(tokens) - 64, 200).tolist(), 0, len(tokens) - 64]
    for start, n in [*((start, 64) for start in starts), (5, len(tokens) - 9)]:
        ids, _ = store.documents(start, start + n)
        assert np.array_equal(ids, expected[start : start + n] - expected[start])
