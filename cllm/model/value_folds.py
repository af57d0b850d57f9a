"""Two layers' values brought into common coordinates without a change of what they compute (VFOLD).

A layer computes the same if the values v of a KV head become Tᵀ v, for an invertible T (D, D), and the columns W of
o_proj that read them become W T⁻ᵀ. For layers l (the anchor) and m, with the second moments S11 of l's values, S22 of
m's and S12 between them, the T of least distance after whitening is from the singular value decomposition U S Wᵀ of
S11^(-1/2) S12 S22^(-1/2) (canonical correlations):

    T = S22^(-1/2) W Uᵀ S11^(1/2),    T⁻¹ = S11^(-1/2) U Wᵀ S22^(1/2)

With values as rows, V_m T is like V_l, and V_l T⁻¹ like V_m. Heads are paired by the Hungarian method, with the
distance |V_l T⁻¹ - V_m| of every pair as cost.

Shapes: G KV heads, D channels of a head, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.model.hungarian import hungarian

_LAMBDA = 1e-4
"""Added to the diagonal of second moments, relative to its mean (VFOLD)."""
_STEPS = 16
"""Of Newton's iteration: ten, and some to spare."""


@dataclass(slots=True)
class ValueSums:
    """Sums over tokens of products of two layers' values: those of the anchor and of the layer to be folded."""

    anchor: Tensor
    """(G, D, D)."""
    own: Tensor
    """(G, D, D)."""
    cross: Tensor
    """(G, G, D, D): anchor's head, then own head."""

    @classmethod
    def of(cls, anchor: Tensor, own: Tensor) -> ValueSums:
        """From values (G, D, N)."""
        a, b = anchor.double(), own.double()
        return cls(
            torch.einsum("gdn,gen->gde", a, a),
            torch.einsum("gdn,gen->gde", b, b),
            torch.einsum("gdn,hen->ghde", a, b),
        )

    def __add__(self, more: ValueSums) -> ValueSums:
        return ValueSums(self.anchor + more.anchor, self.own + more.own, self.cross + more.cross)

    def matched(self) -> tuple[list[int], Tensor]:
        """The own head that is paired with each head of the anchor, and T⁻¹ (G, D, D) fp64 of each pair, on the CPU."""
        inverses = canonical_inverse(self.anchor[:, None], self.own[None], self.cross)  # G, G, D, D
        # |V_l T⁻¹ - V_m|² with rows of values: tr(T⁻ᵀ S11 T⁻¹) - 2 tr(T⁻ᵀ S12) + tr(S22)
        moved, common = self.anchor[:, None] @ inverses * inverses, inverses * self.cross
        traces = self.own.diagonal(dim1=-2, dim2=-1).sum(-1)
        cost = moved.sum((-2, -1)) - 2 * common.sum((-2, -1)) + traces
        order = hungarian(-cost.clamp(min=0).sqrt().cpu())
        return order, inverses[torch.arange(len(order)), order].cpu()


def canonical_inverse(anchor: Tensor, own: Tensor, cross: Tensor) -> Tensor:
    """T⁻¹ (..., D, D) from S11, S22 and S12, fp64, in any common scale. Each S11 and S22 is decomposed once."""
    _, inverse = _root(anchor)
    own_half, own_inverse = _root(own)
    return inverse @ orthogonal_factor(inverse @ cross @ own_inverse) @ own_half


def orthogonal_factor(x: Tensor) -> Tensor:
    """U Wᵀ of the singular value decompositions U S Wᵀ of `x` (..., D, D) fp64.

    Newton's iteration X ← (γ X + X⁻ᵀ / γ) / 2 with the scaling of Higham (SIAM J. Sci. Stat. Comput. 7(4), 1986), which
    brings all singular values to 1 in ten steps. It runs on many small matrices at once, which decompositions do not.
    Matrices that are singular are decomposed.
    """
    y = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-300)
    for _ in range(_STEPS):
        inverse = torch.linalg.inv_ex(y).inverse.mT
        factor = (_norms(inverse) / _norms(y)).sqrt()
        y = (factor * y + inverse / factor) / 2
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    wrong = ~((y.mT @ y - eye).abs().amax((-2, -1)) < 1e-10)  # not a number is wrong
    if bool(wrong.any()):
        u, _, wh = torch.linalg.svd(x[wrong])
        y[wrong] = u @ wh
    return y


def _norms(x: Tensor) -> Tensor:
    """(..., 1, 1): √(‖x‖₁ ‖x‖_∞), between the largest singular value and √D times it."""
    size = x.abs()
    return (size.sum(-2).amax(-1) * size.sum(-1).amax(-1)).sqrt()[..., None, None]


def _root(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The square roots of covariances (..., D, D) with `_LAMBDA` on their diagonals, and the inverses of the roots."""
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
    scale = covariance.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)[..., None, None]
    values, vectors = torch.linalg.eigh(covariance + _LAMBDA * scale * eye)
    root = values.clamp(min=1e-30).sqrt()[..., None, :]
    return vectors * root @ vectors.mT, vectors / root @ vectors.mT
