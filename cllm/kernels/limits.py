"""Resources of a device, and how many programs fill it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True, slots=True)
class Limits:
    """Resources of a device. The defaults are those of an H100 or H200."""

    processors: int = 132
    """Multiprocessors."""
    shared: int = 227 * 1024
    """Bytes of shared memory for the programs of one multiprocessor."""


@functools.cache
def device_limits(device: torch.device) -> Limits:
    if device.type != "cuda":
        return Limits()
    properties: Any = torch.cuda.get_device_properties(device)  # the second is missing in torch's type stubs
    return Limits(properties.multi_processor_count, properties.shared_memory_per_block_optin)


def balanced_splits(groups: int, slots: int, most: int) -> int:
    """The smallest number of splits, at most `most`, with which waves of `slots` programs are 90 % full.

    Then all programs finish together. If there is no such number: the one with the fullest waves.

    Args:
        groups: programs for each split.
        slots: programs that the device runs at once.
        most: maximum number of splits.
    """

    def filled(splits: int) -> float:
        waves = groups * splits / slots
        return waves / math.ceil(waves)

    return next((n for n in range(1, most + 1) if filled(n) >= 0.9), max(range(1, most + 1), key=filled))
