"""Shared projections by ridge regression: the projection of one owner closest to those of all layers that share it.

Only sums of products are stored, in fp64. A penalty on the distance from the start keeps directions that the text does
not determine, and the squared error on the text is never larger than at the start.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cllm.model.decoder import Decoder
from cllm.model.sources import OwnKV
from cllm.uptrain.calibrate import Batches, observe
from cllm.uptrain.decoder import TracedDecoder, owner_of
from cllm.uptrain.heads import heads_of, set_heads
from cllm.uptrain.project import Part, readers

_PARTS: tuple[tuple[Part, str], ...] = (("k", "keys"), ("v", "values"))


def solve(a: Tensor, b: Tensor, start: Tensor, ridge: float) -> Tensor:
    """The x that minimises ½ xᵀ a x - bᵀ x + ½ ridge m |x - start|², with m the mean of a's diagonal.

    Args:
        a: (..., n, n) fp64 and symmetric, or complex128 and Hermitian.
        b: (..., n, k) in that dtype.
        start: (..., n, k) in that dtype.
        ridge: at least 0. A tiny one is always added, so directions that do not occur in the text stay at the start.
    """
    mean = a.diagonal(dim1=-2, dim2=-1).real.mean(-1)[..., None, None].clamp(min=1e-30)
    penalty = max(ridge, 1e-12) * mean * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return torch.linalg.solve(a + penalty, b + penalty @ start)


class LinearFit:
    """The regression of (channels, N) targets on (N, inputs) inputs, batch by batch, in fp64."""

    def __init__(self) -> None:
        self.cross: Tensor | None = None
        """(inputs, channels): Σ x yᵀ."""
        self.square: Tensor = torch.zeros(())
        """Σ |y|²."""

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add a batch."""
        cross, square = x.double().T @ y.double().T, y.double().square().sum()
        self.cross = cross if self.cross is None else self.cross + cross
        self.square = self.square.to(square) + square

    def solve(self, second: Tensor, start: Tensor, ridge: float) -> tuple[Tensor, float]:
        """The weight (channels, inputs) near `start`, as `solve` says, and |y - W x|² / |y|²; `second` is Σ x xᵀ."""
        assert self.cross is not None
        weight = solve(second, self.cross, start.double().T, ridge)
        error = self.square - 2 * (weight * self.cross).sum() + (weight * (second @ weight)).sum()
        return weight.T, float(error / self.square.clamp(min=1e-30))


@torch.no_grad()
def fit_shared(
    student: Decoder, teacher: TracedDecoder, owners: Mapping[int, OwnKV], batches: Batches, *, ridge: float
) -> dict[str, float]:
    """Regress the projections of shared owners onto the mean of the keys and values of their group's teacher layers.

    The squared error to the mean differs from that to every layer of the group by a constant, so this is the best
    single projection for all of them. Targets are before RoPE, which rotates both sides alike. With norms on keys the
    target is the mean normalised key before its gain, and the projection then matches only its direction.

    Args:
        student: its projections are the start of the regression.
        teacher: evaluates the text.
        owners: the teacher's projections of each layer, aligned.
        batches: the text.
        ridge: pull towards the start.

    Returns:
        Mean squared error over the group relative to its mean square, as `layer 5 keys before` and `... after`.
    """
    groups = shared_groups(student)
    inputs: dict[int, Tensor] = {}
    targets: dict[tuple[int, Part], Tensor] = {}
    squares: dict[tuple[int, Part], Tensor] = {}
    for seen in observe(teacher, batches) if groups else ():
        slots = {
            i: dict(zip(("k", "v"), seen.before_rope(i, owners[i]), strict=True))
            for i in {i for group in groups.values() for i in group}
        }
        xs = {j: seen.projected(student, j).double() for j in {j for j, _ in groups}}
        for j, x in xs.items():
            inputs[j] = inputs.get(j, 0) + x.T @ x
        for (j, part), group in groups.items():
            ys = [slots[i][part] for i in group]
            targets[j, part] = targets.get((j, part), 0) + (torch.stack(ys).mean(0) @ xs[j]).T
            squares[j, part] = squares.get((j, part), 0) + torch.stack([y.square().sum() for y in ys]).mean()
    errors: dict[str, float] = {}
    for (j, part), target in targets.items():
        owner = owner_of(student, j)
        linear = owner.k_proj if part == "k" else owner.v_proj
        start = heads_of(linear, owner.head_dim).flatten(0, 1).double().T
        found = solve(inputs[j], target, start, ridge)
        for when, weight in (("before", start), ("after", found)):
            error = squares[j, part] - 2 * (weight * target).sum() + (weight * (inputs[j] @ weight)).sum()
            errors[f"layer {j} {dict(_PARTS)[part]} {when}"] = float(error / squares[j, part].clamp(min=1e-30))
        set_heads(linear, found.T.unflatten(0, (-1, owner.head_dim)).to(linear.weight.dtype))
    return errors


def shared_groups(student: Decoder) -> dict[tuple[int, Part], list[int]]:
    """For each owner and part that another layer shares (not fuses), the layers that read it, the owner included."""
    plan = student.plan
    groups: dict[tuple[int, Part], list[int]] = {}
    for j in plan.owners:
        for part, _ in _PARTS:
            read = plan.keys if part == "k" else plan.values
            group = [i for i in readers(plan, j, part) if read(i).is_stored]
            if any(i != j for i in group):
                groups[j, part] = group
    return groups
