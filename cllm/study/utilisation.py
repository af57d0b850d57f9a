"""How busy GPUs were, sampled from nvidia-smi while a study runs."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import threading
from collections.abc import Sequence

_EVERY = 5.0
"""Seconds between samples."""
_QUERY = ["nvidia-smi", "--query-gpu=index,utilization.gpu", "--format=csv,noheader,nounits"]


class Utilisation:
    """Samples in a thread between `start` and `stop`. Without nvidia-smi there are no samples.

    Args:
        devices: indices of the GPUs to sample; names of another form, such as UUIDs, select all.
    """

    def __init__(self, devices: Sequence[str]):
        self._devices = set(devices) if all(device.isdigit() for device in devices) else None
        self._samples: list[float] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if devices and shutil.which("nvidia-smi"):
            self._thread = threading.Thread(target=self._sample, name="GPU utilisation", daemon=True)

    def start(self) -> None:
        if self._thread is not None:
            self._thread.start()

    def stop(self) -> float | None:
        """End sampling. Returns the mean share of time in which the GPUs computed, 0 to 1; None without samples."""
        self._stop.set()
        if self._thread is not None and self._thread.is_alive():
            self._thread.join(timeout=10)
        return statistics.fmean(self._samples) / 100 if self._samples else None

    def _sample(self) -> None:
        while not self._stop.wait(_EVERY):
            try:
                text = subprocess.run(_QUERY, capture_output=True, text=True, timeout=20).stdout
            except (OSError, subprocess.TimeoutExpired):
                continue
            rows = [line.split(",") for line in text.splitlines() if line.count(",") == 1]
            for index, percent in rows:
                if percent.strip().isdigit() and (self._devices is None or index.strip() in self._devices):
                    self._samples.append(float(percent))
