"""Low-rank codes in bases that are fixed before a prompt is seen: those that a model's weights give.

A slot's keys before RoPE, and its values, are y = W x + b with W (width, d_model). A truncated singular value
decomposition of W D, for an invertible D, replaces W by L R with

    W D = U Σ Vᵀ,    L = U_r √Σ_r,    R = √Σ_r V_rᵀ D⁻¹ = √Σ_r⁻¹ U_rᵀ W,    so L R = U_r U_rᵀ W

R x is what the papers cache. It equals √Σ_r⁻¹ U_rᵀ (y - b): the cached keys and values, projected on the basis U_r.
So no input has to be recorded, and every method of this kind is a basis U: the leading eigenvectors of the form
W D Dᵀ Wᵀ. Stored is A = (y - b) U_r (B, n, r); read is A U_rᵀ + b. U_r and b belong to the method and not to a cache.
The projection is idempotent: compressing again loses nothing more.

    D Dᵀ = 1                        LoRC, and Palu without whitening: W itself
    D Dᵀ = diag(mean |x|^α)²        ASVD
    D Dᵀ = E[x xᵀ]                  Palu, as D is its Cholesky factor; the form is the second moment of y - b
    second moment of y itself       EigenAttention

If a norm with gains g follows the key projection, a token's key is one number times diag(g) (W x + b) (`key_norm.py`).
The basis is then that of diag(g) [W, b] with inputs [x, 1]. It projects the normalised key, and nothing is subtracted.
A norm over each head multiplies each head by another number, so each head has its own basis.

Shapes: B batch, n tokens, width = G · D numbers of G KV heads of D channels, r rank.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cllm.posthoc.code import Code
from cllm.posthoc.lowrank import Solver


class Basis:
    """An orthonormal basis of keys or of values, and what is subtracted before. It belongs to the method, which uses it
    for all caches, and does not count as a cache's tensor."""

    def __init__(self, matrix: Tensor, bias: Tensor | None):
        self.matrix, self.bias = matrix, bias
        """(width, r) and (width,) in the cache's dtype."""

    def project(self, rows: Tensor) -> Tensor:
        """(y - b) U (B, n, r) of rows y (B, n, width) fp32."""
        return (rows if self.bias is None else rows - self.bias.float()) @ self.matrix.float()

    @property
    def nbytes(self) -> int:
        return self.matrix.nbytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(frozen=True)
class Projected(Code):
    """A Uᵀ + b, with a basis that the cache does not store."""

    a: Code
    """(B, n, r)."""
    basis: Basis
    width: tuple[int, ...]

    def decode(self) -> Tensor:
        y = self.a.decode() @ self.basis.matrix.mT
        return (y if self.basis.bias is None else y + self.basis.bias).unflatten(-1, self.width)

    @property
    def has_factors(self) -> bool:
        return self.basis.bias is None

    def factors(self) -> tuple[Tensor, Tensor] | None:
        if not self.has_factors:
            return None
        a = self.a.decode()
        return a, self.basis.matrix.expand(len(a), -1, -1)

    def read_flops(self) -> int:
        return 2 * self.a.decode().numel() * len(self.basis.matrix)


@dataclass(frozen=True)
class Spectrum:
    """The eigenvectors of a slot's form, for groups of heads separately."""

    vectors: tuple[Tensor, ...]
    """(w, w) fp64 of each group, by falling eigenvalue; the widths w sum up to the tensor's."""
    roots: tuple[Tensor, ...]
    """(w,) fp64: the roots of the eigenvalues, which are singular values of W D."""
    bias: Tensor | None
    """(width,)."""

    SOLVER: ClassVar[Solver] = Solver("gram", "fp32")
    """Eigenvectors of the form in fp64."""

    @classmethod
    def of(cls, form: Tensor, bias: Tensor | None, channels: int) -> Spectrum:
        """Of a form (width, width), cut into groups of `channels`; the last one may be smaller."""
        parts = [form[i : i + channels, i : i + channels].double() for i in range(0, len(form), channels)]
        found = [torch.linalg.eigh((part + part.mT) / 2) for part in parts]
        roots = tuple(values.flip(0).clamp(min=0).sqrt() for values, _ in found)
        return cls(tuple(vectors.flip(1) for _, vectors in found), roots, bias)

    @functools.cached_property
    def kept(self) -> list[list[float]]:
        """For each group and rank, the share of the sum of all singular values that its first ones have. They are read
        from the device once, because ranks are searched for by trying many shares."""
        return [(roots.cumsum(0) / roots.sum().clamp(min=1e-300)).tolist() for roots in self.roots]

    @property
    def widths(self) -> list[int]:
        """Channels of each group."""
        return [len(vectors) for vectors in self.vectors]

    def basis(self, ranks: Sequence[int], dtype: torch.dtype) -> Basis:
        """The leading `ranks` vectors of each group, as one block-diagonal matrix."""
        blocks = [vectors[:, :rank] for vectors, rank in zip(self.vectors, ranks, strict=True)]
        return Basis(torch.block_diag(*blocks).to(dtype), None if self.bias is None else self.bias.to(dtype))


def ranks_at(spectrum: Spectrum, keep: float, share: float) -> list[int]:
    """`keep` · `share` of each group's width, at least 1 and at most all."""
    return [max(1, min(int(keep * share * w + 1e-9), w)) for w in spectrum.widths]


def energy_ranks(spectrum: Spectrum, keep: float) -> list[int]:
    """The smallest rank of each group whose singular values sum up to `keep` of the sum of all (EigenAttention); for 1,
    all, because later prompts may have directions that the calibration text lacks."""
    if keep >= 1:
        return spectrum.widths
    return [min(bisect_left(kept, keep - 1e-12) + 1, len(kept)) for kept in spectrum.kept]


def condition_number(spectrum: Spectrum) -> float:
    """log κ = log σ_max - log σ_min, over all groups."""
    roots = torch.cat(spectrum.roots)
    top = roots.max().clamp(min=1e-300)
    return (top.log() - roots.min().clamp(min=1e-12 * top).log()).item()


def progressive_shares(conditions: Sequence[float], least: float) -> list[float]:
    """The share of the largest rank that each layer gets, from log κ of its projections (LoRC).

        log κ̃_l = Σ_{j >= l} log κ_j,    share_l = 1 - (max - log κ̃_l) / (max - min) (1 - least)

    So early layers, whose errors pass through all later ones, keep the most.
    """
    totals = torch.tensor(conditions, dtype=torch.float64).flip(0).cumsum(0).flip(0)
    span = (totals.max() - totals.min()).clamp(min=1e-300)
    return (1 - (totals.max() - totals) / span * (1 - least)).tolist()
