"""XQuant (arXiv 2510.11236): KIVI's codes, shared by pairs of neighbouring slots."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from cllm.posthoc.code import Code, Codes
from cllm.posthoc.methods.kivi import KIVI
from cllm.posthoc.quantize import Quantized
from cllm.posthoc.registry import register
from cllm.posthoc.slots import SlotTensors


@register(
    "xquant",
    summary="as kivi, with codes shared by pairs of slots and the range narrowed at both ends",
    sweep=("xquant:bits=2,group=32,residual=32",),
)
class XQuant(KIVI):
    """XQuant: codes shared by pairs of neighbouring slots, and the range of values narrowed.

    Slots l - 1 and l of a pair both use the codes of l - 1; each stores its own scale and zero. Decoding uses
    z' = z + η s (2^b - 1) and s' = (1 - 2η) s.
    """

    slot_options: ClassVar[frozenset[str]] = KIVI.slot_options | {"share_k", "share_v"}
    no_mean_bits: ClassVar[str | None] = "slots that share codes have one width"

    eta: float = Field(0.05, ge=0, le=0.5)
    """η: how far both ends of the range are moved inwards, as a share of max - min."""
    share_k: int = Field(0, ge=0)
    """First slot, counted from 0 among the slots, from which pairs share codes of keys."""
    share_v: int = Field(0, ge=0)
    """The same for values."""

    def _calibrated(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        wide = scale.float()
        moved = zero.float() + self.eta * wide * (2**self.bits - 1)
        return ((1 - 2 * self.eta) * wide).to(scale.dtype), moved.to(zero.dtype)

    def code_slots(self, tensors: SlotTensors, bits: int | None = None) -> Codes:
        codes = super().code_slots(tensors, bits)
        for i in range(1, len(codes)):
            if self._shares(tensors, i):
                lower, upper = codes[i - 1], codes[i]
                assert isinstance(lower, Quantized)
                assert isinstance(upper, Quantized)
                codes[i] = dataclasses.replace(upper, packed=lower.packed)
        return codes

    def _shares(self, tensors: SlotTensors, i: int) -> bool:
        """Whether slot `i` uses the codes of the slot before it."""
        start = self.share_k if tensors.kind == "k" else self.share_v
        return i % 2 == 1 and i >= start and tensors.data[i].shape == tensors.data[i - 1].shape

    def extend_slots(self, tensors: SlotTensors, codes: Sequence[Code], bits: int | None = None) -> Codes:
        joined = list[Quantized]()
        for i, code in enumerate(codes):
            shared = joined[-1] if self._shares(tensors, i) else None
            joined.append(self._extended(code, tensors.flat(i), shared))
        return list(joined)
