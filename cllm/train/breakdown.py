"""Where the time of a step goes: forward, backward, optimizer, and the wait for the next batch.

On a GPU the moments are CUDA events, recorded as the host passes and read once an interval, so that nothing in a step
waits for the device: a part is then what the device spent on it. On a CPU they are the host's clock.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch

PARTS = ("forward", "backward", "optimizer", "data_wait")


class Breakdown:
    """Cuts an interval at marks; each mark gives the time since the one before to a part."""

    def __init__(self) -> None:
        self.start(torch.device("cpu"))

    def start(self, device: torch.device) -> None:
        """Begin a new interval on `device`."""
        self.device = device
        self._marks: list[tuple[str | None, Any]] = [(None, self._now())]

    def mark(self, part: str | None) -> None:
        """`part` ends here; None: the time since the last mark belongs to no part."""
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
