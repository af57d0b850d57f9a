"""Plans whose layers read several slots at once, each with a mask of its own: CED, HySparse."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cllm.plan.joins import LOCAL, Gate, Gates, Join, Part
from cllm.plan.kinds import Own
from cllm.plan.plan import MAX_LAYERS, KVPlan, LayerPlan
from cllm.plan.presets.base import LayerCount, Preset, count_or_half, register_preset, runs_of_layers
from cllm.plan.shape import Shape
from cllm.section import MAX_TOKENS


@register_preset
class CED(Preset):
    """The dense form of DeepSeek-V4.1's decoder half: upper layers join a global slot and a window in one softmax.

    The global slot is projected from the output of the lower half, the window from the layer's own input.
    """

    preset: Literal["ced"] = "ced"
    n_lower: LayerCount = Field(None, ge=1, le=MAX_LAYERS)
    """Number of lower layers, which read only themselves; null: half of all layers."""
    window: int = Field(128, ge=1, le=MAX_TOKENS)
    """Window of the upper layers' own slots, in tokens."""
    group: int = Field(1, ge=1, le=MAX_LAYERS)
    """Number of upper layers that read one global slot; each has a window of its own."""
    sink: bool = True
    """A learned number for each query head in the denominator of the upper layers' softmax."""

    def expand(self, shape: Shape) -> KVPlan:
        n, heads = count_or_half(shape, self.n_lower, "n_lower"), self.n_kv_heads or shape.n_heads
        far, near = Own(n_kv_heads=heads, input=n - 1), Own(n_kv_heads=heads)
        layers = [LayerPlan(own=self.own(shape))] * n
        for group in runs_of_layers(range(n, shape.n_layers), self.group):
            for i in group:
                first = i == group[0]
                read = Join((Part(group[0]), Part(LOCAL if first else i, self.window)), sink=self.sink)
                own, local = (far, near) if first else (near, None)
                layers.append(LayerPlan(own=own, local=local, keys=read, values=read))
        return KVPlan.of(layers)


@register_preset
class HySparse(Preset):
    """The dense form of HySparse (arXiv 2602.03560): layers add, with gates, attention to the last full layer's slot
    and to a window of their own."""

    preset: Literal["hysparse"] = "hysparse"
    n_gated: int = Field(11, ge=1, le=MAX_LAYERS)
    """Number of layers after each full one that read its slot (the paper: 11)."""
    window: int = Field(128, ge=2, le=MAX_TOKENS)
    """Window of those layers' own slots, in tokens; the paper does not state its length."""
    gates: Gates = "separate"
    """`separate`: a gate for each of the two attentions; `complementary`: one gate g, and 1 - g (PLT)."""

    def expand(self, shape: Shape) -> KVPlan:
        own = self.own(shape)
        layers = []
        for i in range(shape.n_layers):
            full = i - i % (self.n_gated + 1)
            read = Gate((Part(full), Part(i, self.window)), gates=self.gates)
            layers.append(LayerPlan(own=own) if i == full else LayerPlan(own=own, keys=read, values=read))
        return KVPlan.of(layers)
