"""One decoder layer: pre-norm attention and a pre-norm MLP, each added to the residual stream."""

from __future__ import annotations

from torch import Tensor, nn

import cllm.model.joint  # noqa: F401  (registers the mixers of reads of several slots)
from cllm.cache.slot import Slot
from cllm.cache.stores import Store
from cllm.config import ModelConfig
from cllm.model.attention import make_mixer
from cllm.model.context import Context
from cllm.model.mlp import GatedMLP
from cllm.model.norm import RMSNorm
from cllm.plan.plan import KVPlan


class Block(nn.Module):
    """Layer `layer` of a plan."""

    checkpoints_itself = False
    """Whether the block does its own gradient checkpointing, like a transformers layer; the decoder then does none."""

    def __init__(self, config: ModelConfig, plan: KVPlan, layer: int, d_ff: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = make_mixer(config, plan, layer)
        self.mlp_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = GatedMLP(config.d_model, d_ff, config.mlp_activation)
        self.after_attention_norm, self.after_mlp_norm = (
            RMSNorm(config.d_model, eps=config.norm_eps) if config.norms_after else None for _ in range(2)
        )
        self.returns_slot = layer in plan.shared
        """Whether other layers read this layer's slot. A slot returned to no reader would still receive zero gradients
        in a compiled block, which cost memory traffic."""

    def forward(
        self,
        x: Tensor,
        context: Context,
        *slots: Slot,
        store: Store | None = None,
        source: Tensor | None = None,
        **local: Store | None,
    ) -> tuple[Tensor, Slot | None]:
        """The residual stream after this layer, and the layer's slot.

        Args:
            x: (B, T, d_model); (B, n, d_model) if a lower layer was the last that all tokens of a prompt had to reach.
            context: the state that all layers of this pass share.
            slots: the slots of `plan.reads_others(layer)`.
            store: the cache's store of this layer, to which the layer's slot is added.
            source: (B, T or n, d_model), the normalised output of the layer that the plan names as this one's `input`.
            local: `local_store`, the cache's store of this layer's local slot, if the plan gives it one.

        Returns:
            The residual stream (B, T, d_model), or (B, n, d_model) if `context.tail` has n tokens; and this layer's
            slot as other layers read it, or None if none does.
        """
        residual = x if source is None else source
        mixed, own = self.attention(residual, self.attention_norm(x), slots, context, store, **local)
        if self.after_attention_norm is not None:
            mixed = self.after_attention_norm(mixed)
        x = context.after_write(x)[1] + mixed
        normed = self.mlp_norm(x)
        x = self.mlp(normed, x) if self.after_mlp_norm is None else x + self.after_mlp_norm(self.mlp(normed))
        return x, own if self.returns_slot else None
