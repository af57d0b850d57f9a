"""Progress of long work: a bar in a terminal, and elsewhere a line about every minute.

    with ProgressMeter(1000, "mha on validation", "window") as meter:
        meter.update(8)

In a terminal, log messages are printed above the bar. In a pipe or a file, a line is

    mha on validation: 120 of 1,000 windows, 12 %, 1 h 40 min left

The first line comes after 10 seconds, so short work prints none.
"""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from time import monotonic
from types import TracebackType
from typing import Self

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

FIRST_LINE = 10.0
"""Seconds until the first line."""
BETWEEN_LINES = 60.0
"""Least seconds between lines."""
_LINES_OF_RATE = 10
"""The time left follows from the speed since that many lines ago."""


class ProgressMeter:
    """Shows how much of a piece of work is done, on stderr.

    Args:
        total: units of work; None: unknown.
        name: of the work, at the beginning of the bar or line.
        unit: singular noun; with `scaled`, a symbol such as B.
        done: units that an earlier process has done.
        scaled: abbreviate counts: `1.2G` instead of 1,200,000,000.
        shown: False in all processes but one.
    """

    def __init__(
        self, total: int | None, name: str, unit: str, *, done: int = 0, scaled: bool = False, shown: bool = True
    ):
        self.total, self.name, self.unit, self.scaled, self.shown = total, name, unit, scaled, shown
        self.done = done
        self._note = ""
        self._context = contextlib.ExitStack()
        self._bar: tqdm | None = None
        self._began = monotonic()
        self._due = self._began + FIRST_LINE
        self._printed = deque([(self._began, done)], maxlen=_LINES_OF_RATE)
        if shown and sys.stderr.isatty():
            self._bar = self._context.enter_context(
                tqdm(total=total, initial=done, desc=name, unit=unit, unit_scale=scaled, dynamic_ncols=True, leave=None)
            )
            self._context.enter_context(logging_redirect_tqdm())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(self, n: int = 1) -> None:
        """Count `n` more units."""
        self.done += n
        if self._bar is not None:
            self._bar.update(n)
        elif self.shown and (now := monotonic()) >= self._due:
            self._due = now + BETWEEN_LINES
            self._print(self._line(now), now)

    def skip(self, n: int) -> None:
        """Count `n` more units that took no time, such as those that an earlier process has done."""
        self.done += n
        self._printed[-1] = (monotonic(), self.done)
        if self._bar is not None:
            self._bar.initial += n
            self._bar.update(n)

    def note(self, text: str) -> None:
        """Show `text` behind the count from now on."""
        self._note = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """Remove the bar if another one is above it. A last line tells the time of work that has printed lines."""
        if self._bar is None and len(self._printed) > 1:
            now = monotonic()
            self._print(f"{self._count()} in {duration(now - self._began)}", now)
            self._printed.clear()
        self._context.close()
        self._bar = None

    def _count(self) -> str:
        done = tqdm.format_sizeof(self.done) if self.scaled else f"{self.done:,}"
        if self.total is None:
            return f"{done}{self._units()}"
        total = tqdm.format_sizeof(self.total) if self.scaled else f"{self.total:,}"
        return f"{done} of {total}{self._units()}"

    def _units(self) -> str:
        return self.unit if self.scaled else f" {self.unit}{'es' if self.unit.endswith('ch') else 's'}"

    def _line(self, now: float) -> str:
        """The count, its share of the total, and the time left at the speed of the last lines."""
        line = self._count()
        if self.total:
            line += f", {self.done / self.total:.0%}".replace("%", " %")
            time_before, done_before = self._printed[0]
            if self.done > done_before:
                left = (self.total - self.done) * (now - time_before) / (self.done - done_before)
                line += f", {duration(max(left, 0))} left"
        return line

    def _print(self, line: str, now: float) -> None:
        self._printed.append((now, self.done))
        tqdm.write(f"{self.name}: {line}{self._note and f', {self._note}'}", file=sys.stderr)
        sys.stderr.flush()


def duration(seconds: float) -> str:
    """Hours and minutes; seconds below a minute.

    >>> duration(40), duration(600), duration(6060)
    ('40 s', '10 min', '1 h 41 min')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"
