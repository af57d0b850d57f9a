"""Compressed slots inside a `KVCache`.

compressed = compress_cache(cache, method)      # `cache` is left as it was
decoder.hidden(input_ids, cache=compressed)     # goes on; new tokens are exact, after the compressed ones
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.cache.cache import KVCache
from cllm.cache.slot import Slot
from cllm.cache.stores import FixedSlot, GrowingSlot, SlotStore, StateStore, Step, Store
from cllm.errors import UserError
from cllm.kernels.lowrank_decode import Table
from cllm.model.rope import rope_table
from cllm.plan.plan import KVPlan
from cllm.posthoc.code import Compressor, Prefix
from cllm.posthoc.compress import Filled, Outcome, encode
from cllm.posthoc.deferred import Deferred
from cllm.posthoc.held import held_bytes, remember


@dataclass(frozen=True, slots=True)
class TurningStep(Step):
    """A pass of one token over compressed slots."""

    table: Table
    """RoPE of the compressed tokens without sinks, made in every such pass for all slots together: kept, it would be a
    cache too."""


class CompressedSlot(SlotStore):
    """A compressed prefix; and its exact sinks, then tokens as they come, in a slot that grows or has `room` for more.

    A pass of one token reads the prefix as it is stored where it is made of factors; for all others it is made anew in
    every pass.
    """

    window, fp8 = None, False

    def __init__(self, prefix: Prefix, sinks: Slot, room: int | None = None):
        self.prefix, self.dtype = prefix, sinks.k.dtype
        self.compressed = prefix.sinks.length
        """Tokens of the prefix, sinks included."""
        size = None if room is None else prefix.sinks.count + room
        self.tail = _exact_slot(sinks, prefix.sinks.count, size, window=None, dtype=self.dtype, fp8=False)
        """The sinks and the tokens since: as kernels count them, those from column S - s on (`sinks.py`)."""
        factors = (prefix.k.factors(), prefix.v.factors())
        self.defers = prefix.rotation is not None and None not in factors
        """Whether a pass of one token reads the prefix as it is stored."""
        self.followed = False
        """Whether another slot is this one again."""
        self.seen: Slot | None = None
        """What readers of the pass under way got, where the slot is followed: the others' is free after their layer."""

    def extend(self, new: Slot, step: Step) -> Slot:
        since = self.tail.extend(new, self._since(step))
        if isinstance(step, TurningStep) and self.defers:
            k, v = (Deferred(self.prefix, part, since, step.table) for part in ("k", "v"))
            seen = Slot(k, v)  # type: ignore[arg-type]
        else:
            seen = self.prefix.join(since)
        if self.followed:
            self.seen = seen
        return seen

    def commit(self, step: Step) -> None:
        self.tail.commit(self._since(step))
        self.seen = None

    def _since(self, step: Step) -> Step:
        """`step` as the tokens that are not compressed see it."""
        rest = self.prefix.sinks.rest
        return Step(step.length, max(step.past - rest, 0), step.column - rest)

    def last(self, n: int, past: int) -> Slot:
        since = past - self.prefix.sinks.rest
        return self.prefix.join(self.tail.last(since, since)).map(lambda t: t[:, t.shape[1] - n :])

    @property
    def size(self) -> int:
        return self.prefix.sinks.rest + self.tail.size

    def crop(self, length: int, past: int) -> None:
        if length < self.compressed:
            raise UserError(
                f"cache: cannot go back from {past} to {length} tokens: the first {self.compressed} are compressed; "
                f"allowed: {self.compressed} or more"
            )
        rest = self.prefix.sinks.rest
        self.tail.crop(length - rest, past - rest)

    def tensors(self) -> dict[str, Tensor]:
        stored = {f"prefix.{i}": tensor for i, tensor in enumerate(self.prefix.storage())}
        return {**stored, **self.tail.tensors()}

    def nbytes(self) -> int:
        return held_bytes(list(self.tensors().values()))

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        self.prefix = self.prefix.map(change)
        self.tail.replace(change)


class FollowingSlot(SlotStore):
    """Nothing: readers get what another slot, earlier in the same pass, gives its own."""

    window, fp8 = None, False

    def __init__(self, source: CompressedSlot | GrowingSlot):
        self.source, self.dtype = source, source.dtype
        if isinstance(source, CompressedSlot):
            source.followed = True

    def extend(self, new: Slot, step: Step) -> Slot:
        seen = self.source.seen if isinstance(self.source, CompressedSlot) else self.source.pending
        assert seen is not None, "a slot follows one of a layer below it"
        return seen

    def commit(self, step: Step) -> None:
        pass

    def last(self, n: int, past: int) -> Slot:
        return self.source.last(n, past)

    @property
    def size(self) -> int:
        return self.source.size

    def crop(self, length: int, past: int) -> None:
        pass

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        pass


class CompressedKVCache(KVCache):
    """A `KVCache` some of whose slots begin with a compressed prefix. Made by `compress_cache`."""

    outcome: Outcome
    """Of the last compression."""
    seconds = 0.0
    """Of all compressions so far."""

    def __init__(self, cache: KVCache, method: Compressor, *, measure: bool = True, room: int | None = None):
        super().__init__(cache.config, max_len=None if room is None else cache.seen + room)
        assert cache.column is not None
        self.method, self.measure, self.room = method.released(), measure, room
        self.batch, self.seen, self.column = cache.batch, cache.seen, cache.column.clone()
        self.starts = None if cache.starts is None else cache.starts.clone()
        self._compress(cache, method)

    def _compress(self, cache: KVCache, method: Compressor) -> None:
        prefixes, self.outcome = encode(method, filled(cache), measure=self.measure)
        self.seconds += self.outcome.seconds
        self.compressed, self.sinks = cache.seen, min(method.sinks, cache.seen)
        self._check_selection({owner: prefix for owner, (prefix, _) in prefixes.items()})
        stores: dict[int, Store] = {
            owner: CompressedSlot(*prefixes[owner], self.room)
            if owner in prefixes
            else _copy(store, cache.seen, self.max_len)
            for owner, store in cache.stores.items()
            if owner not in self.method.follows()
        }
        for owner, source in self.method.follows().items():
            followed = stores[source]
            assert isinstance(followed, CompressedSlot)
            stores[owner] = FollowingSlot(followed)
        self.stores = {owner: stores[owner] for owner in cache.stores}

    def _check_selection(self, prefixes: dict[int, Prefix]) -> None:
        chosen = {owner for owner, prefix in prefixes.items() if prefix.landmarks is not None}
        for layer in range(len(self.plan)):
            sources = self.plan.keys(layer).layers
            if len(sources) > 1 and chosen & set(sources):
                raise UserError(
                    f"{self.method.name}: select: the keys of layer {layer} are made of the slots {list(sources)}; "
                    "allowed: plans whose layers read the keys of one slot"
                )

    @property
    def exact_tokens(self) -> int:
        """Tokens since the last compression."""
        return self.seen - self.compressed

    def begin(self, plan: KVPlan, ids: Tensor, starts: Tensor | None, dtype: torch.dtype) -> Step:
        step = super().begin(plan, ids, starts, dtype)
        if step.length > 1:
            return step
        positions = torch.arange(self.sinks, self.compressed, device=ids.device)
        cos, sin = rope_table(self.config.rope, self.config.resolved_head_dim, positions)  # S, 1, 2, D / 2
        return TurningStep(step.length, step.past, step.column, (cos[:, 0, 0], sin[:, 0, 1]))

    def finish(self, step: Step) -> None:
        super().finish(step)
        if self.method.recompress is not None and self.exact_tokens >= self.method.recompress:
            self._compress(self, self.method)

    def nbytes(self) -> int:
        """Bytes of all that is stored, shared tensors once."""
        return held_bytes([tensor for store in self.stores.values() for tensor in store.tensors().values()])

    def reset(self) -> None:
        """Refused: what was compressed cannot be made room again."""
        raise UserError("a compressed cache cannot be reset; make a new one")

    def _rearrange(self, change: Callable[[Tensor], Tensor], batch: int) -> None:
        super()._rearrange(remember(change), batch)


def compress_cache(
    cache: KVCache, method: Compressor, *, measure: bool = True, room: int | None = None
) -> CompressedKVCache:
    """`cache` compressed by `method`, growing from there; `cache` itself is not changed.

    Keys must have been rotated by the positions that a decoder gives by default. With `measure`, reconstruction errors
    are in `outcome.errors`. With `room`, there are places for so many more tokens and the result is a static cache,
    whose passes of one token a CUDA graph can hold (`StepGraph`).

    Raises:
        UserError: for a cache without tokens or without slots to compress, for a `room` below 1 or together with
            `recompress`, and as the method does.
    """
    if cache.seen == 0:
        raise UserError(f"{method.name}: the cache is empty; fill it with a prompt first")
    if room is not None and room < 1:
        raise UserError(f"room of a compressed cache is {room}; allowed: 1 or more, or None to let it grow")
    if room is not None and method.recompress is not None:
        raise UserError(
            f"{method.name}: recompress={method.recompress} makes a cache anew, which a fixed room of {room} tokens "
            "cannot; allowed: one of the two"
        )
    return CompressedKVCache(cache, method, measure=measure, room=room)


def filled(cache: KVCache) -> Filled:
    """The slots of `cache` that can be compressed, as attention reads them."""
    slots, latent, seen, total, beside = {}, set(), cache.seen, 0, 0
    for owner, store in cache.stores.items():
        held = store.last(store.kept(seen), seen) if isinstance(store, SlotStore) else None
        nbytes = store.nbytes() if held is None else sum(t.nbytes for t in held if t is not None)
        total += nbytes  # of tokens, where a static cache counts places
        if held is None or not isinstance(store, SlotStore) or store.window is not None:
            beside += nbytes
            continue
        slots[owner] = store.unpack(held)
        if not cache.plan.owned(owner).is_plain:
            latent.add(owner)
    table = functools.partial(rope_table, cache.config.rope)
    return Filled(slots, frozenset(latent), 0, cache.starts, total, beside, table)


def _copy(store: Store, seen: int, max_len: int | None) -> Store:
    """The tokens of a windowed slot in a growing store or, for a static cache, in a ring; or a recurrent state."""
    if isinstance(store, StateStore):
        batch, *shape = store.state.shape
        state = StateStore(tuple(shape), batch, device=store.state.device)  # type: ignore[arg-type]
        state.state.copy_(store.state)
        return state
    assert isinstance(store, SlotStore)
    slot = store.last(store.kept(seen), seen).map(torch.clone)
    size = None if max_len is None else min(store.window or max_len, max_len)
    return _exact_slot(slot, seen, size, window=store.window, dtype=store.dtype, fp8=store.fp8)


def _exact_slot(
    slot: Slot, past: int, size: int | None, *, window: int | None, dtype: torch.dtype, fp8: bool
) -> GrowingSlot | FixedSlot:
    """A store that holds `slot`, the last of `past` tokens: one that grows, or one of `size` places."""
    widths, device = (tuple(slot.k.shape[2:]), tuple(slot.v.shape[2:])), slot.k.device
    if size is None:
        growing = GrowingSlot(widths, len(slot.k), 0, window=window, dtype=dtype, fp8=fp8, device=device)
        growing.slot = slot
        return growing
    fixed = FixedSlot(widths, len(slot.k), size, window=window, dtype=dtype, fp8=fp8, device=device)
    kept = slot.k.shape[1]
    fixed.pending = slot
    fixed.commit(Step(kept, past - kept, torch.zeros(1, dtype=torch.long, device=device)))
    return fixed
