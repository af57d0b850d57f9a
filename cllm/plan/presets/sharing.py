"""Plans in which layers share one slot as it is: CLA, YOCO and YOCO-U, trailing layers (Gemma 3n, AFM)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cllm.errors import PlanError
from cllm.plan.kinds import Own, Retention, Share
from cllm.plan.plan import MAX_LAYERS, KVPlan, LayerPlan, Loop
from cllm.plan.presets.base import LayerCount, Preset, count_or_half, from_targets, register_preset, runs_of_layers
from cllm.plan.presets.owning import MHA
from cllm.plan.shape import Shape
from cllm.section import MAX_HEADS, MAX_TOKENS


@register_preset
class CLA(Preset):
    """Cross-layer attention (arXiv 2405.12981): runs of `factor` layers read the lowest layer of the run.

    The paper's three variants of CLA-2 on 20 layers are `keep_ends: true`, `dense_front: 9, factor: 10, dense_back: 1`
    and `dense_front: 1, factor: 10, dense_back: 9`.
    """

    preset: Literal["cla"] = "cla"
    factor: int = Field(2, ge=2, le=MAX_LAYERS)
    """Number of layers that read one slot. If it does not divide the number of layers, layer 0 shares with no other."""
    kv_norm: bool = True
    """As in the paper, queries and K/V have separate norms (section 3.1.1)."""
    keep_ends: bool = False
    """The first and the last layer own K/V that no other layer reads."""
    dense_front: int = Field(0, ge=0, le=MAX_LAYERS)
    """Number of layers at the bottom that own K/V that no other layer reads."""
    dense_back: int = Field(0, ge=0, le=MAX_LAYERS)
    """Number of layers at the top that own K/V that no other layer reads."""

    def expand(self, shape: Shape) -> KVPlan:
        front, back = max(self.dense_front, int(self.keep_ends)), max(self.dense_back, int(self.keep_ends))
        n = shape.n_layers
        if front + back > n:
            raise PlanError(f"model.kv: dense_front {front} + dense_back {back} layers exceed the model's {n}")
        alone = [[i] for i in (*range(front), *range(n - back, n))]
        groups = alone + runs_of_layers(range(front, n - back), self.factor)
        target = {i: group[0] for group in groups for i in group}
        return from_targets([target[i] for i in range(n)], self.own(shape))


@register_preset
class YOCO(Preset):
    """You only cache once (arXiv 2405.05254): an efficient lower half, one full slot, an upper half that reads it."""

    preset: Literal["yoco"] = "yoco"
    lower: Literal["window", "retention"] = "window"
    """Kind of the lower layers: sliding-window attention or gated retention."""
    window: int = Field(1024, ge=1, le=MAX_TOKENS)
    """Sliding window of the lower layers, in tokens (the paper's 3B: 1024)."""
    n_lower: LayerCount = Field(None, ge=1, le=MAX_LAYERS)
    """Number of lower layers; null: half of all layers."""
    kv_norm: bool = True
    """The one full slot has a separate norm, as in the authors' code."""
    lower_kv_heads: int | None = Field(None, ge=1, le=MAX_HEADS)
    """KV heads of the lower layers; null: as many as query heads."""

    def expand(self, shape: Shape) -> KVPlan:
        return self.layers(shape, count_or_half(shape, self.n_lower, "n_lower"))

    def layers(self, shape: Shape, n: int, loop: Loop | None = None) -> KVPlan:
        """The plan with `n` lower layers."""
        windowed = self.lower == "window"
        low = Own(n_kv_heads=self.lower_kv_heads or shape.n_heads) if windowed else Retention()
        lower = [LayerPlan(own=low, window=self.window if windowed else None)] * n
        upper = [LayerPlan(keys=Share(n), values=Share(n))] * (shape.n_layers - n - 1)
        return KVPlan.of([*lower, LayerPlan(own=self.own(shape)), *upper], loop=loop)


@register_preset
class YOCOU(YOCO):
    """YOCO whose lower layers are computed several times with the same weights (YOCO-U, arXiv 2604.01220).

    `model.n_layers` counts every turn: 10 lower layers, 3 turns and 10 upper layers are 40. Each turn of a lower layer
    caches a window of its own. The slot that the upper layers read is projected from the output of the last turn.
    """

    preset: Literal["yoco_u"] = "yoco_u"  # type: ignore[assignment]
    window: int = Field(512, ge=1, le=MAX_TOKENS)
    """Sliding window of the lower layers, in tokens (the paper: 512)."""
    times: int = Field(3, ge=2, le=MAX_LAYERS)
    """Turns of the lower layers."""
    n_lower: LayerCount = Field(None, ge=1, le=MAX_LAYERS)
    """Lower layers of one turn; null: as many as upper layers, n_layers / (times + 1)."""

    def expand(self, shape: Shape) -> KVPlan:
        count = shape.n_layers // (self.times + 1) if self.n_lower is None else self.n_lower
        if not 1 <= count <= (shape.n_layers - 1) // self.times:
            raise PlanError(
                f"model.n_layers is {shape.n_layers}, which counts {self.times} turns of {count} lower layers "
                f"(model.kv.times, n_lower) and the upper ones; allowed: {max(count, 1) * self.times + 1} or more"
            )
        return self.layers(shape, count * self.times, Loop(first=0, count=count, times=self.times))


@register_preset
class Trailing(MHA):
    """The last `n_shared` layers read the last owner of their mask kind (Gemma 3n: 15 of 35 layers, every 5th full)."""

    preset: Literal["trailing"] = "trailing"  # type: ignore[assignment]
    n_shared: LayerCount = Field(None, ge=1, le=MAX_LAYERS)
    """Number of layers at the top without own K/V; null: half of all layers."""

    def shared(self, shape: Shape) -> int:
        return count_or_half(shape, self.n_shared, "n_shared")

    def expand(self, shape: Shape) -> KVPlan:
        windows = self.windows(shape.n_layers)
        first = shape.n_layers - self.shared(shape)
        last_of_kind = {w: i for i, w in enumerate(windows[:first])}
        layers = [LayerPlan(own=self.own(shape), window=w) for w in windows[:first]]
        for i, window in enumerate(windows[first:], start=first):
            if window not in last_of_kind:
                kind = "full attention" if window is None else "a sliding window"
                raise PlanError(f"layer {i}: has {kind}, and none of the owners 0 to {first - 1} has; lower n_shared")
            target = Share(last_of_kind[window])
            layers.append(LayerPlan(keys=target, values=target, window=window))
        return KVPlan.of(layers)


@register_preset
class AFM(Trailing):
    """Apple's on-device model (arXiv 2507.13575): depth split 5:3, the upper block reads the lower one's last layer."""

    preset: Literal["afm"] = "afm"  # type: ignore[assignment]
    n_shared: LayerCount = Field(None, ge=1, le=MAX_LAYERS)
    """Number of layers at the top without own K/V; null: three eighths of all layers."""

    def shared(self, shape: Shape) -> int:
        return count_or_half(shape, shape.n_layers * 3 // 8 if self.n_shared is None else self.n_shared, "n_shared")
