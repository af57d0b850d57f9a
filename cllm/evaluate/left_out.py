"""Commands over several runs skip broken ones and name them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from cllm.errors import UserError
from cllm.files import shorten
from cllm.signals import raise_if_stopped

_LENGTH = 600


class LeftOut:
    """`with left_out.unless_usable(run): ...` encloses the work on each of `total` runs.

    A `UserError` in the block is printed on stderr and the command continues; a reason that several runs share is
    printed once. With a single run it is raised.
    """

    def __init__(self, total: int):
        self._total = total
        self.names: list[str] = []
        """The runs that were left out."""
        self._reasons: set[str] = set()

    @contextmanager
    def unless_usable(self, run: str | Path) -> Iterator[None]:
        """Leave `run` out if the block raises a `UserError`."""
        try:
            yield
        except UserError as error:
            raise_if_stopped(error)
            if self._total == 1:
                raise
            self.names.append(str(run))
            text = shorten(" ".join(str(error).split()), _LENGTH)
            known = text in self._reasons
            self._reasons.add(text)
            text = "for the same reason" if known else text
            line = f"left out: {text}" if str(run) in text else f"left out: {run}: {text}"
            tqdm.write(line, file=sys.stderr)  # a bar may be shown

    def status(self) -> int:
        """The exit status: 0, or 1 if a run was left out. Raises `UserError` if all were."""
        if self.names and len(self.names) == self._total:
            reason = f": {next(iter(self._reasons))}" if len(self._reasons) == 1 else ""
            raise UserError(f"none of the {self._total} runs can be used{reason}")
        return 1 if self.names else 0
