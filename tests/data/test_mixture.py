"""Several folders in fixed shares: against a sorted list, over runs, and for any number of workers and ranks."""

from __future__ import annotations

import json
import math
from collections import Counter
from fractions import Fraction
from itertools import islice
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cllm.data.mixture import MixedDataset, Mixture
from cllm.data.module import DataModule
from cllm.data.packing import PackedDataset
from cllm.data.store import TokenStore
from cllm.errors import DataError, UserError

WEIGHTS = [
    {"a": 1, "b": 1},
    {"a": 3, "b": 1},
    {"a": 0.7, "b": 0.25, "c": 0.05},
    {"b": 1 / 3, "a": 1e-3, "d": 2.5, "c": 0.1, "e": 0.1},
    {"only": 0.2},
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_the_order_is_that_of_sorted_times(weights):
    total = sum(Fraction(str(w)) for w in weights.values())
    times = [
        ((j + Fraction(1, 2)) * total / Fraction(str(weight)), folder, j)
        for folder, weight in weights.items()
        for j in range(300)
    ]
    wanted = [(folder, j) for _, folder, j in sorted(times)[:300]]
    mixture = Mixture(weights)
    assert [mixture.locate(i) for i in range(300)] == wanted
    for n in (0, 1, 7, 300):
        counted = Counter(folder for folder, _ in wanted[:n])
        assert mixture.counts(n) == {folder: counted[folder] for folder in weights}


def test_an_order_worked_by_hand():
    assert "".join(Mixture({"a": 3, "b": 1}).locate(i)[0] for i in range(8)) == "aabaaaba"
    assert Mixture({"a": 3, "b": 1}).locate(10**12 + 2) == ("b", 10**12 // 4)


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_counts_are_within_the_stated_bound_of_the_shares(weights):
    mixture = Mixture(weights)
    assert sum(mixture.shares.values()) == pytest.approx(1)
    for folder, share in mixture.shares.items():
        n = math.ceil(100 * len(weights) + 100 / share)
        assert mixture.counts(n)[folder] / n == pytest.approx(share, rel=0.005)
    for n in (*range(1, 200), 10**6 + 1, 10**12 + 7):
        for folder, count in mixture.counts(n).items():
            exact = Fraction(str(weights[folder])) / sum(Fraction(str(w)) for w in weights.values())
            assert abs(count - n * exact) <= Fraction(1, 2) + exact * len(weights) / 2


def test_neither_the_order_of_folders_nor_the_scale_of_weights_matters():
    one = Mixture({"a": 0.7, "b": 0.2, "c": 0.1})
    for other in (Mixture({"c": 0.1, "a": 0.7, "b": 0.2}), Mixture({"a": 7, "b": 2, "c": 1})):
        assert [one.locate(i) for i in range(100)] == [other.locate(i) for i in range(100)]


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(prepared, command, tmp_path_factory):
    """Two folders of one tokenizer. In the text of the second, which is shorter, every word is "zzz"."""
    folder = tmp_path_factory.mktemp("second")
    texts = [" ".join(["zzz"] * (i % 40 + 5)) + f" {i}" for i in range(120)]
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = {
        "name": "second",
        "out": str(folder / "second"),
        "source": {"kind": "files", "paths": [str(folder / "corpus.jsonl")]},
        "tokenizer": {"load": str(prepared / "tokenizer")},
        "validation": {"fraction": 0.2},
        "workers": 1,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    assert command("--config", folder / "recipe.yaml") == 0
    return str(prepared), str(folder / "second")


def make(weights, validation=None, **changes) -> DataModule:
    settings = {"seq_len": 16, "micro_batch": 2, "global_batch": 4, "document_mask": True} | changes
    return DataModule(weights, validation, **settings)


def batches(module: DataModule, n: int, **trainer) -> list[dict[str, torch.Tensor]]:
    trainer_facts: Any = SimpleNamespace(**({"global_step": 0, "global_rank": 0, "world_size": 1} | trainer))
    module.trainer = trainer_facts
    return list(islice(module.train_dataloader(), n))


def same(a, b) -> bool:
    return len(a) == len(b) and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True)
    )


def test_tokens_of_a_run_have_the_shares_of_the_weights(folders):
    """Told apart by their content: of the letters, the second folder has only z."""
    weights = {folders[0]: 0.7, folders[1]: 0.3}
    module = make(weights, seed=5)
    tokenizer = module.manifest.tokenizer()
    rows = torch.cat([batch["input_ids"] for batch in batches(module, 600)])
    from_second = sum("z" in tokenizer.decode(row) for row in rows.tolist())
    assert from_second / len(rows) == pytest.approx(0.3, abs=0.005)


def test_each_folder_has_its_own_order_and_epochs(folders):
    weights = {folders[0]: 1, folders[1]: 2}
    sources = {folder: PackedDataset(TokenStore(folder), 16, seed=3) for folder in folders}
    mixed, seen = MixedDataset(sources, weights), dict.fromkeys(folders, 0)
    assert len(mixed) == sum(len(source) for source in sources.values())
    for index in range(3 * len(sources[folders[1]])):
        folder, number = mixed.mixture.locate(index)
        assert number == seen[folder]
        assert torch.equal(mixed[index]["input_ids"], sources[folder][number]["input_ids"])
        seen[folder] += 1
    assert seen[folders[1]] > len(sources[folders[1]]), "more than an epoch"
    with pytest.raises(IndexError):
        mixed[-1]


def test_one_folder_with_a_weight_is_that_folder(folders):
    assert same(batches(make({folders[0]: 0.3}), 9), batches(make(folders[0]), 9))
    assert not same(batches(make({folders[0]: 0.3}, seed=1), 9), batches(make(folders[0]), 9))


@pytest.mark.parametrize("num_workers", [1, 4])
def test_workers_do_not_change_the_batches(folders, num_workers):
    weights = {folders[0]: 0.6, folders[1]: 0.4}
    assert same(batches(make(weights, num_workers=num_workers), 12), batches(make(weights), 12))


def test_ranks_and_steps_do_not_change_the_batches(folders):
    weights = {folders[0]: 0.6, folders[1]: 0.4}
    one = batches(make(weights), 12)
    two = [batches(make(weights), 6, global_rank=rank, world_size=2) for rank in range(2)]
    for step in range(6):
        rows = torch.cat([batch["input_ids"] for batch in one[2 * step : 2 * step + 2]])
        assert torch.equal(torch.cat([two[0][step]["input_ids"], two[1][step]["input_ids"]]), rows)
    assert same(batches(make(weights), 4, global_step=4), one[8:])


def test_folders_of_different_tokenizers_are_refused(prepared, tmp_path, run, recipe):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": "w" * i}) + "\n" for i in range(1, 99)))
    _, other = run(recipe([tmp_path / "a.jsonl"], validation={"fraction": 0.5}))
    with pytest.raises(DataError, match=rf"data\.mix: {other} was made with another tokenizer than {prepared}"):
        make({str(prepared): 1, str(other): 1})


def test_the_vocabulary_of_every_folder_must_fit_the_model(folders):
    assert list(make({folders[0]: 1, folders[1]: 1}, vocab_size=320).manifests) == list(folders)
    with pytest.raises(UserError, match=r"model\.vocab_size 319 is less than the 320 tokens"):
        make({folders[0]: 1, folders[1]: 1}, vocab_size=319)
