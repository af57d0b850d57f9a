"""Tensors that stay in host memory while the rest of the cache is on a device (ShadowKV, arXiv 2410.21465, section 4).

Shapes: B batch, n compressed tokens, width the shape of one token in one tensor of a slot.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cllm.posthoc.code import Code
from cllm.posthoc.tensor_tree import Change


@dataclass(frozen=True)
class HostRows(Code):
    """An uncompressed tensor in host memory. A decode step copies the selected tokens' rows to the device, a longer
    pass all rows.

    For a GPU the memory is pinned, and steps read it without waiting for the host. torch reserves pinned memory in
    powers of two, and reuses it as soon as the last reference is gone: keep a cache until the steps that read it have
    ended.
    """

    in_host_memory: ClassVar[bool] = True

    data: Tensor
    """(B, n, *width) on the CPU."""
    device: torch.device
    """Of the cache."""

    @classmethod
    def of(cls, x: Tensor) -> HostRows:
        """A copy of `x` (B, n, *width) in host memory, for a cache on the device of `x`."""
        return cls(torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.is_cuda).copy_(x), x.device)

    def decode(self) -> Tensor:
        return self.data.to(self.device, non_blocking=True)

    def factors(self) -> tuple[Tensor, Tensor | None]:
        return self.data.flatten(2), None

    @property
    def has_factors(self) -> bool:
        return True

    def map(self, change: Change) -> HostRows:
        """As for every tree; the result is pinned too."""
        if self.device.type != "cuda":
            return HostRows(change(self.data), self.device)
        torch.cuda.synchronize(self.device)  # steps may still read memory that is reused for the next tensor
        data = change(self.data)
        return HostRows(data if data.is_pinned() else data.pin_memory(), self.device)
