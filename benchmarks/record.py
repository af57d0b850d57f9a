"""Results of a benchmark, kept on disk while it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cllm.files import write_atomic
from cllm.signals import raise_if_stopped

Row = dict[str, Any]

KEPT = "with --out, its file has what was measured before; the same command measures all again and replaces it"
"""The results that a command with a `Record` keeps when a signal ends it, for `stoppable`."""


def reason_of(failure: BaseException, most: int | None = None) -> str:
    """The text of an error that is recorded while the benchmark goes on: one line, at most `most` characters.

    Raises:
        Interrupted: from `failure`, if it replaced the exception of a signal.
    """
    raise_if_stopped(failure)
    return " ".join(str(failure).split())[:most]


class Record:
    """Results as they come, written as JSON after each of them: an interruption loses only the running measurement.

    Args:
        results: what is known before the first measurement; `rows` is added if it is missing.
        out: the JSON file; None: nothing is written.
    """

    def __init__(self, results: dict[str, Any], out: Path | None):
        self.results, self.out = results, out

    @property
    def rows(self) -> list[Row]:
        return self.results.setdefault("rows", [])

    def add(self, row: Row) -> None:
        """Add a row and write the file."""
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Write the file."""
        if self.out is not None:
            write_atomic(self.out, json.dumps(self.results, indent=2) + "\n")
