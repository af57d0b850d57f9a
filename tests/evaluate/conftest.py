"""Prepared folders, runs with random weights, and the two command lines."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cllm.config import Config
from cllm.data.manifest import Manifest
from cllm.data.prepare.build import prepare
from cllm.data.prepare.recipe import Recipe
from cllm.model.decoder import Decoder
from cllm.runs import RunFolder

REPO = Path(__file__).resolve().parents[2]
WORDS = ["alpha", "beta", "naïve", "日本", "return x", "🙂", "one two three"]


def _script(path: Path) -> Callable[..., int]:
    spec = importlib.util.spec_from_file_location(f"{path.stem}_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *words: module.main([str(word) for word in words])


@pytest.fixture(scope="session")
def evaluate() -> Callable[..., int]:
    """evaluate.py's `main`, taking words and returning the exit status."""
    return _script(REPO / "evaluate.py")


@pytest.fixture(scope="session")
def compare() -> Callable[..., int]:
    """scripts/compare.py's `main`, taking words and returning the exit status."""
    return _script(REPO / "scripts" / "compare.py")


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Sixty short documents with characters of one to four bytes."""
    draw = np.random.default_rng(0)
    return [" ".join(draw.choice(WORDS, size=draw.integers(1, 20))) + f" {i}" for i in range(60)]


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, texts) -> Callable[[int], Path]:
    """`prepared(300)`: a prepared folder of `texts` in several shards, with a tokenizer of that size; 257 is bytes."""
    made: dict[int, Path] = {}

    def build(vocab_size: int) -> Path:
        if vocab_size not in made:
            folder = tmp_path_factory.mktemp("prepared")
            corpus = folder / "corpus.jsonl"
            corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
            recipe = {
                "name": "small",
                "out": str(folder / f"small-{vocab_size}"),
                "source": {"kind": "files", "paths": [str(corpus)]},
                "tokenizer": {"train": {"vocab_size": vocab_size}},
                "validation": {"fraction": 0.4},
                "shard_tokens": 400,
                "workers": 1,
            }
            made[vocab_size] = prepare(Recipe.model_validate(recipe)).folder
        return made[vocab_size]

    return build


@pytest.fixture
def make_run(tmp_path, prepared, random_model) -> Callable[..., tuple[RunFolder, Decoder]]:
    """`make_run("a", vocab_size=300, steps=(20,), data={"document_mask": True})`: a run of random weights."""

    def build(
        name: str = "a",
        *,
        vocab_size: int = 300,
        steps: tuple[int, ...] = (20,),
        data: dict[str, Any] | None = None,
        preset: str = "cla",
    ) -> tuple[RunFolder, Decoder]:
        folder = prepared(vocab_size)
        model = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 24, "max_seq_len": 32, "kv": {"preset": preset}}
        config = Config.model_validate(
            {
                "name": name,
                "runs_dir": str(tmp_path / "runs"),
                "model": {**model, "vocab_size": Manifest.read(folder).vocab_size},
                "data": {"path": str(folder), "seq_len": 16, **(data or {})},
            }
        )
        run, decoder = RunFolder(tmp_path / "runs" / name), random_model(config.model).eval()
        run.write_config(config)
        run.checkpoint_folder.mkdir()
        for step in steps:
            state = {f"model.{key}": tensor for key, tensor in decoder.state_dict().items()}
            torch.save({"state_dict": state}, run.checkpoint_path(step))
        return run, decoder

    return build
