"""The files of a study.

OUT/
  results/POINT.json   the result of a finished point: small, to be kept and committed
  results/sessions/    for each run of the command, how long each device was busy
  runs/POINT/          its run, as `cllm train` writes it
  state/POINT.yaml     the config that it is trained with
  state/POINT.log      the output of its training and evaluation
  state/POINT.failed   the last line of a training that failed
  state/.POINT.lock    the lock of a process that works on it
  state/compiled/      code that torch has compiled, shared by all runs
  report/              the report
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from cllm.lock import PATIENCE, lock_file
from cllm.runs import RunFolder
from cllm.study.points import Point


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths of a study's files."""

    out: Path
    runs: Path
    """The folder of runs, by default in `out`; checkpoints make it large."""

    @classmethod
    def at(cls, out: Path, runs: Path | None = None) -> Layout:
        """The layout in a folder."""
        return cls(out.resolve(), (runs or out / "runs").resolve())

    @property
    def results(self) -> Path:
        return self.out / "results"

    @property
    def sessions(self) -> Path:
        return self.results / "sessions"

    @property
    def report(self) -> Path:
        return self.out / "report"

    @property
    def state(self) -> Path:
        return self.out / "state"

    @property
    def compiled(self) -> Path:
        return self.state / "compiled"

    def result(self, point: Point) -> Path:
        return self.results / f"{point.name}.json"

    def run(self, point: Point) -> RunFolder:
        return RunFolder(self.runs / point.name)

    def config(self, point: Point) -> Path:
        return self.state / f"{point.name}.yaml"

    def log(self, point: Point) -> Path:
        return self.state / f"{point.name}.log"

    def failure(self, point: Point) -> Path:
        return self.state / f"{point.name}.failed"

    def evaluation(self, point: Point) -> Path:
        """The folder of records of an evaluation that is not finished."""
        return self.state / f"{point.name}.evaluation"

    def lock(self, point: Point) -> Path:
        """The path to lock, see `cllm.lock`."""
        return self.state / point.name


def is_held(folder: Path) -> bool:
    """Whether a living process seems to have the lock of `folder`, by the record in the lock file. Takes no lock."""
    file = lock_file(folder)
    try:
        record, touched = json.loads(file.read_bytes()), file.stat().st_mtime
    except (OSError, ValueError):
        return False
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    if record.get("boot") != boot:
        return time.time() - touched < PATIENCE
    try:
        state = Path(f"/proc/{record.get('pid')}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state != "Z"


def study_folder(name: str) -> Path:
    """The default folder of a study's files, in the working directory."""
    return Path("studies") / name
