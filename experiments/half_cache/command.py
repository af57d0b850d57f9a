"""Arguments and the end of the commands of this package."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cllm.arguments import Parser, number, whole_number
from cllm.errors import EXIT_STOPPED
from cllm.lock import locked
from cllm.signals import STOPPING
from experiments.half_cache.runner import Devices
from experiments.half_cache.students import KINDS, RECIPES, STARTS


def add_students(parser: Parser, *, defaults: str, starts: Sequence[str], lr: str, batch: str) -> None:
    """Add the arguments that say which students are trained, and how.

    Args:
        parser: of a command.
        defaults: names of its students, as help.
        starts: by default.
        lr: the default rate, as help.
        batch: the default number of sequences, as help.
    """
    add = parser.add_argument
    add("--students", nargs="+", metavar="NAME",
        help=f"KIND or KIND+RECIPE+...; kinds: {', '.join(KINDS)}; recipes: {', '.join(RECIPES)} (default: "
        f"{defaults})")  # fmt: skip
    add("--starts", nargs="+", choices=tuple(STARTS), default=list(starts), metavar="START",
        help=f"the best of {', '.join(STARTS)} (default: {' '.join(starts)}); latents have svd alone")  # fmt: skip
    add("--lr", type=number(above=0), help=f"peak rate of students (default: {lr})")
    add("--batch", type=whole_number(1), metavar="N", help=f"sequences of a student's step (default: {batch})")


def add_running(parser: Parser) -> None:
    """Add the arguments that say where and how long students run."""
    add = parser.add_argument
    add("--parallel", type=whole_number(1), default=1, metavar="N", help="students at a time on each GPU (default: 1)")
    add("--stop-after", metavar="TIME", help="save and end after this time, such as 9m")
    add("--device", choices=("auto", "cpu"), default="auto", help="auto: all visible GPUs")


def run_until_stopped(out: Path, devices: Devices, work: Callable[[], bool]) -> int:
    """Do `work`, which stops when time is up or a signal comes; print the table, and return the exit status.

    Returns:
        1 after a failure, 3 if `work` was stopped before its end, else 0.
    """
    out.mkdir(parents=True, exist_ok=True)
    with locked(out):
        numbers = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, devices.stop) for number in numbers}
        try:
            done = work()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    table = out / "table.md"
    print(table.read_text(encoding="utf-8") if table.exists() else "no student has finished", end="\n")
    if devices.failed:
        for name, message in devices.failed.items():
            print(f"{name}: failed: {message}", file=sys.stderr)
        return 1
    if not done:
        print("time is up: the same command goes on", file=sys.stderr)
        return EXIT_STOPPED
    return 0
