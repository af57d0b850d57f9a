"""A process for each part of an evaluation, as many at once as there are places."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from cllm.errors import UserError
from cllm.evaluate.parallel.parts import Part
from cllm.evaluate.parallel.store import Report, Store
from cllm.files import shorten
from cllm.lock import locked
from cllm.progress import ProgressMeter
from cllm.workers import Command, last_line, run_all

_LINE = 400
"""Characters of a failed part's last line that are shown."""


class Launch:
    """Measures the parts of a command.

    Args:
        parts: in the order of the command.
        words: the words of the command.
        store: the files of parts.
        command: the command that measures what a file says.
        may_be_empty: whether every spec of --posthoc may be refused.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        words: Sequence[str],
        store: Store,
        command: Callable[[Path], Sequence[str]],
        *,
        may_be_empty: bool = False,
    ):
        self._parts, self._words, self._store, self._command = list(parts), words, store, command
        self._may_be_empty = may_be_empty
        self.failed: list[Part] = []
        self._published: dict[str, tuple[Report, list[Path]]] = {}

    def run(self, places: Sequence[str | None]) -> None:
        """Measure all parts that have not ended before.

        A part that fails is reported on stderr, and the others are measured nevertheless. Files are written as soon as
        their part has ended.

        Raises:
            UserError: if another process measures the same, a file cannot be written, or every part fails.
            Interrupted: at a signal, after all processes have ended; the same command then goes on.
        """
        with locked(self._store.folder):
            self._store.open()
            left = self._go_on()
            order = sorted(left, key=lambda part: -part.cost)
            commands = [
                Command(self._command(self._store.begin(part, self._words)), self._store.log(part)) for part in order
            ]
            done = len(self._parts) - len(left)
            with ProgressMeter(len(self._parts), "evaluation", "measurement", done=done) as meter:

                def ended(n: int, status: int) -> None:
                    self._take(order[n], status)
                    meter.update()

                try:
                    run_all(commands, places, ended, lambda: meter.update(0), _say)
                finally:
                    for part in left:  # that have ended since the last look
                        if part.key not in self._published and part not in self.failed and self._store.report(part):
                            self._take(part, 0)
                    self._store.settle([(part, self._published[part.key][0]) for part in self._ended()])
            if not self._may_be_empty:
                self._leave_out_empty()
            if not self.failed:
                self._store.close()
        if not self._published:
            raise UserError(f"nothing was measured; logs: {self._store.folder}")

    def measured(self) -> list[tuple[Part, Report, list[Path]]]:
        """The parts that have ended, in the order of the command, with their reports and files."""
        return [(part, *self._published[part.key]) for part in self._ended()]

    def _ended(self) -> list[Part]:
        return [part for part in self._parts if part.key in self._published]

    def _go_on(self) -> list[Part]:
        """Publish the parts that have ended before; returns the others."""
        left = []
        for part in self._parts:
            report = self._store.report(part)
            if report is None:
                left.append(part)
            else:
                self._publish(part, report)
        if len(left) < len(self._parts):
            done = len(self._parts) - len(left)
            _say(f"{done} of {len(self._parts)} measurements were made before and are not repeated")
        return left

    def _take(self, part: Part, status: int) -> None:
        """Take the outcome of a process that has ended."""
        report = self._store.report(part)
        if report is None:
            log = self._store.log(part)
            line = shorten(last_line(log).removeprefix("error: "), _LINE) or f"it ended with status {status}"
            killed = f"killed by {signal.Signals(-status).name}: " if status < 0 else ""
            _say(f"left out: {part.label}: {killed}{line}; log: {log}")
            self.failed.append(part)
            return
        for message in report.messages:
            _say(message)
        self._publish(part, report)

    def _leave_out_empty(self) -> None:
        """Count parts as failed whose place has ended without a record, since every spec was refused."""
        for _, several in groupby(self._parts, key=lambda part: part.place):
            parts = list(several)
            reports = [self._published[part.key][0] for part in parts if part.key in self._published]
            refused = {spec: reason for report in reports for spec, reason in report.refused.items()}
            if refused and len(reports) == len(parts) and not any(report.records for report in reports):
                spec, reason = next(iter(refused.items()))
                _say(f'left out: {parts[0].place_label}: --posthoc "{spec}": {reason}')
                for part in parts:
                    del self._published[part.key]
                self.failed += parts

    def _publish(self, part: Part, report: Report) -> None:
        self._published[part.key] = report, self._store.publish(part, report)


def _say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)  # a bar may be shown
