"""Rows of a decoding benchmark under way: failures, the time limit, and the file that is written after each."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.decode.report import relate
from benchmarks.record import Record, Row, reason_of
from benchmarks.timing import wait


class Results(Record):
    """All rows so far. The error of a failed measurement is stored in its row, and the others continue.

    Args:
        results: what is known before the first measurement, or a finished benchmark.
        out: the JSON file; None: nothing is written.
        device: checked after every measurement; if it no longer answers, nothing more is measured.
        limit: seconds after which no measurement starts.
    """

    def __init__(self, results: dict[str, Any], out: Path | None, device: torch.device, limit: float):
        empty: dict[str, Any] = {"rows": [], "capacity": [], "generated": [], "not_measured": [], "stopped": None}
        super().__init__(empty | results, out)
        self.device, self.limit = device, limit
        self.begin = time.monotonic()

    @property
    def capacity(self) -> list[Row]:
        return self.results["capacity"]

    @property
    def generated(self) -> list[Row]:
        return self.results["generated"]

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begin

    def measure(self, what: str, row: Row, function: Callable[[], Row], error: str = "error") -> None:
        """Update `row` with the result of `function`, or store under `error` why it failed or was not measured."""
        if self.results["stopped"] is None and self.seconds > self.limit:
            self.results["stopped"] = f"the time limit of {self.limit:g} s"
        if self.results["stopped"] is not None:
            self.results["not_measured"].append(what)
            row[error] = f"not measured: {self.results['stopped']}"
            return
        begin = time.monotonic()
        note = ""
        try:
            row |= (measured := function())
            note = f", decoding checked: {measured['check']}" if "check" in measured else ""
        except Exception as failure:
            row[error] = f"{type(failure).__name__}: {reason_of(failure)}"
            note = f", failed: {row[error][:300]}"
        self._check_device()
        print(f"[{self.seconds:6.1f} s] {what}: {time.monotonic() - begin:.1f} s{note}", file=sys.stderr, flush=True)
        self.write()

    def write(self) -> None:
        """Compare all rows with the baseline's, and write the file."""
        relate(self.rows, self.capacity)
        super().write()

    def _check_device(self) -> None:
        try:
            wait(self.device)
        except Exception as failure:
            self.results["stopped"] = f"the device does not answer any more: {reason_of(failure, 300)}"
