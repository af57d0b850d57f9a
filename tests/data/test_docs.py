"""The numbers of docs/data.md are those of the recipes."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from cllm.config.load import load_settings
from cllm.data.manifest import Counts, Manifest, Shard, Split
from cllm.data.prepare.corpus import Corpus
from cllm.data.prepare.recipe import Recipe
from cllm.data.prepare.report import summary

REPO = Path(__file__).resolve().parents[2]
DOC = (REPO / "docs" / "data.md").read_text(encoding="utf-8")
RECIPES = {path.name: load_settings(Recipe, [path]) for path in sorted((REPO / "data" / "recipes").glob("*.yaml"))}

FINGERPRINT = "2ea955e22fe5e373154164964940d32c581e96ca0a0264d54e83db5d112e5cd5"
"""Of the names and sizes of the files that the page's numbers were printed for."""


def number(text: str) -> int:
    return int(text.replace(",", ""))


def printed() -> tuple[str, dict[str, tuple[int, int, float]]]:
    """What the page says that preparing stdlib.yaml prints, and of each split: documents, tokens, bytes a token."""
    block = re.search(r"```\n(data/prepared/stdlib\n.*?)\n```", DOC, re.DOTALL)[1]
    rows = re.findall(r"^(\w+) +([\d,]+) +([\d,]+) +1 +([\d.]+)$", block, re.MULTILINE)
    return block, {name: (number(documents), number(tokens), float(rate)) for name, documents, tokens, rate in rows}


def test_the_table_of_recipes_says_what_they_do():
    rows = dict(re.findall(r"^\| `(\w+\.yaml)` \|.*\| (.*?) \|$", DOC, re.MULTILINE))
    assert rows.keys() == RECIPES.keys()
    for name, recipe in RECIPES.items():
        choice = recipe.tokenizer
        words = f"trained, {choice.train.vocab_size} tokens" if choice.train else f"`{choice.load}`"
        words = f"the numbers below {choice.numbers}" if choice.numbers else words
        assert rows[name] == words, name
    assert "the first 50 GB of SlimPajama" in DOC
    assert RECIPES["slimpajama.yaml"].max_bytes == 50 * 10**9
    assert "FineWeb-Edu, 10-billion-token sample" in DOC
    assert RECIPES["fineweb_edu.yaml"].source.config == "sample-10BT"


def test_the_summary_is_as_the_command_prints_it():
    block, splits = printed()
    counts = re.search(r"not UTF-8: (\d+) documents; (\d+) byte", block)
    left_out = re.search(r"left out: (\d+) empty", block)
    made = {}
    for name, (documents, tokens, rate) in splits.items():
        n_bytes = round(tokens * rate)
        shard = Shard(
            file="x", index="y", tokens=tokens, documents=documents, bytes=n_bytes, sha256="", index_sha256=""
        )
        made[name] = Split(tokens=tokens, documents=documents, bytes=n_bytes, shards=[shard])
    manifest = Manifest(
        name="stdlib",
        dtype="uint16",
        vocab_size=RECIPES["stdlib.yaml"].tokenizer.train.vocab_size,
        eos_id=0,
        tokenizer_sha256="",
        splits=made,
        counts=Counts(
            invalid_utf8_documents=int(counts[1]), replaced_sequences=int(counts[2]), empty_documents=int(left_out[1])
        ),
        recipe={},
        source_sha256="",
        versions={},
        folder=RECIPES["stdlib.yaml"].folder,
    )
    assert summary(manifest) == block


def test_the_corpus_is_as_large_as_the_page_says():
    block, splits = printed()
    corpus = Corpus(RECIPES["stdlib.yaml"])
    if corpus.fingerprint_sha256() != FINGERPRINT:
        pytest.skip("this Python has another standard library than the page's numbers are of")
    documents: Counter[str] = Counter()
    n_bytes: Counter[str] = Counter()
    for document in corpus.documents():
        documents[document.split] += 1
        n_bytes[document.split] += document.n_bytes
    assert documents == {name: n for name, (n, _, _) in splits.items()}
    for name, (_, tokens, rate) in splits.items():
        assert n_bytes[name] / tokens == pytest.approx(rate, abs=5e-4)
    counts = corpus.counts
    assert f"not UTF-8: {counts.invalid_utf8_documents} documents; {counts.replaced_sequences} byte" in block
    assert f"left out: {counts.empty_documents} empty documents" in block
