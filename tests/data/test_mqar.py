"""Sequences of multi-query associative recall: what they hold, and which of their labels count."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from cllm.data.packing import PackedDataset
from cllm.data.prepare.build import prepare
from cllm.data.prepare.recipe import Mqar, Recipe
from cllm.data.store import TokenStore
from cllm.kernels.cross_entropy import IGNORE

NUMBERS, LENGTH, PAIRS = 64, 32, [3, 7]


def recipe(folder: Path, **source: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "mqar",
            "out": str(folder),
            "source": {
                "kind": "mqar",
                "mqar": {"numbers": NUMBERS, "length": LENGTH, "pairs": PAIRS, "documents": 40} | source,
            },
            "tokenizer": {"numbers": NUMBERS},
            "validation": {"fraction": 0.2},
            "workers": 1,
        }
    )


def test_sequences_ask_for_keys_with_their_values_and_only_repetitions_count(tmp_path: Path) -> None:
    prepare(recipe(tmp_path / "mqar"))
    stores = {split: TokenStore(tmp_path / "mqar", split) for split in ("train", "validation")}
    tokens = torch.cat([torch.from_numpy(store.read(0, len(store))) for store in stores.values()])
    documents = tokens.view(-1, LENGTH).tolist()
    assert len({tuple(document) for document in documents}) == 40
    answers, asked_shares = {}, []
    for document in documents:
        assert document.index(0) == LENGTH - 1, "EOS is the last token, and no other"
        firsts = document[: 2 * max(PAIRS) : 2]
        pairs = max(PAIRS) if len({key for key in firsts if key < NUMBERS // 2}) == max(PAIRS) else min(PAIRS)
        keys, values = document[: 2 * pairs : 2], document[1 : 2 * pairs : 2]
        assert len(set(keys)) == pairs
        assert all(0 < key < NUMBERS // 2 <= value for key, value in zip(keys, values, strict=True))
        assert len(set(values)) == pairs
        asked = [t for t in range(2 * pairs, LENGTH - 1) if document[t] in keys]
        assert all((t - 2 * pairs) % 2 == 0 for t in asked)
        known = dict(zip(keys, values, strict=True))
        assert all(document[t + 1] == known[document[t]] for t in asked)
        asked_shares.append(len(asked) / ((LENGTH - 1 - 2 * pairs) // 2))
        answers[tuple(document[:-1])] = {(document[t], document[t + 1]) for t in asked}
    assert 0.6 < sum(asked_shares) / len(asked_shares) < 0.9, "three quarters"
    data = PackedDataset(stores["train"], LENGTH, document_mask=True, only_repeated=True)
    for n in range(len(data)):
        ids, labels = data[n]["input_ids"].tolist(), data[n]["labels"].tolist()
        counted = [(a, b) for a, b in zip(ids, labels, strict=True) if b != IGNORE]
        bigrams = list(itertools.pairwise(ids))
        assert counted == [bigram for t, bigram in enumerate(bigrams) if bigram in bigrams[:t]]
        assert answers[tuple(ids[:-1])] <= set(counted)


def test_a_document_depends_on_the_seed_and_its_number_alone(tmp_path: Path) -> None:
    few, many = (prepare(recipe(tmp_path / str(n), documents=n, seed=3)) for n in (20, 40))
    first = _documents(few.folder)
    assert first < _documents(many.folder)
    assert not first & _documents(prepare(recipe(tmp_path / "other", documents=20, seed=4)).folder)


def _documents(folder: Path) -> set[tuple[int, ...]]:
    stores = [TokenStore(folder, split) for split in ("train", "validation")]
    return {tuple(row.tolist()) for s in stores for row in s.read(0, len(s)).reshape(-1, LENGTH)}


@pytest.mark.parametrize(
    ("change", "message"),
    [({"pairs": [8]}, "have room for 7: a quarter"), ({"numbers": 12}, "have room for 5"), ({"pairs": []}, "at least")],
)
def test_pairs_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mqar.model_validate({"numbers": NUMBERS, "length": LENGTH, "pairs": PAIRS} | change)


def test_a_recipe_needs_the_tokenizer_of_its_numbers(tmp_path: Path) -> None:
    content = recipe(tmp_path).model_dump(exclude_unset=True)
    for tokenizer in ({"numbers": 32}, {"train": {"vocab_size": 300}}):
        with pytest.raises(ValueError, match=r"tokenizer\.numbers is .*, but source\.mqar\.numbers is 64"):
            Recipe.model_validate(content | {"tokenizer": tokenizer})
    with pytest.raises(ValueError, match="numbers is given, and so is"):
        Recipe.model_validate(content | {"tokenizer": {"numbers": 64, "load": "gpt2"}})


def test_recipes_of_before_have_the_content_that_they_had() -> None:
    content = Recipe.model_validate(
        {"name": "a", "source": {}, "tokenizer": {"load": "gpt2"}, "validation": {"fraction": 0.1}}
    ).content()
    assert set(content["source"]) == {"kind", "paths", "dataset", "config", "split", "revision", "text_field"}
    assert set(content["tokenizer"]) == {"train", "load"}
