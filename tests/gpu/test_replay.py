"""Students whose steps are replayed as CUDA graphs against the same students without: losses and gradients' norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cllm.train import replay
from cllm.train.replay import Replay
from cllm.train.run import train
from cllm.uptrain.complete import load_config

STEPS = 24
SHAPE = {"d_model": 256, "n_layers": 4, "n_heads": 4, "max_seq_len": 128}
LOSSES = {"kl": 1.0, "attention": 1.0, "hidden": 1.0}


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list with an entry for each replayed step."""
    calls: list[int] = []

    class Counted(Replay):
        def __call__(self, batch: Any) -> Any:
            calls.append(1)
            return super().__call__(batch)

    monkeypatch.setattr(replay, "Replay", Counted)
    return calls


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(("preset", "method"), [("gqa", "copy"), ("cla", "copy"), ("fusedkv", "copy"), ("mla", "svd")])
def test_replayed_students(
    made_up_text: Path, tmp_path: Path, replays: list[int], preset: str, method: str, recomputed: bool
) -> None:
    common: dict[str, Any] = {
        "runs_dir": str(tmp_path),
        "data": {"path": str(made_up_text), "seq_len": 128, "num_workers": 1, "validation_sequences": 16},
        "optim": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 4},
        "train": {
            **{"steps": STEPS, "global_batch": 8, "micro_batch": 8, "devices": 1, "seed": 1, "log_every": 1},
            **{"validate_every": 10, "gradient_checkpointing": recomputed},
        },
    }
    file = tmp_path / "teacher.yaml"
    file.write_text(yaml.safe_dump({**common, "model": SHAPE}), encoding="utf-8")
    teacher = train(load_config([file], ["--name", "teacher"]))
    common["optim"] |= {"lr": 1e-4, "min_lr": 1e-5, "rates": {"kv": 3.0}}
    student = {"init": {"from": str(teacher.path), "method": method}, "uptrain": {"loss": LOSSES}}
    file = tmp_path / "student.yaml"
    file.write_text(yaml.safe_dump({**common, **student, "model": {"kv": {"preset": preset}}}), encoding="utf-8")
    plain, replayed = (
        list(train(load_config([file], ["--name", f"graph-{graph}", "--train.cuda_graph", graph])).metrics())
        for graph in ("false", "true")
    )
    assert len(replays) == STEPS
    for a, b in zip(plain, replayed, strict=True):
        for key in ("train/loss", "val/loss", "train/objective", "train/gradient_norm"):
            if key in a:
                # Backward kernels add in any order: two runs without graphs part in their last bits too.
                assert b[key] == pytest.approx(a[key], rel=0.03), (a["step"], key)
    losses = [next(row["train/loss"] for row in rows if "train/loss" in row) for rows in (plain, replayed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
