"""Loops: layers that are computed several times in a row with the same weights.

    loop: {layers: 0-9, times: 3}

Every turn has layers of its own in the plan, with slots, reads and windows of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import Field

from cllm.errors import PlanError
from cllm.plan.kinds import MAX_LAYERS, Source
from cllm.plan.numbers import layer_range, ranges
from cllm.section import Section


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """A run of layers that is computed several times in a row with the same weights.

    Turn r of layer first + j is layer first + r count + j of the plan.
    """

    first: int
    """The lowest layer of the first turn."""
    count: int
    """Layers of a turn."""
    times: int
    """Turns."""

    @property
    def last(self) -> int:
        """The highest layer of the last turn."""
        return self.first + self.count * self.times - 1

    @property
    def weights(self) -> str:
        """The layers whose weights all turns have, such as `layers 0-1`."""
        first = range(self.first, self.first + self.count)
        return f"layer{'s' if len(first) > 1 else ''} {ranges(first)}"

    @property
    def text(self) -> str:
        """In a table of the plan."""
        later = range(self.first + self.count, self.last + 1)
        have = f"layers {ranges(later)} have" if len(later) > 1 else f"layer {later[0]} has"
        return f"{have} the weights of {self.weights}: a loop of {self.times} turns"

    def turn(self, layer: int) -> str:
        """The turn that `layer` belongs to, such as `turn 1 of 3`; empty outside of the loop."""
        inside = self.first <= layer <= self.last
        return f"turn {(layer - self.first) // self.count + 1} of {self.times}" if inside else ""

    def settings(self) -> dict[str, Any]:
        """The settings in YAML; the inverse of `LoopConfig.plan`."""
        return {"layers": ranges(range(self.first, self.first + self.count)), "times": self.times}

    def weights_of(self, layer: int) -> int:
        """The layer of the first turn whose weights `layer` has; `layer` itself outside of the loop."""
        return self.first + (layer - self.first) % self.count if self.first <= layer <= self.last else layer


class LoopConfig(Section):
    """Layers that are computed several times in a row with the same weights."""

    layers: int | str | list[int]
    """The layers of the first turn, in a row: 3, "0-9" or [0, 1]. The layers above them are the other turns."""
    times: int = Field(ge=2, le=MAX_LAYERS)
    """Turns."""

    def plan(self) -> Loop:
        found = layer_range(self.layers, "model.kv.loop.layers")
        if not found or found[0] < 0 or list(found) != list(range(found[0], found[0] + len(found))):
            raise PlanError(f"model.kv.loop.layers is {self.layers}; allowed: layers in a row from 0 on, such as 0-9")
        return Loop(first=found[0], count=len(found), times=self.times)


class _Layer(Protocol):
    """The part of a plan's layer that is checked."""

    @property
    def own(self) -> Source | None: ...
    @property
    def local(self) -> Source | None: ...


class _Plan(Protocol):
    """The part of a plan that is checked."""

    @property
    def layers(self) -> Sequence[_Layer]: ...
    @property
    def loop(self) -> Loop | None: ...
    def source(self, i: int) -> Source: ...


def check_loop(plan: _Plan) -> None:
    """Check that the turns of the plan's loop, if it has one, can share weights.

    Raises:
        PlanError: for a loop that ends above the highest layer, with the layers that the model needs; and naming the
            layer of a later turn that owns or reads another kind of slot than that of the first turn.
    """
    loop = plan.loop
    if loop is None:
        return
    if loop.last >= len(plan.layers):
        raise PlanError(
            f"model.kv.loop: {loop.times} turns of {loop.count} layers from layer {loop.first} end at layer "
            f"{loop.last}, but the model has layers 0 to {len(plan.layers) - 1}; allowed: model.n_layers, which counts "
            f"every turn, {loop.last + 1} or more"
        )
    for i in range(loop.first + loop.count, loop.last + 1):
        j = loop.weights_of(i)
        mine, theirs = plan.layers[i], plan.layers[j]
        for own, first in ((mine.own, theirs.own), (mine.local, theirs.local)):
            if own is not None and first is not None and own != first:
                raise PlanError(
                    f"layer {i}: owns {own.text}, and layer {j}, whose weights it has in model.kv.loop, {first.text}; "
                    "allowed: the same, or nothing"
                )
        if mine.own is not None and theirs.own is None:
            raise PlanError(
                f"layer {i}: owns {mine.own.text}, and layer {j}, whose weights it has in model.kv.loop, owns nothing; "
                "allowed: nothing"
            )
        source, first = plan.source(i), plan.source(j)
        alike = source.head_dim == first.head_dim if source.is_plain else source == first
        if source.is_plain != first.is_plain or not alike:
            raise PlanError(
                f"layer {i}: reads {source.text}, and layer {j}, whose weights it has in model.kv.loop, {first.text}; "
                "allowed: slots of the same kind, with heads of the same size"
            )
