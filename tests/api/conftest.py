"""A folder with prepared text, a config and a trained run, in which examples work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

import cllm

TINY = {
    "name": "tiny",
    "model": {"d_model": 32, "n_layers": 4, "n_heads": 2, "max_seq_len": 32},
    "data": {"path": "data/prepared/days", "seq_len": 32, "num_workers": 0, "validation_sequences": 4},
    "optim": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 1},
    "train": {
        "steps": 2,
        "global_batch": 2,
        "micro_batch": 2,
        "log_every": 1,
        "validate_every": 2,
        "checkpoint_every": 2,
        "accelerator": "cpu",
    },
}


@pytest.fixture(scope="session")
def trained_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.yaml, data/prepared/days and runs/tiny."""
    folder, before = tmp_path_factory.mktemp("api"), Path.cwd()
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY), encoding="utf-8")
    os.chdir(folder)
    try:
        cllm.prepare(texts=[f"{n} fine days" for n in range(200)], name="days")
        cllm.train("tiny.yaml")
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def workspace(trained_in: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder, as the working directory."""
    monkeypatch.chdir(trained_in)
    return trained_in
