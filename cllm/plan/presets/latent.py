"""Plans of low-rank latents: MLA."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cllm.errors import PlanError
from cllm.plan.kinds import Latent, Share
from cllm.plan.plan import MAX_LAYERS, KVPlan, LayerPlan
from cllm.plan.presets.base import Preset, register_preset, runs_of_layers
from cllm.plan.shape import Shape
from cllm.section import MAX_WIDTH


@register_preset
class MLA(Preset):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), optionally with one latent for several layers."""

    preset: Literal["mla"] = "mla"
    n_kv_heads: None = None
    """Not used: a latent has no heads."""
    kv_norm: Literal[False] = False
    """Not used: the latent is normalised."""
    kv_lora_rank: int | None = Field(None, ge=1, le=MAX_WIDTH)
    """Width of the cached latent; null: 4 head_dim (DeepSeek-V2: 512 at head_dim 128)."""
    q_lora_rank: int | None = Field(None, ge=1, le=MAX_WIDTH)
    """Rank of the query projection; null: full rank (DeepSeek-V2-Lite)."""
    qk_nope_head_dim: int | None = Field(None, ge=1, le=MAX_WIDTH)
    """Channels of a query head without position; null: head_dim."""
    qk_rope_head_dim: int | None = Field(None, ge=2, le=MAX_WIDTH)
    """Channels of the decoupled RoPE key that all heads share; null: half of head_dim."""
    v_head_dim: int | None = Field(None, ge=1, le=MAX_WIDTH)
    """Channels of a value head; null: head_dim."""
    factor: int = Field(1, ge=1, le=MAX_LAYERS)
    """Number of layers that read one latent; 1: every layer caches a latent."""

    def expand(self, shape: Shape) -> KVPlan:
        d = shape.head_dim
        latent = Latent(
            kv_lora_rank=self.kv_lora_rank or 4 * d,
            q_lora_rank=self.q_lora_rank,
            qk_nope_head_dim=self.qk_nope_head_dim or d,
            qk_rope_head_dim=self.qk_rope_head_dim or max(2, d // 4 * 2),
            v_head_dim=self.v_head_dim or d,
        )
        if latent.qk_rope_head_dim % 2:
            raise PlanError(
                f"model.kv.qk_rope_head_dim is {latent.qk_rope_head_dim}; RoPE rotates pairs: an even number"
            )
        groups = runs_of_layers(range(shape.n_layers), self.factor)
        return KVPlan.of(
            LayerPlan(own=latent) if i == group[0] else LayerPlan(keys=Share(group[0]), values=Share(group[0]))
            for group in groups
            for i in group
        )
