"""Sequences, labels and document masks, worked by hand on a corpus where a token is a byte."""

from __future__ import annotations

import json

import pytest
import torch

from cllm.data.packing import IGNORE, PackedDataset, ValidationDataset
from cllm.data.store import TokenStore
from cllm.errors import DataError


@pytest.fixture
def tiny(tmp_path, run, recipe) -> TokenStore:
    """Documents "ab", "cde", "f", "ghij": the 14 tokens a b . c d e . f . g h i j . over two shards."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ["ab", "cde", "f", "ghij"]))
    spec = recipe([tmp_path / "a.jsonl"], tokenizer={"train": {"vocab_size": 257}}, shard_tokens=8)
    status, out = run(spec)
    assert status == 0
    assert len(list(out.glob("train-*.bin"))) == 2
    return TokenStore(out)


def spell(store: TokenStore, ids: torch.Tensor) -> str:
    """Tokens as letters, EOS as a full stop, ignored labels as an underscore."""
    tokenizer = store.manifest.tokenizer()
    letters = {IGNORE: "_", store.eos_id: "."}
    return "".join(letters.get(i) or str(tokenizer.decode([i])) for i in ids.tolist())


def test_windows_do_not_overlap_and_labels_look_one_ahead(tiny):
    dataset = PackedDataset(tiny, 6, shuffle=False)
    assert len(dataset) == 2
    assert [spell(tiny, dataset[i]["input_ids"]) for i in range(2)] == ["ab.cde", ".f.ghi"]
    assert [spell(tiny, dataset[i]["labels"]) for i in range(2)] == ["b.cde.", "f.ghij"]
    assert set(dataset[0]) == {"input_ids", "labels"}
    assert {tensor.dtype for tensor in dataset[0].values()} == {torch.int64}


def test_document_masks(tiny):
    first, second = (PackedDataset(tiny, 6, shuffle=False, document_mask=True)[i] for i in range(2))
    # An EOS is the last label of its document; what follows it is nobody's to predict.
    assert spell(tiny, first["input_ids"]) == "ab.cde"
    assert spell(tiny, first["labels"]) == "b._de."
    assert first["document_ids"].tolist() == [0, 0, 0, 1, 1, 1]
    assert first["positions"].tolist() == [0, 1, 2, 0, 1, 2]
    # A document cut by the window's start begins at position 0 there.
    assert spell(tiny, second["input_ids"]) == ".f.ghi"
    assert spell(tiny, second["labels"]) == "_._hij"
    assert second["document_ids"].tolist() == [0, 1, 1, 2, 2, 2]
    assert second["positions"].tolist() == [0, 0, 1, 0, 1, 2]


def test_epochs_follow_each_other_in_new_orders(prepared):
    store = TokenStore(prepared)
    dataset = PackedDataset(store, 16, seed=3)
    n = len(dataset)
    epochs = [[tuple(dataset[epoch * n + i]["input_ids"].tolist()) for i in range(n)] for epoch in range(2)]
    plain = [tuple(PackedDataset(store, 16, shuffle=False)[i]["input_ids"].tolist()) for i in range(n)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(plain)
    assert epochs[0] != epochs[1] != plain
    assert epochs[0][0] != tuple(PackedDataset(store, 16, seed=4)[0]["input_ids"].tolist())
    with pytest.raises(IndexError):
        dataset[-1]


def test_too_little_data(tiny):
    assert len(PackedDataset(tiny, 13)) == 1
    with pytest.raises(DataError, match=r"out: its train split has 14 tokens, too few for .* seq_len 14"):
        PackedDataset(tiny, 14)


@pytest.mark.parametrize("document_mask", [False, True])
def test_validation_covers_the_split_to_its_end(tiny, document_mask):
    dataset = ValidationDataset(tiny, 6, document_mask=document_mask)
    assert [spell(tiny, row["input_ids"]) for row in (dataset[i] for i in range(3))] == ["ab.cde", ".f.ghi", "j....."]
    labels = "".join(spell(tiny, dataset[i]["labels"]) for i in range(3))
    assert labels == ("b._de._._hij._____" if document_mask else "b.cde.f.ghij._____")
    long = ValidationDataset(tiny, 50, document_mask=document_mask)[0]
    assert (long["labels"] != IGNORE).sum() == (10 if document_mask else 13)


def test_validation_limit_is_spread_over_the_split(prepared):
    store = TokenStore(prepared, "validation")
    every = ValidationDataset(store, 16)
    some = ValidationDataset(store, 16, limit=5)
    places = [i * len(every) // 5 for i in range(5)]
    assert len(some) == 5
    for i, place in enumerate(places):
        assert torch.equal(some[i]["input_ids"], every[place]["input_ids"])
    assert len(ValidationDataset(store, 16, limit=10**9)) == len(every)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("limit", [None, 1, 7])
def test_any_number_of_ranks_scores_the_same_tokens(prepared, world_size, limit):
    store = TokenStore(prepared, "validation")

    def scored(dataset):
        rows = [dataset[i] for i in range(len(dataset))]
        return [tuple(row["labels"].tolist()) for row in rows if (row["labels"] != IGNORE).any()]

    ranks = [
        ValidationDataset(store, 16, limit=limit, rank=rank, world_size=world_size, document_mask=True)
        for rank in range(world_size)
    ]
    assert len({len(rank) for rank in ranks}) == 1
    together = [row for rank in ranks for row in scored(rank)]
    assert sorted(together) == sorted(scored(ValidationDataset(store, 16, limit=limit, document_mask=True)))
