"""The clock of training, and peak FLOP/s of GPUs."""

from __future__ import annotations

import time

import torch

from cllm.train.breakdown import Breakdown

# Dense bf16 tensor-core peaks in FLOP/s, from the vendors' data sheets (without sparsity). The first match wins, so
# cards with another peak come before the SXM module of their kind.
_PEAKS = (
    ("B200", 2250e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("RTX 4090", 165e12),
)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 peak of a GPU in FLOP/s; None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS if part in name), None)


class Clock:
    """Seconds of training, without validation and checkpoints, and the seconds of these spent waiting for data.

    `parts` divides the same seconds into the parts of a step.
    """

    def __init__(self) -> None:
        self.parts = Breakdown()
        self._wait_begin: float | None = None
        self.start()

    def start(self, device: torch.device | None = None) -> None:
        """Begin a new interval, on `device` if given."""
        self._begin, self._paused, self._waited = time.perf_counter(), 0.0, 0.0
        self._pause_begin: float | None = None
        if self._wait_begin is not None:  # a row ends between two batches; the wait continues in the next row
            self._wait_begin = self._begin
        self.parts.start(device or self.parts.device)

    def pause(self) -> None:
        self._pause_begin = time.perf_counter()

    def resume(self) -> None:
        now = time.perf_counter()
        if self._pause_begin is not None:
            self._paused += now - self._pause_begin
            self._pause_begin = None
        if self._wait_begin is not None:  # validation and saving come between two batches, but are not a wait for data
            self._wait_begin = now
        self.parts.mark(None)

    def waiting(self) -> None:
        """A batch has ended; the wait for the next one begins."""
        self.parts.mark("optimizer")
        self._wait_begin = time.perf_counter()

    def working(self) -> None:
        """The next batch has arrived."""
        self.parts.mark("data_wait")
        if self._wait_begin is not None:
            self._waited += time.perf_counter() - self._wait_begin
            self._wait_begin = None

    def read(self) -> tuple[float, float]:
        """Seconds of training since `start`, and the seconds of these spent waiting for data."""
        return time.perf_counter() - self._begin - self._paused, self._waited
