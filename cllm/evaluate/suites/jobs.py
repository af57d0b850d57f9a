"""The jobs of a command line: one for each set of a subject."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from cllm.errors import UserError
from cllm.evaluate.perplexity import Settings, open_sets
from cllm.evaluate.subjects import Subject
from cllm.evaluate.suites.choice import Chosen
from cllm.evaluate.suites.suite import Job, Record, Suite
from cllm.files import check_writable


def jobs(
    chosen: Chosen, subject: Subject, options: argparse.Namespace, device: torch.device, *, only: int | None = None
) -> Iterator[Job]:
    """A job for each set that the options name, opened when it is reached; one job if the suite takes no text.

    With `only`, there is a job for the set of that number alone.

    Raises:
        UserError: as `open_sets` does.
    """
    settings = Settings(
        split=options.split,
        window=options.window,
        stride=options.stride,
        batch=options.batch,
        max_tokens=options.max_tokens,
        calibration=options.calibration,
    )
    skips: bool = options.skip_refused
    if not chosen.suite.takes_text:
        yield Job(settings=settings, device=device, options=options, given=chosen.given, skips_refused=skips)
        return
    for text in open_sets(subject, options.data, split=settings.split, name=options.name, only=only):
        yield Job(settings=settings, device=device, options=options, text=text, given=chosen.given, skips_refused=skips)


def run_job(
    suite: Suite,
    subject: Subject,
    job: Job,
    out: Path | None,
    *,
    records: list[Record],
    files: list[Path],
    refused: dict[str, str],
    say: Callable[[Sequence[str]], None],
    may_be_empty: bool = False,
) -> None:
    """Run a job of a suite and save what it measures.

    Args:
        suite: what measures.
        subject: the model.
        job: what to measure.
        out: the folder of results; None: the subject's own.
        records: gets each record as soon as it is saved.
        files: gets the file of each record, and with --skip-refused that of the refused specs.
        refused: gets the refused specs with the reason; with --skip-refused all in it are saved together.
        say: is called with the lines that tell of the specs it refuses.
        may_be_empty: whether it may refuse every spec, as with --skip-refused.

    Raises:
        UserError: as `Suite.run` does, and if the suite refuses every spec.
    """
    found = suite.run(subject, job)
    if job.refused and not (found or may_be_empty or job.skips_refused):
        spec, reason = next(iter(job.refused.items()))
        raise UserError(f'--posthoc "{spec}": {reason}')
    for record in found:
        files.append(suite.save(subject, record, out))
        records.append(record)
    if job.refused:
        say(suite.describe_refused(subject, job.refused))
        refused |= job.refused
        if job.skips_refused:
            files.append(suite.save_refused(subject, refused, out))


def check_results(folder: Path) -> None:
    """Refuse a folder of results that cannot be written to, before anything is measured. Raises `UserError`."""
    try:
        check_writable(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None
