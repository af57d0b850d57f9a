"""A short form of `python -m tests.chaos`: every command survives a few kills and signals without losing anything."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_commands_lose_nothing_when_they_are_killed_and_interrupted(tmp_path: Path) -> None:
    """In a process of its own, since it forks: Python must have started no thread by then."""
    command = [
        sys.executable,
        "-m",
        "tests.chaos",
        "--disturbances",
        "24",
        "--seed",
        "3",
        "--work",
        str(tmp_path / "w"),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()[1:6]]
    assert [row[0] for row in rows] == ["prepare", "train", "evaluate", "export", "sweep"]
    assert sum(int(row[2]) for row in rows) >= 24, "disturbances that ended a command"
    assert {row[3] for row in rows} == {"0"}, "faults"
