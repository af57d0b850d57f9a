"""A prepared folder of made-up text and a config that trains on it in seconds."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
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


@pytest.fixture
def check_skipped_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[Config], None]:
    """Trains 4 steps, the third without a finite gradient, and checks that it changes no weight and no state."""
    from cllm.train.module import TrainingModule
    from cllm.train.run import train

    def check(config: Config) -> None:
        backwards = iter(range(99))

        def after_backward(self: TrainingModule) -> None:
            if next(backwards) == 5:  # the third step, two micro-batches each
                self.model.blocks[0].mlp.down_proj.weight.grad[0, 0] = torch.nan

        monkeypatch.setattr(TrainingModule, "on_after_backward", after_backward)
        folder = train(config)
        skipped = {row["step"]: row["train/skipped_steps"] for row in folder.metrics() if "train/skipped_steps" in row}
        assert skipped == {1: 0, 2: 0, 3: 1, 4: 1}
        before, after, end = (torch.load(path, weights_only=True) for _, path in folder.checkpoints()[1:])
        for name, tensor in before["state_dict"].items():
            assert torch.equal(tensor, after["state_dict"][name]), name
            assert not torch.equal(tensor, end["state_dict"][name]), "the next step changes it again"
        states = before["optimizer_states"][0]["state"]
        assert states
        for n, state in states.items():
            assert state
            for key, value in state.items():
                assert torch.equal(value, after["optimizer_states"][0]["state"][n][key])

    return check
