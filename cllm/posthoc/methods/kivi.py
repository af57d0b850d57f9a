"""KIVI (arXiv 2402.02750): keys quantised per channel, values per token."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cllm.errors import UserError
from cllm.posthoc.code import Code, Codes
from cllm.posthoc.method import Compressor, TensorCoder
from cllm.posthoc.quantize import Bits, Quantized, grouped, pack, quantize
from cllm.posthoc.registry import register
from cllm.posthoc.slots import SlotTensors


@register(
    "kivi",
    summary="keys quantised per channel, values per token, the last tokens exact",
    sweep=("kivi:bits=4,group=32,residual=32", "kivi:bits=2,group=32,residual=32"),
)
class KIVI(Compressor, TensorCoder):
    """KIVI: keys quantised per channel, values per token, the last tokens kept exact."""

    slot_options: ClassVar[frozenset[str]] = frozenset({"recompress", "sinks"})

    bits: Bits = 2
    """Bits of a code."""
    group: int = Field(32, ge=2)
    """Elements that share a scale and a zero: tokens of a channel in keys, channels of a token in values."""
    residual: int = Field(128, ge=0)
    """Last tokens that stay exact, plus as many as are left when the others are divided by `group`."""

    def encode(self, keys: SlotTensors, values: SlotTensors | None) -> tuple[Codes, Codes]:
        return self._code_all(keys), [None] * len(keys.slots) if values is None else self._code_all(values)

    def _code_all(self, tensors: SlotTensors) -> Codes:
        return [
            self.code(tensors.flat(i, padding="repeat"), tensors.kind, tensors.dtype, tuple(tensors.data[i].shape[2:]))
            for i in range(len(tensors.slots))
        ]

    def code(self, rows: Tensor, kind: Literal["k", "v"], dtype: torch.dtype, width: tuple[int, ...]) -> Code:
        return self._code(rows, kind, dtype, width)

    def coded_rows(self, rows: int) -> int:
        return max(rows - self.residual, 0) // self.group * self.group

    def _code(
        self,
        rows: Tensor,
        kind: Literal["k", "v"],
        dtype: torch.dtype,
        width: tuple[int, ...],
        codes_of: Quantized | None = None,
    ) -> Quantized:
        """The code of `rows` (B, n, C); with `codes_of`, only scale and zero are new, and that one's codes are
        shared."""
        tokens, channels = rows.shape[1:]
        count = self.coded_rows(tokens)
        if not count:
            raise UserError(
                f"{self.name}: nothing of {tokens} tokens is left to quantise with group={self.group}, "
                f"residual={self.residual}; allowed: up to {tokens} together"
            )
        if kind == "v" and channels % self.group:
            raise UserError(f"{self.name}: group={self.group} does not divide the {channels} channels of a token")
        codes, scale, zero = quantize(grouped(rows[:, :count], kind, self.group), self.bits, dtype)
        scale, zero = self._calibrated(scale, zero)
        packed = pack(codes.flatten(1), self.bits) if codes_of is None else codes_of.packed
        rest = rows[:, count:].to(dtype, copy=True).contiguous()
        return Quantized(packed, scale, zero, rest, kind, self.bits, self.group, width)

    def _calibrated(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero to store; a subclass may move them."""
        return scale, zero
