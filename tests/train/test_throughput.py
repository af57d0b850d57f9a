"""The clock of a run."""

from __future__ import annotations

import pytest
import torch

from cllm.train import throughput
from cllm.train.throughput import Clock, peak_flops


def test_time_of_validation_is_neither_training_nor_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    clock = Clock()

    def pass_(seconds: float) -> None:
        now[0] += seconds

    pass_(5)  # a step
    clock.waiting()
    clock.pause()
    pass_(100)  # validation
    clock.resume()
    pass_(2)  # the loader is late
    clock.working()
    pass_(3)  # a step
    assert clock.read() == (10, 2)
    clock.start()
    pass_(4)
    assert clock.read() == (4, 0)


def test_a_wait_after_a_row_counts_in_the_next_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one step of 1 s, each followed by writing the row for 2 s and waiting 3 s for data."""
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    clock = Clock()
    rows = []
    for _ in range(3):
        clock.working()
        now[0] += 1
        clock.waiting()
        rows.append(clock.read())
        now[0] += 2
        clock.start()
        now[0] += 3
    assert rows == [(1, 0), (4, 3), (4, 3)]


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA B200", 2250),
        ("Another", None),
    ],
)
def test_peaks_are_those_of_the_card_and_not_of_its_family(
    monkeypatch: pytest.MonkeyPatch, name: str, tera: int | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == (None if tera is None else tera * 1e12)
    assert peak_flops(torch.device("cpu")) is None
