"""Batched matrix products in a chosen precision, for fits of cached tensors.

Shapes: B batch, n tokens, C channels, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Literal

import torch
from torch import Tensor

Products = Literal["fp32", "tf32", "bf16"]

ROUNDING: dict[Products, float] = {"fp32": 2**-24, "tf32": 2**-11, "bf16": 2**-8}
"""The relative rounding error of a number in a product."""
_BLOCK = 1024
"""Channels of a block of `gram`."""
_PRECISION = Lock()
"""Groups are factorised by several threads, but the precision of fp32 products is a setting of the process."""


@contextmanager
def _fp32_products(precision: Literal["high", "highest"]) -> Iterator[None]:
    """Products of fp32 tensors in that precision of `torch.set_float32_matmul_precision`; the one before returns."""
    with _PRECISION:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def multiply(x: Tensor, y: Tensor, products: Products, dtype: torch.dtype = torch.float32) -> Tensor:
    """x y in `dtype`, for operands (B, n, C) and (B, C, r) in fp32 or narrower, rounded to `products` first.

    The precision that the process has set for fp32 products does not matter, and is restored."""
    if products == "bf16":
        return (x.bfloat16() @ y.bfloat16()).to(dtype)
    with _fp32_products("high" if products == "tf32" else "highest"):
        return (x @ y).to(dtype)


class Split:
    """A matrix (B, C, C) fp32 as the sum of two in TF32, for products that are nearly as exact as fp32.

    A product is the sum of three TF32 products of high and low parts; the product of both low parts is left out. On a
    GPU it takes less than half the time of one in fp32.
    """

    def __init__(self, x: Tensor):
        self.high = tf32(x)
        self.low = x - self.high

    def multiply(self, y: Tensor) -> Tensor:
        """The product (B, C, r) fp32 with `y` (B, C, r) fp32."""
        first = tf32(y)
        with _fp32_products("high"):
            product = self.low @ first
            product.baddbmm_(self.high, y - first)
            return product.baddbmm_(self.high, first)


def tf32(x: Tensor) -> Tensor:
    """`x` in fp32, truncated to the 10 fraction bits of TF32."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def gram(x: Tensor, products: Products) -> Tensor:
    """XᵀX (B, C, C) in fp32, of `x` (B, n, C) rounded to `products`.

    Of many channels, the blocks below the diagonal are copies of those above it: of 4,096 channels 5/8 are computed.
    """
    x = x.bfloat16() if products == "bf16" else x
    size = x.shape[2]
    if size < 4 * _BLOCK:
        return _gram_block(x, x, products)
    out = torch.empty(len(x), size, size, device=x.device)
    for begin in range(0, size, _BLOCK):
        end = min(begin + _BLOCK, size)
        rows = _gram_block(x[:, :, begin:end], x[:, :, begin:], products)
        out[:, begin:end, begin:] = rows
        out[:, end:, begin:end] = rows[:, :, end - begin :].mT
    return out


def _gram_block(x: Tensor, y: Tensor, products: Products) -> Tensor:
    """XᵀY in fp32; `x` and `y` are bf16 if `products` is."""
    if products != "bf16":
        return multiply(x.mT, y, products)
    if x.is_cuda:
        return torch.bmm(x.mT, y, out_dtype=torch.float32)
    return x.float().mT @ y.float()
