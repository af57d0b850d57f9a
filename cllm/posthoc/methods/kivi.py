"""KIVI (arXiv 2402.02750): keys quantised per channel, values per token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from cllm.errors import UserError
from cllm.posthoc.code import Code, Codes
from cllm.posthoc.head_bits import HeadBits
from cllm.posthoc.method import TensorCoder
from cllm.posthoc.quantize import Bits, Quantized, grouped, join_packed, pack, quantize
from cllm.posthoc.registry import register
from cllm.posthoc.slots import SlotTensors


@register(
    "kivi",
    summary="keys quantised per channel, values per token, the last tokens exact",
    sweep=("kivi:bits=4,group=32,residual=32", "kivi:bits=2,group=32,residual=32"),
)
class KIVI(HeadBits, TensorCoder):
    """KIVI: keys quantised per channel, values per token, the last tokens kept exact. `mean_bits` is not in the
    paper."""

    slot_options: ClassVar[frozenset[str]] = frozenset({"recompress", "every", "sinks", "mean_bits"})
    widths: ClassVar[tuple[int, ...]] = (1, 2, 4, 8)

    bits: Bits = 2
    """Bits of a code."""
    group: int = Field(32, ge=2)
    """Elements that share a scale and a zero: tokens of a channel in keys, channels of a token in values."""
    residual: int = Field(128, ge=0)
    """Last tokens that stay exact, plus as many as are left when the others are divided by `group`. If there are fewer
    than both together, all stay exact."""

    def code_slots(self, tensors: SlotTensors, bits: int | None = None) -> Codes:
        return self._with_bits(tensors, bits).code_all(tensors)

    def _with_bits(self, tensors: SlotTensors, bits: int | None) -> Self:
        """The method itself for None; a copy with `bits` for heads that are coded by themselves."""
        if bits is None:
            return self
        undivided = [x.shape[-1] for x in tensors.data if x.shape[-1] % self.group]
        if tensors.kind == "v" and undivided:
            raise UserError(
                f"{self.name}: {self.weighting} codes every head by itself, and group={self.group} does not divide the "
                f"{undivided[0]} channels of a head"
            )
        return self.model_copy(update={"bits": bits})

    def code(self, rows: Tensor, kind: Literal["k", "v"], dtype: torch.dtype, width: tuple[int, ...]) -> Code:
        return self._code(rows, kind, dtype, width)

    def extend_slots(self, tensors: SlotTensors, codes: Sequence[Code], bits: int | None = None) -> Codes:
        """The codes are those of all tokens at once: exact ones that leave the residual are quantised in new groups."""
        method = self._with_bits(tensors, bits)
        return [method._extended(code, tensors.flat(i)) for i, code in enumerate(codes)]

    def extend(
        self, code: Code, rows: Tensor, kind: Literal["k", "v"], dtype: torch.dtype, width: tuple[int, ...]
    ) -> Code:
        return self._extended(code, rows)

    def _extended(self, code: Code, rows: Tensor, codes_of: Quantized | None = None) -> Quantized:
        """`code` with `rows` (B, n, C) behind its own; with `codes_of`, it shares that one's codes."""
        assert isinstance(code, Quantized)
        rows = torch.cat((code.rest.float(), rows), dim=1)
        if not self.coded_rows(rows.shape[1]):
            rest = rows.to(code.rest.dtype)
            return dataclasses.replace(code, packed=code.packed if codes_of is None else codes_of.packed, rest=rest)
        new = self._code(rows, code.kind, code.rest.dtype, code.width)
        packed = join_packed(code, new) if codes_of is None else codes_of.packed
        scale, zero = torch.cat((code.scale, new.scale), dim=1), torch.cat((code.zero, new.zero), dim=1)
        return dataclasses.replace(new, packed=packed, scale=scale, zero=zero)

    def coded_rows(self, rows: int) -> int:
        return max(rows - self.residual, 0) // self.group * self.group

    def _code(self, rows: Tensor, kind: Literal["k", "v"], dtype: torch.dtype, width: tuple[int, ...]) -> Quantized:
        """The code of `rows` (B, n, C)."""
        tokens, channels = rows.shape[1:]
        count = self.coded_rows(tokens)  # 0: all rows stay exact
        if kind == "v" and channels % self.group:
            raise UserError(f"{self.name}: group={self.group} does not divide the {channels} channels of a token")
        codes, scale, zero = quantize(grouped(rows[:, :count], kind, self.group), self.bits, dtype)
        scale, zero = self._calibrated(scale, zero)
        packed = pack(codes.flatten(1), self.bits)
        rest = rows[:, count:].to(dtype, copy=True).contiguous()
        return Quantized(packed, scale, zero, rest, kind, self.bits, self.group, width)

    def _calibrated(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero to store; a subclass may move them."""
        return scale, zero
