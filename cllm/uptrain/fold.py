"""Value folding: the values of layers brought into common coordinates, exactly, before they are shared (VFOLD).

The maps of values and the pairs of heads are those of `cllm/model/value_folds.py`. Heads are reordered with their
queries and keys (heads.py).

What several layers share afterwards is one projection W of the owner's input x. With R_i the regression of the folded
values of layer i on x: `mean` takes W = mean_i R_i, the regression of the values' mean; `joint` takes the D principal
directions B of the stacked R_i / |V_i| on C = Σ x xᵀ and W = Bᵀ [R_i / |V_i|], so that maps of W x, one for each layer,
have the least relative squared error of values in total.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cllm.config.uptraining import InitFrom
from cllm.model.decoder import Decoder
from cllm.model.sources import OwnKV
from cllm.model.value_folds import ValueSums
from cllm.plan.plan import KVPlan
from cllm.uptrain.calibrate import Batches, observe
from cllm.uptrain.decoder import TracedDecoder
from cllm.uptrain.heads import Alignment, heads_of, set_heads
from cllm.uptrain.owners import OwnerStart
from cllm.uptrain.project import anchors
from cllm.uptrain.ridge import LinearFit, shared_groups


def alignment_of(sums: ValueSums) -> Alignment:
    """Heads paired and values mapped so that the layer's agree best with the anchor's."""
    order, inverses = sums.matched()
    identity = Alignment.identity(len(order), sums.anchor.shape[-1], order)
    return Alignment(order, identity.key_factors, inverses)


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
    return {i: alignment_of(found) for i, found in sums.items()}


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
