"""Train designs, compress the caches of the trained models as well, and put both into one table and one figure.

    %(prog)s --config tradeoff/98m --data.path data/prepared/NAME --out runs/tradeoff
    %(prog)s ... --designs mha gqa:n_kv_heads=4 fusedkv --ratio 2 4 --minutes 9

A design is NAME[:KEY=VALUE,...]: a file of configs/kv/ and settings of `model.kv` on top of it. Each is trained by
`train` and measured as it was trained and with every --spec, as by `sweep`. Run it again to resume:
finished runs and earlier measurements are reused, an interrupted run is resumed. Settings such as --train.steps 500 go
to every run. docs/posthoc.md explains the table.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from pathlib import Path

import cllm
from cllm import processes
from cllm.arguments import number, whole_number
from cllm.commands.sweep import SweepOptions, sweep
from cllm.config import Config
from cllm.config.designs import parse_plan
from cllm.config.load import ConfigParser, config_parser
from cllm.config.shipped import find_config
from cllm.errors import EXIT_STOPPED, UserError, one_line
from cllm.lock import locked
from cllm.runs import RunFolder
from cllm.signals import stoppable
from cllm.uptrain.complete import load_config

DESIGNS = ("mha", "fusedkv", "fusedkv_lite", "cla", "yoco", "gqa")


def run_name(design: str) -> str:
    """`gqa:n_kv_heads=4` as a run's name, gqa-n_kv_heads-4."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", design)


def is_finished(folder: RunFolder) -> bool:
    """Whether the run was validated after its last step, and has that step's checkpoint, which the sweep measures.

    A run that a callback has ended early is finished.
    """
    if not folder.config_file.exists():
        return False
    train = folder.config().train
    last = folder.early_stop() or train.steps
    validated = train.validate_every is None or folder.is_validated_at(last)
    return validated and last in dict(folder.checkpoints())


def train(words: list[str], seconds: float) -> None:
    """Run `cllm train` in a process; after `seconds`, and on a signal to this process, it saves and stops.

    Raises:
        UserError: when it fails.
    """
    # The child must import this cllm, installed or not, and not a folder `cllm` in the working directory.
    path = os.pathsep.join(filter(None, (str(Path(cllm.__file__).resolve().parents[1]), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "cllm", "train", *words, "--resume", "auto"]
    status = processes.run(command, seconds=seconds, env=environment)
    if status not in (0, EXIT_STOPPED):
        raise UserError(f"train {' '.join(words)} ended with status {status}; its output is above")


def make_parser(program: str) -> ConfigParser:
    """The command line's arguments."""
    parser = config_parser(Config, __doc__ or "", program)
    add, count, ratio = parser.add_argument, whole_number(1), number(above=0)
    add("--designs", nargs="+", default=list(DESIGNS), metavar="DESIGN", help=f"default: {' '.join(DESIGNS)}")
    add("--out", type=Path, default=Path("runs/tradeoff"), metavar="DIR", help="for runs, table, figure and events "
        "(default: %(default)s)")  # fmt: skip
    add("--minutes", type=number(least=0), default=1e6, metavar="M",
        help="stop training after M minutes; the same command goes on")  # fmt: skip
    add("--spec", action="append", default=[], help="as in sweep, @FILE and sinks=N included")
    add("--group", type=count, nargs="+", default=[4], help="values of {group} (default: 4)")
    add("--ratio", type=ratio, nargs="+", default=[2.0, 4.0, 8.0], help="values of {ratio} (default: 2 4 8)")
    add(
        "--prefix",
        type=count,
        metavar="N",
        help="tokens of a window to compress (default: half of the training length)",
    )
    add("--batch", type=count, metavar="N", help="windows computed together")
    add("--max-tokens", type=count, metavar="N", help="score only the first N tokens of the validation set")
    add("--calibration", type=Path, metavar="PATH", help="as in sweep")
    return parser


@one_line
@stoppable("the same command goes on")
def main(argv: list[str] | None = None, *, program: str = "cllm tradeoff") -> int:
    """Run the command line; returns its exit status: 3 if time ran out or a signal stopped it."""
    options, overrides = make_parser(program).parse_settings(argv)
    if not options.config:
        raise UserError(
            "--config: missing; for example --config configs/tradeoff/98m.yaml --data.path data/prepared/NAME"
        )
    # Imported late: --help and mistakes in arguments answer without loading torch.
    from cllm.evaluate.calibration import check_is_used
    from cllm.evaluate.pareto import expand
    from cllm.posthoc.registry import default_sweep, parse

    deadline = time.monotonic() + 60 * options.minutes
    specs = expand(options.spec or default_sweep(), options.group, options.ratio)
    for spec in specs:
        parse(spec, "--spec")
    check_is_used(options.calibration, specs)
    runs = train_arguments(options, overrides)
    with locked(options.out.resolve()):
        return train_and_sweep(options, runs, deadline)


def train_arguments(options: argparse.Namespace, overrides: list[str]) -> dict[str, list[str]]:
    """The arguments of `cllm train` for each run by its name.

    Raises:
        UserError: for an invalid design or setting, before the first run starts.
    """
    files = [str(find_config(file).resolve()) for file in options.config]
    runs: dict[str, list[str]] = {}
    for design in options.designs:
        plan, settings = parse_plan(design)
        own = {"name": run_name(design), "runs_dir": options.out.resolve()}
        own |= {f"model.kv.{key}": text for key, text in settings.items()}
        added = [*overrides, *(word for key, text in own.items() for word in (f"--{key}", str(text)))]
        load_config([*files, plan], added)
        runs[run_name(design)] = [*(word for file in (*files, plan) for word in ("--config", str(file))), *added]
    return runs


def train_and_sweep(options: argparse.Namespace, runs: dict[str, list[str]], deadline: float) -> int:
    """Train `runs`, by name with their arguments, then measure all of them; returns the exit status."""
    out = options.out.resolve()
    print(f"runs, table and figure go to {out}", file=sys.stderr, flush=True)
    for place, (name, words) in enumerate(runs.items(), start=1):
        if is_finished(RunFolder(out / name)):
            continue
        left = deadline - time.monotonic()
        if left > 0:
            print(f"== {name} ({place} of {len(runs)})", file=sys.stderr, flush=True)
            train(words, left)
        if not is_finished(RunFolder(out / name)):
            print(f"stopped: {name} is not finished; the same command goes on", file=sys.stderr)
            return EXIT_STOPPED
    settings = SweepOptions(
        spec=options.spec,
        group=options.group,
        ratio=options.ratio,
        prefix=options.prefix,
        batch=options.batch,
        max_tokens=options.max_tokens,
        calibration=options.calibration,
        out=out / "posthoc",
    )
    return sweep([str(out / name) for name in runs], settings)
