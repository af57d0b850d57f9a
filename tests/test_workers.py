"""Commands on several GPUs: one on which everything fails does not use up the queue."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cllm.workers import MOST_FAILURES, Command, Health, run_all

BROKEN = """
import os, pathlib, sys, time
marks, name = pathlib.Path(sys.argv[1]), sys.argv[2]
if os.environ["CUDA_VISIBLE_DEVICES"] == "1":
    (marks / name).touch()
    sys.exit(1)
deadline = time.monotonic() + 300
while len(list(marks.iterdir())) < int(sys.argv[3]) and time.monotonic() < deadline:
    time.sleep(0.01)
"""
"""Fails on GPU 1; on others, waits until as many have failed as can fail there."""


def test_a_gpu_on_which_everything_fails_gets_no_more_work(tmp_path: Path) -> None:
    marks, lines = tmp_path / "marks", list[str]()
    marks.mkdir()
    words = [sys.executable, "-S", "-c", BROKEN, str(marks)]
    commands = [Command([*words, str(n), str(MOST_FAILURES)], tmp_path / f"{n}.log") for n in range(12)]
    statuses: dict[int, int] = {}
    run_all(commands, ["0", "1"], statuses.__setitem__, say=lines.append)
    assert sorted(statuses) == list(range(12))
    assert sum(statuses.values()) == MOST_FAILURES
    assert [line.partition(":")[0] for line in lines] == ["GPU 1 gets no more work"]


@pytest.mark.parametrize(
    ("ends", "given_up"),
    [
        ([(1, True)] * 3, [1]),
        ([(1, True), (1, False), (1, True), (1, True)], []),
        ([(0, True), (1, True), (1, True), (1, True)], []),  # what fails everywhere is no fault of a GPU
        ([(0, True), (0, False), (1, True), (1, True), (1, True)], [1]),
        ([(1, True)] * 3 + [(0, True)] * 9, [1]),  # the last one is never given up
        ([(2, True)] * 9, []),  # a share of the CPU
    ],
)
def test_three_failures_in_a_row_on_one_gpu_alone(ends: list[tuple[int, bool]], given_up: list[int]) -> None:
    health = Health(["0", "1", None])
    lines = [line for place, failed in ends if (line := health.ended(place, failed=failed))]
    assert [n for n in range(3) if not health.is_usable(n)] == given_up
    assert len(lines) == len(given_up)
