"""The attention half of a block, for each kind of slot a layer can read: keys and values, latents, recurrent states.

Every mixer has the same face: it takes the residual stream before and after the block's norm and the slots of other
layers that its layer reads, and returns its output and, if its layer owns a slot, that slot. Slots are arguments and
results and never travel by any other way, so that gradient checkpointing sees them.

Shapes: B batch, T tokens, H query heads, G KV heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllm.config import ModelConfig, Rope
from cllm.kernels.attention import Documents, Mask, attention, document_boundaries
from cllm.kernels.retention import gated_retention
from cllm.kv.plan import KVPlan, Latent, Own, Retention
from cllm.kv.sources import Slot, make_owner, make_read
from cllm.model.norm import RMSNorm
from cllm.model.rope import apply_rope, rope_table


@dataclass(slots=True)
class Context:
    """What every layer of one forward pass shares: positions, documents, and the tables made from them."""

    rope_config: Rope
    positions: Tensor
    """(B or 1, T) integers."""
    document_ids: Tensor | None = None
    """(B, T) integers, or None: one document a row."""
    backend: str = "auto"
    documents: Documents | None = None
    """The boundaries of `document_ids`, made here for kernels on a GPU, so that no compiled block has to."""
    _rope: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _masks: dict[tuple[int | None, bool], Mask] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.document_ids is not None and self.documents is None and self.document_ids.is_cuda:
            self.documents = document_boundaries(self.document_ids)

    def rope(self, dim: int) -> tuple[Tensor, Tensor]:
        """cos and sin (B or 1, T, 1, dim), made once for each dim."""
        if dim not in self._rope:
            self._rope[dim] = rope_table(self.rope_config, dim, self.positions)
        return self._rope[dim]

    def prepare(self, plan: KVPlan, head_dim: int) -> None:
        """Make every table and mask that the layers of `plan` will ask for, outside of what is compiled."""
        for i, layer in enumerate(plan.layers):
            source = plan.source(i)
            self.rope(source.qk_rope_head_dim if isinstance(source, Latent) else head_dim)
            self.mask(layer.window, plan.reads_above(i))

    def mask(self, window: int | None, exclude_self: bool) -> Mask:
        """The mask of a kind of layer, made once for each kind."""
        if (window, exclude_self) not in self._masks:
            self._masks[window, exclude_self] = Mask(window, exclude_self, self.document_ids, self.documents)
        return self._masks[window, exclude_self]


class _Mixer(nn.Module):
    """What mixers have in common: the layer's place in the plan, and the owner module if the layer owns a slot."""

    def __init__(self, config: ModelConfig, plan: KVPlan, layer: int):
        super().__init__()
        self.window, self.exclude_self = plan.layers[layer].window, plan.reads_above(layer)
        self.owner = make_owner(config, plan.layers[layer].own)
        self.places = {j: place for place, j in enumerate((*plan.reads_others(layer), layer))}
        """Where the slot of each layer stands in what `write` returns: those of other layers, then the own one."""

    def write(
        self, residual: Tensor, normed: Tensor, slots: Sequence[Slot], context: Context
    ) -> tuple[Slot | None, Sequence[Slot]]:
        """This layer's own slot, if it owns one, and `slots` with it at the end."""
        if self.owner is None:
            return None, slots
        slot = self.owner(residual, normed, context.rope)
        return slot, (*slots, slot)


class Attention(_Mixer):
    """Softmax attention over keys and values that the plan names."""

    def __init__(self, config: ModelConfig, plan: KVPlan, layer: int):
        super().__init__(config, plan, layer)
        source = plan.source(layer)
        assert isinstance(source, Own)
        self.head_dim = config.resolved_head_dim
        width = config.n_heads * self.head_dim
        self.q_proj = nn.Linear(config.d_model, width, bias=config.q_bias)
        self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.keys = make_read(plan.keys(layer), "k", self.places, source.n_kv_heads, self.head_dim)
        self.values = make_read(plan.values(layer), "v", self.places, source.n_kv_heads, self.head_dim)
        self.o_proj = nn.Linear(width, config.d_model, bias=False)

    def forward(self, residual: Tensor, normed: Tensor, slots: Sequence[Slot], context: Context):
        """(B, T, d_model) and the layer's own slot or None."""
        own, slots = self.write(residual, normed, slots, context)
        q = self.q_proj(normed).unflatten(-1, (-1, self.head_dim))  # B, T, H, D
        if self.q_norm is not None:
            q = self.q_norm(q)
        q = apply_rope(q, context.rope(self.head_dim))
        mask = context.mask(self.window, self.exclude_self)
        out = attention(q, self.keys(slots), self.values(slots), mask, backend=context.backend)
        return self.o_proj(out.flatten(-2)), own


class LatentAttention(_Mixer):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1.2-2.1.3), in expanded form."""

    def __init__(self, config: ModelConfig, plan: KVPlan, layer: int):
        super().__init__(config, plan, layer)
        latent = plan.source(layer)
        assert isinstance(latent, Latent)
        self.place = self.places[plan.keys(layer).layers[0]]
        self.n_heads, self.latent = config.n_heads, latent
        width = config.n_heads * (latent.qk_nope_head_dim + latent.qk_rope_head_dim)
        self.q_down_proj = self.q_norm = None
        if latent.q_lora_rank is not None:
            self.q_down_proj = nn.Linear(config.d_model, latent.q_lora_rank, bias=False)
            self.q_norm = RMSNorm(latent.q_lora_rank, eps=config.norm_eps)
        self.q_proj = nn.Linear(latent.q_lora_rank or config.d_model, width, bias=False)
        kv_width = config.n_heads * (latent.qk_nope_head_dim + latent.v_head_dim)
        self.kv_up_proj = nn.Linear(latent.kv_lora_rank, kv_width, bias=False)
        self.o_proj = nn.Linear(config.n_heads * latent.v_head_dim, config.d_model, bias=False)

    def forward(self, residual: Tensor, normed: Tensor, slots: Sequence[Slot], context: Context):
        """(B, T, d_model) and the layer's own slot or None."""
        own, slots = self.write(residual, normed, slots, context)
        nope, rope, value = self.latent.qk_nope_head_dim, self.latent.qk_rope_head_dim, self.latent.v_head_dim
        x = normed if self.q_down_proj is None or self.q_norm is None else self.q_norm(self.q_down_proj(normed))
        q_nope, q_rope = self.q_proj(x).unflatten(-1, (self.n_heads, -1)).split((nope, rope), dim=-1)
        q = torch.cat((q_nope, apply_rope(q_rope, context.rope(rope))), dim=-1)  # B, T, H, nope + rope
        c, k_rope = slots[self.place]
        k_nope, v = self.kv_up_proj(c).unflatten(-1, (self.n_heads, -1)).split((nope, value), dim=-1)
        k = torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, self.n_heads, -1)), dim=-1)
        out = attention(q, k, v, context.mask(self.window, self.exclude_self), backend=context.backend)
        return self.o_proj(out.flatten(-2)), own


class GatedRetention(_Mixer):
    """Gated retention (YOCO, arXiv 2405.05254, section 3.2): for each head a recurrent state that decays by
    γ = σ(W x)^(1/16) and a norm without weights; then a swish gate."""

    def __init__(self, config: ModelConfig, plan: KVPlan, layer: int):
        super().__init__(config, plan, layer)
        self.head_dim = config.resolved_head_dim
        width = config.n_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.gate_proj = (
            nn.Linear(config.d_model, width, bias=False) for _ in range(4)
        )
        self.decay_proj = nn.Linear(config.d_model, config.n_heads, bias=False)
        self.head_norm = RMSNorm(self.head_dim, eps=config.norm_eps, elementwise_affine=False)
        self.o_proj = nn.Linear(width, config.d_model, bias=False)

    def forward(self, residual: Tensor, normed: Tensor, slots: Sequence[Slot], context: Context):
        """(B, T, d_model) and None: a recurrent state is no slot."""
        q, k, v, gate = (
            proj(normed).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj, self.gate_proj)
        )
        table = context.rope(self.head_dim)
        log_decay = F.logsigmoid(self.decay_proj(normed).float()) / 16  # B, T, H
        out = gated_retention(
            apply_rope(q, table),
            apply_rope(k, table),
            v,
            log_decay,
            scale=self.head_dim**-0.5,
            document_ids=context.document_ids,
        )
        return self.o_proj((F.silu(gate) * self.head_norm(out)).flatten(-2)), None


def make_mixer(config: ModelConfig, plan: KVPlan, layer: int) -> _Mixer:
    """The mixer for the kind of slot that a layer reads."""
    kinds: dict[type, type[_Mixer]] = {Own: Attention, Latent: LatentAttention, Retention: GatedRetention}
    return kinds[type(plan.source(layer))](config, plan, layer)
