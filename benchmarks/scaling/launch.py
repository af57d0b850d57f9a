"""Start one training run on given GPUs, and end it with all of its processes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from cllm.config import Config
from cllm.files import write_atomic
from cllm.processes import has_ended, reap
from cllm.processes import start as start_process

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Launched:
    """The first process of a run; it starts those of the other devices."""

    process: subprocess.Popen[bytes]
    gpus: list[int]
    log_file: Path
    deadline: float

    def poll(self, *, end: bool = False) -> int | None:
        """The exit status, or None while the run continues. A run past its deadline, or with `end`, is ended: 124."""
        if has_ended(self.process):
            return reap(self.process)  # with the other devices' processes, if the first one failed
        if not end and time.monotonic() <= self.deadline:
            return None
        reap(self.process)
        return 124

    def tail(self, lines: int = 15) -> str:
        """The end of the run's output."""
        return "\n".join(self.log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def free_port() -> int:
    """An unused port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(config: Config, gpus: list[int], profiled: int, timeout: float) -> Launched:
    """Start the run of `config` on the GPUs with these numbers; its last `profiled` steps are profiled."""
    runs = Path(config.runs_dir)
    file, log_file = runs / f"{config.name}.yaml", runs / f"{config.name}.log"
    write_atomic(file, yaml.safe_dump(config.as_yaml_data(), sort_keys=False))
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    environment = os.environ | {"PYTHONPATH": path, "MASTER_PORT": str(free_port())}
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
    with log_file.open("wb") as log:
        process = start_process(
            [sys.executable, "-m", "benchmarks.scaling.worker", file, str(profiled)],
            cwd=ROOT, env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    return Launched(process, gpus, log_file, time.monotonic() + timeout)
