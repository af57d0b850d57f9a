"""Start one training run on given GPUs, and end it with all of its processes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from cllm.config import Config
from cllm.files import write_atomic
from cllm.processes import has_ended, reap
from cllm.processes import start as start_process
from cllm.workers import child_environment, find_gpus

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Launched:
    """The first process of a run; it starts those of the other devices."""

    process: subprocess.Popen[bytes]
    gpus: list[int]
    log_file: Path
    timeout: float
    """Seconds after which it is ended."""
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def poll(self, *, end: bool = False) -> int | None:
        """The exit status, or None while the run continues. A run past its timeout, or with `end`, is ended: 124."""
        if has_ended(self.process):
            return reap(self.process)  # with the other devices' processes, if the first one failed
        if not end and self.seconds <= self.timeout:
            return None
        reap(self.process)
        return 124

    def tail(self, lines: int = 15) -> str:
        """The end of the run's output."""
        return "\n".join(self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def startable(sizes: Sequence[int], free: int, *, idle: bool) -> list[int]:
    """Positions of the waiting runs that start now, of which `sizes` has the number of GPUs, in their order.

    On an idle machine these are all that fit beside the earlier ones. While runs are under way none starts before an
    earlier one, which would otherwise wait for all GPUs until no smaller run is left.
    """
    chosen = []
    for position, size in enumerate(sizes):
        if size <= free:
            chosen.append(position)
            free -= size
        elif not idle:
            break
    return chosen


def start(config: Config, gpus: list[int], profiled: int, timeout: float) -> Launched:
    """Start the run of `config` on the GPUs with these numbers; its last `profiled` steps are profiled."""
    runs = Path(config.runs_dir)
    file, log_file = runs / f"{config.name}.yaml", runs / f"{config.name}.log"
    write_atomic(file, yaml.safe_dump(config.as_yaml_data(), sort_keys=False))
    # Each run chooses a port when it starts its processes, which is later than here.
    place = ",".join(names[gpu] for gpu in gpus) if (names := find_gpus()) else None
    environment = child_environment(place, max(1, len(names)))  # a process for each GPU
    with log_file.open("wb") as log:
        process = start_process(
            [sys.executable, "-m", "benchmarks.scaling.worker", file, str(profiled)],
            cwd=ROOT, env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    return Launched(process, gpus, log_file, timeout)
