"""A prepared folder of made-up text and a config that trains on it in seconds."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cllm.config import Config
from cllm.uptrain.complete import load_config

TEXT = "the plan says where keys and values come from and every layer reads what an owner wrote before it"


@pytest.fixture(scope="session")
def prepared(prepare_texts: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder with both splits."""
    draw = random.Random(0)
    texts = (" ".join(draw.choices(TEXT.split(), k=draw.randint(5, 60))) for _ in range(400))
    return prepare_texts(tmp_path_factory.mktemp("corpus"), texts, 0.1)


@pytest.fixture
def tiny(prepared: Path, tmp_path: Path) -> Callable[..., Config]:
    """Makes a config from dotted settings: `tiny("--train.steps", "3")`."""
    base: dict[str, Any] = {
        "name": "tiny",
        "runs_dir": str(tmp_path / "runs"),
        "model": {"d_model": 32, "n_layers": 4, "n_heads": 2, "max_seq_len": 32},
        "data": {"path": str(prepared), "seq_len": 32, "num_workers": 0, "validation_sequences": 6},
        "optim": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 1},
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
    return lambda *overrides: load_config([file], overrides)
