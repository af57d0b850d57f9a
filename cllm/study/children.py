"""Training and evaluation of points in processes, one GPU each."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import cllm
from cllm import processes
from cllm.config import Config
from cllm.study.busy import Intervals, Stepping
from cllm.study.points import Point
from cllm.study.queue import Work


class Commands(Protocol):
    """The commands of a point's processes."""

    def train(self, config: Path) -> list[str]:
        """The command that trains the config in a file, or goes on with it."""

    def evaluate(self, job: Path) -> list[str]:
        """The command that evaluates as a file of a job says."""


@dataclass
class Slot:
    """A place for a run: a GPU, or a share of the CPU."""

    device: str | None
    """The GPU as in CUDA_VISIBLE_DEVICES; None: the CPU."""
    jobs: list[Job] = field(default_factory=list)
    busy: Intervals = field(default_factory=Intervals)
    """When a run on it took steps or was evaluated, see busy.py."""

    @property
    def name(self) -> str:
        return "CPU" if self.device is None else f"GPU {self.device}"


@dataclass
class Job:
    """A process that works on a point, and the locks that it needs."""

    point: Point
    work: Work
    config: Config
    slot: Slot
    process: subprocess.Popen
    locks: ExitStack
    """Releases the point."""
    stepping_time: Stepping
    """When the process started; of a training, also when its steps began."""
    started: float = field(default_factory=time.monotonic)
    first_tokens: int = 0
    """Tokens that the run had when the process started."""
    first_row: tuple[float, int] | None = None
    """Time and tokens of the first row that the process logged. Its speed includes compilation."""
    stepping: bool = False
    """Whether the process has logged a second row, so that its speed is known."""
    checked: float = 0.0
    ended: int = 0
    """Evaluations of the point whose records the result has."""

    @property
    def tokens(self) -> int:
        """Tokens of the entire run."""
        train = self.config.train
        return train.steps * train.global_batch * self.config.data.seq_len


def find_gpus() -> list[str]:
    """The GPUs that a process may use, as in CUDA_VISIBLE_DEVICES; empty without a usable GPU."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(n) for n in range(count)]


def child_environment(slot: Slot, slots: int, compiled: Path) -> dict[str, str]:
    """The environment of a run on a slot.

    The run sees one GPU, a share of the CPU's cores, and the compiled code of all runs. Variables of SLURM that would
    make it a part of a larger run are left out.
    """
    # The child must import this cllm, installed or not, and not a folder `cllm` in the working directory.
    path = os.pathsep.join(filter(None, (str(Path(cllm.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH"))))
    found = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    found |= {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    found.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // slots)))
    if slot.device is None:
        found["CUDA_VISIBLE_DEVICES"] = ""
    else:
        found["CUDA_VISIBLE_DEVICES"] = slot.device
        found.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled / "inductor"))
        found.setdefault("TRITON_CACHE_DIR", str(compiled / "triton"))
    return found


def start(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen:
    """Start a process whose output is appended to a log. It gets SIGTERM when this process is killed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        return processes.start(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=environment
        )
