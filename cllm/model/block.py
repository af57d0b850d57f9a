"""One decoder layer: pre-norm attention and pre-norm SwiGLU, each added to the residual stream."""

from __future__ import annotations

from torch import Tensor, nn

from cllm.cache.slot import Slot
from cllm.cache.stores import Store
from cllm.config import ModelConfig
from cllm.model.attention import Context, make_mixer
from cllm.model.mlp import SwiGLU
from cllm.model.norm import RMSNorm
from cllm.plan.plan import KVPlan


class Block(nn.Module):
    """Layer `layer` of a plan."""

    recomputes = False
    """Whether the block checkpoints itself, as transformers' layers do, so that the decoder must not do it, too."""

    def __init__(self, config: ModelConfig, plan: KVPlan, layer: int, d_ff: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = make_mixer(config, plan, layer)
        self.mlp_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = SwiGLU(config.d_model, d_ff)
        self.shares = layer in plan.shared
        """Whether other layers read the own slot. Handed on for nobody, it would get gradients of zeros in the backward
        of a compiled block, which are written, read and added."""

    def forward(
        self, x: Tensor, context: Context, *read: Tensor | None, store: Store | None = None
    ) -> tuple[Tensor, Slot | None]:
        """The stream after this layer, and the layer's own slot or None.

        Args:
            x: (B, T, d_model).
            context: what all layers of this pass share.
            read: the slots of `plan.reads_others(layer)`, their fields in one flat list; tensors, not containers, so
                that gradient checkpointing treats them as inputs.
            store: what a cache keeps of this layer, which takes the layer's own slot of these tokens.

        Returns:
            The stream (B, T, d_model), or (B, 1, d_model) where `context.tail` says that only the last token goes on;
            and the own slot as other layers read it, or None where none does.
        """
        width = len(Slot._fields)
        slots = [Slot(*read[n : n + width]) for n in range(0, len(read), width)]  # type: ignore[arg-type]
        mixed, own = self.attention(x, self.attention_norm(x), slots, context, store)
        x = (x if context.tail is None else x[:, -1:]) + mixed
        return self.mlp(self.mlp_norm(x), x), own if self.shares else None
