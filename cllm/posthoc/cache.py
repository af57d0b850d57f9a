"""Compressed slots inside a `KVCache`.

compressed = compress_cache(cache, method)      # `cache` is left as it was
decoder.hidden(input_ids, cache=compressed)     # later tokens are exact, after the compressed ones
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from cllm.cache.cache import KVCache
from cllm.cache.copies import copy_store
from cllm.cache.stores import SlotStore, Step, Store
from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.model.rope import rope_table
from cllm.plan.plan import KVPlan
from cllm.posthoc.absorb import absorb
from cllm.posthoc.compress import Outcome, encode
from cllm.posthoc.landmarks import check_selection
from cllm.posthoc.later_queries import LaterQueries
from cllm.posthoc.method import Compressor
from cllm.posthoc.slots import CompressibleSlots, JointRead
from cllm.posthoc.stores import CompressedSlot, DecodeStep, SharingSlot, consecutive_table
from cllm.posthoc.tensor_tree import once_each, total_bytes


class CompressedKVCache(KVCache):
    """A `KVCache` in which some slots begin with a compressed prefix. `compress_cache` returns one."""

    outcome: Outcome
    """The cost of the last compression."""
    seconds = 0.0
    """Spent on all compressions so far."""
    later: LaterQueries | None = None
    """The queries of later tokens, if the method needs them."""
    fitted = 0
    """Tokens that the method has been fitted to; tokens after them have joined with `every`."""

    def __init__(self, cache: KVCache, method: Compressor, *, measure: bool = True, room: int | None = None):
        super().__init__(cache.config, max_len=None if room is None else cache.seen + room)
        assert cache.column is not None
        self.method, self.measure, self.room = method.released(), measure, room
        self.later = method.later_queries()
        self.batch, self.seen, self.column = cache.batch, cache.seen, cache.column.clone()
        self.starts = None if cache.starts is None else cache.starts.clone()
        self._compress(cache, method)

    @classmethod
    def empty(
        cls, config: ModelConfig, method: Compressor, *, measure: bool, max_len: int | None, room: int | None
    ) -> CompressedKVCache:
        """A cache without tokens and stores, to be filled with those of a stored one (`cllm/prefix/pack.py`)."""
        cache = cls.__new__(cls)
        KVCache.__init__(cache, config, max_len=max_len)
        cache.method, cache.measure, cache.room = method, measure, room
        return cache

    def _compress(self, cache: KVCache, method: Compressor) -> None:
        cached = compressible_slots(cache)
        if cache is self:
            before = {j: store.prefix for j, store in self.stores.items() if isinstance(store, CompressedSlot)}
            cached = cached.again(before, self.later)
        prefixes, self.outcome = encode(method, cached, measure=self.measure)
        self.seconds += self.outcome.seconds
        self.compressed = self.fitted = cache.seen
        self.sinks = min(method.sinks, cache.seen)
        selecting = {owner for owner, (prefix, _) in prefixes.items() if prefix.selects}
        check_selection(self.method.name, self.plan, selecting)
        if self.room is not None and any(prefix.sinks.evicted for prefix, _ in prefixes.values()):
            raise UserError(
                f"{self.method.name}: room={self.room}: a static cache finds tokens by their columns, and evicted "
                "tokens leave gaps; allowed: None"
            )
        stores: dict[int, Store] = {
            owner: CompressedSlot(*prefixes[owner], self.room)
            if owner in prefixes
            else copy_store(store, cache.seen, self.max_len)
            for owner, store in cache.stores.items()
            if owner not in self.method.shares()
        }
        for owner, source in self.method.shares().items():
            shared = stores[source]
            assert isinstance(shared, CompressedSlot)
            stores[owner] = SharingSlot(shared)
        self.stores = {owner: stores[owner] for owner in cache.stores}

    @property
    def records_queries(self) -> bool:
        return self.later is not None

    @property
    def exact_tokens(self) -> int:
        """Tokens since the last compression."""
        return self.seen - self.compressed

    def begin(self, plan: KVPlan, ids: Tensor, starts: Tensor | None, dtype: torch.dtype) -> Step:
        step = super().begin(plan, ids, starts, dtype)
        if self.later is not None:
            self.later.begin()
        if step.length > 1:
            return step
        rope, positions = self.config.rope, torch.arange(self.sinks, self.compressed, device=ids.device)
        slots = [store for store in self.stores.values() if isinstance(store, CompressedSlot)]
        dims = {slot.head_dim for slot in slots if slot.defers and not slot.prefix.sinks.evicted}
        tables = {dim: consecutive_table(rope, dim, positions) for dim in dims}
        return DecodeStep(step.length, step.past, step.column, tables)

    def finish(self, step: Step) -> None:
        super().finish(step)
        if self.later is not None:
            self.later.end()
        self._compress_later(self.method)

    def _compress_later(self, method: Compressor) -> None:
        """Compress the tokens since the last compression, if the method's options say that it is time."""
        again, every = method.encodes_every, method.absorbs_every
        if again is not None and self.seen - self.fitted >= again:
            self._compress(self, method)
            if self.later is not None:
                self.later.forget()
        while every is not None and self.exact_tokens >= every:
            slots = {j: store for j, store in self.stores.items() if isinstance(store, CompressedSlot)}
            latent = {j for j in slots if not self.plan.owned(j).is_plain}
            block = {j: store.first_later(every) for j, store in slots.items()}
            prefixes, seconds = absorb(method, {j: store.prefix for j, store in slots.items()}, block, latent)
            for j, store in slots.items():
                store.absorb(prefixes[j])
            self.compressed += every
            self.seconds += seconds

    def nbytes(self) -> int:
        """Bytes of all stored tensors but those of `host_nbytes`; a shared one counts once."""
        later = [] if self.later is None else self.later.tensors()
        tensors = (t for store in self.stores.values() for t in store.tensors().values())
        return total_bytes([*tensors, *later]) - self.host_nbytes()

    def host_tensors(self) -> list[Tensor]:
        """The stored tensors that are in host memory when the others are on a device."""
        stores = (store for store in self.stores.values() if isinstance(store, CompressedSlot))
        return [tensor for store in stores for tensor in store.host_tensors()]

    def host_nbytes(self) -> int:
        """Bytes of `host_tensors`, also of a cache on a CPU, where they are in the same memory as the others."""
        return total_bytes(self.host_tensors())

    def crop(self, max_length: int) -> None:
        """As in `KVCache`, down to the compressed tokens."""
        before = self.seen
        super().crop(max_length)
        if self.later is not None:
            self.later.crop(before - self.seen)

    def reset(self) -> None:
        """Not supported: raises `UserError`."""
        raise UserError("a compressed cache cannot be reset; make a new one")

    def _rearrange(self, change: Callable[[Tensor], Tensor], batch: int) -> None:
        super()._rearrange(once_each(change), batch)
        if self.later is not None:
            self.later.replace(change)


def compress_cache(
    cache: KVCache, method: Compressor, *, measure: bool = True, room: int | None = None
) -> CompressedKVCache:
    """`cache` compressed by `method`, to which later tokens are added exactly. `cache` itself is not changed.

    Args:
        cache: filled with keys at the positions that a decoder uses by default.
        method: for example `parse("xkv:ratio=4")`.
        measure: compute reconstruction errors, into `outcome.errors`.
        room: None for a growing cache; or the number of later tokens of a static cache, whose decode steps a CUDA graph
            can record (`StepGraph`).

    Raises:
        UserError: for a cache without tokens or without slots to compress, for a `room` below 1 or together with
            `recompress` or `every`, and as the method does.
    """
    if cache.seen == 0:
        raise UserError(f"{method.name}: the cache is empty; fill it with a prompt first")
    if room is not None and room < 1:
        raise UserError(f"room of a compressed cache is {room}; allowed: 1 or more, or None to let it grow")
    if room is not None and method.every is not None:
        raise UserError(
            f"{method.name}: every={method.every} moves tokens out of their places, which a fixed room of {room} "
            "tokens cannot; allowed: one of the two"
        )
    if room is not None and method.recompress is not None:
        raise UserError(
            f"{method.name}: recompress={method.recompress} makes a cache anew, which a fixed room of {room} tokens "
            "cannot; allowed: one of the two"
        )
    return CompressedKVCache(cache, method, measure=measure, room=room)


def compressible_slots(cache: KVCache) -> CompressibleSlots:
    """The slots of `cache` that can be compressed, as attention reads them."""
    slots, latent, seen, total, incompressible = {}, set(), cache.seen, 0, 0
    evicted: dict[int, int] = {}
    for owner, store in cache.stores.items():
        if not (own := cache.plan.owned(owner)).is_compressible:
            raise UserError(
                f"layer {owner} stores {own.text}, which no post-hoc method compresses; allowed: slots of keys after "
                "RoPE and values, and latents"
            )
        packed = store.last(store.kept(seen), seen) if isinstance(store, SlotStore) else None
        # Bytes of the cached tokens: a static cache's `nbytes()` counts its free room too.
        nbytes = store.nbytes() if packed is None else sum(t.nbytes for t in packed if t is not None)
        total += nbytes
        if packed is None or not isinstance(store, SlotStore) or store.window is not None:
            incompressible += nbytes
            continue
        slots[owner] = store.unpack(packed)
        if store.kept(seen) < seen:
            evicted[owner] = seen - store.kept(seen)
            total += nbytes * evicted[owner] // store.kept(seen)
        if not cache.plan.owned(owner).is_plain:
            latent.add(owner)
    rope = functools.partial(rope_table, cache.config.rope)
    reads = tuple(
        JointRead(layer, read.slots, read.window, cache.plan.reads_above(layer))
        for layer in range(len(cache.plan))
        for read in cache.plan.attended(layer)
    )
    return CompressibleSlots(slots, frozenset(latent), cache.starts, total, incompressible, rope, reads, evicted)
