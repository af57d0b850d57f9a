"""Plans in which owners write other slots than two projections of their own input."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cllm.plan.forms import OwnHalf, OwnMixed, OwnTied
from cllm.plan.fuse import Fuse
from cllm.plan.kinds import Own, Share
from cllm.plan.plan import MAX_LAYERS, KVPlan, LayerPlan
from cllm.plan.presets.base import LayerCount, Preset, count_or_half, register_preset, runs_of_layers
from cllm.plan.shape import Shape
from cllm.section import MAX_TOKENS


@register_preset
class SwiftKV(Preset):
    """SwiftKV (arXiv 2410.03960): upper layers project the output of the lower part, which is all that a prompt needs.

    With `group: 1` it is the paper's SingleInputKV, with more its AcrossKV.
    """

    preset: Literal["swiftkv"] = "swiftkv"
    n_lower: LayerCount = Field(None, ge=1, le=MAX_LAYERS)
    """Number of lower layers, which project their own input; null: half of all layers."""
    group: int = Field(1, ge=1, le=MAX_LAYERS)
    """Number of upper layers that read one slot. If it does not divide their number, the first one shares with no
    other."""

    def expand(self, shape: Shape) -> KVPlan:
        n = count_or_half(shape, self.n_lower, "n_lower")
        upper = Own(n_kv_heads=self.n_kv_heads or shape.n_heads, input=n - 1)
        layers = [LayerPlan(own=self.own(shape))] * n
        for group in runs_of_layers(range(n, shape.n_layers), self.group):
            target = Share(group[0])
            layers += [LayerPlan(own=upper), *[LayerPlan(keys=target, values=target)] * (len(group) - 1)]
        return KVPlan.of(layers)


@register_preset
class SVFormer(Preset):
    """SVFormer (arXiv 2410.17897, section 3.3): all layers read the values of layer 0, and own only their keys."""

    preset: Literal["svformer"] = "svformer"

    def expand(self, shape: Shape) -> KVPlan:
        heads = self.n_kv_heads or shape.n_heads
        keys = OwnHalf(n_kv_heads=heads, kv_norm=self.kv_norm, only="keys")
        above = [LayerPlan(own=keys, values=Share(0))] * (shape.n_layers - 1)
        return KVPlan.of([LayerPlan(own=self.own(shape)), *above])


@register_preset
class KVTie(Preset):
    """Tied keys and values (Q-K=V, arXiv 2606.04032): one projection, stored once, is keys with RoPE and values."""

    preset: Literal["kv_tie"] = "kv_tie"

    def expand(self, shape: Shape) -> KVPlan:
        own = OwnTied(n_kv_heads=self.n_kv_heads or shape.n_heads, kv_norm=self.kv_norm, tie="kv")
        return KVPlan.of([LayerPlan(own=own)] * shape.n_layers)


@register_preset
class YOCOPlusPlus(Preset):
    """YOCO++ (arXiv 2604.13556): owners mix the slot of layer 0 into theirs, and the layers above read the last owner.

    It starts as the plan without mixing.
    """

    preset: Literal["yoco_pp"] = "yoco_pp"
    n_owners: LayerCount = Field(None, ge=1, le=MAX_LAYERS)
    """Number of lower layers that own K/V; null: half of all layers."""
    window: int | None = Field(None, ge=1, le=MAX_TOKENS)
    """Sliding window of all owners but the last, in tokens; null: full attention."""

    def expand(self, shape: Shape) -> KVPlan:
        n = count_or_half(shape, self.n_owners, "n_owners")
        mixed = OwnMixed(n_kv_heads=self.n_kv_heads or shape.n_heads, kv_norm=self.kv_norm, mix=(0,))
        owners = [self.own(shape), *[mixed] * (n - 1)]
        layers = [LayerPlan(own=own, window=None if i == n - 1 else self.window) for i, own in enumerate(owners)]
        return KVPlan.of([*layers, *[LayerPlan(keys=Share(n - 1), values=Share(n - 1))] * (shape.n_layers - n)])


@register_preset
class ResFormer(Preset):
    """ResFormer (arXiv 2410.17897, section 3.2): values are a learned sum of those of layer 0 and the layer's own."""

    preset: Literal["resformer"] = "resformer"

    def expand(self, shape: Shape) -> KVPlan:
        own = self.own(shape)
        above = (
            LayerPlan(own=own, values=Fuse((0, i), granularity="scalar", init="mean")) for i in range(1, shape.n_layers)
        )
        return KVPlan.of([LayerPlan(own=own), *above])
