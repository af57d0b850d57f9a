"""First weights of owners from a teacher's layer, one class for each kind of slot.

A kind registers its class with `owner_start`; a kind without one cannot be started from keys and values. Symbols: x is
the input of the owner's projections, C = Σ x xᵀ over a calibration text, W_K and W_V the teacher's projections of the
layer, G KV heads, D channels.

- Two projections of the layer's own input, or one of the two: those of the teacher, exactly.
- Projections of another layer's output y (`input`): the ridge regression of the teacher's keys before RoPE and values
  on y, W = (Σ K yᵀ + ρ W_K) (Σ y yᵀ + ρ)⁻¹, and the same for V.
- One projection for both (`tie`): keys RoPE(W x) and values M W x, with the map M (D, D) of each head folded into
  o_proj by the fit of readers (fit.py). W and M minimise Σ |W_K x - W x|² + β |W_V x - M W x|²: with
  A = [W_K; √β W_V] and the D principal directions B = [B_K; B_V] of A C Aᵀ, W = B_K Bᵀ A and M = B_V B_K⁻¹ / √β. No
  pair of keys needs a factor, since it could be moved into W and M. β makes keys and values weigh the same. With norms
  on keys, which keep only their direction, W = W_K and values alone are approximated.
- A mixture with lower owners (`mix`): the teacher's projections, and weights that add nothing of the others, exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cllm.errors import UserError
from cllm.model.decoder import Decoder
from cllm.model.sources import OwnKV, OwnMixedKV, OwnTiedKV, WriteMix
from cllm.plan.forms import OwnMixed, OwnTied
from cllm.plan.kinds import Own
from cllm.plan.registry import Builders
from cllm.uptrain.calibrate import Batches, Observed, observe
from cllm.uptrain.decoder import TracedDecoder, block_of
from cllm.uptrain.heads import heads_of, set_heads
from cllm.uptrain.ridge import LinearFit

owner_start = Builders("start from another model")
"""`(student, layer, theirs, norm)`: an `OwnerStart` for a kind of source."""


class OwnerStart:
    """The first weights of the owner of one layer: `copy`, and where `reads_text`, `add` for each batch, then `fit`."""

    module: ClassVar[type[nn.Module]] = OwnKV
    """The owner module that the weights are for."""
    needs_text: ClassVar[bool] = False
    """Weights cannot be copied, only fitted."""

    def __init__(self, student: Decoder, layer: int, theirs: OwnKV, norm: nn.Module):
        self.student, self.layer, self.theirs, self.norm = student, layer, theirs, norm
        self.source = student.plan.owned(layer)
        self.reads_text = self.source.input is not None or self.needs_text
        """The slot is not that of the teacher's layer after `copy`, and least squares bring it closer."""
        self._sums = {part: LinearFit() for part in ("keys", "values")}
        self._second: Tensor | None = None

    @property
    def owner(self) -> Any:
        """The owner module of the layer."""
        owner = block_of(self.student, self.layer).attention.owner
        assert owner is not None
        return owner

    def copy(self) -> None:
        """Copy the teacher's projections and norms."""
        for name in ("k_proj", "v_proj", "k_norm"):
            _load(getattr(self.owner, name), getattr(self.theirs, name))
        _load(self.owner.norm, self.norm)

    def reorder(self, order: list[int]) -> None:
        """Reorder the KV heads that the owner projects."""
        for linear in self.linears().values():
            set_heads(linear, heads_of(linear, self.theirs.head_dim)[order])

    def linears(self) -> dict[str, nn.Linear]:
        """The projections by what they project, `keys` and `values`."""
        named = {"keys": self.owner.k_proj, "values": self.owner.v_proj}
        return {part: linear for part, linear in named.items() if linear is not None}

    def add(self, seen: Observed) -> None:
        """Add the sums of one batch."""
        k, v = seen.before_rope(self.layer, self.theirs)
        x, second = seen.projected(self.student, self.layer), seen.second_moment(self.student, self.layer)
        self._second = second if self._second is None else self._second + second
        for part, target in (("keys", k), ("values", v)):
            self._sums[part].add(x, target)

    def fit(self, ridge: float) -> dict[str, float]:
        """Set the weights; returns relative squared errors of what is projected, as `layer 5 projected keys`."""
        assert self._second is not None
        errors = {}
        for part, linear in self.linears().items():
            start = heads_of(linear, self.theirs.head_dim).flatten(0, 1)
            weight, error = self._sums[part].solve(self._second, start, ridge)
            set_heads(linear, weight.unflatten(0, (-1, self.theirs.head_dim)).to(linear.weight.dtype))
            errors[f"layer {self.layer} projected {part}"] = error
        return errors


owner_start(Own)(OwnerStart)


@owner_start(OwnTied)
class TiedStart(OwnerStart):
    """One projection for keys and values."""

    module = OwnTiedKV
    needs_text = True

    def copy(self) -> None:
        """Copy the projection of keys, and the norms."""
        owner = self.owner
        assert isinstance(owner, OwnTiedKV)
        _load(owner.kv_proj, self.theirs.k_proj)
        _load(owner.k_norm, self.theirs.k_norm)
        _load(owner.norm, self.norm)

    def linears(self) -> dict[str, nn.Linear]:
        owner = self.owner
        assert isinstance(owner, OwnTiedKV)
        return {"keys": owner.kv_proj}

    def fit(self, ridge: float) -> dict[str, float]:
        """Set the weights; returns relative squared errors of keys and, after the best map, of values."""
        owner, d, second = self.owner, self.theirs.head_dim, self._second
        assert isinstance(owner, OwnTiedKV)
        assert second is not None
        if owner.k_norm is not None:
            return super().fit(ridge) if self.source.input is not None else {}
        keys, values = (
            self._sums[part].solve(second, heads_of(linear, d).flatten(0, 1), ridge)[0].unflatten(0, (-1, d))
            for part, linear in (("keys", self.theirs.k_proj), ("values", self.theirs.v_proj))
        )
        weights, lost_keys, lost_values = zip(
            *(tied_projection(k, v, second) for k, v in zip(keys, values, strict=True)), strict=True
        )
        set_heads(owner.kv_proj, torch.stack(weights).to(owner.kv_proj.weight.dtype))
        return {
            f"layer {self.layer} projected {part}": float(torch.stack(lost).mean())
            for part, lost in (("keys", lost_keys), ("values", lost_values))
        }


def tied_projection(k: Tensor, v: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The W that serves the keys k x and, after a map M, the values v x of one head, as the module's docstring says.

    Args:
        k, v: (D, inputs) fp64.
        second: (inputs, inputs) fp64, C.

    Returns:
        W (D, inputs), and the relative squared errors of keys and of values, scalars.
    """
    d = len(k)
    squares = [((w @ second) * w).sum().clamp(min=1e-30) for w in (k, v)]
    beta = squares[0] / squares[1]
    stacked = torch.cat((k, beta.sqrt() * v))
    top = torch.linalg.eigh(stacked @ second @ stacked.T)[1][:, -d:]
    weight = top[:d] @ (top.T @ stacked)
    left = stacked - top @ (top.T @ stacked)
    lost = [((w @ second) * w).sum() / squares[0] for w in left.split(d)]
    return weight, lost[0], lost[1]


@owner_start(OwnMixed)
class MixedStart(OwnerStart):
    """Two projections, and the weights of a mixture with lower owners."""

    module = OwnMixedKV

    def copy(self) -> None:
        """Copy the teacher's projections, and mix nothing into them."""
        super().copy()
        for module in self.owner.children():
            if isinstance(module, WriteMix):
                module.reset_parameters()


@torch.no_grad()
def copy_owners(student: Decoder, teacher: Decoder, owners: Mapping[int, OwnKV]) -> dict[int, OwnerStart]:
    """Copy the teacher's projections to every owner, as its kind does; returns the starts by layer.

    A kv_norm that the teacher lacks becomes the layer's norm.

    Args:
        student: any plan.
        teacher: of the same shape.
        owners: the teacher's projections of each layer.

    Raises:
        UserError: naming the layer and its kind, for a kind without a start.
    """
    starts: dict[int, OwnerStart] = {}
    for j in student.plan.owners:
        owner, source = block_of(student, j).attention.owner, student.plan.owned(j)
        if not source.is_plain:  # latents have a method of their own
            continue
        kind: Any = owner_start.find(source)
        if kind is None or type(owner) is not kind.module:
            raise UserError(
                f"model.kv: layer {j} owns a slot by {source.key}, which cannot be copied from another model; allowed "
                "with init.from: own"
            )
        starts[j] = kind(student, j, owners[j], owners[j].norm or block_of(teacher, j).attention_norm)
        starts[j].copy()
    return starts


@torch.no_grad()
def fit_owners(
    starts: Iterable[OwnerStart], teacher: TracedDecoder, batches: Batches, *, ridge: float
) -> dict[str, float]:
    """Fit the owners whose slots are not those of the teacher, on a calibration text; returns errors by layer."""
    fitted = [start for start in starts if start.reads_text]
    for seen in observe(teacher, batches) if fitted else ():
        for start in fitted:
            start.add(seen)
    errors: dict[str, float] = {}
    for start in fitted:
        errors |= start.fit(ridge)
    return errors


def _load(mine: nn.Module | None, theirs: nn.Module | None) -> None:
    if mine is not None and theirs is not None:
        mine.load_state_dict(theirs.state_dict())
