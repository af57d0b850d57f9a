"""Small prepared folders, made once a session, and the command line that makes them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

REPO = Path(__file__).resolve().parents[2]
WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "naïve",
    "日本",
    "def f(x):\n    return x",
    "🙂",
    "one two three",
    "<|endoftext|>",
]


def _documents(n: int, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, size=draw.integers(1, 80))) + f" {i}" for i in range(n)]


@pytest.fixture(scope="session")
def documents():
    """`documents(n)`: n different short texts."""
    return _documents


@pytest.fixture(scope="session")
def command():
    """data/prepare.py's `main`, taking words and returning the exit status."""
    spec = importlib.util.spec_from_file_location("prepare_script", REPO / "data" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *words: module.main([str(word) for word in words])


@pytest.fixture
def run(command, tmp_path):
    """`run(recipe, *words)`: prepare a recipe, given as a dict, on one process; returns (exit status, its folder)."""

    def prepare(recipe: dict, *words) -> tuple[int, Path]:
        file, out = tmp_path / "recipe.yaml", tmp_path / "out"
        file.write_text(json.dumps({"workers": 1, "out": str(out)} | recipe))  # JSON is YAML
        return command("--config", file, *words), out

    return prepare


@pytest.fixture
def recipe(tmp_path):
    """`recipe(paths, **changes)`: a recipe for files, with a small tokenizer and no validation split."""

    def make(paths, **changes) -> dict:
        base = {
            "name": "test",
            "source": {"kind": "files", "paths": [str(path) for path in paths]},
            "tokenizer": {"train": {"vocab_size": 300}},
            "validation": {"fraction": 0},
        }
        return base | changes

    return make


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, command) -> Path:
    """A folder of 400 documents with several shards and a validation split."""
    folder = tmp_path_factory.mktemp("prepared")
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in _documents(400)), encoding="utf-8")
    recipe = {
        "name": "small",
        "out": str(folder / "small"),
        "source": {"kind": "files", "paths": [str(corpus)]},
        "tokenizer": {"train": {"vocab_size": 320}},
        "validation": {"fraction": 0.2},
        "shard_tokens": 5000,
        "workers": 1,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    assert command("--config", folder / "recipe.yaml") == 0
    return folder / "small"
