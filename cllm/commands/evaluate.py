"""Measure perplexity and bits per byte of trained models, and the cost of compressing their caches.

    %(prog)s --run runs/NAME [--run ...] [--data FOLDER_OR_TEXT_FILE ...] [--window N] [--stride N]
    %(prog)s --run runs/NAME --posthoc xkv:group=4,ratio=4 [--posthoc ...] [--prefix N]
    %(prog)s --run runs/NAME --suite mqar --suite copying:distances=128|512 [--posthoc xkv:group=4,ratio=4 ...]

A run is a run folder (its newest checkpoint), one checkpoint file, or a Hugging Face checkpoint folder. Without --data
a run is scored on its own validation sets. docs/evaluation.md defines what is measured, docs/posthoc.md describes
--posthoc, docs/suites.md the suites that ask a model to find or copy something.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cllm.arguments import Parser, whole_number
from cllm.errors import UserError, one_line
from cllm.evaluate.suites.choice import Chosen, describe_suites
from cllm.evaluate.suites.registry import add_options, choose, suites
from cllm.evaluate.suites.suite import Job, Record, Suite
from cllm.files import write_atomic
from cllm.signals import stoppable

if TYPE_CHECKING:
    import torch

    from cllm.evaluate.subjects import Subject


def make_parser(program: str) -> Parser:
    """The command line's arguments."""
    parser, count = Parser(prog=program, description=__doc__), whole_number(1)
    add = parser.add_argument
    add("--run", action="append", default=[], metavar="PATH", help="run, .ckpt file or Hugging Face folder; repeatable")
    add("--data", nargs="+", action="extend", default=[], metavar="PATH",
        help="prepared folders or text files (.txt .md: one document; .jsonl: the `text` of each line); "
        "default: the run's own validation sets")  # fmt: skip
    add("--split", default="validation", help="split of prepared folders to score (default: %(default)s)")
    add("--window", type=count, metavar="N", help="tokens that the model reads at once (default: the training length; "
        "at most 2048 for Hugging Face models)")  # fmt: skip
    add("--stride", type=count, metavar="N", help="tokens scored in each window (default: half the window)")
    add("--batch", type=count, metavar="N", help="windows or samples computed together; changes only speed and memory")
    add("--max-tokens", type=count, metavar="N", help="score only the first N tokens of each set")
    parser.add_device()
    add("--name", metavar="SET", help="name of the set in files and TensorBoard (default: from the data's path)")
    add("--out", metavar="DIR", type=Path, help="folder of the results; nothing is then written to the run (default: "
        "evaluation/ in the run's folder; runs/evaluation/NAME-HASH for a Hugging Face folder)")  # fmt: skip
    add("--list-suites", action="store_true", help="list the suites of --suite and their options, and exit")
    add("--list-posthoc", action="store_true", help="list the methods of --posthoc and their options, and exit")
    add_options(parser)
    return parser


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
    # Imported late: --help and mistakes in arguments answer without loading torch.
    from cllm.environment import choose_device
    from cllm.evaluate.left_out import LeftOut

    device = choose_device(options.device)
    report = _Report(chosen)
    left_out = LeftOut(len(options.run))
    try:
        for path in options.run:
            with left_out.unless_usable(path):
                _measure(path, chosen, options, device, report)
    finally:
        report.print()
    return left_out.status()


class _Report:
    """The records so far and their files."""

    def __init__(self, chosen: Sequence[Chosen]):
        self.records: list[tuple[Suite, list[Record]]] = [(choice.suite, []) for choice in chosen]
        """Of each suite, for all runs."""
        self.files: list[tuple[Suite, list[Path]]] = []
        """Of each suite and run."""

    def print(self) -> None:
        """Print a table for each suite, then the files."""
        tables = [suite.table(records) for suite, records in self.records if records]
        written = [line for suite, files in self.files if files for line in suite.written(files)]
        if tables:
            print("\n\n".join(tables), *written, sep="\n")


def _measure(
    path: str, chosen: Sequence[Chosen], options: argparse.Namespace, device: torch.device, report: _Report
) -> None:
    """Measure one run with every suite, and add its records to the report."""
    from cllm.evaluate.subjects import load_subject
    from cllm.evaluate.suites.jobs import jobs

    subject = load_subject(path, device)
    planned: list[Iterable[Job]] = [jobs(choice, subject, options, device) for choice in chosen]
    if len(chosen) > 1:  # what does not fit is refused before the first suite runs
        planned = [list(each) for each in planned]
        for choice, each in zip(chosen, planned, strict=True):
            for job in each:
                choice.suite.check(subject, job)
    announced = options.out is not None or subject.kind == "run"
    for each, (suite, records) in zip(planned, report.records, strict=True):
        report.files.append((suite, files := []))
        for job in each:
            if not announced:
                suite.check(subject, job)  # a refusal is the only line on stderr
                print(f"results of {path} go to {subject.results()}", file=sys.stderr, flush=True)
                announced = True
            for record in suite.run(subject, job):
                files.append(suite.save(subject, record, options.out))
                records.append(record)
            if job.refused:
                files.append(_save_refused(subject, suite, job.refused, options.out))


def _save_refused(subject: Subject, suite: Suite, refused: dict[str, str], out: Path | None) -> Path:
    """Report the specs that a suite went on without, and write them with the reasons as JSON."""
    for spec, reason in refused.items():
        print(f"{subject.name} on {suite.name}: {spec} is refused: {reason}", file=sys.stderr, flush=True)
    file = subject.results(out) / suite.name / "refused.json"
    record = {"suite": suite.name, "run": subject.name, "design": subject.design, "refused": refused}
    write_atomic(file, json.dumps(record, indent=2) + "\n")
    return file
