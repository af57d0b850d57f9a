"""Timed variants of a setting, of which the fastest is kept, until a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.posthoc_options import PrintedRecord, layer_ms
from benchmarks.record import reason_of
from benchmarks.timing import wait

SECONDS = 345
"""Nothing is measured after this time."""


class Variants:
    """Measures variants until a deadline, and keeps the best."""

    def __init__(self, device: torch.device, record: PrintedRecord, begin: float):
        self.device, self.record, self.begin, self.start = device, record, begin, begin

    def time(self, what: str, name: str, calls: Sequence[Callable[[], object]], **more: Any) -> float:
        """Add a row with the ms of a call; infinity for a variant that fails or comes too late."""
        if time.monotonic() - self.start > SECONDS:
            print(f"{what:<9}{name}: no time left", flush=True)
            return float("inf")
        try:
            ms = layer_ms(calls, self.device)
        except Exception as failure:
            reason = reason_of(failure, 150)
            wait(self.device)
            print(f"{what:<9}{name} failed: {reason}", flush=True)
            return float("inf")
        self.record.add({"what": what, "name": name, "ms": ms, **more})
        return ms

    def search(
        self,
        what: str,
        best: Any,
        options: dict[str, Sequence[Any]],
        time_of: Callable[[Any, str], float],
        until: float,
    ) -> Any:
        """The best found of `best` and dataclasses that differ from it, one field after another, until `until` s."""
        least = time_of(best, "by rule")
        for field, values in options.items():
            for value in values:
                if time.monotonic() - self.begin > until:
                    print(f"{what}: no time for {field}={value} and what follows", flush=True)
                    return best
                other = replace(best, **{field: value})
                if (ms := time_of(other, f"{field}={value}")) < least:
                    least, best = ms, other
        return best
