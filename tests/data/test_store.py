"""The shards of a split read as one sequence."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from cllm.data.store import TokenStore
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
    windows += [tuple(map(int, pair)) for pair in np.sort(draw.integers(0, len(flat) + 1, size=(200, 2)))]
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
