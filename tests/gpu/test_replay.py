"""Steps replayed as CUDA graphs against steps without: losses, gradients' norms and the weights that follow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cllm.config import Config
from cllm.train import run
from cllm.train.replay import Replay
from cllm.train.run import train
from cllm.uptrain.complete import load_config

STEPS = 24


@pytest.fixture
def small(made_up_text: Path, tmp_path: Path) -> Callable[..., Config]:
    config: dict[str, Any] = {
        "runs_dir": str(tmp_path),
        "model": {"d_model": 256, "n_layers": 4, "n_heads": 4, "max_seq_len": 128},
        "data": {"path": str(made_up_text), "seq_len": 128, "num_workers": 1, "validation_sequences": 16},
        "optim": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 4},
        "train": {"steps": STEPS, "global_batch": 8, "micro_batch": 8, "log_every": 1, "devices": 1, "seed": 1,
                  "validate_every": 10},
    }  # fmt: skip
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return lambda *words: load_config([file], words)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list with an entry for each replayed step."""
    calls: list[int] = []

    class Counted(Replay):
        def __call__(self, batch: Any) -> Any:
            calls.append(1)
            return super().__call__(batch)

    monkeypatch.setattr(run, "Replay", Counted)
    return calls


def compare(small: Callable[..., Config], replays: list[int], *words: str) -> None:
    rows = []
    for graph in ("false", "true"):
        folder = train(small("--name", f"graph-{graph}", "--train.cuda_graph", graph, *words))
        rows.append(list(folder.metrics()))
    assert len(replays) == STEPS
    for plain, replayed in zip(*rows, strict=True):
        for key in ("train/loss", "val/loss", "train/objective", "train/gradient_norm"):
            if key in plain:
                # Backward kernels add in any order: two runs without graphs part in their last bits too.
                assert replayed[key] == pytest.approx(plain[key], rel=0.03), (plain["step"], key)
    first = [next(row["train/loss"] for row in run if "train/loss" in row) for run in rows]
    assert first[0] == pytest.approx(first[1], rel=1e-5)


@pytest.mark.parametrize(
    "words",
    [
        ("--model.kv.preset", "mha"),
        ("--model.kv.preset", "fusedkv"),
        ("--model.kv.preset", "mla"),
        ("--model.kv.preset", "mha", "--train.gradient_checkpointing", "true"),
        ("--model.kv.preset", "mha", "--train.compile", "false"),
    ],
    ids=lambda words: "-".join(words[1::2]),
)
def test_replayed_steps(small: Callable[..., Config], replays: list[int], words: tuple[str, ...]) -> None:
    compare(small, replays, *words)


@pytest.mark.parametrize("preset", ["gqa", "cla", "mla"])
def test_replayed_students(small: Callable[..., Config], replays: list[int], preset: str) -> None:
    teacher = train(small("--name", "teacher"))
    method = "svd" if preset == "mla" else "copy"
    words = ("--init.from", str(teacher.path), "--init.method", method, "--model.kv.preset", preset)
    losses = ("--uptrain.loss.kl", "1.0", "--uptrain.loss.attention", "1.0", "--uptrain.loss.hidden", "1.0")
    rates = ("--optim.rates.kv", "3.0", "--optim.lr", "1e-4", "--optim.min_lr", "1e-5")
    compare(small, replays, *words, *losses, *rates)
