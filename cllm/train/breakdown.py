"""The time of a step by part: forward, backward, optimizer, and the wait for the next batch.

On a GPU parts are measured between CUDA events, which are recorded in the stream and read once an interval, so that no
step waits for the device: a part is device time. On a CPU it is wall time of the host.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch

PARTS = ("forward", "backward", "optimizer", "data_wait")


class Breakdown:
    """Divides an interval at marks; each mark adds the time since the previous one to a part."""

    def __init__(self) -> None:
        self.start(torch.device("cpu"))

    def start(self, device: torch.device) -> None:
        """Begin a new interval on `device`."""
        self.device = device
        self._marks: list[tuple[str | None, Any]] = [(None, self._now())]

    def mark(self, part: str | None) -> None:
        """Add the time since the last mark to `part`; None: to no part."""
        self._marks.append((part, self._now()))

    def read(self) -> dict[str, float]:
        """Milliseconds of each of `PARTS` since `start`. Waits for the device to reach the last mark."""
        if self.device.type == "cuda":
            self._marks[-1][1].synchronize()
        total = dict.fromkeys(PARTS, 0.0)
        for (_, begin), (part, end) in itertools.pairwise(self._marks):
            if part is not None:
                total[part] += begin.elapsed_time(end) if self.device.type == "cuda" else 1000 * (end - begin)
        return total

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
