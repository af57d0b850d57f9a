"""Numbers of 8 bits with one scale for each token or channel: the baselines `int8` and `fp8`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cllm.posthoc.code import Code, Codes, smallest_scale
from cllm.posthoc.method import Compressor
from cllm.posthoc.registry import register
from cllm.posthoc.slots import SlotTensors

Axis = Literal["token", "channel"]


@dataclass(frozen=True)
class Scaled(Code):
    """A tensor as numbers of 8 bits times scales."""

    numbers: Tensor
    """int8, or the bytes of fp8 numbers as uint8, (B, n, *width)."""
    scale: Tensor
    """In the cache's dtype: (B, n, ..., 1), one for each token of a head, or (B, 1, *width), one for each channel."""

    def decode(self) -> Tensor:
        numbers = self.numbers.view(torch.float8_e4m3fn) if self.numbers.dtype == torch.uint8 else self.numbers
        return (numbers.float() * self.scale.float()).to(self.scale.dtype)


@register(
    "int8", summary="8-bit integers with one scale for each channel of keys and each token of values", sweep=("int8",)
)
class Int8(Compressor):
    """int8 without a zero point: x' = s q, q = round(x / s), s = max |x| / 127 over a vector.

    A vector is a channel of all tokens (`channel`) or a token of one head (`token`). The channels of keys differ far
    more in size than their tokens, so keys have a scale for each channel, and values for each token (KIVI, arXiv
    2402.02750).
    """

    largest: ClassVar[float] = 127.0

    keys: Axis = "channel"
    """Vectors of keys, and of latents, that share a scale: `channel` or `token`."""
    values: Axis = "token"
    """The same for values."""

    def encode(self, keys: SlotTensors, values: SlotTensors | None) -> tuple[Codes, Codes]:
        k = self._code_all(keys, self.keys)
        return k, [None] * len(keys.slots) if values is None else self._code_all(values, self.values)

    def _code_all(self, tensors: SlotTensors, axis: Axis) -> Codes:
        return tensors.code_stacks(
            lambda stack: self._code(stack.flat(0).view(stack.data[0].shape), axis, tensors.dtype)
        )

    def _code(self, x: Tensor, axis: Axis, dtype: torch.dtype) -> Scaled:
        """The code of `x` (B, n, *width) fp32, padding 0."""
        scale = x.abs().amax(1 if axis == "channel" else -1, keepdim=True) / self.largest
        scale = scale.clamp(min=smallest_scale(dtype)).to(dtype)
        return Scaled(self._numbers((x / scale.float()).clamp(-self.largest, self.largest)), scale)

    def _numbers(self, x: Tensor) -> Tensor:
        return x.round().to(torch.int8)


@register(
    "fp8", summary="fp8 numbers (e4m3) with one scale for each channel of keys and each token of values", sweep=("fp8",)
)
class FP8(Int8):
    """fp8 (e4m3: 4 bits of exponent, 3 of mantissa): x' = s q, s = max |x| / 448 over a vector as in `int8`.

    The relative error of a number is at most 1/16 whatever its size, so scales matter less than for int8.
    """

    largest: ClassVar[float] = 448.0

    def _numbers(self, x: Tensor) -> Tensor:
        return x.to(torch.float8_e4m3fn).view(torch.uint8)
