"""The jobs of a command line: one for each set of a subject."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from cllm.errors import UserError
from cllm.evaluate.perplexity import Settings, open_sets
from cllm.evaluate.subjects import Subject
from cllm.evaluate.suites.choice import Chosen
from cllm.evaluate.suites.suite import Job
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
    )
    refused: dict[str, str] | None = {} if options.skip_refused else None
    if not chosen.suite.takes_text:
        yield Job(settings=settings, device=device, options=options, given=chosen.given, refused=refused)
        return
    for text in open_sets(subject, options.data, split=settings.split, name=options.name, only=only):
        yield Job(settings=settings, device=device, options=options, text=text, given=chosen.given, refused=refused)


def check_results(folder: Path) -> None:
    """Refuse a folder of results that cannot be written to, before anything is measured. Raises `UserError`."""
    try:
        check_writable(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror or error}") from None
