"""Value folding: the values of layers brought into common coordinates, exactly, before they are shared (VFOLD).

A layer computes the same if the values v of a KV head become Tᵀ v, for an invertible T (D, D), and the columns W of
o_proj that read them become W T⁻ᵀ; heads may be reordered with their queries and keys (heads.py). For layers l (the
anchor) and m, with the covariances S11 of l, S22 of m and S12 between them, the T of least distance after whitening is
from the singular value decomposition U S Wᵀ of S11^(-1/2) S12 S22^(-1/2) (canonical correlations):

    T = S22^(-1/2) W Uᵀ S11^(1/2),    T⁻¹ = S11^(-1/2) U Wᵀ S22^(1/2)

Heads are paired by the Hungarian method, with the distance |V_l T⁻¹ - V_m| of every pair as cost.

What several layers share afterwards is one projection W of the owner's input x. With R_i the regression of the folded
values of layer i on x: `mean` takes W = mean_i R_i, the regression of the values' mean; `joint` takes the D principal
directions B of the stacked R_i / |V_i| on C = Σ x xᵀ and W = Bᵀ [R_i / |V_i|], so that maps of W x, one for each layer,
have the least relative squared error of values in total.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.config.uptraining import InitFrom
from cllm.model.decoder import Decoder
from cllm.model.sources import OwnKV
from cllm.plan.plan import KVPlan
from cllm.uptrain.calibrate import Batches, observe
from cllm.uptrain.decoder import TracedDecoder
from cllm.uptrain.heads import Alignment, heads_of, set_heads
from cllm.uptrain.hungarian import hungarian
from cllm.uptrain.owners import OwnerStart
from cllm.uptrain.project import anchors
from cllm.uptrain.ridge import LinearFit, shared_groups

_LAMBDA = 1e-4
"""Added to the diagonal of covariances, relative to its mean (VFOLD)."""


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

    def alignment(self) -> Alignment:
        """Heads paired and values mapped so that the layer's agree best with the anchor's."""
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
        identity = Alignment.identity(n, d, order)
        return Alignment(order, identity.key_factors, inverses[torch.arange(n), order])


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


def value_anchors(plan: KVPlan) -> dict[int, int]:
    """The layers whose values are folded, each with the layer that it is folded to.

    These are layers that read the values of others, and all sources of fused values but the first.
    """
    found: dict[int, int] = {}
    for i in plan.inexact:
        anchor = anchors(plan, i)[1]
        for j in (i, *plan.values(i).layers, *plan.keys(i).layers):
            if j != anchor and j not in found and (j == i or j in plan.owners):
                found[j] = anchor
    roots = set(found.values())
    return {i: j for i, j in found.items() if i not in roots}


@torch.no_grad()
def fold_values(
    plan: KVPlan, teacher: TracedDecoder, owners: Mapping[int, OwnKV], batches: Batches
) -> dict[int, Alignment]:
    """The folds of `value_anchors`, from values on a calibration text. `owners` are the teacher's projections."""
    pairs = value_anchors(plan)
    sums: dict[int, ValueSums] = {}
    for seen in observe(teacher, batches) if pairs else ():
        values = {i: seen.slot(i, owners[i])[1] for i in {*pairs, *pairs.values()}}
        for i, j in pairs.items():
            more = ValueSums.of(values[j], values[i])
            sums[i] = sums[i] + more if i in sums else more
    return {i: found.alignment() for i, found in sums.items()}


@torch.no_grad()
def share_values(
    starts: Mapping[int, OwnerStart],
    student: Decoder,
    teacher: TracedDecoder,
    owners: Mapping[int, OwnKV],
    batches: Batches,
    settings: InitFrom,
) -> list[int]:
    """Set the value projections of owners that others share; returns those owners, whose own values have changed.

    Owners without a projection for values alone are left as they are.

    Args:
        starts: of the owners; their projections are the start of the regression of their own values.
        student: of the owners.
        teacher: evaluates the text.
        owners: the teacher's projections of each layer, folded.
        batches: the text.
        settings: `fold`; and `ridge`, the pull towards the start, which is 0 for the values of other layers.
    """
    linears = {j: start.linears().get("values") for j, start in starts.items()}
    groups = {j: group for (j, part), group in shared_groups(student).items() if part == "v" and linears[j] is not None}
    fits = {(j, i): LinearFit() for j, group in groups.items() for i in group}
    second: dict[int, Tensor] = {}
    for seen in observe(teacher, batches) if groups else ():
        values = {i: seen.before_rope(i, owners[i])[1] for i in {i for group in groups.values() for i in group}}
        for j, group in groups.items():
            x, more = seen.projected(student, j), seen.second_moment(student, j)
            second[j] = second[j] + more if j in second else more
            for i in group:
                fits[j, i].add(x, values[i])
    for j, group in groups.items():
        linear, d = linears[j], owners[j].head_dim
        assert linear is not None
        start = heads_of(linear, d).flatten(0, 1)
        found = [fits[j, i].solve(second[j], start * (i == j), settings.ridge)[0].unflatten(0, (-1, d)) for i in group]
        regressed = torch.stack(found)  # readers, G, D, inputs
        shared = regressed.mean(0) if settings.fold == "mean" else _principal(regressed, second[j])
        set_heads(linear, shared.to(linear.weight.dtype))
    return list(groups)


def _principal(regressed: Tensor, second: Tensor) -> Tensor:
    """(G, D, inputs): the principal directions of projections (readers, G, D, inputs), as the module says."""
    d = regressed.shape[2]
    squares = torch.einsum("rgdm,mn,rgdn->rg", regressed, second, regressed).clamp(min=1e-30)
    even = (regressed / squares.sqrt()[..., None, None]).transpose(0, 1).flatten(1, 2)  # G, readers D, inputs
    vectors = torch.linalg.eigh(even @ second @ even.mT)[1][..., -d:]
    shared = vectors.mT @ even
    size = torch.einsum("gdm,mn,gdn->g", shared, second, shared).clamp(min=1e-30)
    return shared * (squares.mean(0) / size).sqrt()[:, None, None]
