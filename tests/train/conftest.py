"""A prepared folder of made-up text and a config that trains on it in seconds."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cllm import cli
from cllm.config import Config
from cllm.data.prepare.build import prepare
from cllm.data.prepare.recipe import Recipe

TEXT = "the plan says where keys and values come from and every layer reads what an owner wrote before it"


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder with both splits."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    lines = [" ".join(draw.choices(TEXT.split(), k=draw.randint(5, 60))) for _ in range(400)]
    (folder / "text").mkdir()
    for n, line in enumerate(lines):
        (folder / "text" / f"{n}.txt").write_text(line, encoding="utf-8")
    recipe = {
        "name": "tiny",
        "out": str(folder / "prepared"),
        "source": {"kind": "files", "paths": [str(folder / "text")]},
        "tokenizer": {"train": {"vocab_size": 280}},
        "validation": {"fraction": 0.1},
        "workers": 1,
    }
    prepare(cli.validate(Recipe, recipe))
    return folder / "prepared"


@pytest.fixture
def tiny(prepared: Path, tmp_path: Path) -> Callable[..., Config]:
    """Makes a config from dotted settings: `tiny("--train.steps", "3")`."""
    base: dict[str, Any] = {
        "name": "tiny",
        "runs_dir": str(tmp_path / "runs"),
        "model": {"d_model": 32, "n_layers": 4, "n_heads": 2, "max_seq_len": 32},
        "data": {"path": str(prepared), "seq_len": 32, "num_workers": 0, "validation_sequences": 6},
        "optim": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 2},
        "train": {
            "steps": 8,
            "global_batch": 4,
            "micro_batch": 2,
            "log_every": 1,
            "validate_every": 4,
            "checkpoint_every": 4,
            "accelerator": "cpu",
        },
    }
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(base), encoding="utf-8")
    return lambda *overrides: cli.load(Config, [file], overrides)
