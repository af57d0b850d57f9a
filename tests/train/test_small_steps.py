"""`python -m benchmarks.small_steps` on a CPU: what it measures, and its errors."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks import small_steps
from benchmarks.record import KEPT
from cllm.config import Config


@pytest.fixture
def file(tiny: Callable[..., Config], tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(tiny().model_dump(mode="json", by_alias=True)), encoding="utf-8")
    return file


def test_a_step_is_timed_and_leaves_no_run(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    before = set(tmp_path.iterdir())
    words = ["--steps", "5", "--set", "train.micro_batch=4", "train.global_batch=8", "--out", str(out)]
    assert small_steps.main([str(file), *words]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["config"], row["graph"], row["tokens"]) == ("small", False, 8 * 32)
    assert row["tokens_per_s"] == pytest.approx(1000 * row["tokens"] / row["step_ms"])
    assert set(tmp_path.iterdir()) == {*before, out}
    assert f"| small | no | {row['step_ms']:.1f} |" in capsys.readouterr().out


def test_a_wrong_setting_is_named(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert small_steps.main([str(file), "--set", "train.micro_batches=4"]) == 2
    assert "micro_batches" in capsys.readouterr().err


def test_a_signal_ends_it_in_one_line_and_earlier_rows_are_kept(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training itself handles the signal: it stops after the step, before the timed steps have ended."""
    second, out = file.with_name("second.yaml"), tmp_path / "out.json"
    second.write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    begin = small_steps.Timer.on_train_batch_start

    def interrupt(self: small_steps.Timer, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if out.exists() and batch_idx == 2:
            signal.raise_signal(signal.SIGTERM)
        begin(self, trainer, module, batch, batch_idx)

    monkeypatch.setattr(small_steps.Timer, "on_train_batch_start", interrupt)
    assert small_steps.main([str(file), str(second), "--steps", "5", "--out", str(out)]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.splitlines()[-1] == f"interrupted by SIGTERM; {KEPT}"
    assert [row["config"] for row in json.loads(out.read_text())["rows"]] == ["small"]
