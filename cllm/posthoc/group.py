"""A group of slots that share a basis."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from cllm.posthoc.code import Codes
from cllm.posthoc.slots import SlotTensors
from cllm.posthoc.weighting import Weights


@dataclass
class Group:
    """The slots that share a basis of keys, or of values, while they are coded."""

    tensors: SlotTensors
    slots: list[int]
    """Indices into `tensors.slots`."""
    weights: dict[int, Weights]
    """Weights by slot; empty: none."""
    codes: Codes
    """Of all slots, to write into."""
    vectors: Tensor | None = None
    """(B, layers · width, r) fp32, once they are known."""
    spectrum: Tensor | None = None
    """(B, r) fp64, once it is known."""
    widths: Tensor | None = None
    """(r,): bits of each column of A, for `codes=mixed`."""
