"""KIVI (arXiv 2402.02750): keys quantised per channel, values per token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cllm.errors import UserError
from cllm.posthoc.code import Code, Codes
from cllm.posthoc.method import Compressor, TensorCoder
from cllm.posthoc.quantize import Bits, Quantized, grouped, join_packed, pack, quantize
from cllm.posthoc.registry import register
from cllm.posthoc.slots import SlotTensors


@register(
    "kivi",
    summary="keys quantised per channel, values per token, the last tokens exact",
    sweep=("kivi:bits=4,group=32,residual=32", "kivi:bits=2,group=32,residual=32"),
)
class KIVI(Compressor, TensorCoder):
    """KIVI: keys quantised per channel, values per token, the last tokens kept exact."""

    slot_options: ClassVar[frozenset[str]] = frozenset({"recompress", "every", "sinks"})

    bits: Bits = 2
    """Bits of a code."""
    group: int = Field(32, ge=2)
    """Elements that share a scale and a zero: tokens of a channel in keys, channels of a token in values."""
    residual: int = Field(128, ge=0)
    """Last tokens that stay exact, plus as many as are left when the others are divided by `group`. If there are fewer
    than both together, all stay exact."""

    def encode(self, keys: SlotTensors, values: SlotTensors | None) -> tuple[Codes, Codes]:
        return self._encode_all(keys), [None] * len(keys.slots) if values is None else self._encode_all(values)

    def _encode_all(self, tensors: SlotTensors) -> Codes:
        return self.code_all(tensors)

    def code(self, rows: Tensor, kind: Literal["k", "v"], dtype: torch.dtype, width: tuple[int, ...]) -> Code:
        return self._code(rows, kind, dtype, width)

    def absorb(
        self, keys: SlotTensors, values: SlotTensors | None, codes: tuple[Sequence[Code], Sequence[Code]]
    ) -> tuple[Codes, Codes]:
        """The codes are those of all tokens at once: exact ones that leave the residual are quantised in new groups."""
        no_values: Codes = [None] * len(keys.slots)
        return self._extend_all(keys, codes[0]), no_values if values is None else self._extend_all(values, codes[1])

    def _extend_all(self, tensors: SlotTensors, codes: Sequence[Code]) -> Codes:
        return [self._extended(code, tensors.flat(i)) for i, code in enumerate(codes)]

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
