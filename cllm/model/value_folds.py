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
        n, d = self.anchor.shape[0], self.anchor.shape[-1]
        cost = torch.zeros(n, n, dtype=torch.float64)
        inverses = torch.empty(n, n, d, d, dtype=torch.float64)
        anchor, own, cross = (t.cpu() for t in (self.anchor, self.own, self.cross))
        for g in range(n):
            for h in range(n):
                inverses[g, h] = t = canonical_inverse(anchor[g], own[h], cross[g, h])
                # |V_l T⁻¹ - V_m|² with rows of values: tr(T⁻ᵀ S11 T⁻¹) - 2 tr(T⁻ᵀ S12) + tr(S22)
                cost[g, h] = ((anchor[g] @ t) * t).sum() - 2 * (t * cross[g, h]).sum() + own[h].trace()
        order = hungarian(-cost.clamp(min=0).sqrt())
        return order, inverses[torch.arange(n), order]


def canonical_inverse(anchor: Tensor, own: Tensor, cross: Tensor) -> Tensor:
    """T⁻¹ (D, D) from S11, S22 and S12, (D, D) fp64 each, in any common scale."""
    inverse = _root(anchor)[1]
    own_half, own_inverse = _root(own)
    u, _, wh = torch.linalg.svd(inverse @ cross @ own_inverse)
    return inverse @ u @ wh @ own_half


def _root(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of a covariance with `_LAMBDA` on its diagonal, and the inverse of that root."""
    eye = torch.eye(len(covariance), dtype=covariance.dtype)
    values, vectors = torch.linalg.eigh(covariance + _LAMBDA * covariance.diagonal().mean().clamp(min=1e-30) * eye)
    root = values.clamp(min=1e-30).sqrt()
    return vectors * root @ vectors.T, vectors / root @ vectors.T
