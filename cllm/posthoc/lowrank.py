"""Low-rank factors of cached tensors: X ≈ A Bᵀ, with a basis A over tokens and coefficients B per layer.

X (B, n, C) stacks the rows of a group of layers side by side, C = layers · width. By Eckart and Young the best rank-r
X' is U_r Σ_r V_rᵀ, with ||X - X'||² = Σ_{i>r} σ_i². Stored are A = X V_r (B, n, r), which all layers of the group
share, and each layer's rows of V_r as B (B, width, r). As A is computed from X, X' is a projection of X however
accurate V_r is, and full rank loses only rounding.

    exact    SVD in fp64
    gram     eigenvectors of XᵀX (C, C), or of XXᵀ (n, n) where that is smaller, in fp64
    random   subspace iteration from a random start (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithm 4.4), shifted
             as in dashSVD (arXiv 2404.09276), in fp32; its products with X may be in TF32 or bf16, orthogonalisation
             is always in fp32
    power    iteration with Chebyshev polynomials of XᵀX, made orthonormal by Cholesky factors in fp64 (`power.py`).
             The result is a basis of the subspace, not sorted by singular value

For `random` and `power` in fp32, ||X - X'|| is within 1 % of the minimum if σ_i falls like i^-1/4 or faster and r is up
to 3/8 of C (1.2 % at i^-1/10), down to the resolution of fp32, 1e-6 of ||X||. bf16 resolves 1e-3: if one singular value
is 1000 times the next, 40 to 50 % of the spectrum below it is lost. `choose_solver` chooses between `gram` and `power`
by the dtype of the cache.

Shapes: B batch, n tokens, C channels, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cllm.errors import UserError
from cllm.posthoc.budget import largest
from cllm.posthoc.code import Code
from cllm.posthoc.power import power, random_start
from cllm.posthoc.products import ROUNDING, Products, multiply

Algorithm = Literal["exact", "gram", "random", "power"]
_NARROW: dict[torch.dtype, Products] = {torch.bfloat16: "tf32", torch.float16: "fp32"}
"""The products of `power` for a cache of that dtype."""

_OVERSAMPLE = 16
_ITERATIONS = 4
_DIAGONAL = 1e-13
_ALIGNED = 8
"""Ranks of which multiples are read fast."""


@dataclass(frozen=True)
class Solver:
    """How leading singular vectors are computed."""

    algorithm: Algorithm
    products: Products
    """Of `random` and `power`, and of the rows A."""

    FACTS: ClassVar[frozenset[str]] = frozenset({"svd", "products"})
    """Keys of `facts`."""

    def facts(self) -> dict[str, str]:
        """The solver as records name it."""
        return {"svd": self.algorithm, "products": self.products}

    def right_vectors(self, x: Tensor, rank: int | None) -> tuple[Tensor, Tensor | None]:
        """`right_vectors` (below) of `x` (B, n, C) by this solver."""
        return right_vectors(x, self.algorithm, rank, self.products)


def choose_solver(dtype: torch.dtype, *, spectrum: bool = False) -> Solver:
    """The fastest solver whose products lose less of a cache than rounding it to `dtype` did.

    The iteration of `power` itself makes ||X - X'|| up to 1 % larger (see above), whatever its products are.

    - bf16: `power` with TF32 products. Rounding to bf16 changed each number by up to 2^-8 of itself. TF32 multiplies
      bf16 numbers as they are; it rounds keys before RoPE and the other factor by up to 2^-11. XᵀX in fp32 resolves σ
      down to 1e-3 of the largest. So if one singular value is 1000 times the next, more of X is lost than with `gram`,
      but less than half of what rounding to bf16 changed (`tests/posthoc/test_solvers.py`, n > C).
    - fp16: `power` with fp32 products. Rounding to fp16 changed each number by up to 2^-11 of itself. In the same
      spectra TF32 products lose more than that.
    - fp32 and fp64: `gram`, in fp64.

    Args:
        dtype: of the cache, not of the tensor that is factorised.
        spectrum: whether all singular values are needed. Only `gram` computes them.
    """
    products = None if spectrum else _NARROW.get(dtype)
    return Solver("gram", "fp32") if products is None else Solver("power", products)


def right_vectors(
    x: Tensor, algorithm: Algorithm, rank: int | None, products: Products = "fp32"
) -> tuple[Tensor, Tensor | None]:
    """Leading right singular vectors of `x` (B, n, C), and its singular values if the algorithm computes them all.

    `x` is fp32, or bf16 if `products` is; `products` matters to `random` and `power` only.

    Returns:
        (B, C, r) fp32, orthonormal, for r = `rank`, or min(n, C) for None; and (B, min(n, C)) fp64, or None for
        `random` and `power`.
    """
    full = min(x.shape[1:])
    rank = full if rank is None else rank
    if algorithm == "random":
        return _subspace(x, rank, products), None
    if algorithm == "power":
        return power(x, rank, products), None
    if algorithm == "exact":
        _, values, vt = torch.linalg.svd(x.double(), full_matrices=False)
        return vt[:, :rank].mT.float().contiguous(), values
    wide = x.double()
    if x.shape[1] >= x.shape[2]:
        squares, vectors = torch.linalg.eigh(wide.mT @ wide)
        return vectors.flip(-1)[..., :rank].float().contiguous(), squares.flip(-1).clamp(min=0).sqrt()
    squares, vectors = torch.linalg.eigh(wide @ wide.mT)
    right = wide.mT @ vectors.flip(-1)[..., :rank]
    return torch.linalg.qr(right).Q.float(), squares.flip(-1).clamp(min=0).sqrt()


def _subspace(x: Tensor, rank: int, products: Products) -> Tensor:
    """(B, C, rank). The random start is the same in every call, so results are reproducible."""
    x = x.bfloat16() if products == "bf16" else x
    size = min(rank + _OVERSAMPLE, *x.shape[1:])
    q = torch.linalg.qr(random_start(len(x), x.shape[2], size, x.device).float()).Q
    shift = q.new_zeros(len(x), 1, 1)
    for _ in range(_ITERATIONS):
        y = multiply(x.mT, multiply(x, q, products), products) - shift * q
        q, shift = torch.linalg.qr(y).Q, _grown(shift, y, products)
    small = multiply(x, q, products)  # B, n, size
    _, vectors = torch.linalg.eigh(multiply(small.mT, small, "fp32").double())  # the best directions within q
    return multiply(q, vectors.flip(-1)[..., :rank].float(), "fp32")


def _grown(shift: Tensor, y: Tensor, products: Products) -> Tensor:
    """The next shift α (B, 1, 1) of an iteration with XᵀX - αI, after `y` = (XᵀX - αI) Q.

    α = (σ_min(Y) + α) / 2 is at most half of the smallest σ² that Q is to find, so that nothing below it grows faster
    (dashSVD, arXiv 2404.09276). σ_min is bounded from below, without an eigensolver, by λ_max(G⁻¹) <= ‖G⁻⁸‖^(1/8)
    with G = YᵀY, minus the rounding of products: if large singular values hide it, α does not change.
    """
    inverse, total = _inverse_gram(y)
    fourth = inverse @ inverse
    fourth = fourth @ fourth
    bound = (fourth @ fourth).flatten(1).norm(dim=1)[:, None, None] ** (1 / 8)
    least = ((1 / bound - _DIAGONAL).clamp(min=0).sqrt() - ROUNDING[products]) * total.sqrt()
    return torch.maximum(shift, (least.float() + shift) / 2)


def _inverse_gram(y: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse (B, m, m) fp64 of YᵀY / trace + 1e-13 I for `y` (B, n, m), and the trace (B, 1, 1)."""
    wide = y.double()
    gram = wide.mT @ wide
    total = gram.diagonal(dim1=1, dim2=2).sum(-1)[:, None, None].clamp(min=1e-300)
    gram = gram / total
    gram.diagonal(dim1=1, dim2=2).add_(_DIAGONAL)
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(gram).L), total


def energy_rank(values: Tensor, energy: float) -> int:
    """The smallest rank that keeps `energy` of Σσ² in every row of `values` (B, m), descending."""
    kept = values.square().cumsum(-1) / values.square().sum(-1, keepdim=True).clamp(min=1e-300)
    return int((kept < energy - 1e-12).sum(-1).max()) + 1


def factor_elements(tokens: int, layers: int, width: int, rank: int) -> int:
    """Elements of the factors of a group: tokens · rank of A and layers · width · rank of B."""
    return (tokens + layers * width) * rank


def ranks_for_budget(
    budget: float, tokens: int, keys: list[tuple[int, int]], values: list[tuple[int, int]], *, keys_to_values: float
) -> tuple[list[int], list[int]] | None:
    """The largest ranks of the groups, (layers, width) each, at which all factors have at most `budget` elements.

    A full group of keys gets rank x and one of values `keys_to_values` · x; a smaller group gets a rank in proportion
    to its layers, and every group at least 1. A rank is at most min(tokens, layers · width) of its group; the others
    then grow instead. None if rank 1 everywhere exceeds `budget`.
    """
    groups = [(n, w, 1.0) for n, w in keys] + [(n, w, keys_to_values) for n, w in values]
    longest = max(n for n, _, _ in groups)

    def ranks(x: float) -> list[int]:
        return [max(1, min(math.floor(x * weight * n / longest + 1e-9), tokens, n * w)) for n, w, weight in groups]

    def cost(x: float) -> int:
        return sum(factor_elements(tokens, n, w, r) for (n, w, _), r in zip(groups, ranks(x), strict=True))

    if (x := largest(cost, budget, float(longest * max(w * n for n, w, _ in groups)))) is None:
        return None
    best = ranks(x)
    return best[: len(keys)], best[len(keys) :]


def water_filling(squares: Sequence[Tensor], costs: Sequence[int], budget: float) -> list[int] | None:
    """The ranks of groups that keep the most of Σσ² within `budget` elements.

    Args:
        squares: σ² of each group (m,), descending, all in one unit.
        costs: elements of one rank of each group.

    Returns:
        At least 1 each; None if rank 1 everywhere exceeds `budget`. Ranks are taken in the order of σ² per element.
    """
    if sum(costs) > budget:
        return None
    device = squares[0].device
    groups = torch.cat([torch.full((len(s) - 1,), i, device=device) for i, s in enumerate(squares)])
    gains = torch.cat([s[1:] / cost for s, cost in zip(squares, costs, strict=True)])
    price = torch.tensor(costs, dtype=torch.float64, device=device)
    order = groups[gains.argsort(descending=True, stable=True)]
    taken = order[price[order].cumsum(0) <= budget - sum(costs)]
    return (1 + torch.bincount(taken, minlength=len(costs))).tolist()


def fast_rank(rank: int, tensor: Tensor, dtype: torch.dtype) -> int:
    """The largest rank up to `rank` at which decoding reads factors of `tensor` (B, n, G, D) in `dtype` fast.

    The kernel that keeps B in shared memory needs rows of A that start at multiples of 16 bytes: ranks in multiples of
    8. Below 64, and for numbers and heads that it does not support, `rank` itself.
    """
    rounds = dtype.itemsize == 2 and tensor.dim() == 4 and tensor.shape[3] in (64, 128) and rank >= 64
    return rank - rank % _ALIGNED if rounds else rank


def padded(x: Tensor, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` (..., r), a factor of `tensor`, with columns of zeros up to the next rank that decoding reads fast."""
    rank = x.shape[-1]
    return x if fast_rank(rank, tensor, dtype) == rank else F.pad(x, (0, -rank % _ALIGNED))


def low_rank_already(name: str) -> UserError:
    """The error of a method, by name, that gets latents."""
    return UserError(f"{name}: the slots are latents, which are low rank already; allowed: keys and values")


@dataclass(frozen=True)
class LowRank(Code):
    """One layer's part of A Bᵀ."""

    a: Code
    """(B, n, r): shared by the layers of a group."""
    b: Tensor
    """(B, width, r)."""
    width: tuple[int, ...]

    def decode(self) -> Tensor:
        return (self.a.decode() @ self.b.mT).unflatten(-1, self.width)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.a.decode(), self.columns()

    @property
    def has_factors(self) -> bool:
        return True

    def columns(self) -> Tensor:
        """B (B, width, r)."""
        return self.b
