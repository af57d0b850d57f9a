"""The base of presets, their registry, and helpers that several share."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from cllm.errors import PlanError
from cllm.plan.kinds import Own, Share
from cllm.plan.plan import KVPlan, LayerPlan
from cllm.plan.shape import Iterations, Shape
from cllm.section import MAX_HEADS, Section


class OfDepth(enum.Enum):
    """How a setting of a preset depends on the depth of the model, as metadata of its type. Settings without it, such
    as `factor`, mean the same at any depth."""

    COUNT = "counts layers"
    """It cuts the layers into parts: 8 of 16 layers are 12 of 24."""
    NUMBERS = "has numbers of layers"
    """It names single layers, which another depth does not have."""


LayerCount = Annotated[int | None, OfDepth.COUNT]
LayerNumbers = Annotated[list[int] | None, OfDepth.NUMBERS]


class Preset(Section):
    """A plan by name."""

    preset: str
    """Name of the design."""
    n_kv_heads: int | None = Field(None, ge=1, le=MAX_HEADS)
    """KV heads of every owner; null: as many as query heads."""
    kv_norm: bool = False
    """Owners apply a separate RMSNorm to the input of their K and V projections."""

    @classmethod
    def of_depth(cls) -> dict[str, OfDepth]:
        """The settings that depend on the depth of the model."""
        marks = {
            name: [m for m in field.metadata if isinstance(m, OfDepth)] for name, field in cls.model_fields.items()
        }
        return {name: found[0] for name, found in marks.items() if found}

    def expand(self, shape: Shape) -> KVPlan:
        """The plan for a model of this shape. Raises `PlanError` when the two do not fit."""
        raise NotImplementedError

    def own(self, shape: Shape) -> Own:
        return Own(n_kv_heads=self.n_kv_heads or shape.n_heads, kv_norm=self.kv_norm)


PRESETS: dict[str, type[Preset]] = {}
"""Every preset by its name."""


def register_preset(cls: type[Preset]) -> type[Preset]:
    """Make a preset known to `model.kv.preset`.

    Raises:
        PlanError: for a preset without a name or `expand`, and for a name that is taken.
    """
    field = cls.model_fields["preset"]
    if not isinstance(field.default, str):
        raise PlanError(f'{cls.__name__}: has no name; write  preset: Literal["NAME"] = "NAME"')
    if cls.expand is Preset.expand:
        raise PlanError(f"{cls.__name__}: has no method expand")
    if field.default == "layers":
        raise PlanError(f"{cls.__name__}: the name 'layers' is that of plans spelled out; choose another")
    field.description = Preset.model_fields["preset"].description  # a Literal of its own loses it
    if PRESETS.get(field.default, cls) is not cls:
        raise PlanError(f"{cls.__name__}: preset {field.default!r} is {PRESETS[field.default].__name__}'s name")
    PRESETS[field.default] = cls
    return cls


def preset_names() -> list[str]:
    """Every name that `model.kv.preset` takes."""
    return sorted(PRESETS)


def from_targets(targets: Sequence[int], own: Own, iterations: Iterations | None = None) -> KVPlan:
    """The plan in which layer i reads the slot of `targets[i]`, LCKV's notation."""
    layers = [LayerPlan(own=own if t == i else None, keys=Share(t), values=Share(t)) for i, t in enumerate(targets)]
    return KVPlan.of(layers, iterations if any(t > i for i, t in enumerate(targets)) else None)


def count_or_half(shape: Shape, given: int | None, key: str) -> int:
    """`given`, or half of the layers; refused unless at least one layer is left on either side."""
    if shape.n_layers < 2:
        raise PlanError(
            f"model.n_layers is {shape.n_layers}; allowed with this plan, which splits the layers: 2 or more"
        )
    count = shape.n_layers // 2 if given is None else given
    if not 1 <= count < shape.n_layers:
        raise PlanError(f"model.kv.{key} is {count}; allowed: 1 to {shape.n_layers - 1} for {shape.n_layers} layers")
    return count


def runs_of_layers(layers: Sequence[int], factor: int) -> list[list[int]]:
    """Runs of `factor` layers. Where the factor does not divide their number, the first layer stays alone and what is
    left over joins the last run: CLA-3 on 20 layers is 0 | 1-3 | ... | 13-15 | 16-19, 7 owners as in the paper."""
    layers = list(layers)
    if len(layers) % factor == 0:
        return [layers[i : i + factor] for i in range(0, len(layers), factor)]
    if len(layers) <= factor:
        return [layers]
    first, rest = layers[:1], layers[1:]
    groups = [rest[i : i + factor] for i in range(0, len(rest) - len(rest) % factor, factor)]
    groups[-1] += rest[len(rest) - len(rest) % factor :]
    return [first, *groups]
