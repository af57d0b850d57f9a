"""Suites of samples give on a GPU what they give on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cllm.commands.evaluate import main
from cllm.train.run import train
from cllm.uptrain.complete import load_config

SUITES = ("copying:distances=16|64,length=16,samples=4", "ruler:tasks=niah_single_1|vt,essays=noise,samples=2")
SPECS = ("none", "xkv:group=2,ratio=2")


@pytest.fixture(scope="module")
def run(made_up_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder of two layers that has learned a little."""
    folder = tmp_path_factory.mktemp("suites")
    config: dict[str, Any] = {
        "name": "tiny",
        "runs_dir": str(folder),
        "model": {"d_model": 64, "n_layers": 2, "n_heads": 2, "max_seq_len": 2048, "kv": {"preset": "mha"}},
        "data": {"path": str(made_up_text), "seq_len": 128, "num_workers": 0},
        "optim": {"lr": 1e-3, "warmup_steps": 4},
        "train": {"steps": 10, "global_batch": 4, "micro_batch": 4, "accelerator": "cpu", "precision": "fp32"},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return train(load_config([file])).path


def measure(run: Path, out: Path, device: str, *options: str) -> dict[str, dict[str, Any]]:
    """Records by file."""
    suites = (word for suite in SUITES for word in ("--suite", suite))
    assert main(["--run", str(run), "--out", str(out), "--device", device, *suites, *options]) == 0
    return {str(file.relative_to(out)): json.loads(file.read_text()) for file in sorted(out.rglob("*.json"))}


@pytest.mark.parametrize("specs", [(), SPECS], ids=["uncompressed", "compressed"])
def test_records_of_a_gpu_are_those_of_a_cpu(run: Path, tmp_path: Path, specs: tuple[str, ...]) -> None:
    options = [word for spec in specs for word in ("--posthoc", spec)]
    ours, theirs = (measure(run, tmp_path / device, device, *options) for device in ("cuda", "cpu"))
    assert ours.keys() == theirs.keys()
    compared = 0
    for file, record in ours.items():
        for key in ("loss", "new_loss", "nats", "bytes_per_token"):
            if isinstance(value := theirs[file].get(key), float):
                assert record[key] == pytest.approx(value, rel=2e-3, abs=2e-3), f"{file}: {key}"
                compared += 1
        assert record["questions"] == theirs[file]["questions"]
    assert compared >= 2 * len(SUITES)
