"""A basis of the leading right singular subspace of X (n, C), by filtered iteration with XᵀX.

A step multiplies the basis Q (C, r) by a polynomial of XᵀX that is large at the leading squared singular values σ² and
small at the others, then makes it orthonormal by a Cholesky factor in fp64 (CholeskyQR, Yamamoto et al., 2015):

    Q ← orthonormal(p(XᵀX) Q),    p the Chebyshev polynomial of degree 2 on [0, b] (Zhou and Saad, 2007)

b is the mean of the σ² that Q has not found, (‖X‖² - ‖X Q‖²) / (C - r). It is at most about the smallest σ² that Q is
to find, because the mean of what is left cannot exceed its largest. For b = 0, p is a power.

Each column is orthogonalised against those before it, so the first columns converge to the leading singular vectors one
by one. Large σ are therefore gone from the later columns, up to rounding errors, which a second product multiplies by
(σ₁ / σ_r)² once more. Before it, columns are orthogonalised against the first 32 again, so that only a spectrum with
more large σ than these loses by it.

There is no oversampling, QR or eigensolver: on a GPU each takes longer than more products. The basis of rank r is not
sorted by singular value, but its first columns are a basis of a lower rank that is nearly as good as its own would be.

Shapes: B batch, n tokens, C channels, r rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cllm.posthoc.products import ROUNDING, Products, Split, gram, multiply

_STEPS = 3
_DEFLATED = 32
"""Leading columns against which the others are orthogonalised between the two products of a step."""
_MOST_ALONE = 8
"""Matrices of a batch up to which torch solves one after another on a GPU. With nine and more one kernel solves all,
which took a quarter of the time (two of 4,096 x 384 and 576 a layer group, one H200, 2026-11-28)."""


def power(x: Tensor, rank: int, products: Products) -> Tensor:
    """(B, C, r) fp32, orthonormal, r at most `rank`. If X has rank below r, directions in which X is zero may be
    shorter than 1."""
    squared = Squared(x, products)
    q = _orthonormal(squared(random_start(len(x), x.shape[2], min(rank, *x.shape[1:]), x.device).float()))
    for _ in range(_STEPS):
        q = _orthonormal(_filtered(squared, q))
    return q


class Squared:
    """XᵀX / ‖X‖² as an operator on (B, C, r) fp32.

    XᵀX is computed once if that is less work and products are narrow, as squares in fp32 resolve no more of X than
    narrow products do. A product with XᵀX is then the sum of three TF32 products of high and low parts, which is about
    fp32.
    """

    trace: Tensor
    """(B, 1, 1) fp64: 1, or 0 for a matrix of zeros, up to rounding."""
    rounding: float
    """The relative error of a product."""

    def __init__(self, x: Tensor, products: Products):
        self.products = products
        self.split: Split | None = None
        if products != "fp32" and x.shape[1] >= x.shape[2]:
            square = gram(x, products)
            self.split = Split(square.mul_(_inverse(_trace(square)).float()))
            self.rounding, self.trace = 2**-20, _trace(self.split.high) + _trace(self.split.low)
        else:
            self.x = x.bfloat16() if products == "bf16" else x
            total = torch.linalg.vector_norm(self.x.flatten(1), dim=1, dtype=torch.float64).square()[:, None, None]
            self.rounding, self.trace = max(ROUNDING[products], 2**-22), (total > 0).double()
            self.scale = _inverse(total).float()

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


def _filtered(squared: Squared, q: Tensor) -> Tensor:
    """p(XᵀX) Q up to a factor, for p = (x - h)² - h²/2 with h = b/2."""
    y = squared(q)
    found = (q * y).sum((1, 2), dtype=torch.float64)[:, None, None]
    left = squared.trace * (1 - squared.rounding) - found  # what rounding hides counts as found
    half = (left / (2 * max(q.shape[1] - q.shape[2], 1))).clamp(min=0).float()
    q, y = _deflated(q, y.addcmul_(q, half, value=-1))
    return squared(y).addcmul_(y, half, value=-1).addcmul_(q, half.square(), value=-0.5)


def _deflated(before: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both bases with their columns combined such that `y`'s first columns are orthogonal, and its others orthogonal to
    them. The first ones keep their lengths, which may be far from 1."""
    count, wide = min(_DEFLATED, y.shape[2]), y.double()
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


def _orthonormal(y: Tensor) -> Tensor:
    """A basis (B, C, r) fp32 of the columns of `y` (B, C, r) fp32, Q = Y L⁻ᵀ with L Lᵀ = Yᵀ Y in fp64.

    It is orthonormal up to 1e-16 times the square of the condition number of Y with columns of length 1.
    """
    wide = y.double()
    factor = _cholesky(wide.mT @ wide)
    # The rows of Y are independent, so that a small batch is also a larger one of matrices with fewer rows.
    fewest, rows = _MOST_ALONE // len(y) + 1, y.shape[1]
    parts = next((n for n in range(fewest, 4 * fewest) if rows % n == 0), 1)
    pieces = wide.reshape(parts * len(y), rows // parts, y.shape[2])
    solved = torch.linalg.solve_triangular(factor.repeat_interleave(parts, dim=0), pieces.mT, upper=False)
    return solved.mT.float().reshape(y.shape)


def _cholesky(gram: Tensor) -> Tensor:
    """The Cholesky factor L of `gram` (B, r, r) fp64, which is changed. The diagonal is raised by more than rounding
    errors, so that L exists for columns that depend on each other, and for columns of zeros."""
    gram.diagonal(dim1=1, dim2=2).mul_(1 + 1e-14).add_(1e-300)
    return torch.linalg.cholesky_ex(gram).L


def random_start(batch: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """(B, rows, columns) normal numbers in fp64, the same in every call on one type of device."""
    draw = torch.Generator(device).manual_seed(0)
    return torch.randn(rows, columns, generator=draw, device=device).double().expand(batch, -1, -1)
