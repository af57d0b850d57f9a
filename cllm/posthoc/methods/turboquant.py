"""TurboQuant (arXiv 2504.19874): random rotation, then the best scalar code of a coordinate of a random direction."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from cllm.posthoc.bit_planes import pack_codes, unpack_codes
from cllm.posthoc.code import Code, Codes
from cllm.posthoc.head_bits import HeadBits
from cllm.posthoc.registry import register
from cllm.posthoc.slots import SlotTensors
from cllm.posthoc.tensor_tree import TensorTree


@dataclass(frozen=True)
class Sketch(TensorTree):
    """Signs of random projections of what the codes leave over."""

    signs: Tensor
    """uint8 (B, bytes): one bit for each coordinate."""
    length: Tensor
    """(B, m): ‖r‖ of each vector, for a vector of length 1."""


@dataclass(frozen=True)
class Rotated(Code):
    """Vectors of D numbers as their lengths and codes of their rotated directions."""

    packed: Tensor
    """uint8 (B, bytes): codes of m vectors, D each."""
    length: Tensor
    """(B, m), in the cache's dtype."""
    sketch: Sketch | None
    bits: int
    seed: int
    """Of the rotation and of the sketch's projections."""
    width: tuple[int, ...]

    def decode(self) -> Tensor:
        dim = self.width[-1]
        batch, count = self.length.shape
        codes = (
            unpack_codes(self.packed, self.bits, count * dim)
            if self.bits
            else self.packed.new_zeros(batch, count * dim)
        )
        unit = levels(dim, self.bits, codes.device)[codes.long()].view(batch, count, dim)
        if self.sketch is not None:
            signs = unpack_codes(self.sketch.signs, 1, count * dim).view(batch, count, dim).float() * 2 - 1
            projected = signs @ projection(dim, self.seed, signs.device)
            unit = unit + projected * (math.sqrt(math.pi / 2) / dim) * self.sketch.length.float()[..., None]
        x = (unit @ rotation(dim, self.seed, unit.device)) * self.length.float()[..., None]
        return x.view(batch, -1, *self.width).to(self.length.dtype)


@functools.cache
def rotation(dim: int, seed: int, device: torch.device) -> Tensor:
    """A random orthogonal matrix (D, D) fp32, the same for a seed with every version of torch and numpy."""
    q, r = np.linalg.qr(np.random.RandomState(seed).standard_normal((dim, dim)))
    return torch.from_numpy(q * np.sign(np.diag(r))).float().to(device)


@functools.cache
def projection(dim: int, seed: int, device: torch.device) -> Tensor:
    """The sketch's projections (D, D) fp32, of independent standard normal numbers."""
    state = np.random.RandomState([seed, 1])
    return torch.from_numpy(state.standard_normal((dim, dim))).float().to(device)


@functools.cache
def levels(dim: int, bits: int, device: torch.device) -> Tensor:
    """The 2^bits levels (ascending, fp32) with the least mean squared error for a coordinate of a random unit vector.

    In D dimensions its density is proportional to (1 - x²)^((D - 3) / 2). Lloyd-Max: each level is the mean of its
    cell, and the bounds of cells lie half way between levels. Integrals are sums over 2^16 points.
    """
    points = (np.arange(2**16) + 0.5) / 2**15 - 1
    density = (1 - points**2) ** ((dim - 3) / 2)
    mass = np.concatenate(([0], np.cumsum(density)))
    moment = np.concatenate(([0], np.cumsum(density * points)))
    shares = (np.arange(2**bits) + 0.5) / 2**bits
    found = points[np.searchsorted(mass[1:] / mass[-1], shares).clip(max=len(points) - 1)]
    for _ in range(500):
        bounds = np.searchsorted(points, np.concatenate(([-1], (found[1:] + found[:-1]) / 2, [1])))
        new = np.diff(moment[bounds]) / np.diff(mass[bounds]).clip(min=1e-300)
        if np.abs(new - found).max() < 1e-9:
            break
        found = new
    return torch.from_numpy((found - found[::-1]) / 2).float().to(device)  # symmetric, as the density is


@register(
    "turboquant",
    summary="lengths, and Lloyd-Max codes of randomly rotated directions, without calibration",
    sweep=("turboquant:bits=4", "turboquant:bits=2"),
)
class TurboQuant(HeadBits):
    """TurboQuant: for every vector x of a head (D numbers)

        γ = ‖x‖    u = Π x / γ    q_i = the nearest level of u_i    x' = γ Πᵀ u'

    with a random orthogonal Π. Every coordinate of u is distributed like one of a random direction, whatever x is, so
    one table of 2^b levels is the best scalar code for all (`levels`). For directions

        E ‖u' - u‖² ≤ (√3 π / 2) 4^-b        (theorem 1; 0.36, 0.117, 0.03, 0.009 for b = 1, 2, 3, 4)

    With `sketch=true` keys use b - 1 bits for the levels, and one for signs of random projections of r = u - u',

        x'' = γ Πᵀ (u' + ‖r‖ √(π/2) / D Sᵀ sign(S r)),    S of standard normal numbers,

    which makes products with queries unbiased: E ⟨y, x''⟩ = ⟨y, x⟩, with a variance of at most √3 π² ‖y‖² ‖x‖² 4^-b / D
    (theorem 2). Nothing is fitted, so padding and later tokens change no code. `mean_bits` is not in the paper.
    """

    widths: ClassVar[tuple[int, ...]] = tuple(range(1, 9))

    bits: int = Field(4, ge=1, le=8)
    """Bits of a number, the sketch included."""
    bits_v: int | None = Field(None, ge=1, le=8)
    """`bits` for values; null: the same."""
    sketch: bool = False
    """Use one of the bits of keys for an unbiased sketch of the error."""
    seed: int = Field(0, ge=0, le=2**31 - 1)
    """Of Π and S, which are drawn from it and not stored."""

    def code_slots(self, tensors: SlotTensors, bits: int | None = None) -> Codes:
        own = self.bits if tensors.kind == "k" or self.bits_v is None else self.bits_v
        width, sketch = own if bits is None else bits, self.sketch and tensors.kind == "k"
        return tensors.code_stacks(lambda stack: self._code(stack.data[0], width, sketch=sketch))

    def _code(self, x: Tensor, bits: int, *, sketch: bool) -> Rotated:
        """The code of `x` (B, n, *width)."""
        width, dim, levels_bits = tuple(x.shape[2:]), x.shape[-1], bits - sketch
        vectors = x.flatten(1, -2).float()  # B, m, D
        length = vectors.norm(dim=-1)
        unit = (vectors @ rotation(dim, self.seed, x.device).mT) / length.clamp(min=1e-30)[..., None]
        table = levels(dim, levels_bits, x.device)
        codes = torch.bucketize(unit, (table[1:] + table[:-1]) / 2).to(torch.uint8)
        packed = pack_codes(codes.flatten(1), levels_bits) if levels_bits else codes.new_zeros(len(x), 0)
        rest: Sketch | None = None
        if sketch:
            left = unit - table[codes.long()]
            signs = (left @ projection(dim, self.seed, x.device).mT > 0).to(torch.uint8)
            rest = Sketch(pack_codes(signs.flatten(1), 1), left.norm(dim=-1).to(x.dtype))
        if x.dtype != torch.float64:
            length = length.clamp(max=torch.finfo(x.dtype).max)  # fp16 has a small range
        return Rotated(packed, length.to(x.dtype), rest, levels_bits, self.seed, width)
