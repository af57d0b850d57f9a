"""One decoder layer: pre-norm attention and pre-norm SwiGLU, each added to the residual stream."""

from __future__ import annotations

from torch import Tensor, nn

from cllm.config import ModelConfig
from cllm.kv.plan import KVPlan
from cllm.kv.sources import Slot
from cllm.model.attention import Context, make_mixer
from cllm.model.mlp import SwiGLU
from cllm.model.norm import RMSNorm


class Block(nn.Module):
    """Layer `layer` of a plan."""

    def __init__(self, config: ModelConfig, plan: KVPlan, layer: int, d_ff: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.attention = make_mixer(config, plan, layer)
        self.mlp_norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.mlp = SwiGLU(config.d_model, d_ff)

    def forward(self, x: Tensor, context: Context, *read: Tensor) -> tuple[Tensor, Slot | None]:
        """The stream after this layer, and the layer's own slot or None.

        Args:
            x: (B, T, d_model).
            context: what all layers of this pass share.
            read: the slots of `plan.reads_others(layer)` as a flat list k, v, k, v, ...; tensors, not containers, so
                that gradient checkpointing treats them as inputs.
        """
        slots = [Slot(*read[n : n + 2]) for n in range(0, len(read), 2)]
        mixed, own = self.attention(x, self.attention_norm(x), slots, context)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), own
