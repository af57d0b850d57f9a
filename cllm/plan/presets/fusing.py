"""FusedKV, FusedKV-Lite and their ablations (arXiv 2512.03870)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from cllm.plan.fuse import Fuse, FusionInit
from cllm.plan.kinds import Half, Read, Share
from cllm.plan.plan import MAX_LAYERS, KVPlan, LayerPlan
from cllm.plan.presets.base import LayerCount, LayerNumbers, Preset, count_or_half, register_preset
from cllm.plan.shape import Shape


class _Storage(Preset):
    """Lower layers store; the layers above them read `sources`."""

    n_storage: LayerCount = Field(None, ge=1, le=MAX_LAYERS)
    """Number of layers at the bottom that own K/V; null: half of all layers."""
    sources: LayerNumbers = Field(None, min_length=1)
    """Layers whose K/V the other layers read; null: the first and the last layer that owns K/V."""

    def read(self, sources: Sequence[int]) -> tuple[Read, Read]:
        """(keys, values) of an upper layer."""
        raise NotImplementedError

    def expand(self, shape: Shape) -> KVPlan:
        n = count_or_half(shape, self.n_storage, "n_storage")
        sources = list(dict.fromkeys([0, n - 1])) if self.sources is None else self.sources
        keys, values = self.read(sources)
        storage = [LayerPlan(own=self.own(shape))] * n
        return KVPlan.of([*storage, *[LayerPlan(keys=keys, values=values)] * (shape.n_layers - n)])


class _Fusing(_Storage):
    granularity: Literal["scalar", "channel"] = "channel"
    """`channel`: a weight for every channel (keys: for every rotated pair); `scalar`: one for the entire head."""
    keys: Literal["scalar", "channel", "complex"] | None = None
    """Weights of keys; `complex`: a complex one for every rotated pair and KV head; null: as `granularity` says."""
    values: Literal["scalar", "channel", "matrix"] | None = None
    """Weights of values; `matrix`: (head_dim, head_dim) for every KV head; null: as `granularity` says."""
    per_head: bool = False
    """Separate weights for every KV head, instead of one set for all. Complex and matrix weights always are."""
    init: FusionInit = "lite"
    """Initial fusion weights: `lite` (all keys from the last source, all values from the first), `mean`, `randn`."""

    def fuse(self, half: Half, *layers: int) -> Fuse:
        chosen = self.keys if half == "keys" else self.values
        return Fuse(layers, granularity=chosen or self.granularity, per_head=self.per_head, init=self.init)


@register_preset
class FusedKV(_Fusing):
    """FusedKV (arXiv 2512.03870, eq. 4 and 5): K and V of the upper half are learned sums of two lower slots."""

    preset: Literal["fusedkv"] = "fusedkv"

    def read(self, sources: Sequence[int]) -> tuple[Read, Read]:
        return self.fuse("keys", *sources), self.fuse("values", *sources)


@register_preset
class FusedKVLite(_Storage):
    """FusedKV-Lite (eq. 6): the upper half reads the last source's keys and the first source's values."""

    preset: Literal["fusedkv_lite"] = "fusedkv_lite"

    def read(self, sources: Sequence[int]) -> tuple[Read, Read]:
        return Share(sources[-1]), Share(sources[0])


@register_preset
class FusedKVLiteLearnable(_Fusing):
    """Ablation of the paper (section 3.4): FusedKV-Lite with a learned weight on the one source."""

    preset: Literal["fusedkv_lite_learnable"] = "fusedkv_lite_learnable"

    def read(self, sources: Sequence[int]) -> tuple[Read, Read]:
        return self.fuse("keys", sources[-1]), self.fuse("values", sources[0])


@register_preset
class FusedKVLiteReversed(_Storage):
    """Ablation of the paper (section 3.4): keys from the first source, values from the last; much worse there."""

    preset: Literal["fusedkv_lite_reversed"] = "fusedkv_lite_reversed"

    def read(self, sources: Sequence[int]) -> tuple[Read, Read]:
        return Share(sources[0]), Share(sources[-1])
