"""Two runs of one config with one seed on one GPU: how long they are equal to the last bit.

    python -m pytest tests/gpu/test_repeat.py -q

The forward of the first step has the same weights and the same order of additions in both. Backward kernels may add
partial gradients with atomics, in any order; then the runs part in their last bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cllm.train.run import train
from cllm.uptrain.complete import load_config

STEPS = 20


@pytest.mark.parametrize("preset", ["mha", "fusedkv"])
def test_two_runs_of_one_seed(
    made_up_text: Path, tmp_path: Path, preset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config: dict[str, Any] = {
        "runs_dir": str(tmp_path),
        "model": {"d_model": 256, "n_layers": 4, "n_heads": 4, "max_seq_len": 128, "kv": {"preset": preset}},
        "data": {"path": str(made_up_text), "seq_len": 128, "num_workers": 0, "validation_sequences": 16},
        "optim": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 4},
        "train": {"steps": STEPS, "global_batch": 8, "micro_batch": 8, "log_every": 1, "devices": 1, "seed": 1},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    losses = []
    for name in ("one", "two"):
        run = train(load_config([file], ["--name", name]))
        losses.append([row["train/loss"] for row in run.metrics() if "train/loss" in row])
    equal = next((n for n, (a, b) in enumerate(zip(*losses, strict=True)) if a != b), STEPS)
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}, {preset}: {equal} of {STEPS} losses equal, then {apart:.1e} at most")
    assert len(losses[0]) == STEPS
    assert equal >= 1
    assert apart < 0.03
