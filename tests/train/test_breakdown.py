"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cllm.config import Config
from cllm.train import breakdown
from cllm.train.breakdown import PARTS, Breakdown
from cllm.train.module import TrainingModule
from cllm.train.run import train

Tiny = Callable[..., Config]


def test_each_mark_gives_the_time_before_it_to_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 1.0, 3.0, 10.0, 14.0, 15.0])
    monkeypatch.setattr(breakdown.time, "perf_counter", lambda: next(moments))
    parts = Breakdown()
    parts.start(torch.device("cpu"))
    parts.mark("forward")  # 1 to 3
    parts.mark(None)  # 3 to 10: validation
    parts.mark("data_wait")  # 10 to 14
    parts.mark("forward")  # 14 to 15
    assert parts.read() == {"forward": 3000, "backward": 0, "optimizer": 0, "data_wait": 4000}


def slowed(step: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slow(*arguments: Any) -> Any:
        time.sleep(seconds)
        return step(*arguments)

    return slow


def test_parts_of_a_step_sum_over_its_micro_batches_and_leave_validation_out(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two micro-batches a step, three steps a row, a validation and a checkpoint in the midst of an interval."""
    monkeypatch.setattr(TrainingModule, "training_step", slowed(TrainingModule.training_step, 0.02))
    monkeypatch.setattr(TrainingModule, "validation_step", slowed(TrainingModule.validation_step, 0.2))
    config = tiny("--train.steps", "6", "--train.log_every", "3")
    rows = [row for row in train(config).metrics() if "train/loss" in row]
    assert [row["step"] for row in rows] == [3, 6]
    for row in rows:
        times = {part: row[f"time/{part}_ms"] for part in PARTS}
        assert all(ms > 0 for ms in times.values())
        assert times["forward"] >= 2 * 20, "both micro-batches of a step"
        step_ms = 1000 * 4 * 32 / row["throughput/tokens_per_s"]
        assert sum(times.values()) <= step_ms, "no more than the clock's seconds, which leave validation out"
