"""A basis of the leading right singular subspace of X (n, C), by filtered iteration with XᵀX.

A step multiplies the basis Q (C, r) by a polynomial of XᵀX that is large at the leading squared singular values σ² and
small at the others, then makes it orthonormal by a Cholesky factor in fp64 (CholeskyQR, Yamamoto et al., 2015):

    Q ← orthonormal(p(XᵀX) Q),    p of degree m, the Chebyshev polynomial on [0, b] (Zhou and Saad, 2007)

b is the mean of the σ² that Q has not found, (‖X‖² - ‖X Q‖²) / (C - r). It is at most about the smallest σ² that Q is
to find, because the mean of what is left cannot exceed its largest. For b = 0, p is the power m.

Each column is orthogonalised against those before it, so the first columns converge to the leading singular vectors one
by one. Large σ are therefore gone from the later columns, and several products may follow each other before rounding
errors in their direction have grown (σ₁² / σ_r²)^m times.

Shapes: B batch, n tokens, C channels, r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.posthoc.products import ROUNDING, Products, Split, Split16, gram, multiply, tf32


@dataclass(frozen=True)
class Way:
    """How to iterate."""

    degrees: tuple[int, ...]
    """Degrees of the polynomials after a first product."""
    deflated: int = 0
    """Leading columns against which the others are orthogonalised between the products of a step; 0: no."""
    halved: bool = True
    """Compute half of XᵀX."""
    panel: int = 0
    """Columns of a Cholesky factor that the library computes at once; 0: all."""
    bf16: bool = False
    """Products of XᵀX and Q are sums of bf16 products instead of TF32 ones."""
    joint: bool = False
    """Keys and values of one shape are one batch (`group.JOINT`, which the benchmark sets)."""


WAYS: dict[str, Way | None] = {
    "plain": None,
    "1222": Way((2, 2, 2)),
    "1222d32": Way((2, 2, 2), deflated=32),
    "123d64": Way((2, 3), deflated=64),
    "133d128": Way((3, 3), deflated=128),
    "134d128": Way((3, 4), deflated=128),
    "134d128, all of XX": Way((3, 4), deflated=128, halved=False),
    "134d128, panels": Way((3, 4), deflated=128, panel=192),
    "1222d32, bf16": Way((2, 2, 2), deflated=32, bf16=True),
    "134d128, bf16": Way((3, 4), deflated=128, bf16=True),
    "1222, joint": Way((2, 2, 2), joint=True),
    "1222d32, bf16, joint": Way((2, 2, 2), deflated=32, bf16=True, joint=True),
    "134d128, joint": Way((3, 4), deflated=128, joint=True),
    "134d128, joint, panels": Way((3, 4), deflated=128, panel=192, joint=True),
}
"""Ways to compare; None: eight plain products, each followed by CholeskyQR."""
WAY = "plain"
"""The one that is used."""

_POWERS = 8


def power(x: Tensor, rank: int, products: Products) -> Tensor:
    """(B, C, r) fp32, orthonormal, r at most `rank`. No oversampling: on a GPU, choosing the best of more directions
    takes longer than more iterations."""
    way = WAYS[WAY]
    return _plain(x, rank, products) if way is None else _filtered(x, rank, products, way)


# ---- filtered steps --------------------------------------------------------------------------------------------------


class Squared:
    """XᵀX / ‖X‖² as an operator on (B, C, r) fp32.

    XᵀX is computed once if that is less work and products are narrow, as squares in fp32 resolve no more of X than
    narrow products do. A product with XᵀX is then the sum of three TF32 products of high and low parts, which is about
    fp32.
    """

    def __init__(self, x: Tensor, products: Products, way: Way):
        self.products, self.rounding = products, ROUNDING[products]
        self.split: Split | Split16 | None = None
        if products != "fp32" and x.shape[1] >= x.shape[2]:
            square = gram(x, products, halved=way.halved)
            square.mul_(_inverse(_trace(square)).float())
            self.split = Split16(square) if way.bf16 else Split(square)
            self.rounding, self.trace = 2**-18 if way.bf16 else 2**-20, self.split.trace
        else:
            self.x = x.bfloat16() if products == "bf16" else x
            self.rounding = max(self.rounding, 2**-22)
            square = torch.linalg.vector_norm(self.x.flatten(1), dim=1, dtype=torch.float64).square()[:, None, None]
            self.scale, self.trace = _inverse(square).float(), (square > 0).double()

    def __call__(self, q: Tensor) -> Tensor:
        if self.split is not None:
            return self.split.multiply(q)
        return multiply(self.x.mT, multiply(self.x, q, self.products), self.products).mul_(self.scale)


def _trace(x: Tensor) -> Tensor:
    """(B, 1, 1) fp64."""
    return x.diagonal(dim1=1, dim2=2).sum(-1, dtype=torch.float64)[:, None, None]


def _inverse(x: Tensor) -> Tensor:
    """1 / x, or 1 for 0."""
    return torch.where(x > 0, x, 1).reciprocal()


def _filtered(x: Tensor, rank: int, products: Products, way: Way) -> Tensor:
    squared = Squared(x, products, way)
    y = squared(random_start(len(x), x.shape[2], min(rank, *x.shape[1:]), x.device).float())
    q = _orthonormal(y, way.panel)
    for degree in way.degrees:
        q = _orthonormal(_polynomial(squared, q, degree, way.deflated), way.panel)
    if way.deflated:  # the last products began with nearly orthogonal columns
        return q
    # A step of Newton and Schulz, Q (3 - QᵀQ) / 2.
    step = multiply(q.mT, q, "fp32").mul_(-0.5)
    step.diagonal(dim1=1, dim2=2).add_(1.5)
    return multiply(q, step, "fp32")


def _polynomial(squared: Squared, q: Tensor, degree: int, deflated: int) -> Tensor:
    """p(XᵀX) Q up to a factor, with the recurrence of shifted Chebyshev polynomials of leading coefficient 1:

    p₁ = x - h,  p₂ = (x - h) p₁ - h²/2,  p₃ = (x - h) p₂ - h²/4 p₁, ...    on [0, 2h]
    """
    y = squared(q)
    found = (q * y).sum((1, 2), dtype=torch.float64)[:, None, None]
    left = squared.trace * (1 - squared.rounding) - found  # what rounding hides counts as found
    half = (left / (2 * max(q.shape[1] - q.shape[2], 1))).clamp(min=0).float()
    before, y = q, y.addcmul_(q, half, value=-1)
    for step in range(1, degree):
        if deflated:
            before, y = _deflated(before, y, deflated)
        after = squared(y).addcmul_(y, half, value=-1)
        before, y = y, after.addcmul_(before, half.square(), value=-1 / 2 if step == 1 else -1 / 4)
    return y


def _deflated(before: Tensor, y: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Both bases with their columns combined such that `y`'s first `count` columns are orthogonal, and its others
    orthogonal to them. The first ones keep their lengths, which may be far from 1."""
    count, wide = min(count, y.shape[2]), y.double()
    gram = wide[:, :, :count].mT @ wide
    corner = gram[:, :, :count].clone()
    factor = _cholesky(corner)
    lengths = corner.diagonal(dim1=1, dim2=2).sqrt()[:, None]
    one = torch.eye(count, dtype=gram.dtype, device=gram.device).expand_as(factor)
    within = torch.linalg.solve_triangular(factor, one, upper=False)  # L⁻¹
    weights = torch.cat((within.mT * lengths, -within.mT @ (within @ gram[:, :, count:])), dim=2).float()

    def combined(part: Tensor) -> Tensor:
        made = multiply(part[:, :, :count], weights, "fp32")
        made[:, :, count:] += part[:, :, count:]
        return made

    return combined(before), combined(y)


def _orthonormal(y: Tensor, panel: int = 0) -> Tensor:
    """A basis (B, C, r) fp32 of the columns of `y` (B, C, r) fp32, Q = Y L⁻ᵀ with L Lᵀ = Yᵀ Y in fp64.

    It is orthonormal up to 1e-16 times the square of the condition number of Y with columns of length 1. If X has rank
    below r, directions that `y` lacks may be shorter than 1; X is zero in them.
    """
    wide = y.double()
    return torch.linalg.solve_triangular(_cholesky(wide.mT @ wide, panel), wide.mT, upper=False).mT.float()


def _cholesky(gram: Tensor, panel: int = 0) -> Tensor:
    """The Cholesky factor L of `gram` (B, r, r) fp64, which is changed. The diagonal is raised by more than rounding
    errors, so that L exists for columns that depend on each other, and for columns of zeros."""
    gram.diagonal(dim1=1, dim2=2).mul_(1 + 1e-14).add_(1e-300)
    size = gram.shape[-1]
    if not 0 < panel < size:
        return torch.linalg.cholesky_ex(gram).L
    factor = torch.zeros_like(gram)
    for begin in range(0, size, panel):
        end = min(begin + panel, size)
        corner = torch.linalg.cholesky_ex(gram[:, begin:end, begin:end]).L
        factor[:, begin:end, begin:end] = corner
        if end < size:
            below = torch.linalg.solve_triangular(corner, gram[:, begin:end, end:], upper=False)
            factor[:, end:, begin:end] = below.mT
            gram[:, end:, end:] -= below.mT @ below
    return factor


def random_start(batch: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """(B, rows, columns) normal numbers in fp64, the same in every call on one type of device."""
    draw = torch.Generator(device).manual_seed(0)
    return torch.randn(rows, columns, generator=draw, device=device).double().expand(batch, -1, -1)


# ---- plain products --------------------------------------------------------------------------------------------------


def _plain(x: Tensor, rank: int, products: Products) -> Tensor:
    apply = _squared(x, products)
    q = random_start(len(x), x.shape[2], min(rank, *x.shape[1:]), x.device)
    for _ in range(_POWERS):
        q = _orthonormal64(apply(q))
    return _orthonormal64(q).float().contiguous()


def _squared(x: Tensor, products: Products) -> Callable[[Tensor], Tensor]:
    """The function Q -> XᵀX Q in fp64."""
    if products == "fp32" or x.shape[1] < x.shape[2]:
        narrow = x.bfloat16() if products == "bf16" else x
        return lambda q: multiply(narrow.mT, multiply(narrow, q.float(), products), products).double()
    square = gram(x, products)
    high = tf32(square)
    low = square - high

    def apply(q: Tensor) -> Tensor:
        q = q.float()
        first = tf32(q)
        rest = multiply(high, q - first, "tf32") + multiply(low, first, "tf32")
        return (multiply(high, first, "tf32") + rest).double()

    return apply


def _orthonormal64(y: Tensor) -> Tensor:
    q = y.double()
    q = q / q.norm(dim=1, keepdim=True).clamp(min=1e-300)
    gram = q.mT @ q
    gram.diagonal(dim1=1, dim2=2).add_(1e-14)
    return torch.linalg.solve_triangular(torch.linalg.cholesky_ex(gram).L, q.mT, upper=False).mT
