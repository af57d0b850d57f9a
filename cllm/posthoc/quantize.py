"""Quantised tensors: KIVI (arXiv 2402.02750) and XQuant (arXiv 2510.11236).

For a group of numbers X and b bits

    z = min X        s = (max X - min X) / (2^b - 1)        Q = round((X - z) / s)        X' = s Q + z

Groups run along the tokens, for every channel, in keys; along the channels, for every token, in values (KIVI).
z and s are stored in the cache's dtype and Q is made with them as stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from cllm.errors import UserError
from cllm.posthoc.code import Code, Compressor, Part, TensorCoder
from cllm.posthoc.packing import pack, unpack

Bits = Literal[1, 2, 4, 8]


@dataclass(frozen=True)
class Quantized(Code):
    """The first tokens as packed codes, the rest exact. Slots that share codes hold the same `packed`."""

    packed: Tensor
    """uint8 (B, bytes)."""
    scale: Tensor
    """(B, groups)."""
    zero: Tensor
    """(B, groups)."""
    rest: Tensor
    """(B, tokens since, C)."""
    kind: Literal["k", "v"]
    bits: Bits
    size: int
    """Numbers of a group."""
    width: tuple[int, ...]

    def decode(self) -> Tensor:
        rows, channels = self.scale.shape[1], self.rest.shape[2]
        codes = unpack(self.packed, self.bits, rows * self.size).view(-1, rows, self.size)
        groups = codes.float() * self.scale.float()[..., None] + self.zero.float()[..., None]
        if self.kind == "k":
            quantized = groups.view(len(groups), -1, channels, self.size).mT.flatten(1, 2)  # B, n, C
        else:
            quantized = groups.view(len(groups), -1, channels)
        return torch.cat((quantized.to(self.rest.dtype), self.rest), dim=1).unflatten(-1, self.width)


def grouped(rows: Tensor, kind: Literal["k", "v"], size: int) -> Tensor:
    """(B, groups, size) of `rows` (B, n, C): n a multiple of `size` for keys, C for values."""
    if kind == "k":
        return rows.unflatten(1, (-1, size)).mT.flatten(1, 2)
    return rows.unflatten(2, (-1, size)).flatten(1, 2)


def quantize(groups: Tensor, bits: Bits, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 (B, groups, size), scale and zero (B, groups) in `dtype`, of `groups` (B, groups, size) fp32."""
    zero, top = groups.amin(-1).to(dtype), groups.amax(-1)
    scale = ((top - zero.float()) / (2**bits - 1)).clamp(min=torch.finfo(dtype).tiny).to(dtype)
    codes = ((groups - zero.float()[..., None]) / scale.float()[..., None]).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, zero


class KIVI(Compressor, TensorCoder):
    """KIVI: keys quantised per channel, values per token, the last tokens kept exact."""

    name: ClassVar[str] = "kivi"
    of_slots: ClassVar[frozenset[str]] = frozenset({"recompress", "sinks"})

    bits: Bits = 2
    """Bits of a code."""
    group: int = Field(32, ge=2)
    """Numbers that share a scale and a zero: tokens of a channel in keys, channels of a token in values."""
    residual: int = Field(128, ge=0)
    """Last tokens that stay exact; and as many more as make the quantised ones a multiple of `group`."""

    def encode(self, keys: Part, values: Part | None) -> tuple[list[Code | None], list[Code | None]]:
        return self._code_part(keys), [None] * len(keys.slots) if values is None else self._code_part(values)

    def _code_part(self, part: Part) -> list[Code | None]:
        return [
            self.code(part.flat(i, padding="repeat"), part.kind, part.dtype, tuple(part.data[i].shape[2:]))
            for i in range(len(part.slots))
        ]

    def code(self, rows: Tensor, kind: Literal["k", "v"], dtype: torch.dtype, width: tuple[int, ...]) -> Code:
        return self._code(rows, kind, dtype, width)

    def coded(self, rows: int) -> int:
        return max(rows - self.residual, 0) // self.group * self.group

    def _code(
        self,
        rows: Tensor,
        kind: Literal["k", "v"],
        dtype: torch.dtype,
        width: tuple[int, ...],
        codes_of: Quantized | None = None,
    ) -> Quantized:
        """Codes of `rows` (B, n, C); with `codes_of`, scale and zero alone, beside the codes of another."""
        tokens, channels = rows.shape[1:]
        count = self.coded(tokens)
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
        """Scale and zero as they are stored."""
        return scale, zero


class XQuant(KIVI):
    """XQuant: codes shared by pairs of neighbouring slots, and endpoints drawn in.

    Of a pair (l - 1, l) the codes are those of l - 1, and l has a scale and a zero of its own, so half of the codes
    are stored. Decoding uses z' = z + η s (2^b - 1) and s' = (1 - 2η) s.
    """

    name: ClassVar[str] = "xquant"
    of_slots: ClassVar[frozenset[str]] = frozenset({"recompress", "sinks", "share_k", "share_v"})

    eta: float = Field(0.05, ge=0, le=0.5)
    """η: how far the two endpoints are drawn in, as a share of max - min."""
    share_k: int = Field(0, ge=0)
    """Pairs share codes of keys from this slot on, counted from 0 among the slots."""
    share_v: int = Field(0, ge=0)
    """The same for values."""

    def _calibrated(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        wide = scale.float()
        moved = zero.float() + self.eta * wide * (2**self.bits - 1)
        return ((1 - 2 * self.eta) * wide).to(scale.dtype), moved.to(zero.dtype)

    def _code_part(self, part: Part) -> list[Code | None]:
        start, found = self.share_k if part.kind == "k" else self.share_v, list[Quantized]()
        for i, data in enumerate(part.data):
            shares = i % 2 == 1 and i >= start and data.shape == part.data[i - 1].shape
            width, rows = tuple(data.shape[2:]), part.flat(i, padding="repeat")
            found.append(self._code(rows, part.kind, part.dtype, width, found[-1] if shares else None))
        return list(found)


def bits_per_number(codes: list[Code | None], *, scales: bool = True) -> float:
    """Bits of the quantised tokens of `codes` for each number, shared codes once; without `scales`, of codes alone."""
    coded = [code for code in codes if isinstance(code, Quantized)]
    numbers = sum(code.scale.numel() * code.size for code in coded)
    held = {id(code.packed): code.packed.nbytes for code in coded}
    extra = sum(code.scale.nbytes + code.zero.nbytes for code in coded) if scales else 0
    return 8 * (sum(held.values()) + extra) / numbers
