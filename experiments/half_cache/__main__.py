"""Convert a pretrained model to plans with half or a quarter of its cache, and train each by distillation.

    python -m experiments.half_cache --teacher FOLDER --data PREPARED --out DIR --tokens 20000000 --stop-after 9m

A student is `KIND` or `KIND+RECIPE+...`, with a seed `KIND-s1`. With several `--starts`, each student first gets a loss
for every start and trains from the best of them. `--parallel` students at a time run on each GPU, each in a
process. DIR/results.json, DIR/table.md and DIR/log.txt are written every few seconds. After `--stop-after`, and on
SIGTERM, SIGHUP or Ctrl-C, running students save and the command ends with status 3; the same command continues.
docs/uptraining.md has results.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from cllm.arguments import Parser, whole_number
from cllm.data.manifest import Manifest
from cllm.errors import one_line
from cllm.signals import stoppable
from experiments.half_cache.command import add_running, add_students, run_until_stopped
from experiments.half_cache.runner import Devices, Experiment
from experiments.half_cache.students import DEFAULT, DEFAULT_QUARTER, SHARES, chosen_students, with_seeds


def parser() -> Parser:
    """The command line's arguments."""
    parser = Parser(prog="python -m experiments.half_cache", description=__doc__)
    add = parser.add_argument
    add("--teacher", type=Path, required=True, metavar="FOLDER", help="checkpoint folder or run to start from")
    add("--data", type=Path, required=True, metavar="PREPARED", help="text prepared with the teacher's tokenizer")
    add("--out", type=Path, default=Path("runs/half_cache"), metavar="DIR", help="default: %(default)s")
    add("--share", choices=SHARES, default="1/2", help="share of the cache of the default students")
    add_students(
        parser,
        defaults=f"{' '.join(DEFAULT)}; with --share 1/4: {' '.join(DEFAULT_QUARTER)}",
        starts=("fit", "fit+outputs"),
        lr="that of the config",
        batch="that of the config",
    )
    add("--tokens", type=whole_number(0), default=20_000_000, metavar="N",
        help="tokens to train each student on; 0: starts alone (default: %(default)s)")  # fmt: skip
    add("--seeds", type=whole_number(1), default=1, metavar="N",
        help="seeds of the order of the text (default: %(default)s)")  # fmt: skip
    add_running(parser)
    add("--seq-len", type=whole_number(2), metavar="N", help="tokens of a sequence (default: that of the config)")
    add("--windows", type=whole_number(1), metavar="N", help="validation sequences (default: that of the config)")
    add("--validations", type=whole_number(1), default=8, metavar="N",
        help="validations of a run after its first (default: %(default)s)")  # fmt: skip
    add("--calibration", type=whole_number(1), metavar="N",
        help="calibration sequences (default: that of the config)")  # fmt: skip
    return parser


@one_line
@stoppable("the same command goes on")
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status: 1 after a failure, 3 if time ran out."""
    options = parser().parse_args(arguments)
    defaults = DEFAULT if options.share == "1/2" else DEFAULT_QUARTER
    parsed = chosen_students(options.students, defaults, options.teacher, lambda line: print(line, file=sys.stderr))
    students = with_seeds(parsed, options.seeds)
    devices = Devices(
        options.out, cpu=options.device == "cpu", stop_after=options.stop_after, parallel=options.parallel
    )
    Manifest.read(options.data)
    experiment = Experiment(options, devices, students)
    experiment.check()
    return run_until_stopped(options.out, devices, experiment.run)


if __name__ == "__main__":
    sys.exit(main())
