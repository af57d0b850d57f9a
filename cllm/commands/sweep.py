"""Compress the caches of several runs in many ways, and draw perplexity against bytes.

    %(prog)s runs/* [--spec "xkv:group={group},ratio={ratio}" ...] [--group 2 4]
      [--ratio 2 4 8] [--score copying]

Every run is measured as it was trained and with each spec, as by `evaluate --posthoc`. Earlier measurements are
reused. docs/posthoc.md has the details.
"""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from cllm.arguments import Parser, number, whole_number
from cllm.errors import UserError, nearest, one_line
from cllm.evaluate.result_folders import beside, run_of, without_results
from cllm.lock import locked
from cllm.posthoc import UNCOMPRESSED
from cllm.progress import ProgressMeter
from cllm.signals import raise_if_stopped, stoppable
from cllm.trust import read_object

if TYPE_CHECKING:
    import torch

    from cllm.evaluate.perplexity import Settings
    from cllm.evaluate.points import Scores
    from cllm.evaluate.subjects import Subject
    from cllm.evaluate.texts import TextSet


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """A sweep's measurements, and the folder of its table; as on the command line."""

    spec: Sequence[str] = ()
    """Templates with {group} and {ratio}; empty: those that the methods propose."""
    group: Sequence[int]
    ratio: Sequence[float]
    data: str | None = None
    window: int | None = None
    prefix: int | None = None
    batch: int | None = None
    max_tokens: int | None = None
    calibration: Path | None = None
    again: bool = False
    device: str = "auto"
    baseline: str | None = None
    score: str | None = None
    out: Path | None = None


def make_parser(program: str) -> Parser:
    """The command line's arguments."""
    parser = Parser(prog=program, description=__doc__, usage_hint=f"{program} runs/*")
    add, count, ratio = parser.add_argument, whole_number(1), number(above=0)
    add("runs", nargs="+", metavar="RUN", help="run folders, checkpoints or Hugging Face folders")
    add("--spec", action="append", default=[], help="a method, {group} and {ratio} filled in; repeat it; @FILE: "
        "those on the lines of a file; the "
        "first 4 tokens stay exact, others with sinks=N in the spec "
        "(default: those that each method proposes; evaluate --list-posthoc shows them)")  # fmt: skip
    add("--group", type=count, nargs="+", default=[2, 4], help="values of {group} (default: 2 4)")
    add("--ratio", type=ratio, nargs="+", default=[2.0, 4.0, 8.0], help="values of {ratio} (default: 2 4 8)")
    add("--data", metavar="PATH", help="prepared folder or text file (default: each run's first validation set)")
    add("--window", type=count, metavar="N", help="tokens of a window (default: the training length)")
    add("--prefix", type=count, metavar="N", help="tokens of it to compress (default: half)")
    add("--batch", type=count, metavar="N", help="windows computed together")
    add("--max-tokens", type=count, metavar="N", help="only the first N tokens of the set")
    add("--calibration", type=Path, metavar="PATH", help="prepared folder (its train split) or text file on which "
        "methods calibrate (default: the first prefixes of what is scored)")  # fmt: skip
    add("--again", action="store_true", help="ignore earlier measurements, as after a change of code")
    parser.add_device()
    add("--baseline", metavar="NAME", help="run that increases are relative to (default: the one with most bytes)")
    add("--score", metavar="SUITE[:KEY=VALUE,...]", help="also measure a suite of samples with each spec, as evaluate "
        "--suite does, and draw its main number in place of perplexity")  # fmt: skip
    add("--out", type=Path, metavar="DIR", help="where the table and figure go (default: posthoc/ next to the runs; "
        "runs/posthoc if they lie in different folders or are not runs)")  # fmt: skip
    return parser


def _run_name(path: Path) -> str:
    """The name in the table of the run, checkpoint or folder at `path`."""
    return (path.resolve().parents[1] if path.suffix == ".ckpt" else path.resolve()).name


def _measured(
    subject: Subject, text: TextSet, settings: Settings, spec: str, prefix: int, window: int, batch: int
) -> Any:
    """The record of an earlier measurement of the same checkpoint on the same data, or None; also None for one of an
    earlier version that lacks a number or chose differently."""
    from cllm.evaluate import posthoc
    from cllm.evaluate.calibration import calibration_of
    from cllm.posthoc.registry import parse

    method = parse(spec)
    calibration = calibration_of(settings.calibration, method)
    path = posthoc.Measurement(
        set_name=text.name,
        spec=spec,
        prefix=prefix,
        window=window,
        max_tokens=settings.max_tokens,
        checkpoint=None if subject.latest else subject.checkpoint,
        calibration=calibration,
    ).path(subject.results())
    if not path.exists():
        return None
    record = read_object(path)
    wanted = {"checkpoint": subject.checkpoint, "step": subject.step, "data": str(text.path), "batch": batch}
    wanted |= {"precision": subject.precision, "sinks": method.sinks, **posthoc.fingerprints(subject, text)}
    wanted |= posthoc.calibration_fingerprint(calibration)
    complete = "bf16_bytes_per_token" in record and method.needed_facts <= record.get("facts", {}).keys()
    if not complete or any(record.get(key) != value for key, value in wanted.items()):
        return None
    return record | {"text": text.label}  # earlier records do not say it


class Scoring:
    """A suite of samples that is measured with every spec of a sweep.

    Args:
        text: the suite and its options, as for `evaluate --suite`.

    Raises:
        UserError: for an unknown suite, wrong options, and a suite whose caches are not compressed.
    """

    def __init__(self, text: str):
        from cllm.evaluate.suites.choice import parse_choice
        from cllm.evaluate.suites.registry import suites

        try:
            self.suite, self.given = parse_choice(text, suites())
        except UserError as error:
            raise UserError(f"--score {text}: {error}") from None
        if not self.suite.compresses:
            allowed = ", ".join(name for name, suite in suites().items() if suite.compresses)
            raise UserError(f"--score {text}: {self.suite.name} is no suite of samples; allowed: {allowed}")
        self.number = self.suite.compared_numbers()[0]
        self.values: dict[tuple[str, str], float] = {}

    def measure(self, subject: Subject, specs: Sequence[str], settings: Settings, device: torch.device) -> None:
        """Measure the suite with each of `specs`, and save its records as `evaluate` does. Raises `UserError`."""
        from cllm.evaluate.points import TRAINED
        from cllm.evaluate.suites.suite import Job
        from cllm.evaluate.tasks.suite import ALL

        options = argparse.Namespace(posthoc=list(specs))
        job = Job(settings=settings, device=device, options=options, given=self.given)
        self.suite.check(subject, job)
        for record in self.suite.run(subject, job):
            self.suite.save(subject, record)
            if record["task"] == ALL and self.number.key in record:
                spec = TRAINED if record["spec"] == UNCOMPRESSED else record["spec"]
                self.values[subject.name, spec] = record[self.number.key]

    def scores(self) -> Scores:
        """The suite's main number over all tasks, for every run and spec so far."""
        from cllm.evaluate.points import Scores

        number = self.number
        return Scores(
            head=number.head,
            form=number.form,
            higher_is_better=number.higher_is_better,
            values=self.values,
        )


@one_line
@stoppable("the same command goes on: what was measured is kept")
def main(arguments: Sequence[str] | None = None, *, program: str = "cllm sweep") -> int:
    """Run the command line; returns the exit status of `sweep`, or 3 when stopped."""
    options = vars(make_parser(program).parse_args(arguments))
    logging.basicConfig(format="%(message)s")
    return sweep(options.pop("runs"), SweepOptions(**options))


def sweep(runs: Sequence[str], options: SweepOptions) -> int:
    """Measure every run as it was trained and with every spec, and write the table.

    Returns:
        The exit status: 1 if a measurement failed unexpectedly or a run was left out.

    Raises:
        UserError: for invalid options, before anything is measured.
    """
    # Imported late: --help and mistakes in arguments answer without loading torch.
    from cllm.environment import choose_device
    from cllm.evaluate import pareto
    from cllm.evaluate.calibration import check_is_used
    from cllm.evaluate.perplexity import Settings
    from cllm.posthoc.registry import default_sweep, parse

    specs = pareto.expand(options.spec or default_sweep(), options.group, options.ratio)
    for spec in specs:
        parse(spec, "--spec")
    check_is_used(options.calibration, specs)
    scoring = None if options.score is None else Scoring(options.score)
    device = choose_device(options.device)
    runs = without_results(runs) or runs
    names = [_run_name(Path(path)) for path in runs]
    if options.baseline is not None and options.baseline not in names:
        raise UserError(f"--baseline {options.baseline}: not among the runs; {nearest(options.baseline, names)}")
    settings = Settings(
        window=options.window, batch=options.batch, max_tokens=options.max_tokens, calibration=options.calibration
    )
    out = options.out or beside([run_of(path) for path in runs], "posthoc")
    with locked(out):  # no other sweep may write the table
        print(f"table and figure go to {out}", file=sys.stderr, flush=True)
        return _measure_all(runs, options, specs, settings, device, out, scoring)


def _measure_all(
    runs: Sequence[str],
    options: SweepOptions,
    specs: list[str],
    settings: Settings,
    device: torch.device,
    out: Path,
    scoring: Scoring | None,
) -> int:
    from cllm.evaluate import pareto
    from cllm.evaluate.left_out import LeftOut
    from cllm.evaluate.subjects import load_subject

    records, refused, failed = [], list[str](), False
    left_out = LeftOut(len(runs))
    with ProgressMeter(len(runs) * (len(specs) + 1), "sweep", "measurement") as meter:
        for n, path in enumerate(runs, start=1):
            with left_out.unless_usable(path):
                subject = load_subject(path, device)
                measured = []
                for result in _measure_run(subject, options, specs, settings, device):
                    if isinstance(result, _Refusal):
                        refused.append(result.line)
                        failed |= result.is_bug
                    else:
                        records.append(result)
                        measured.append(result["spec"])
                    meter.update()
                if scoring is not None:
                    scoring.measure(subject, measured, settings, device)
            meter.update(n * (len(specs) + 1) - meter.done)  # those of a run that was left out
    status = max(int(failed), left_out.status())
    found = pareto.points(records, baseline=options.baseline)
    scores = None if scoring is None else scoring.scores()
    found = found if scores is None else scores.apply(found)
    print(pareto.markdown(found, refused, scores), end="")
    for file in pareto.write(found, out, refused, scores):
        print(f"written: {file}")
    return status


@dataclass(frozen=True)
class _Refusal:
    """A spec that could not be measured."""

    line: str
    is_bug: bool


def _measure_run(
    subject: Subject, options: SweepOptions, specs: list[str], settings: Settings, device: torch.device
) -> Iterator[dict[str, Any] | _Refusal]:
    """The record of a run as it was trained, and of every spec; earlier ones are reused, new ones saved.

    Raises `UserError` if the run cannot be measured at all.
    """
    from cllm.evaluate import posthoc
    from cllm.evaluate.perplexity import open_sets

    window, prefix, batch = posthoc.resolve(subject, settings, options.prefix, device)
    text = next(iter(open_sets(subject, [options.data] if options.data else [])))
    for spec in (UNCOMPRESSED, *specs):
        record = None if options.again else _measured(subject, text, settings, spec, prefix, window, batch)
        if record is None:
            try:
                (record,) = posthoc.measure(subject, text, settings, [spec], device, prefix=prefix)
            except Exception as error:
                raise_if_stopped(error)
                if spec == UNCOMPRESSED:  # then nothing can be measured
                    raise
                why, is_bug = str(error), not isinstance(error, UserError)
                if is_bug:
                    tqdm.write(traceback.format_exc(), file=sys.stderr, end="")
                    why = f"failed: {' '.join(why.split())}"
                yield _Refusal(f"{subject.name}, {spec}: {why}", is_bug)
                continue
            posthoc.save(subject, record)
        yield record
