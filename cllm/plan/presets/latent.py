"""Plans of low-rank latents: MLA, latents of several blocks, and one latent for several layers with its rank chosen by
bytes."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from cllm.errors import PlanError
from cllm.plan.kinds import Share
from cllm.plan.latent import Latent
from cllm.plan.plan import MAX_LAYERS, KVPlan, LayerPlan
from cllm.plan.presets.base import Preset, register_preset, runs_of_layers
from cllm.plan.shape import Shape
from cllm.section import MAX_HEADS, MAX_WIDTH


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

    @property
    def n_blocks(self) -> int:
        """Parts of the latent, see `Latent.blocks`."""
        return 1

    def rank(self, shape: Shape, rope_dim: int) -> int:
        """Width of the latents; `rope_dim` channels of a RoPE key are cached with each."""
        return self.kv_lora_rank or 4 * shape.head_dim

    def expand(self, shape: Shape) -> KVPlan:
        d = shape.head_dim
        rope_dim = self.qk_rope_head_dim or max(2, d // 4 * 2)
        latent = Latent(
            kv_lora_rank=self.rank(shape, rope_dim),
            q_lora_rank=self.q_lora_rank,
            qk_nope_head_dim=self.qk_nope_head_dim or d,
            qk_rope_head_dim=rope_dim,
            v_head_dim=self.v_head_dim or d,
            blocks=self.n_blocks,
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


@register_preset
class XMLA(MLA):
    """MLA across layers: groups of layers read one latent, each with up-projections of its own (arXiv 2405.04434, 2.1).

    A group's lowest layer projects the latent and the RoPE key from its own input. Queries, up-projections and outputs
    belong to each layer, and decoding absorbs them. The rank follows from the cache's bytes: with n groups on L layers
    and H heads of D channels, mha caches 2 L H D numbers a token and this plan n (rank + rope).
    """

    preset: Literal["xmla"] = "xmla"  # type: ignore[assignment]
    factor: int = Field(2, ge=1, le=MAX_LAYERS)
    """Number of layers that read one latent. If it does not divide that of all layers, layer 0 shares with no other."""
    bytes: float | None = Field(None, gt=0, le=1)
    """Cached bytes as a share of mha's: the largest rank that needs no more; null: 0.25, or as `kv_lora_rank` says."""
    kv_lora_rank: int | None = Field(None, ge=1, le=MAX_WIDTH)
    """Width of the cached latents; null: as `bytes` says."""

    def rank(self, shape: Shape, rope_dim: int) -> int:
        if self.kv_lora_rank is not None:
            if self.bytes is not None:
                raise PlanError(
                    f"model.kv.bytes is {self.bytes:g} and kv_lora_rank {self.kv_lora_rank}; allowed: one of the two"
                )
            return self.kv_lora_rank
        share = 0.25 if self.bytes is None else self.bytes
        groups, width = len(runs_of_layers(range(shape.n_layers), self.factor)), shape.n_heads * shape.head_dim
        rank = math.floor(share * 2 * shape.n_layers * width / groups + 1e-9) - rope_dim
        least, most = ((r + rope_dim) * groups / (2 * shape.n_layers * width) for r in (1, width))
        if not 1 <= rank <= width:
            raise PlanError(
                f"model.kv.bytes is {share:g}, which makes latents of rank {rank}; allowed with factor {self.factor}: "
                f"{_rounded(least, up=True)} to {_rounded(most, up=False)}, ranks 1 to {width} (n_heads x head_dim)"
            )
        return rank


@register_preset
class MLRA(MLA):
    """Multi-head low-rank attention (MLRA, arXiv 2603.02188): MLA whose latent has blocks, each with an attention.

    Each block has a norm and up-projections to the keys and values of all heads, and the outputs are summed. The cache
    and the number of weights are MLA's, and a tensor-parallel device needs its blocks only.
    """

    preset: Literal["mlra"] = "mlra"  # type: ignore[assignment]
    blocks: int = Field(4, ge=1, le=MAX_HEADS)
    """Parts of the latent (MLRA-4: 4), which divide `kv_lora_rank`; 1: MLA."""

    @property
    def n_blocks(self) -> int:
        return self.blocks


def _rounded(share: float, *, up: bool) -> str:
    """`share` in four decimals."""
    return f"{(math.ceil if up else math.floor)(share * 1e4) / 1e4:g}"
