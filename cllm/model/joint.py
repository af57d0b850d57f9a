"""The mixers of layers that read several slots at once, each with a mask of its own.

`JointAttention` takes one softmax over all of them, `GatedAttention` adds the attentions over each of them with gates.
Their interface is that of the mixers in `attention.py`; the store of a local slot comes as `local_store`.

Shapes: B batch, T tokens, H query heads, G KV heads, D channels of a head, P slots that are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllm.cache.slot import Slot
from cllm.cache.stores import SlotStore, Store
from cllm.config import ModelConfig
from cllm.kernels.attention import Mask, attention
from cllm.kernels.decode import Stored, Visible
from cllm.kernels.joint import DecodePart, JointPart, joint_attention, joint_decode
from cllm.model.attention import Mixer, as_read, decode_function
from cllm.model.context import Context
from cllm.model.norm import RMSNorm
from cllm.model.rope import apply_rope
from cllm.model.sources import Reader, make_owner, stored_part
from cllm.plan.joins import LOCAL, Gate, Join, Whole
from cllm.plan.plan import KVPlan
from cllm.plan.registry import mixer_module


class PartsAttention(Mixer):
    """Base: queries, the slots that are read, and the local slot. A subclass attends to them."""

    def __init__(self, config: ModelConfig, plan: KVPlan, layer: int):
        super().__init__(config, plan, layer)
        read = plan.keys(layer)
        assert isinstance(read, Whole)
        self.local = make_owner(config, plan.layers[layer].local)
        self.local_windowed = self.local is not None and config.rope.is_windowed(plan, len(plan) + layer)
        self.places = [None if part.layer == LOCAL else self.slot_index[part.layer] for part in read.parts]
        """For each slot that is read its index in the slots that `write` returns; None: the local slot."""
        self.windows = [part.window for part in read.parts]
        width = config.n_heads * self.head_dim
        self.q_proj = nn.Linear(config.d_model, width, bias=config.q_bias)
        self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.o_proj = nn.Linear(width, config.d_model, bias=False)

    def forward(
        self,
        residual: Tensor,
        normed: Tensor,
        slots: Sequence[Slot],
        context: Context,
        store: Store | None = None,
        local_store: Store | None = None,
    ) -> tuple[Tensor, Slot | None]:
        """The output (B, T, d_model), or (B, n, d_model) with `context.tail`; and the layer's slot or None."""
        own, slots = self.write(residual, normed, slots, context, store)
        local = self.write_local(residual, normed, context, local_store)
        context, normed = context.after_write(normed)
        q = self.q_proj(normed).unflatten(-1, (-1, self.head_dim))  # B, T, H, D
        if self.q_norm is not None:
            q = self.q_norm(q)
        q = apply_rope(q, context.rope(self.head_dim, self.reads_windowed))
        read = [slots[place] if place is not None else local for place in self.places]
        if context.is_decoding:
            parts = [
                (slot, context.visible(window, False, slot.k.shape[1]))
                for slot, window in zip(read, self.windows, strict=True)
                if slot is not None
            ]
            out = self.decode(q[:, 0], normed[:, 0], parts)[:, None]
        else:
            masked = [
                (slot, context.mask(window, False, slot.k.shape[1]))
                for slot, window in zip(read, self.windows, strict=True)
                if slot is not None
            ]
            out = self.attend(q, normed, masked, context.backend)
        return self.o_proj(out.flatten(-2)), own

    def write_local(self, residual: Tensor, normed: Tensor, context: Context, store: Store | None) -> Slot | None:
        """The local slot as this layer reads it, or None; arguments as those of `write`."""
        if self.local is None:
            return None
        context = context.over(normed)
        slot: Slot = self.local(residual, normed, context.ropes(self.local_windowed))
        dtype = slot.v.dtype
        if store is not None:
            assert isinstance(store, SlotStore)
            assert context.step is not None
            slot = store.extend(slot, context.step)
        return as_read(self.local, slot, context, dtype, self.local_windowed)

    def attend(self, q: Tensor, x: Tensor, parts: Sequence[tuple[Slot, Mask]], backend: str) -> Tensor:
        """The output (B, T, H, D) for queries of that shape and the layer's normalised input `x` (B, T, d_model)."""
        raise NotImplementedError

    def decode(self, q: Tensor, x: Tensor, parts: Sequence[tuple[Slot, Visible]]) -> Tensor:
        """The output (B, H, D) for one query of each sequence (B, H, D); `x` is (B, d_model)."""
        raise NotImplementedError


class Sink(Reader):
    """s_h: one learned number for each query head, a term of the softmax's denominator; (H,) fp32, starts at 0.

    It is trained and saved as other weights of reads.
    """

    def __init__(self, n_heads: int):
        super().__init__((), "k")
        self.weight = nn.Parameter(torch.empty(n_heads, dtype=torch.float32))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


@mixer_module(Join)
class JointAttention(PartsAttention):
    """One softmax over the keys of all slots: o = Σ_j exp(z_j) v_j / (Σ_j exp(z_j) + exp(s_h))."""

    def __init__(self, config: ModelConfig, plan: KVPlan, layer: int):
        super().__init__(config, plan, layer)
        read: Any = plan.keys(layer)
        self.sink = Sink(config.n_heads) if read.sink else None

    def attend(self, q: Tensor, x: Tensor, parts: Sequence[tuple[Slot, Mask]], backend: str) -> Tensor:
        joined = [JointPart(slot.k, slot.v, mask) for slot, mask in parts]
        return joint_attention(q, joined, None if self.sink is None else self.sink.weight, backend=backend)

    def decode(self, q: Tensor, x: Tensor, parts: Sequence[tuple[Slot, Visible]]) -> Tensor:
        joined = [DecodePart(*_as_stored(slot), visible) for slot, visible in parts]
        return joint_decode(q, joined, None if self.sink is None else self.sink.weight, scale=self.head_dim**-0.5)


def _as_stored(slot: Slot) -> tuple[Stored, Stored]:
    """Keys and values as decoding reads them. Compressed data is rebuilt: its own kernels give no log-sum-exp."""
    slot = slot._replace(k=_tensor(slot.k), v=_tensor(slot.v))
    return stored_part(slot, "k"), stored_part(slot, "v")


def _tensor(data: Any) -> Tensor:
    return data if isinstance(data, Tensor) else data[:]


class Gates(Reader):
    """σ(W x) for each query head and gate; W is (gates · H, d_model) fp32 and starts at 0, so all gates at 1/2.

    It is trained and saved as other weights of reads.
    """

    is_projection = True

    def __init__(self, read: Gate, config: ModelConfig):
        super().__init__((), "v")
        self.n_heads, self.complementary = config.n_heads, read.n_gates < len(read.parts)
        shape = (read.n_gates * config.n_heads, config.d_model)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Gates (P, ..., H, 1) fp32 for `x` (..., d_model)."""
        gates = F.linear(x, self.weight.to(x.dtype)).float().sigmoid().unflatten(-1, (-1, self.n_heads))
        gates = gates.movedim(-2, 0)[..., None]
        return torch.cat((gates, 1 - gates)) if self.complementary else gates


@mixer_module(Gate)
class GatedAttention(PartsAttention):
    """A gated sum of the attentions over each slot: o_h = Σ_p g_ph o_ph (HySparse's dense form, PLT)."""

    def __init__(self, config: ModelConfig, plan: KVPlan, layer: int):
        super().__init__(config, plan, layer)
        read: Any = plan.keys(layer)
        self.gates = Gates(read, config)

    def attend(self, q: Tensor, x: Tensor, parts: Sequence[tuple[Slot, Mask]], backend: str) -> Tensor:
        return self._sum([attention(q, slot.k, slot.v, mask, backend=backend) for slot, mask in parts], x)

    def decode(self, q: Tensor, x: Tensor, parts: Sequence[tuple[Slot, Visible]]) -> Tensor:
        outs = []
        for slot, visible in parts:
            keys, values = [stored_part(slot, "k")], [stored_part(slot, "v")]
            outs += decode_function(keys, values)([q], keys, values, visible, scale=self.head_dim**-0.5)
        return self._sum(outs, x)

    def _sum(self, outs: Sequence[Tensor], x: Tensor) -> Tensor:
        total = sum(gate * out for gate, out in zip(self.gates(x), outs, strict=True))
        assert isinstance(total, Tensor)
        return total.to(outs[0].dtype)
