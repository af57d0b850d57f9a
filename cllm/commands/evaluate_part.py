"""One part of `cllm evaluate` on several devices, in a process of its own."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from cllm.commands.evaluate_options import options_parser
from cllm.errors import UserError, one_line
from cllm.evaluate.suites.registry import choose
from cllm.evaluate.suites.suite import Record
from cllm.signals import stoppable
from cllm.trust import read_object


class _Messages(logging.Handler):
    """Collects warnings, which the command that started this process prints."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@one_line
@stoppable()
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure as a JSON file says: the words of the command, and one of its parts. See `cllm/evaluate/parallel/`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if len(words) != 1:
        raise UserError(f"{' '.join(words) or 'no argument'}: allowed: the JSON file of one part of an evaluation")
    file = Path(words[0])
    content = read_object(file)
    logging.basicConfig(format="%(message)s")
    logging.getLogger().addHandler(messages := _Messages())
    parser = options_parser("cllm evaluate")
    options = parser.parse_args(content["words"])
    _measure(file.parent, parser, options, content["part"], messages)
    return 0


def _measure(folder: Path, parser, options: argparse.Namespace, part: dict, messages: _Messages) -> None:
    """Measure a part, with its files in `folder`."""
    from cllm.environment import choose_device
    from cllm.evaluate.parallel.store import Report, results_of, write_report
    from cllm.evaluate.subjects import load_subject
    from cllm.evaluate.suites.jobs import check_results, jobs, run_job

    choice = choose(parser, options)[part["choice"]]
    options.posthoc = part["specs"]
    device = choose_device(options.device if options.devices is None else "cuda")  # never the CPU instead of a GPU
    subject = load_subject(part["run"], device)
    check_results(target := subject.results(options.out))
    private, out = results_of(folder), None
    if options.out is None:
        subject.results_moved_to = private
    else:
        out = private
    records: list[Record] = []
    files: list[Path] = []
    refused: dict[str, str] = {}
    for job in jobs(choice, subject, options, device, only=part["set"]):
        choice.suite.check(subject, job)
        run_job(
            choice.suite,
            subject,
            job,
            out,
            records=records,
            files=files,
            refused=refused,
            say=messages.texts.extend,
            may_be_empty=True,  # other parts have the other specs
        )
    write_report(
        folder,
        Report(
            results=str(target),
            records=records,
            files=[str(path.relative_to(private)) for path in files],
            messages=messages.texts,
            refused=refused,
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
