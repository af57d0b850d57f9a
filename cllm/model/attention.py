"""The attention half of a block, for each kind of slot a layer can read: keys and values, latents, recurrent states.

Every mixer has the same face: it takes the residual stream before and after the block's norm and the slots of other
layers that its layer reads, and returns its output and, if its layer owns a slot, that slot. Slots are arguments and
results and never travel by any other way, so that gradient checkpointing sees them.

Shapes: B batch, T tokens, H query heads, G KV heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cllm.cache.slot import Slot
from cllm.cache.stores import SlotStore, StateStore, Step, Store
from cllm.config import ModelConfig, Rope
from cllm.kernels.attention import Documents, Mask, attention, document_boundaries
from cllm.kernels.decode import Stored, Visible, decode_attention
from cllm.kernels.retention import gated_retention, gated_retention_from
from cllm.model.norm import RMSNorm
from cllm.model.rope import apply_rope, rope_table
from cllm.model.sources import make_owner, make_read
from cllm.plan.kinds import Latent, Retention, Source, mixer_module
from cllm.plan.plan import KVPlan


@dataclass(slots=True)
class Context:
    """What every layer of one forward pass shares: positions, documents, and the tables made from them."""

    rope_config: Rope
    positions: Tensor
    """(B or 1, T) integers."""
    document_ids: Tensor | None = None
    """(B, S) integers, of all tokens that may be seen, or None: one document a row."""
    backend: str = "auto"
    documents: Documents | None = None
    """The boundaries of `document_ids`, made here for kernels on a GPU, so that no compiled block has to."""
    cached: Cached | None = None
    """Where slots' tokens stand; None where every slot holds the tokens of this pass and no others."""
    step: Step | None = None
    """What this pass does to the cache, if there is one."""
    is_text: Tensor | None = None
    """(B, T) booleans, False for padding; None: there is none."""
    tail: Context | None = None
    """Of the last token, if it alone goes on after this layer's slot is written."""
    recompute_fusion: bool = False
    """Whether fused keys and values are made again for the gradient and not kept."""
    _rope: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _masks: dict[tuple[int | None, bool, int], Mask] = field(default_factory=dict)
    _visible: dict[tuple[int | None, bool, int], Visible] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ids = self.document_ids
        if ids is not None and self.documents is None and ids.is_cuda and ids.shape[1] == self.length:
            self.documents = document_boundaries(ids)

    @property
    def length(self) -> int:
        """Tokens of this pass, T."""
        return self.positions.shape[1]

    @property
    def decodes(self) -> bool:
        """Whether there is one query a sequence and slots stand before it, which calls for other kernels."""
        return self.cached is not None and self.length == 1

    def rope(self, dim: int) -> tuple[Tensor, Tensor]:
        """cos and sin (B or 1, T, 1, dim), made once for each dim."""
        if dim not in self._rope:
            self._rope[dim] = rope_table(self.rope_config, dim, self.positions)
        return self._rope[dim]

    def prepare(self, plan: KVPlan, head_dim: int, sizes: Mapping[int, int] | None = None) -> None:
        """Make every table and mask that the layers of `plan` will ask for, outside of what is compiled.

        `sizes` are the tokens in the slot of each owner as readers will see it; the tokens of this pass by default.
        """
        for i, layer in enumerate(plan.layers):
            self.rope(plan.source(i).rope_dim(head_dim))
            size = self.length if sizes is None else min((sizes[j] for j in plan.reads(i) if j in sizes), default=0)
            if size and self.decodes:
                self.visible(layer.window, plan.reads_above(i), size)
            elif size:
                self.mask(layer.window, plan.reads_above(i), size)

    def mask(self, window: int | None, exclude_self: bool, size: int) -> Mask:
        """The mask of a kind of layer over slots of `size` tokens, made once for each kind."""
        key = (window, exclude_self, size)
        if key not in self._masks:
            ids = None if self.document_ids is None else self.document_ids[:, -size:]
            self._masks[key] = Mask(window, exclude_self, ids, self.documents if size == self.length else None)
        return self._masks[key]

    def visible(self, window: int | None, exclude_self: bool, size: int) -> Visible:
        """What the one query of a kind of layer sees of slots with `size` places, made once for each kind."""
        key = (window, exclude_self, size)
        if key not in self._visible:
            assert self.cached is not None
            column, first = self.cached.places(size)
            self._visible[key] = Visible(column, first, window, exclude_self)
        return self._visible[key]


@dataclass(frozen=True, slots=True)
class Cached:
    """Where the slots' tokens stand. A token's column is its place in the padded sequence."""

    column: Tensor
    """(1,) int64: column of the first token of this pass, on the device."""
    starts: Tensor | None
    """(B,) int64: columns of padding before each sequence."""
    total: int | None
    """Columns up to and with this pass, where slots hold tokens in order; None where they are rings."""

    def places(self, size: int) -> tuple[Tensor, Tensor | None]:
        """The last token's place (1,) in slots of `size` tokens and the first place (B,) that each sequence sees."""
        if self.total is None:
            return self.column, self.starts
        first = None if self.starts is None else self.starts - (self.total - size)
        return torch.full_like(self.column, size - 1), first


class _Mixer(nn.Module):
    """What mixers have in common: the layer's place in the plan, and the owner module if the layer owns a slot."""

    def __init__(self, config: ModelConfig, plan: KVPlan, layer: int):
        super().__init__()
        self.window, self.exclude_self = plan.layers[layer].window, plan.reads_above(layer)
        self.owner = make_owner(config, plan.layers[layer].own)
        self.places = {j: place for place, j in enumerate((*plan.reads_others(layer), layer))}
        """Where the slot of each layer stands in what `write` returns: those of other layers, then the own one."""
        self.read_places = [self.places[j] for j in plan.reads(layer)]

    def write(
        self, residual: Tensor, normed: Tensor, slots: Sequence[Slot], context: Context, store: Store | None
    ) -> tuple[Slot | None, Sequence[Slot]]:
        """This layer's own slot as readers see it, if it owns one, and `slots` with it at the end."""
        if self.owner is None:
            return None, slots
        slot = self.owner(residual, normed, context.rope)
        if store is not None:
            assert isinstance(store, SlotStore)
            assert context.step is not None
            slot = store.extend(slot, context.step)
        return slot, (*slots, slot)

    def common(self, slots: Sequence[Slot]) -> tuple[Sequence[Slot], int]:
        """`slots` cut to the tokens that all of them hold, and how many those are."""
        read = [slots[place] for place in self.read_places]
        size = min(slot.k.shape[1] for slot in read)
        if all(slot.k.shape[1] == size for slot in read):
            return slots, size
        return [slot.map(lambda t: t[:, t.shape[1] - size :]) for slot in slots], size


@mixer_module(Source)
class Attention(_Mixer):
    """Softmax attention over keys and values that the plan names."""

    def __init__(self, config: ModelConfig, plan: KVPlan, layer: int):
        super().__init__(config, plan, layer)
        kv_heads = plan.source(layer).kv_heads
        assert kv_heads is not None, f"layer {layer} reads no keys and values"
        self.head_dim = config.resolved_head_dim
        width = config.n_heads * self.head_dim
        self.q_proj = nn.Linear(config.d_model, width, bias=config.q_bias)
        self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.keys = make_read(plan.keys(layer), "k", self.places, kv_heads, self.head_dim)
        self.values = make_read(plan.values(layer), "v", self.places, kv_heads, self.head_dim)
        self.o_proj = nn.Linear(width, config.d_model, bias=False)
        self.fuses = plan.fuses(layer)

    def forward(
        self, residual: Tensor, normed: Tensor, slots: Sequence[Slot], context: Context, store: Store | None = None
    ):
        """(B, T, d_model), of the last token alone if there is a tail, and the layer's own slot or None."""
        own, slots = self.write(residual, normed, slots, context, store)
        context, normed = ending(context, normed)
        slots, size = self.common(slots)
        q = self.q_proj(normed).unflatten(-1, (-1, self.head_dim))  # B, T, H, D
        if self.q_norm is not None:
            q = self.q_norm(q)
        q = apply_rope(q, context.rope(self.head_dim))
        if context.decodes:
            keys, values = self.keys.stored(slots), self.values.stored(slots)
            outs = way_to_attend(keys, values)(
                self.keys.queries(q[:, 0]),
                keys,
                values,
                context.visible(self.window, self.exclude_self, size),
                scale=self.head_dim**-0.5,
            )
            return self.o_proj(self.values.combine(outs).flatten(-2)[:, None]), own
        mask = context.mask(self.window, self.exclude_self, size)
        if self.fuses and context.recompute_fusion and torch.is_grad_enabled():
            out = checkpoint(self._read, q, slots, mask, context.backend, use_reentrant=False, context_fn=_keep_kernels)
        else:
            out = self._read(q, slots, mask, context.backend)
        return self.o_proj(out.flatten(-2)), own

    def _read(self, q: Tensor, slots: Sequence[Slot], mask: Mask, backend: str) -> Tensor:
        """Attention's output (B, T, H, D) over all that this layer reads."""
        return attention(q, self.keys(slots), self.values(slots), mask, backend=backend)


_aten = torch.ops.aten
_ELEMENTWISE = frozenset(
    {_aten.mul.Tensor, _aten.add.Tensor, _aten.cat.default, _aten.clone.default, _aten._to_copy.default}
)
"""What a fusion is made of: cheap to do again, where attention, which reads its result, is not."""


def _keep_kernels() -> Any:
    """Of a region that is run again for its gradients, run element-wise operations and keep what all others gave."""

    def policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        again = operation in _ELEMENTWISE or getattr(operation, "is_view", False)  # a kept view would keep all of it
        return CheckpointPolicy.PREFER_RECOMPUTE if again else CheckpointPolicy.MUST_SAVE

    return create_selective_checkpoint_contexts(policy)


@mixer_module(Latent)
class LatentAttention(_Mixer):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1.2-2.1.3), in expanded form."""

    def __init__(self, config: ModelConfig, plan: KVPlan, layer: int):
        super().__init__(config, plan, layer)
        latent = plan.reading(Latent)[layer]
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

    def forward(
        self, residual: Tensor, normed: Tensor, slots: Sequence[Slot], context: Context, store: Store | None = None
    ):
        """(B, T, d_model), of the last token alone if there is a tail, and the layer's own slot or None."""
        own, slots = self.write(residual, normed, slots, context, store)
        context, normed = ending(context, normed)
        slots, size = self.common(slots)
        nope, rope, value = self.latent.qk_nope_head_dim, self.latent.qk_rope_head_dim, self.latent.v_head_dim
        x = normed if self.q_down_proj is None or self.q_norm is None else self.q_norm(self.q_down_proj(normed))
        q_nope, q_rope = self.q_proj(x).unflatten(-1, (self.n_heads, -1)).split((nope, rope), dim=-1)
        q_rope = apply_rope(q_rope, context.rope(rope))  # B, T, H, rope
        slot = slots[self.place]
        if context.decodes:
            visible = context.visible(self.window, self.exclude_self, size)
            out = self._absorbed(q_nope[:, 0], q_rope[:, 0], slot, visible)[:, None]
        else:
            k_nope, v = self.kv_up_proj(slot.k).unflatten(-1, (self.n_heads, -1)).split((nope, value), dim=-1)
            k = torch.cat((k_nope, slot.v[:, :, None].expand(-1, -1, self.n_heads, -1)), dim=-1)
            mask = context.mask(self.window, self.exclude_self, size)
            out = attention(torch.cat((q_nope, q_rope), dim=-1), k, v, mask, backend=context.backend)
        return self.o_proj(out.flatten(-2)), own

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, slot: Slot, visible: Visible) -> Tensor:
        """(B, H, v_head_dim) for one query a sequence, the latent never expanded (section 2.1.2): the up-projection of
        keys moves to the query, q·(U c) = (Uᵀ q)·c, and that of values to the output, Σ p (W c) = W Σ p c."""
        weight, bias = _as_matrix(self.kv_up_proj, self.latent.kv_lora_rank, q_nope)
        parts = (self.latent.qk_nope_head_dim, self.latent.v_head_dim)
        up_k, up_v = weight.unflatten(0, (self.n_heads, -1)).split(parts, dim=1)  # H, nope or value, rank
        latent = Stored(slot.k[:, :, None], None if slot.k_scale is None else slot.k_scale[:, :, None])
        key = Stored(slot.v[:, :, None], None if slot.v_scale is None else slot.v_scale[:, :, None])
        q_latent = torch.einsum("bhn,hnr->bhr", q_nope, up_k)
        scale = (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5
        (out,) = decode_attention([q_latent, q_rope], [latent, key], [latent], visible, scale=scale)
        out = torch.einsum("bhr,hvr->bhv", out, up_v)
        # What is added to keys adds the same to every score; what is added to values is weighed by weights of sum 1.
        return out if bias is None else out + bias.unflatten(0, (self.n_heads, -1)).split(parts, dim=1)[1]


def _as_matrix(module: nn.Module, width: int, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """The weight (out, width) of an affine module in the dtype of `like`, and its bias (out,) if it may have one.

    A module in the place of a plain layer, such as one with an adapter, has no tensor that says what it computes, so it
    is applied to the unit vectors and to 0.
    """
    if type(module) is nn.Linear and module.bias is None:
        return module.weight.to(like.dtype), None
    unit = torch.eye(width + 1, width, dtype=like.dtype, device=like.device)  # the last row is 0
    rows, bias = module(unit).to(like.dtype).split((width, 1))
    return (rows - bias).T, bias[0]


@mixer_module(Retention)
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

    def forward(
        self, residual: Tensor, normed: Tensor, slots: Sequence[Slot], context: Context, store: Store | None = None
    ):
        """(B, T, d_model), of the last token alone if there is a tail, and None: a recurrent state is no slot."""
        q, k, v, gate = (
            proj(normed).unflatten(-1, (-1, self.head_dim))
            for proj in (self.q_proj, self.k_proj, self.v_proj, self.gate_proj)
        )
        table = context.rope(self.head_dim)
        log_decay = F.logsigmoid(self.decay_proj(normed).float()) / 16  # B, T, H
        q, k = apply_rope(q, table), apply_rope(k, table)
        scale = self.head_dim**-0.5
        if store is None:
            out = gated_retention(q, k, v, log_decay, scale=scale, document_ids=context.document_ids)
        else:
            assert isinstance(store, StateStore)
            if context.is_text is not None:  # padding adds nothing to the state
                k = k * context.is_text[:, :, None, None]
            out, state = gated_retention_from(store.state, q, k, v, log_decay, scale=scale)
            store.put(state)
        out = self.o_proj((F.silu(gate) * self.head_norm(out)).flatten(-2))
        return ending(context, out)[1], None


def ending(context: Context, x: Tensor) -> tuple[Context, Tensor]:
    """What goes on after this layer's slot is written: `context` and `x` (B, T, ...), or those of the last token."""
    return (context, x) if context.tail is None else (context.tail, x[:, -1:])


class Attends(Protocol):
    """What may stand in a slot in the place of a tensor, in a pass of one token: data that is read in a way of its own.
    It has the tensor's `shape`, gives what it is indexed by as a tensor, and takes over attention."""

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
        """As `decode_attention`, of parts some of which are like this one."""
        ...


def way_to_attend(keys: Sequence[Stored], values: Sequence[Stored]) -> Callable[..., list[Tensor]]:
    """`decode_attention`, or the way that the first part which is no tensor brings."""
    own: list[Any] = [part.data for part in (*keys, *values) if not isinstance(part.data, Tensor)]
    return own[0].attend if own else decode_attention


def make_mixer(config: ModelConfig, plan: KVPlan, layer: int) -> _Mixer:
    """The mixer for the kind of slot that a layer reads."""
    return mixer_module.of(plan.source(layer))(config, plan, layer)
