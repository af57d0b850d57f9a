"""The attention half of a block, for each kind of slot a layer can read: keys and values, latents, recurrent states.

All mixers have one interface. They take the residual stream before and after the block's norm, and the slots of other
layers that this layer reads. They return the output and, if the layer owns a slot, that slot. Slots are passed only as
arguments and results, so that gradient checkpointing sees them.

Shapes: B batch, T tokens, H query heads, G KV heads, D channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cllm.cache.paged import PagedSlot
from cllm.cache.slot import Slot
from cllm.cache.stores import SlotStore, StateStore, Store
from cllm.config import ModelConfig
from cllm.errors import PlanError
from cllm.kernels.attention import Mask, attention
from cllm.kernels.decode import Stored, Visible, decode_attention
from cllm.kernels.retention import gated_retention, gated_retention_from
from cllm.model import fusion  # noqa: F401  (registers the modules of `Fuse`)
from cllm.model.context import Context
from cllm.model.norm import BlockRMSNorm, RMSNorm
from cllm.model.rope import apply_rope
from cllm.model.sources import OwnMixedKV, StoredForm, make_owner, make_read
from cllm.plan.kinds import Retention, Source
from cllm.plan.latent import Latent
from cllm.plan.plan import KVPlan
from cllm.plan.registry import mixer_module


class Mixer(nn.Module):
    """Base of all mixers: the layer's mask, the slots that it reads, and the owner module if the layer owns a slot."""

    takes_requests = False
    """Whether it computes a row that holds the tokens of several requests (`Context.groups`)."""

    def __init__(self, config: ModelConfig, plan: KVPlan, layer: int):
        super().__init__()
        self.head_dim = plan.source(layer).head_size(config.resolved_head_dim)
        self.window, self.exclude_self = plan.layers[layer].window, plan.reads_above(layer)
        self.owner = make_owner(config, plan.layers[layer].own)
        self.reads_windowed = config.rope.is_windowed(plan, plan.key_slots(layer)[0])
        self.owns_windowed = self.owner is not None and config.rope.is_windowed(plan, layer)
        """Which RoPE the keys have that it reads, and those that it owns (`Rope.of`)."""
        self.slot_index = {j: index for index, j in enumerate((*plan.reads_others(layer), layer))}
        """Index of each layer's slot in the slots that `write` returns: those of other layers, then this layer's."""
        self.read_indices = [self.slot_index[j] for j in plan.reads(layer)]
        self.mix_indices = [self.slot_index[j] for j in plan.mixes(layer)]

    def write(
        self, residual: Tensor, normed: Tensor, slots: Sequence[Slot], context: Context, store: Store | None
    ) -> tuple[Slot | None, Sequence[Slot]]:
        """This layer's slot as readers see it, or None, and `slots` with that slot appended.

        `residual` is the stream as it enters the layer or, if the owner projects another layer's output, that output,
        normalised. With a `store`, the slot is added to the cache and the cached tokens come before the new ones.
        """
        if self.owner is None:
            return None, slots
        context = context.over(residual)
        slot = self.owner(residual, normed, context.ropes(self.owns_windowed))
        dtype = slot.v.dtype
        if self.mix_indices:
            assert isinstance(self.owner, OwnMixedKV)
            slot = self.owner.mix(slot, [context.newest(slots[index], dtype) for index in self.mix_indices])
        if isinstance(store, PagedSlot):  # its pages hold what readers see
            slot = store.extend(self.as_read(slot, context, dtype))
            return slot, (*slots, slot)
        if store is not None:
            assert isinstance(store, SlotStore)
            assert context.step is not None
            slot = store.extend(slot, context.step)
        slot = self.as_read(slot, context, dtype)
        return slot, (*slots, slot)

    def as_read(self, stored: Slot, context: Context, dtype: torch.dtype) -> Slot:
        """The slot of this layer as readers see it, from its stored tokens, those of this pass included."""
        return as_read(self.owner, stored, context, dtype, self.owns_windowed)

    def align(self, slots: Sequence[Slot]) -> tuple[Sequence[Slot], int]:
        """`slots` cut to the length of the shortest slot that is read, and that length.

        The last tokens are kept: slots with different windows cache different numbers of tokens.
        """
        read = [slots[index] for index in self.read_indices]
        size = min(slot.k.shape[1] for slot in read)
        if all(slot.k.shape[1] == size for slot in read):
            return slots, size
        return [slot.map(lambda t: t[:, t.shape[1] - size :]) for slot in slots], size


def as_read(owner: nn.Module | None, stored: Slot, context: Context, dtype: torch.dtype, windowed: bool) -> Slot:
    """The slot of `owner` as readers see it, or as decoding kernels do, from its stored tokens; see `Rope.of`."""
    if not isinstance(owner, StoredForm):
        return stored
    table = context.slot_rope(owner.head_dim, stored.v.shape[1], windowed)
    return owner.as_decoded(stored, table) if context.is_decoding else owner.as_read(stored, table, dtype)


@mixer_module(Source)
class Attention(Mixer):
    """Softmax attention over keys and values that the plan names."""

    takes_requests = True

    def __init__(self, config: ModelConfig, plan: KVPlan, layer: int):
        super().__init__(config, plan, layer)
        kv_heads = plan.source(layer).kv_heads
        assert kv_heads is not None, f"layer {layer} reads no keys and values"
        width = config.n_heads * self.head_dim
        self.q_proj = nn.Linear(config.d_model, width, bias=config.q_bias)
        self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.keys = make_read(plan.keys(layer), "k", self.slot_index, kv_heads, self.head_dim)
        self.values = make_read(plan.values(layer), "v", self.slot_index, kv_heads, self.head_dim)
        self.o_proj = nn.Linear(width, config.d_model, bias=False)
        self.is_fused = plan.fuses(layer)

    def forward(
        self, residual: Tensor, normed: Tensor, slots: Sequence[Slot], context: Context, store: Store | None = None
    ):
        """The output (B, T, d_model), or (B, n, d_model) with `context.tail`; and the layer's slot or None."""
        own, slots = self.write(residual, normed, slots, context, store)
        context, normed = context.after_write(normed)
        q = self.q_proj(normed).unflatten(-1, (-1, self.head_dim))  # B, T, H, D
        if self.q_norm is not None:
            q = self.q_norm(q)
        q = apply_rope(q, context.rope(self.head_dim, self.reads_windowed))
        if not context.groups:
            return self.o_proj(self._attend(q, slots, context).flatten(-2)), own
        out = torch.empty_like(q)
        for group in context.groups:
            group.put(out, self._attend(group.query(q), [group.slot(slot) for slot in slots], group.context))
        return self.o_proj(out.flatten(-2)), own

    def _attend(self, q: Tensor, slots: Sequence[Slot], context: Context) -> Tensor:
        """Attention's output (B, T, H, D) for queries of the same shape, over the slots of one sequence a row."""
        slots, size = self.align(slots)
        if context.is_decoding:
            keys, values = self.keys.stored(slots), self.values.stored(slots)
            attend = decode_function(keys, values)
            outs = attend(
                self.keys.queries(q[:, 0]),
                keys,
                values,
                context.visible(self.window, self.exclude_self, size),
                scale=self.head_dim**-0.5,
            )
            return self.values.combine(outs)[:, None]
        mask = context.mask(self.window, self.exclude_self, size)
        if self.is_fused and context.recompute_fusion and torch.is_grad_enabled():
            return checkpoint(
                self._read,
                q,
                slots,
                mask,
                context.backend,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=_keep_kernels,
            )
        return self._read(q, slots, mask, context.backend)

    def _read(self, q: Tensor, slots: Sequence[Slot], mask: Mask, backend: str) -> Tensor:
        """Attention's output (B, T, H, D) over the keys and values of `slots`."""
        return attention(q, self.keys(slots), self.values(slots), mask, backend=backend)


_aten = torch.ops.aten
_FUSION = frozenset(
    {
        *(_aten.mul.Tensor, _aten.add.Tensor, _aten.cat.default, _aten.clone.default, _aten._to_copy.default),
        *(_aten.neg.default, _aten.flip.default, _aten.bmm.default, _aten.baddbmm.default),
    }
)
"""The operations of a fusion. They are cheap to recompute, unlike the attention that reads their result."""


def _keep_kernels() -> Any:
    """Checkpoint policy: recompute the operations of fusions in the backward; save the results of all others."""

    def policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        again = operation in _FUSION or getattr(operation, "is_view", False)  # a kept view would keep all of it
        return CheckpointPolicy.PREFER_RECOMPUTE if again else CheckpointPolicy.MUST_SAVE

    return create_selective_checkpoint_contexts(policy)


@mixer_module(Latent)
class LatentAttention(Mixer):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1.2-2.1.3), in expanded form.

    A latent of several blocks has an up-projection and an attention for each, and the output is n^-½ Σ_i o_i over its n
    blocks. Queries of a low rank r are scaled by √(d_model / r) before their up-projection (MLRA, arXiv 2603.02188).
    """

    def __init__(self, config: ModelConfig, plan: KVPlan, layer: int):
        super().__init__(config, plan, layer)
        latent = plan.reading(Latent)[layer]
        self.latent_index = self.slot_index[plan.keys(layer).layers[0]]
        self.n_heads, self.latent, blocks = config.n_heads, latent, latent.blocks
        width = config.n_heads * (latent.qk_nope_head_dim + latent.qk_rope_head_dim)
        self.q_down_proj = self.q_norm = None
        if latent.q_lora_rank is not None:
            self.q_down_proj = nn.Linear(config.d_model, latent.q_lora_rank, bias=False)
            scale = math.sqrt(config.d_model / latent.q_lora_rank)
            self.q_norm = (
                RMSNorm(latent.q_lora_rank, eps=config.norm_eps)
                if blocks == 1
                else BlockRMSNorm(latent.q_lora_rank, blocks=1, scale=scale, eps=config.norm_eps)
            )
        self.q_proj = nn.Linear(latent.q_lora_rank or config.d_model, width, bias=False)
        kv_width = config.n_heads * (latent.qk_nope_head_dim + latent.v_head_dim)
        ups = [nn.Linear(latent.kv_lora_rank // blocks, kv_width, bias=False) for _ in range(blocks)]
        self.kv_up_proj = ups[0] if blocks == 1 else nn.ModuleList(ups)
        self.o_proj = nn.Linear(config.n_heads * latent.v_head_dim, config.d_model, bias=False)

    @property
    def up_projections(self) -> Sequence[nn.Module]:
        """The up-projection of each block of the latent, (kv_lora_rank / blocks) -> H (nope + value)."""
        return list(self.kv_up_proj) if isinstance(self.kv_up_proj, nn.ModuleList) else [self.kv_up_proj]

    def forward(
        self, residual: Tensor, normed: Tensor, slots: Sequence[Slot], context: Context, store: Store | None = None
    ):
        """The output (B, T, d_model), or (B, n, d_model) with `context.tail`; and the layer's slot or None."""
        own, slots = self.write(residual, normed, slots, context, store)
        context, normed = context.after_write(normed)
        slots, size = self.align(slots)
        nope, rope = self.latent.qk_nope_head_dim, self.latent.qk_rope_head_dim
        x = normed if self.q_down_proj is None or self.q_norm is None else self.q_norm(self.q_down_proj(normed))
        q_nope, q_rope = self.q_proj(x).unflatten(-1, (self.n_heads, -1)).split((nope, rope), dim=-1)
        q_rope = apply_rope(q_rope, context.rope(rope, self.reads_windowed))  # B, T, H, rope
        slot = slots[self.latent_index]
        if context.is_decoding:
            visible = context.visible(self.window, self.exclude_self, size)
            out = self._absorbed(q_nope[:, 0], q_rope[:, 0], slot, visible)[:, None]
        else:
            mask = context.mask(self.window, self.exclude_self, size)
            out = self._expanded(torch.cat((q_nope, q_rope), dim=-1), slot, mask, context.backend)
        return self.o_proj(out.flatten(-2)), own

    def _expanded(self, q: Tensor, slot: Slot, mask: Mask, backend: str) -> Tensor:
        """(B, T, H, v_head_dim) for queries (B, T, H, nope + rope): attention over keys and values of all heads."""
        outs = []
        for up, latent in zip(self.up_projections, slot.k.chunk(self.latent.blocks, dim=-1), strict=True):
            parts = (self.latent.qk_nope_head_dim, self.latent.v_head_dim)
            k_nope, v = up(latent).unflatten(-1, (self.n_heads, -1)).split(parts, dim=-1)
            k = torch.cat((k_nope, slot.v[:, :, None].expand(-1, -1, self.n_heads, -1)), dim=-1)
            outs.append(attention(q, k, v, mask, backend=backend))
        return _scaled_sum(outs)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, slot: Slot, visible: Visible) -> Tensor:
        """(B, H, v_head_dim) for one query of each sequence, without expanding the latent (section 2.1.2).

        The up-projection of keys is applied to the query, q·(U c) = (Uᵀ q)·c, and that of values to the output,
        Σ p (W c) = W Σ p c. The blocks of the latent are KV heads, each with all query heads, so that one call reads
        every block once.
        """
        blocks, parts = self.latent.blocks, (self.latent.qk_nope_head_dim, self.latent.v_head_dim)
        matrices = [_as_matrix(up, self.latent.kv_lora_rank // blocks, q_nope) for up in self.up_projections]
        ups = [weight.unflatten(0, (self.n_heads, -1)).split(parts, dim=1) for weight, _ in matrices]
        q_latent = _joined([torch.einsum("bhn,hnr->bhr", q_nope, up_k) for up_k, _ in ups])  # B, blocks H, r
        q_rope = _joined([q_rope] * blocks)
        scale = (parts[0] + self.latent.qk_rope_head_dim) ** -0.5
        data, key = slot.k[:, :, None], slot.v[:, :, None]
        latent = Stored(data.unflatten(-1, (blocks, -1))[:, :, 0], _for_heads(slot.k_scale, blocks))
        rope_key = Stored(key.expand(-1, -1, blocks, -1), _for_heads(slot.v_scale, blocks))
        (out,) = decode_attention([q_latent, q_rope], [latent, rope_key], [latent], visible, scale=scale)
        outs = []
        for (_, up_v), (_, bias), of_block in zip(ups, matrices, out.split(self.n_heads, dim=1), strict=True):
            value = torch.einsum("bhr,hvr->bhv", of_block, up_v)
            # A bias of keys adds the same number to every score. A bias of values is weighted by p, whose sum is 1.
            outs.append(value if bias is None else value + bias.unflatten(0, (self.n_heads, -1)).split(parts, dim=1)[1])
        return _scaled_sum(outs)


def _for_heads(scale: Tensor | None, heads: int) -> Tensor | None:
    """Factors of tokens (B, S) as (B, S, heads)."""
    return None if scale is None else scale[:, :, None].expand(-1, -1, heads)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors (B, H, ...) side by side in H."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)


def _scaled_sum(outs: Sequence[Tensor]) -> Tensor:
    """n^-½ Σ_i o_i over n outputs."""
    total = outs[0]
    for out in outs[1:]:
        total = total + out
    return total if len(outs) == 1 else total * len(outs) ** -0.5


def _as_matrix(module: nn.Module, width: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """The weight (out, width) of an affine module in the dtype of `like`, and its bias (out,) or None.

    A module that replaces a plain layer, such as one with an adapter, may have no such tensors. Then the weight and the
    bias are computed by applying the module to the unit vectors and to 0.
    """
    if type(module) is nn.Linear and module.bias is None:
        return module.weight.to(like.dtype), None
    unit = torch.eye(width + 1, width, dtype=like.dtype, device=like.device)  # the last row is 0
    rows, bias = module(unit).to(like.dtype).split((width, 1))
    return (rows - bias).T, bias[0]


@mixer_module(Retention)
class GatedRetention(Mixer):
    """Gated retention (YOCO, arXiv 2405.05254, section 3.2).

    Each head has a recurrent state, which decays by γ = σ(W x)^(1/16), and a norm without weights; then a swish gate.
    """

    def __init__(self, config: ModelConfig, plan: KVPlan, layer: int):
        super().__init__(config, plan, layer)
        width = config.n_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj, self.gate_proj = (
            nn.Linear(config.d_model, width, bias=False) for _ in range(4)
        )
        self.decay_proj = nn.Linear(config.d_model, config.n_heads, bias=False)
        self.head_norm = RMSNorm(self.head_dim, eps=config.norm_eps, elementwise_affine=False)
        self.o_proj = nn.Linear(width, config.d_model, bias=False)

    def forward(
        self, residual: Tensor, normed: Tensor, slots: Sequence[Slot], context: Context, store: Store | None = None
    ):
        """The output (B, T, d_model), or (B, n, d_model) with `context.tail`; and None instead of a slot."""
        q, k, v, gate = (
            proj(normed).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj, self.gate_proj)
        )
        table = context.rope(self.head_dim, self.reads_windowed)
        log_decay = F.logsigmoid(self.decay_proj(normed).float()) / 16  # B, T, H
        q, k = apply_rope(q, table), apply_rope(k, table)
        scale = self.head_dim**-0.5
        if store is None:
            out = gated_retention(q, k, v, log_decay, scale=scale, document_ids=context.document_ids)
        else:
            assert isinstance(store, StateStore)
            if context.is_text is not None:  # padding must not change the state
                k = k * context.is_text[:, :, None, None]
            out, state = gated_retention_from(store.state, q, k, v, log_decay, scale=scale)
            store.put(state)
        out = self.o_proj((F.silu(gate) * self.head_norm(out)).flatten(-2))
        return context.after_write(out)[1], None


class CompressedTensor(Protocol):
    """Replaces the tensor `k` or `v` of a slot during one-token decoding, for data stored compressed.

    It has the tensor's `shape`, can be indexed like the tensor, and provides its own attention function.
    """

    @property
    def shape(self) -> torch.Size: ...

    def __getitem__(self, key: Any) -> Tensor: ...

    def attend(
        self,
        queries: Sequence[Tensor],
        keys: Sequence[Stored],
        values: Sequence[Stored],
        visible: Visible,
        *,
        scale: float,
    ) -> list[Tensor]:
        """`decode_attention` for parts of which at least one is a `CompressedTensor`."""
        ...


def decode_function(keys: Sequence[Stored], values: Sequence[Stored]) -> Callable[..., list[Tensor]]:
    """`decode_attention`, or the attention function of the first part that is compressed."""
    for part in (*keys, *values):
        data: Tensor | CompressedTensor = part.data
        if not isinstance(data, Tensor):
            return data.attend
    return decode_attention


def make_mixer(config: ModelConfig, plan: KVPlan, layer: int) -> Mixer:
    """The mixer for the kind of slot that a layer reads, or for its read of several slots at once."""
    source = plan.source(layer)
    build = mixer_module.of(plan.keys(layer) if plan.reads_at_once(layer) else source)
    if build is Attention and not source.is_plain:
        raise PlanError(
            f"layer {layer}: {type(source).__name__} is not keys and values and has no mixer; register one with "
            "cllm.plan.registry.mixer_module"
        )
    return build(config, plan, layer)
