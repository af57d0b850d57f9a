"""Places for the processes of a study, and the work on a point in one of them."""

from __future__ import annotations

import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

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
