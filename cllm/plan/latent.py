"""`Latent`, a source whose slot is one low-rank latent and one RoPE key for all heads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pydantic import Field

from cllm.errors import PlanError
from cllm.plan.kinds import Source, Widths
from cllm.section import MAX_HEADS, MAX_WIDTH, Section


@dataclass(frozen=True, kw_only=True, slots=True)
class Latent(Source):
    """A slot of one low-rank latent and one RoPE key for all heads: MLA (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    The slot holds c (B, T, kv_lora_rank) and k_rope (B, T, qk_rope_head_dim). Every layer that reads the slot expands
    it with up-projections of its own, which decoding absorbs into its queries and output.

    With several `blocks`, c is split into as many parts of equal width (MLRA, arXiv 2603.02188). Each is normalised
    separately and expanded to keys and values of all heads. A layer's output is the sum of the attentions over the
    parts, divided by the square root of their number.
    """

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None
    blocks: int = 1

    key, noun, is_plain = "latent", "latent", False

    class Settings(Section):
        """The layers own a latent."""

        kv_lora_rank: int = Field(ge=1, le=MAX_WIDTH)
        """Width of the cached latent."""
        q_lora_rank: int | None = Field(None, ge=1, le=MAX_WIDTH)
        """Rank of the query projection; null: full rank."""
        qk_nope_head_dim: int = Field(ge=1, le=MAX_WIDTH)
        """Channels of a query head without position."""
        qk_rope_head_dim: int = Field(ge=2, le=MAX_WIDTH, multiple_of=2)
        """Channels of the decoupled RoPE key."""
        v_head_dim: int = Field(ge=1, le=MAX_WIDTH)
        """Channels of a value head."""
        blocks: int = Field(1, ge=1, le=MAX_HEADS)
        """Parts of the latent, each with a norm and an attention; 1: the entire latent is one (MLA); 4: MLRA-4."""

    def settings(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "blocks" or value != 1}

    @property
    def text(self) -> str:
        blocks = "" if self.blocks == 1 else f"{self.blocks} x "
        return f"latent {blocks}{self.kv_lora_rank // self.blocks} + {self.qk_rope_head_dim}"

    def check(self, layer: int) -> None:
        Source.check(self, layer)
        if self.kv_lora_rank % self.blocks:
            raise PlanError(
                f"layer {layer}: blocks is {self.blocks} and kv_lora_rank {self.kv_lora_rank}; allowed: a number of "
                "blocks that divides kv_lora_rank"
            )

    def widths(self, head_dim: int) -> Widths:
        return (self.kv_lora_rank,), (self.qk_rope_head_dim,)

    def rope_dim(self, head_dim: int) -> int:
        return self.qk_rope_head_dim

    def attention_flops(self, n_heads: int, head_dim: int, seen: float) -> float:
        return 2 * n_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim) * self.blocks * seen

    def read_activations(self, n_heads: int, head_dim: int, made: int) -> int:
        # Expanded keys and values of all heads are kept too; the RoPE key is a part of the keys. Values are a part of
        # what the up-projection returns, which keeps the keys' other part once more. The sum of several outputs is kept
        # beside them.
        key, value, several = self.qk_nope_head_dim + self.qk_rope_head_dim, self.v_head_dim, self.blocks > 1
        kept = (1 + self.blocks) * key + self.blocks * self.qk_nope_head_dim + (2 * self.blocks + several) * value
        return n_heads * kept + made * self.kv_lora_rank
