"""A tier of packed caches in memory, on a device or the host. It has a budget; the least recently used leave first."""

from __future__ import annotations

from collections import OrderedDict

import torch

from cllm.prefix.pack import Packed


class MemoryTier:
    """Packed caches by name."""

    def __init__(self, device: torch.device, budget: int):
        self.device, self.budget = device, budget
        self._held: OrderedDict[str, Packed] = OrderedDict()
        """The least recently used first."""

    def __contains__(self, name: str) -> bool:
        return name in self._held

    @property
    def nbytes(self) -> int:
        """Bytes of all caches."""
        return sum(packed.nbytes for packed in self._held.values())

    def names(self) -> list[str]:
        """The least recently used first."""
        return list(self._held)

    def get(self, name: str) -> Packed | None:
        """A cache, which counts as used now."""
        if name in self._held:
            self._held.move_to_end(name)
        return self._held.get(name)

    def put(self, name: str, packed: Packed) -> list[tuple[str, Packed]]:
        """Store a cache on the tier's device. Returns those that had to leave: others, or itself if it is too large."""
        if packed.nbytes > self.budget:
            return [(name, packed)]
        self._held.pop(name, None)
        left = []
        while self.nbytes + packed.nbytes > self.budget:
            left.append(self._held.popitem(last=False))
        self._held[name] = packed.to(self.device)
        return left

    def drop(self, name: str) -> None:
        """Forget a cache, if it is there."""
        self._held.pop(name, None)
