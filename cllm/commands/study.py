"""Run a study: a grid of designs, learning rates, seeds and token budgets, and put it into one report.

    %(prog)s studies/cpu --data.path data/prepared/stdlib
    %(prog)s STUDY.yaml --dry-run --tokens-per-second 700000
    %(prog)s STUDY.yaml --stop-after 25m
    %(prog)s STUDY.yaml --status
    %(prog)s STUDY.yaml --report

Every GPU of this machine gets a run. The same command goes on where it was stopped or killed. Settings such as
--data.path P go to every run; `cllm train --help` lists them. docs/study.md describes studies.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cllm.arguments import number, whole_number
from cllm.config import Config
from cllm.config.load import ConfigParser
from cllm.errors import UserError, nearest, one_line
from cllm.signals import stoppable
from cllm.workers import choose_gpus, find_gpus

if TYPE_CHECKING:
    from cllm.study.schema import Study


class CllmCommands:
    """`cllm train`, and the evaluation of a point, by this Python."""

    def train(self, config: Path) -> list[str]:
        return [sys.executable, "-m", "cllm", "train", "--config", str(config), "--resume", "auto"]

    def evaluate(self, job: Path) -> list[str]:
        return [sys.executable, "-m", "cllm.commands.study_point", str(job)]


class _Parser(ConfigParser):
    """A parser whose help leaves the settings of runs to that of `cllm train`."""

    def full_help(self) -> str:
        return self.format_help()


def make_parser(program: str) -> ConfigParser:
    """The command line's arguments."""
    parser = _Parser(Config, __doc__ or "", program)
    parser.usage_hint = f"{program} studies/cpu"
    add = parser.add_argument
    add("study", metavar="STUDY", help="the study's YAML file, or the name of a shipped one")
    add("--out", type=Path, metavar="DIR", help="folder of the study's files (default: studies/NAME)")
    add("--runs", type=Path, metavar="DIR", help="folder of its runs, which are large (default: runs/ in --out)")
    add("--only", action="append", default=[], metavar="DESIGN", help="only this design; repeatable")
    add("--devices", default="auto", metavar="WHERE", help="auto: every GPU, or the CPU; gpu; cpu; or GPUs such as 0,2")
    add("--workers", type=whole_number(1), default=1, metavar="N", help="runs at once on a CPU (default: 1)")
    add("--stop-after", metavar="TIME", help="start no run that would not end within this time, such as 25m; running "
        "ones then save and stop")  # fmt: skip
    add("--dry-run", action="store_true", help="print designs, runs, tokens and hours; do not train")
    add("--tokens-per-second", type=number(above=0), metavar="N", help="speed of one run, for estimates of time")
    add("--status", action="store_true", help="print the table of points and the time that is left")
    add("--slurm", action="store_true", help="print the script of a SLURM array")
    add("--report", action="store_true", help="write the report from the results")
    return parser


@one_line
@stoppable("the same command goes on")
def main(argv: list[str] | None = None, *, program: str = "cllm study") -> int:
    """Run the command line; returns its exit status, that of `Runner.run`."""
    parser = make_parser(program)
    options, overrides = parser.parse_settings(argv)
    logging.basicConfig(format="%(message)s")
    actions = [name for name in ("dry_run", "status", "slurm", "report") if getattr(options, name)]
    if len(actions) > 1:
        raise UserError(" and ".join(f"--{name.replace('_', '-')}" for name in actions) + ": allowed: one of them")
    from cllm.study.layout import Layout, study_folder
    from cllm.study.schema import load_study, parse_duration

    study = load_study(options.study, overrides)
    seconds = None if options.stop_after is None else parse_duration(options.stop_after)
    if options.slurm:
        for option in ("devices", "workers"):
            if (value := getattr(options, option)) != parser.get_default(option):
                raise UserError(
                    f"--{option} {value} has no effect with --slurm: every task has the GPU that SLURM gives it"
                )
    for name in options.only:
        if name not in study.designs:
            raise UserError(f"--only {name}: not a design of the study; {nearest(name, study.designs)}")
    layout = Layout.at(options.out or study_folder(study.name), options.runs)
    if options.report:
        from cllm.study.report import write_report

        for path in write_report(study, layout, only=options.only):
            print(f"written: {path}")
        return 0
    _check_evaluations(study)
    if options.slurm:
        from cllm.study.slurm import array_script

        layout.state.mkdir(parents=True, exist_ok=True)  # SLURM does not make the folder of its logs
        print(array_script(study, _task_command(options, overrides, layout), layout.state), end="")
        return 0
    return _work(options, study, layout, seconds)


def _check_evaluations(study: Study) -> None:
    """Refuse a suite or a spec of `evaluate` that `cllm evaluate` would refuse after training."""
    from cllm.commands import evaluate
    from cllm.evaluate.suites.registry import choose
    from cllm.posthoc.registry import parse

    parser = evaluate.make_parser("cllm evaluate")
    for words in study.evaluate.commands():
        try:
            options = parser.parse_args([word for word in ("--run", "RUN", *words) if word not in ("-h", "--help")])
            for option, given in _of_study(options, words).items():
                if given:
                    raise UserError(f"{option}: a study sets it; allowed: options that say what is measured")
            choose(parser, options)
            for spec in options.posthoc:
                parse(spec)
        except UserError as error:
            raise UserError(f"study {study.name}: evaluate: {' '.join(words)}: {error}") from None


def _of_study(options: argparse.Namespace, words: Sequence[str]) -> dict[str, bool]:
    """The options of `cllm evaluate` that a study cannot have, and whether they are given."""
    return {
        "--help": not {"-h", "--help"}.isdisjoint(words),
        "--run": len(options.run) > 1,
        "--out": options.out is not None,
        "--list-suites": options.list_suites,
        "--list-posthoc": options.list_posthoc,
    }


def _check_data(study: Study, configs: Sequence[Config]) -> None:
    """Refuse texts of `evaluate` and prepared folders of runs that are missing, before anything is trained.

    Files of `beside` are for the report, which may be written elsewhere: those that are missing are only named.
    """
    from cllm.data.manifest import Manifest

    for path in study.beside.results:
        if not Path(path).exists():
            print(f"study {study.name}: beside: {path}: no such file; --report will need it", file=sys.stderr)
    for path in study.evaluate.data:
        if not Path(path).exists():
            raise UserError(f"study {study.name}: evaluate.data: {path}: no such file or folder")
    for folder in dict.fromkeys(f for c in configs for f in (*c.data.weights, *c.data.validation_sets.values())):
        Manifest.read(folder)


def _task_command(options: argparse.Namespace, overrides: list[str], layout) -> list[str]:
    """The words of a SLURM task: this command without `--slurm`, with its folders spelled out."""
    words = ["cllm", "study", str(options.study), "--out", str(layout.out)]
    if options.runs is not None:
        words += ["--runs", str(layout.runs)]
    for name in options.only:
        words += ["--only", name]
    if options.stop_after is not None:
        words += ["--stop-after", options.stop_after]
    return [*words, *overrides]


def _work(options: argparse.Namespace, study, layout, seconds: float | None) -> int:
    """Train, for `seconds` at most, or print the plan or the state."""
    from cllm.study.children import Slot
    from cllm.study.estimate import Estimates
    from cllm.study.points import Grid
    from cllm.study.queue import Queue
    from cllm.study.results import read_results
    from cllm.study.runner import Options, Runner
    from cllm.study.status import dry_run, status
    from cllm.study.utilisation import Utilisation
    from cllm.version import code_version

    gpus = _gpus(options.devices, find_gpus)
    slots = [Slot(gpu) for gpu in gpus] or [Slot(None) for _ in range(options.workers)]
    grid = Grid(study, code_version(), options.only)
    estimates = Estimates(options.tokens_per_second or study.tokens_per_second, overridden=options.dry_run)
    points = [grid.point(variant, study.tokens[0], 0, None) for variant in grid.variants]
    configs = [grid.config(point, layout.runs) for point in points]  # mistakes are reported before anything is written
    if options.dry_run:
        print(dry_run(grid, layout, estimates, len(slots)))
        return 0
    queue = Queue(grid, layout)
    if options.status:
        estimates.learn(read_results(layout.results))
        print(status(queue, estimates, len(slots)))
        return 0
    _check_data(study, configs if any(work == "train" for _, work in queue.left()) else ())
    print(f"results go to {layout.results}, runs to {layout.runs}", file=sys.stderr, flush=True)
    runner = Runner(queue, CllmCommands(), slots, estimates, Options(seconds=seconds, share=study.share_gpu))
    busy = Utilisation(gpus)
    busy.start()
    try:
        code = runner.run()
    finally:
        computed = busy.stop()
        if computed is not None:
            print(f"nvidia-smi: GPUs computed {100 * computed:.0f} % of the time", file=sys.stderr)
    print(status(queue, estimates, len(slots)))
    return code


def _gpus(where: str, find) -> list[str]:
    """The GPUs of `--devices`; empty: the CPU."""
    if where == "cpu" or (where == "auto" and os.environ.get("CUDA_VISIBLE_DEVICES") == ""):
        return []
    found: list[str] = find()
    if where == "auto":
        return found
    if where == "gpu" or not found:
        if not found:
            raise UserError(f"--devices {where}: torch sees no GPU; allowed here: cpu, auto")
        return found
    return choose_gpus(where, found, ("gpu", "cpu", "auto"))
