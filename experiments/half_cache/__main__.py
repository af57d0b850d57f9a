"""Convert a pretrained model to plans with half or a quarter of its cache, and train each by distillation.

    python -m experiments.half_cache --teacher FOLDER --data PREPARED --out DIR --tokens 20000000 --stop-after 9m

A student is `KIND` or `KIND+RECIPE+...`. With several `--starts`, each student first gets a
loss for every start and trains from the best of them. `--parallel` students at a time run on each GPU, each in a
process. DIR/results.json, DIR/table.md and DIR/log.txt are written every few seconds. After `--stop-after`, and on
SIGTERM, SIGHUP or Ctrl-C, running students save and the command ends with status 3; the same command continues.
docs/uptraining.md has results.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from cllm.arguments import Parser, whole_number
from cllm.errors import EXIT_STOPPED, UserError, one_line
from cllm.lock import locked
from cllm.signals import STOPPING, stoppable
from cllm.uptrain.teacher import teacher_config
from experiments.half_cache.runner import Devices, Experiment
from experiments.half_cache.students import (
    DEFAULT,
    DEFAULT_QUARTER,
    KINDS,
    RECIPES,
    SHARES,
    STARTS,
    Shape,
    Student,
    check_bytes,
    check_names,
)


def parser() -> Parser:
    """The command line's arguments."""
    parser = Parser(prog="python -m experiments.half_cache", description=__doc__)
    add = parser.add_argument
    add("--teacher", type=Path, required=True, metavar="FOLDER", help="checkpoint folder or run to start from")
    add("--data", type=Path, required=True, metavar="PREPARED", help="text prepared with the teacher's tokenizer")
    add("--out", type=Path, default=Path("runs/half_cache"), metavar="DIR", help="default: %(default)s")
    add("--share", choices=SHARES, default="1/2", help="share of the cache of the default students")
    add("--students", nargs="+", metavar="NAME",
        help=f"KIND or KIND+RECIPE+...; kinds: {', '.join(KINDS)}; recipes: {', '.join(RECIPES)} (default: "
        f"{' '.join(DEFAULT)}; with --share 1/4: {' '.join(DEFAULT_QUARTER)})")  # fmt: skip
    add("--starts", nargs="+", default=["fit", "fit+outputs"], metavar="START",
        help=f"of {', '.join(STARTS)} (default: fit fit+outputs); latents have svd alone")  # fmt: skip
    add("--tokens", type=whole_number(0), default=20_000_000, metavar="N",
        help="tokens to train each student on; 0: starts alone (default: %(default)s)")  # fmt: skip
    add("--seeds", type=whole_number(1), default=1, metavar="N",
        help="seeds of the order of the text (default: %(default)s)")  # fmt: skip
    add_running(parser)
    add("--lr", type=float, help="peak rate (default: that of the config)")
    add("--batch", type=whole_number(1), metavar="N", help="sequences of a step (default: that of the config)")
    add("--seq-len", type=whole_number(2), metavar="N", help="tokens of a sequence (default: that of the config)")
    add("--windows", type=whole_number(1), metavar="N", help="validation sequences (default: that of the config)")
    add("--validations", type=whole_number(1), default=8, metavar="N",
        help="validations of a run after its first (default: %(default)s)")  # fmt: skip
    add("--calibration", type=whole_number(1), metavar="N",
        help="calibration sequences (default: that of the config)")  # fmt: skip
    return parser


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


def default_students(options: argparse.Namespace) -> list[str]:
    """The students of `--share`, without those that the teacher's shape does not allow."""
    model, found = teacher_config(options.teacher), []
    shape = Shape.of(model, options.teacher)
    for name in DEFAULT if options.share == "1/2" else DEFAULT_QUARTER:
        try:
            check_bytes(Student(name), model, shape, options.teacher)
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
        else:
            found.append(name)
    return found


@one_line
@stoppable("the same command goes on")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status: 1 after a failure, 3 if time ran out."""
    options = parser().parse_args(arguments)
    check_names(options.starts, STARTS, "--starts")
    options.out.mkdir(parents=True, exist_ok=True)
    parsed = [Student.parse(name) for name in dict.fromkeys(options.students or default_students(options))]
    students = [Student(s.kind, s.recipes, seed) for seed in range(options.seeds) for s in parsed]
    devices = Devices(
        options.out, cpu=options.device == "cpu", stop_after=options.stop_after, parallel=options.parallel
    )
    experiment = Experiment(options, devices, students)
    return run_until_stopped(options.out, devices, experiment.run)


if __name__ == "__main__":
    sys.exit(main())
