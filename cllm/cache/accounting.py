"""Bytes of the KV cache, counted from the plan: resident, written and read per token.

The three differ. Sharing lowers what is *resident* and *written*, but every layer still *reads* the slots it attends
to, and a fusing layer reads several: FusedKV stores half of mha's cache and reads one and a half times as much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

from cllm.config import ModelConfig
from cllm.plan.kinds import Half, Source
from cllm.plan.presets import MHA

Storage = Literal["model", "fp8"]
"""Format of stored slots: the model's dtype, or e4m3 with a bf16 factor for every token and head."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KVBytes:
    """Bytes of one sequence's cache, per token of its context."""

    context: int
    """Tokens of the context."""
    resident: float
    """Bytes stored per token of the context; windows and recurrent states are averaged over it."""
    written: float
    """Bytes that one new token adds."""
    read: float
    """Bytes read per token of the context when one token is decoded."""

    def relative_to(self, other: KVBytes) -> tuple[float, float]:
        """(resident, read) as a share of `other`."""
        return self.resident / other.resident, self.read / other.read


def slot_bytes(
    source: Source, head_dim: int, *, bytes_per_element: int = 2, storage: Storage = "model"
) -> tuple[int, int]:
    """Bytes that one token adds to the two tensors of a slot; under fp8 with a bf16 factor for each vector."""
    k, v = source.elements(head_dim)
    if storage == "model":
        return k * bytes_per_element, v * bytes_per_element
    k_vectors, v_vectors = (math.prod(width[:-1]) for width in source.widths(head_dim))
    return k + 2 * k_vectors, v + 2 * v_vectors


def state_bytes(config: ModelConfig, source: Source) -> int:
    """Bytes of a recurrent state, always fp32; 0 for a kind that has a slot instead."""
    shape = source.state_shape(config.n_heads, config.resolved_head_dim)
    return 0 if shape is None else 4 * math.prod(shape)


def kv_bytes(
    config: ModelConfig, *, context: int | None = None, bytes_per_element: int = 2, storage: Storage = "model"
) -> KVBytes:
    """Bytes of `config`'s plan at `context` tokens (default: `max_seq_len`), by default in bf16.

    A layer reads all tokens that its masks show it; a fused read counts once for each source, and a tensor that is both
    keys and values counts once. A recurrent state is read and written entirely for every token.
    """
    plan = config.plan()
    context = context or config.max_seq_len
    size = partial(slot_bytes, head_dim=config.resolved_head_dim, bytes_per_element=bytes_per_element, storage=storage)
    slots = {j: size(plan.owned(j)) for j in plan.slots}
    resident = written = read = 0.0
    for owner in plan.slots:
        if state := state_bytes(config, plan.owned(owner)):
            resident, written = resident + state, written + state
            continue
        resident += sum(slots[owner]) * min(plan.kept(owner) or context, context)
        written += sum(slots[owner])
    for i in range(len(plan)):
        if state := state_bytes(config, plan.source(i)):
            read += state
            continue
        for read_slots, window in plan.attended(i):
            at_once = plan.reads_at_once(i)
            keys, values = (read_slots if at_once else half.layers for half in (plan.keys(i), plan.values(i)))
            tensors = {(j, plan.owned(j).tensor_of("keys")) for j in keys}
            tensors |= {(j, plan.owned(j).tensor_of("values")) for j in values}
            read += sum(slots[j][tensor] for j, tensor in tensors) * min(window or context, context)
    return KVBytes(context=context, resident=resident / context, written=written, read=read / context)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """Bytes for each token that cross between layer `after` and the next, in one direction of a training pass."""

    after: int
    """The last layer below the cut."""
    residual: int
    """The residual stream, upwards."""
    up: int
    """Keys and values of owners below that layers above the cut read, and outputs of lower layers that owners above the
    cut project."""
    down: int
    """Keys and values that layers below read from owners above, in every iteration of a cyclic plan."""
    cyclic: bool
    """Whether the cut is inside layers that are computed together, by iteration."""
    looped: bool
    """Whether layers on both sides of the cut have the same weights, so that their gradients must be added as well."""

    @property
    def total(self) -> int:
        return self.residual + self.up + self.down


def cuts(config: ModelConfig, *, bytes_per_element: int = 2) -> list[Cut]:
    """Every place where a pipeline could cut the model, lowest first.

    A slot crosses a cut once, however many layers on the other side read it, and only the tensors that one of them
    reads: keys without values where values come from elsewhere. The backward carries gradients of the same sizes the
    other way.
    """
    plan = config.plan()
    head_dim = config.resolved_head_dim
    slots = {j: slot_bytes(plan.owned(j), head_dim, bytes_per_element=bytes_per_element) for j in plan.owners}
    readers: dict[Half, dict[int, list[int]]] = {"keys": plan.readers("keys"), "values": plan.readers("values")}
    found = []
    for after in range(len(plan) - 1):
        up = down = 0
        for j in plan.owners:
            tensor_of = plan.owned(j).tensor_of
            users = {half: (*reads[j], *plan.mixers(j)) for half, reads in readers.items()}
            above = {tensor_of(half) for half, layers in users.items() if any(i > after for i in layers)}
            below = {tensor_of(half) for half, layers in users.items() if any(i <= after for i in layers)}
            up += sum(slots[j][tensor] for tensor in above) * (j <= after)
            down += sum(slots[j][tensor] for tensor in below) * (j > after)
        cyclic = any(first <= after < last for first, last in plan.cyclic_spans())
        residual = config.d_model * bytes_per_element
        inputs = (plan.owned(j).input for j in plan.owners if j > after)
        up += residual * len({i for i in inputs if i is not None and i < after})  # that of `after` is the residual
        weights = [plan.weights_of(i) for i in range(len(plan))]
        looped = not set(weights[: after + 1]).isdisjoint(weights[after + 1 :])
        found.append(Cut(after=after, residual=residual, up=up, down=down, cyclic=cyclic, looped=looped))
    return found


def cache_bytes(
    config: ModelConfig, *, context: int, batch: int = 1, bytes_per_element: int = 2, storage: Storage = "model"
) -> int:
    """`KVCache.nbytes()` after `context` tokens, or with `max_len=context`."""
    found = kv_bytes(config, context=context, bytes_per_element=bytes_per_element, storage=storage)
    return round(found.resident * context) * batch


def mha_twin(config: ModelConfig) -> ModelConfig:
    """The same model with the mha plan, with which caches are compared."""
    return config.model_copy(update={"kv": MHA(), "match_params": False})


def describe_bytes(config: ModelConfig) -> list[str]:
    """Two lines of text: `kv_bytes` in bf16 at the longest context, and against the same model with the mha plan."""
    own, twin = kv_bytes(config), kv_bytes(mha_twin(config))
    resident, read = own.relative_to(twin)
    return [
        f"KV cache     {own.resident:,.0f} bytes a token resident, {own.written:,.0f} written, {own.read:,.0f} read "
        f"(bf16, context {own.context:,})",
        f"against mha  {resident:.4g}x resident, {read:.4g}x read",
    ]
