"""Plans in which every layer owns keys and values: MHA, GQA, MQA."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cllm.errors import PlanError
from cllm.plan.kinds import Own
from cllm.plan.plan import MAX_LAYERS, KVPlan, LayerPlan
from cllm.plan.presets.base import Preset, register_preset
from cllm.plan.shape import Shape
from cllm.section import MAX_TOKENS


@register_preset
class MHA(Preset):
    """Multi-head attention: every layer owns, as many KV heads as query heads."""

    preset: Literal["mha"] = "mha"
    window: int | None = Field(None, ge=1, le=MAX_TOKENS)
    """Sliding window in tokens, the query's own included (Mistral); null: full causal attention."""
    full_every: int | None = Field(None, ge=1, le=MAX_LAYERS)
    """With a window: every n-th layer keeps full attention (Gemma: 6)."""

    def windows(self, n_layers: int) -> list[int | None]:
        full = self.full_every
        if full and self.window is None:
            raise PlanError(
                f"model.kv.full_every is {full}, but without a window every layer has full attention; set window"
            )
        return [None if full and (i + 1) % full == 0 else self.window for i in range(n_layers)]

    def expand(self, shape: Shape) -> KVPlan:
        return KVPlan.of(LayerPlan(own=self.own(shape), window=w) for w in self.windows(shape.n_layers))


@register_preset
class GQA(MHA):
    """Grouped-query attention (arXiv 2305.13245): `n_kv_heads` defaults to half of the query heads."""

    preset: Literal["gqa"] = "gqa"  # type: ignore[assignment]

    def own(self, shape: Shape) -> Own:
        return Own(n_kv_heads=self.n_kv_heads or max(1, shape.n_heads // 2), kv_norm=self.kv_norm)


@register_preset
class MQA(MHA):
    """Multi-query attention (arXiv 1911.02150): one KV head."""

    preset: Literal["mqa"] = "mqa"  # type: ignore[assignment]
    n_kv_heads: Literal[1] = 1
    """Always 1."""
