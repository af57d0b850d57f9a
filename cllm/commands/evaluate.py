"""Measure perplexity and bits per byte of trained models, and the cost of compressing their caches.

    %(prog)s --run runs/NAME [--run ...] [--data FOLDER_OR_TEXT_FILE ...] [--window N] [--stride N]
    %(prog)s --run runs/NAME --posthoc xkv:group=4,ratio=4 [--posthoc ...] [--prefix N]
    %(prog)s --run runs/NAME --suite mqar --suite "copying:distances=128|512" [--posthoc xkv:group=4,ratio=4 ...]
    %(prog)s --run runs/A --run runs/B --suite mqar --suite copying --devices all [--per-device N]

A run is a run folder (its newest checkpoint), one checkpoint file, or a Hugging Face checkpoint folder. Without --data
a run is scored on its own validation sets. docs/evaluation.md defines what is measured, docs/posthoc.md describes
--posthoc, docs/suites.md the suites that ask a model to find or copy something.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from cllm.arguments import Parser
from cllm.commands.evaluate_options import options_parser
from cllm.errors import UserError, one_line
from cllm.evaluate.result_folders import results_of_checkpoint
from cllm.evaluate.suites.choice import Chosen, describe_suites
from cllm.evaluate.suites.registry import choose, suites
from cllm.evaluate.suites.suite import Job, Record, Suite
from cllm.hub.kind import identify_model
from cllm.signals import stoppable

if TYPE_CHECKING:
    import torch

    from cllm.evaluate.left_out import LeftOut
    from cllm.evaluate.parallel.parts import Part


def make_parser(program: str) -> Parser:
    """The command line's arguments."""
    return options_parser(program, __doc__)


@one_line
@stoppable()
def main(arguments: Sequence[str] | None = None, *, program: str = "cllm evaluate") -> int:
    """Run the command line; returns its exit status: 1 if one of several runs was left out."""
    commands = make_parser(program)
    options = commands.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    if options.list_posthoc:
        from cllm.posthoc.registry import describe_methods

        print(describe_methods())
        return 0
    if options.list_suites:
        print(describe_suites(suites().values()))
        return 0
    if not options.run:
        raise UserError("nothing to evaluate: give --run runs/NAME")
    if options.out and len(options.run) > 1:
        raise UserError(f"--out {options.out}: takes the results of one run, and there are {len(options.run)}")
    chosen = choose(commands, options)
    options.run = list(dict.fromkeys(options.run))  # a run that is given twice is measured once
    # Imported late: --help and mistakes in arguments answer without loading torch.
    from cllm.environment import choose_device
    from cllm.evaluate.calibration import check_is_used
    from cllm.evaluate.left_out import LeftOut

    check_is_used(options.calibration, options.posthoc)
    report = _Report(chosen, options.suite)
    left_out = LeftOut(len(options.run))
    places = _places(options)
    try:
        if places:
            words = list(sys.argv[1:] if arguments is None else arguments)
            return _measure_in_processes(words, chosen, options, places, report, left_out)
        device = choose_device(options.device)
        for path in options.run:
            with left_out.unless_usable(path):
                _measure(path, chosen, options, device, report)
    finally:
        report.print()
    return left_out.status()


class _Report:
    """The records so far and their files."""

    def __init__(self, chosen: Sequence[Chosen], texts: Sequence[str]):
        self.records: list[tuple[Suite, list[Record]]] = [(choice.suite, []) for choice in chosen]
        """Of each suite, for all runs."""
        self.files: list[tuple[Suite, list[Path]]] = []
        """Of each suite and run."""
        names = [choice.suite.name for choice in chosen]
        self._titles = [f"--suite {text}\n" if names.count(names[n]) > 1 else "" for n, text in enumerate(texts)] or [
            ""
        ]
        """Above the tables of suites that are measured with several options."""
        self._files_of: dict[tuple[str, int], list[Path]] = {}

    def add(
        self, place: tuple[str, int], specs: Sequence[str], records: Sequence[Record], files: Sequence[Path]
    ) -> None:
        """Add what was measured on a set by a run and the suite of a number, in the order of `specs`."""
        suite, known = self.records[place[1]]
        if place not in self._files_of:
            self.files.append((suite, self._files_of.setdefault(place, [])))
        self._files_of[place] += files
        order = {spec: n for n, spec in enumerate(specs)}
        known += sorted(records, key=lambda record: order.get(record.get("spec", ""), -1))

    def print(self) -> None:
        """Print a table for each suite, then the files."""
        tables = [
            title + suite.table(records)
            for title, (suite, records) in zip(self._titles, self.records, strict=True)
            if records
        ]
        written = [line for suite, files in self.files if files for line in suite.written(files)]
        if tables:
            print("\n\n".join(tables), *written, sep="\n")


def _measure(
    path: str, chosen: Sequence[Chosen], options: argparse.Namespace, device: torch.device, report: _Report
) -> None:
    """Measure one run with every suite, and add its records to the report."""
    from cllm.evaluate.subjects import load_subject
    from cllm.evaluate.suites.jobs import check_results, jobs, run_job

    subject = load_subject(path, device)
    check_results(subject.results(options.out))
    refused: dict[str, dict[str, str]] = {}
    planned: list[Iterable[Job]] = [jobs(choice, subject, options, device) for choice in chosen]
    if len(chosen) > 1:  # what does not fit is refused before the first suite runs
        planned = [list(each) for each in planned]
        for choice, each in zip(chosen, planned, strict=True):
            for job in each:
                choice.suite.check(subject, job)
    announced = options.out is not None or subject.kind == "run"
    for each, (suite, records) in zip(planned, report.records, strict=True):
        files: list[Path] = []
        report.files.append((suite, files))
        for job in each:
            if not announced:
                suite.check(subject, job)  # a refusal is the only line on stderr
                print(f"results of {path} go to {subject.results()}", file=sys.stderr, flush=True)
                announced = True
            known = refused.setdefault(suite.name, {})
            run_job(suite, subject, job, options.out, records=records, files=files, refused=known, say=_say)


def _say(lines: Sequence[str]) -> None:
    print(*lines, sep="\n", file=sys.stderr, flush=True)


# ---- in several processes


def _places(options: argparse.Namespace) -> list[str | None]:
    """Where processes measure; empty: in this process.

    Raises:
        UserError: for GPUs that are not there, and options that do not fit together.
    """
    if options.devices is None:
        if options.per_device > 1:
            raise UserError(f"--per-device {options.per_device}: needs --devices, such as --devices all")
        if options.processes > 1 and options.device != "cpu":
            from cllm.environment import choose_device

            if choose_device(options.device).type != "cpu":
                raise UserError(
                    f"--processes {options.processes}: is for a CPU: add --device cpu, or use --devices on GPUs"
                )
        return [None] * options.processes if options.processes > 1 else []
    for option, value in (("--processes", options.processes > 1), ("--device cpu", options.device == "cpu")):
        if value:
            raise UserError(f"{option}: does not go with --devices {options.devices}, which names GPUs")
    from cllm.workers import choose_gpus, find_gpus

    found = find_gpus()
    if not found:
        raise UserError(f"--devices {options.devices}: torch sees no GPU; allowed here: --processes N")
    gpus = found if options.devices == "all" else choose_gpus(options.devices, found, ("all",))
    return gpus * options.per_device


def _measure_in_processes(
    words: Sequence[str],
    chosen: Sequence[Chosen],
    options: argparse.Namespace,
    places: Sequence[str | None],
    report: _Report,
    left_out: LeftOut,
) -> int:
    """Measure in a process for each part of the command, and add its records to the report. Returns the exit status."""
    from cllm.evaluate.parallel.launch import Launch
    from cllm.evaluate.parallel.parts import parts_of
    from cllm.evaluate.parallel.store import Store, parts_folder

    parts: dict[str, Part] = {}
    for path in options.run:
        with left_out.unless_usable(path):
            found = parts_of(path, chosen, options, "cpu" if places[0] is None else "cuda")
            parts |= {part.key: part for part in found if part.key not in parts}
            if options.out is None and not identify_model(path).is_run:
                print(f"results of {path} go to {results_of_checkpoint(Path(path))}", file=sys.stderr, flush=True)
    if not parts:
        return left_out.status()
    store = Store(parts_folder(options.run, options.out))
    launch = Launch(list(parts.values()), words, store, _command, may_be_empty=options.skip_refused)
    try:
        launch.run(places)
    except KeyboardInterrupt:
        print("what has been measured is kept; the same command goes on", file=sys.stderr)
        raise
    finally:
        for (run, choice, _), several in groupby(launch.measured(), key=lambda item: item[0].place):
            measured = list(several)
            records = [record for _, found, _ in measured for record in found.records]
            report.add((run, choice), options.posthoc, records, [file for _, _, files in measured for file in files])
    return 1 if launch.failed else left_out.status()


def _command(file: Path) -> list[str]:
    return [sys.executable, "-m", "cllm.commands.evaluate_part", str(file)]
