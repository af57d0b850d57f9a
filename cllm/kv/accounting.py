"""What a plan costs at inference, counted from the plan: bytes resident, written and read.

The three differ. Sharing lowers what is *resident* and *written*, but every layer still *reads* the slots it attends
to, and a fusing layer reads several: FusedKV stores half of mha's cache and reads one and a half times as much.
"""

from __future__ import annotations

from dataclasses import dataclass

from cllm.config import ModelConfig
from cllm.kv.plan import KVPlan, Latent, Own, Retention
from cllm.kv.presets import MHA


@dataclass(frozen=True, kw_only=True, slots=True)
class KVBytes:
    """Bytes of one sequence's cache, each divided by the tokens of its context."""

    context: int
    """Tokens of the context that the figures are for."""
    resident: float
    """Bytes held for each token of the context; windows and recurrent states are spread over it."""
    written: float
    """Bytes that one new token adds."""
    read: float
    """Bytes read for each token of the context when one token is decoded."""

    def relative_to(self, other: KVBytes) -> tuple[float, float]:
        """(resident, read) as a share of `other`."""
        return self.resident / other.resident, self.read / other.read


def slot_elements(plan: KVPlan, owner: int, head_dim: int) -> tuple[int, int]:
    """Numbers that one token adds to the two tensors of a slot."""
    source = plan.layers[owner].own
    if isinstance(source, Own):
        return source.n_kv_heads * head_dim, source.n_kv_heads * head_dim
    if isinstance(source, Latent):
        return source.kv_lora_rank, source.qk_rope_head_dim
    return 0, 0


def kv_bytes(config: ModelConfig, *, context: int | None = None, bytes_per_element: int = 2) -> KVBytes:
    """The cost of `config`'s plan at `context` tokens (default: `max_seq_len`), in bf16 unless told otherwise.

    A layer reads the whole of the tensors it attends to, as far as its window goes; keys and values that two fused
    sources contribute count once for each source. A recurrent state is read and written whole for every token.
    """
    plan, head_dim = config.plan(), config.resolved_head_dim
    context = context or config.max_seq_len
    resident = written = read = 0.0
    for owner in plan.owners:
        elements = sum(slot_elements(plan, owner, head_dim))
        resident += elements * min(plan.layers[owner].window or context, context)
        written += elements
        if isinstance(plan.layers[owner].own, Retention):
            state = config.n_heads * head_dim * head_dim
            resident, written = resident + state, written + state
    for i, layer in enumerate(plan.layers):
        seen = min(layer.window or context, context)
        source = plan.source(i)
        if isinstance(source, Retention):
            read += config.n_heads * head_dim * head_dim
        elif isinstance(source, Latent):
            read += sum(slot_elements(plan, plan.keys(i).layers[0], head_dim)) * seen
        else:
            keys = sum(slot_elements(plan, j, head_dim)[0] for j in plan.keys(i).layers)
            values = sum(slot_elements(plan, j, head_dim)[1] for j in plan.values(i).layers)
            read += (keys + values) * seen
    scale = bytes_per_element
    return KVBytes(
        context=context, resident=resident * scale / context, written=written * scale, read=read * scale / context
    )


def mha_twin(config: ModelConfig) -> ModelConfig:
    """The same model with the mha plan: what caches are compared with."""
    return config.model_copy(update={"kv": MHA(), "match_params": False})
