"""Processes that share the GPUs of a machine, or its CPU.

A place is what one process computes on: a GPU, or several separated by commas, as in CUDA_VISIBLE_DEVICES; or None for
a share of the CPU.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cllm
from cllm import processes
from cllm.errors import UserError
from cllm.signals import Interrupted

GRACE = 30.0
"""Seconds after which `run_all` kills commands that it has asked to end."""
MOST_FAILURES = 3
"""Failures in a row after which `Health` gives up a GPU."""
_POLL = 0.05
_LOG_TAIL = 8192
_RANKS = {
    *("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE"),
}
"""Variables of torchrun and Kubernetes that make a process a part of a larger run, as those of SLURM do."""


def usable_cores() -> int:
    """The cores that this process may use: fewer than the machine has in a job of SLURM or under taskset."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_gpus() -> list[str]:
    """The GPUs that a process may use, as in CUDA_VISIBLE_DEVICES; empty without a usable GPU."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(n) for n in range(count)]


def all_gpus() -> str | None:
    """The place of all GPUs that a process may use; None without a usable GPU."""
    return ",".join(find_gpus()) or None


def choose_gpus(text: str, known: Sequence[str], words: Sequence[str]) -> list[str]:
    """The GPUs of `--devices text`, such as `0,2`.

    Args:
        text: names of GPUs, separated by commas.
        known: the GPUs there are.
        words: other values that the option takes, for messages.

    Raises:
        UserError: for a GPU that is not there or is named twice.
    """
    names = [name.strip() for name in text.split(",")]
    allowed = ", ".join([*known, *words])
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--devices {text}: there is no GPU {unknown[0]!r}; allowed: {allowed}")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise UserError(f"--devices {text}: names GPU {repeated[0]} twice; allowed: each GPU once")
    return names


def child_environment(
    place: str | None, places: int, compiled: Path | None = None, *, most_threads: int | None = None
) -> dict[str, str]:
    """The environment of a process on a place.

    The process sees the GPUs of its place and uses a share of the CPU's cores, unless OMP_NUM_THREADS says otherwise.
    Variables of SLURM, torchrun and Kubernetes that would make it a part of a larger run are left out.

    Args:
        place: GPUs as in CUDA_VISIBLE_DEVICES; None: the CPU.
        places: number of processes at once.
        compiled: a folder for compiled code that the processes share; None: the usual one.
        most_threads: the largest number of threads in such a share; None: no limit.
    """
    # The child must import this cllm, installed or not, and not a folder `cllm` in the working directory.
    path = os.pathsep.join(filter(None, (str(Path(cllm.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH"))))
    of_launchers = {key for key in os.environ if key in _RANKS or key.startswith(("SLURM_", "TORCHELASTIC_"))}
    found = {key: value for key, value in os.environ.items() if key not in of_launchers}
    found |= {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    found.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // places)))
    found["CUDA_VISIBLE_DEVICES"] = "" if place is None else place
    if most_threads is not None and "OMP_NUM_THREADS" not in os.environ:
        found["OMP_NUM_THREADS"] = str(min(int(found["OMP_NUM_THREADS"]), most_threads))
    if place is not None and compiled is not None:
        found.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled / "inductor"))
        found.setdefault("TRITON_CACHE_DIR", str(compiled / "triton"))
    return found


def start(command: Sequence[str], log: Path, environment: dict[str, str]) -> subprocess.Popen:
    """Start a process whose output is appended to a log. It gets SIGTERM when this process is killed."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as stream:
        return processes.start(
            command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, env=environment
        )


def last_line(log: Path) -> str:
    """The last line of a log that has text; an empty one if no line has."""
    try:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - _LOG_TAIL))
            lines = stream.read().decode(errors="replace").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


class Health:
    """Failures in a row on each place. A broken GPU fails quickly at whatever it is given, and would use up a queue.

    Args:
        places: GPUs, or None for a share of the CPU, which is never given up.
    """

    def __init__(self, places: Sequence[str | None]):
        self._places = list(places)
        self._failures = [0] * len(places)
        self._given_up: set[int] = set()

    def ended(self, place: int, *, failed: bool) -> str | None:
        """Note that a process on the place with this number has ended.

        Returns a line if the place is given up: after `MOST_FAILURES` failures in a row, unless the last process on
        another place has failed too, or no other place is left.
        """
        self._failures[place] = self._failures[place] + 1 if failed else 0
        others = [n for n, gpu in enumerate(self._places) if gpu not in (None, self._places[place])]
        others = [n for n in others if self.is_usable(n)]
        if self._failures[place] < MOST_FAILURES or self._places[place] is None or not others:
            return None
        if any(self._failures[n] for n in others):
            return None
        self._given_up.add(place)
        return (
            f"GPU {self._places[place]} gets no more work: {MOST_FAILURES} processes in a row have failed on it, and "
            "none of the last ones on the others; the same command repeats what failed"
        )

    def is_usable(self, place: int) -> bool:
        """Whether the place with this number has not been given up."""
        return place not in self._given_up


@dataclass(frozen=True, slots=True)
class Command:
    """A command for `run_all`."""

    words: Sequence[str]
    log: Path


def run_all(
    commands: Sequence[Command],
    places: Sequence[str | None],
    ended: Callable[[int, int], None],
    waiting: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Run commands in their order, each in a process, as many at once as there are places. Leaves no process behind.

    A GPU on which commands keep failing gets no more of them (`Health`).

    On SIGINT, SIGTERM or SIGHUP to this process, all commands get SIGTERM, and are killed if they have not ended after
    `GRACE` seconds or at the next signal.

    Args:
        commands: the commands.
        places: where they run; one command at a time on each.
        ended: called with the number of a command that has ended and its exit status.
        waiting: called several times a second.
        say: gets a line for each GPU that is given up.

    Raises:
        Interrupted: after all processes have ended, if there was such a signal.
    """
    left = deque(enumerate(commands))
    running: dict[int, tuple[int, subprocess.Popen]] = {}
    environments = [child_environment(place, len(places)) for place in places]
    health = Health(places)
    with processes.received_signals() as received:
        try:
            while (left or running) and not received:
                for place, environment in enumerate(environments):
                    if place in running and processes.has_ended(running[place][1]):
                        n, process = running.pop(place)
                        status = processes.reap(process)
                        ended(n, status)
                        if (line := health.ended(place, failed=status != 0)) is not None:
                            say(line)
                    if place not in running and left and health.is_usable(place):
                        n, command = left.popleft()
                        running[place] = n, start(command.words, command.log, environment)
                waiting()
                time.sleep(_POLL)
        finally:
            _end([process for _, process in running.values()], received)
    if received:
        raise Interrupted(received[0])


def _end(running: Sequence[subprocess.Popen], received: list[int]) -> None:
    """Ask processes to end, and kill those that have not done so after a while or at another signal."""
    for process in running:
        processes.send(process, signal.SIGTERM)
    deadline, signals = time.monotonic() + GRACE, len(received)
    while not all(map(processes.has_ended, running)) and time.monotonic() < deadline and len(received) == signals:
        time.sleep(_POLL)
    for process in running:
        processes.reap(process)
