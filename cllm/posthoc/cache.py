"""Compressed slots inside a `KVCache`.

compressed = compress_cache(cache, method)      # `cache` is left as it was
decoder.hidden(input_ids, cache=compressed)     # goes on; new tokens are exact, after the compressed ones
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cllm.errors import UserError
from cllm.kv.cache import KVCache
from cllm.kv.plan import Latent
from cllm.kv.sources import Slot
from cllm.kv.stores import GrowingSlot, SlotStore, StateStore, Step, Store
from cllm.model.rope import rope_table
from cllm.posthoc.code import Compressor, Prefix, held_bytes, remember
from cllm.posthoc.compress import Filled, Outcome, encode


class CompressedSlot(SlotStore):
    """A compressed prefix, then tokens as they come. What readers see of the prefix is made anew in every pass."""

    window, fp8 = None, False

    def __init__(self, prefix: Prefix):
        read = prefix.read()
        self.dtype = read.k.dtype
        self.prefix, self.compressed = prefix, read.k.shape[1]
        self.slot = Slot(read.k[:, :0].clone(), read.v[:, :0].clone())  # the tokens since
        self.pending: Slot | None = None
        self.seen: Slot | None = None

    def extend(self, new: Slot, step: Step) -> Slot:
        self.pending = self.slot.join(self.pack(new))
        self.seen = self.prefix.read().join(self.pending)
        return self.seen

    def commit(self, step: Step) -> None:
        if self.pending is not None:
            self.slot, self.pending, self.seen = self.pending, None, None

    def last(self, n: int, past: int) -> Slot:
        whole = self.prefix.read().join(self.slot)
        return whole.map(lambda t: t[:, t.shape[1] - n :])

    @property
    def size(self) -> int:
        return self.compressed + self.slot.k.shape[1]

    def crop(self, length: int, past: int) -> None:
        if length < self.compressed:
            raise UserError(
                f"cache: cannot go back from {past} to {length} tokens: the first {self.compressed} are compressed; "
                f"allowed: {self.compressed} or more"
            )
        self.slot = self.slot.map(lambda t: t[:, : length - self.compressed].clone())

    def tensors(self) -> dict[str, Tensor]:
        stored = {f"prefix.{i}": tensor for i, tensor in enumerate(self.prefix.storage())}
        return {**stored, "k": self.slot.k, "v": self.slot.v}

    def nbytes(self) -> int:
        return held_bytes(list(self.tensors().values()))

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        self.prefix, self.slot = self.prefix.map(change), self.slot.map(change)


class FollowingSlot(SlotStore):
    """Nothing: readers get what another slot, earlier in the same pass, gives its own."""

    window, fp8 = None, False

    def __init__(self, source: CompressedSlot | GrowingSlot):
        self.source, self.dtype = source, source.dtype

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

    def __init__(self, cache: KVCache, method: Compressor, *, measure: bool = True):
        super().__init__(cache.config)
        assert cache.column is not None
        self.method, self.measure = method, measure
        self.batch, self.seen, self.column = cache.batch, cache.seen, cache.column.clone()
        self.starts = None if cache.starts is None else cache.starts.clone()
        self._compress(cache)

    def _compress(self, cache: KVCache) -> None:
        self.outcome = encode(self.method, filled(cache), measure=self.measure)
        stores: dict[int, Store] = {
            owner: CompressedSlot(self.outcome.prefixes[owner])
            if owner in self.outcome.prefixes
            else _copy(store, cache.seen)
            for owner, store in cache.stores.items()
            if owner not in self.method.follows()
        }
        for owner, source in self.method.follows().items():
            followed = stores[source]
            assert isinstance(followed, CompressedSlot)
            stores[owner] = FollowingSlot(followed)
        self.stores = {owner: stores[owner] for owner in cache.stores}

    @property
    def exact_tokens(self) -> int:
        """Tokens since the last compression."""
        return next(s.slot.k.shape[1] for s in self.stores.values() if isinstance(s, CompressedSlot))

    def finish(self, step: Step) -> None:
        super().finish(step)
        if self.method.recompress is not None and self.exact_tokens >= self.method.recompress:
            self._compress(self)

    def nbytes(self) -> int:
        """Bytes of all that is stored, shared tensors once."""
        return held_bytes([tensor for store in self.stores.values() for tensor in store.tensors().values()])

    def reset(self) -> None:
        """Refused: what was compressed cannot be made room again."""
        raise UserError("a compressed cache cannot be reset; make a new one")

    def _rearrange(self, change: Callable[[Tensor], Tensor], batch: int) -> None:
        super()._rearrange(remember(change), batch)


def compress_cache(cache: KVCache, method: Compressor, *, measure: bool = True) -> CompressedKVCache:
    """`cache` compressed by `method`, growing from there; `cache` itself is not changed.

    Keys must have been rotated by the positions that a decoder gives by default. With `measure`, reconstruction errors
    are in `outcome.errors`.

    Raises:
        UserError: for a cache without tokens or without slots to compress, and as the method does.
    """
    if cache.seen == 0:
        raise UserError(f"{method.name}: the cache is empty; fill it with a prompt first")
    return CompressedKVCache(cache, method, measure=measure)


def filled(cache: KVCache) -> Filled:
    """The slots of `cache` that can be compressed, as attention reads them."""
    slots, latent, seen = {}, set(), cache.seen
    for owner, store in cache.stores.items():
        if isinstance(store, SlotStore) and cache.plan.layers[owner].window is None:
            slots[owner] = store.unpack(store.last(store.kept(seen), seen))
            if isinstance(cache.plan.layers[owner].own, Latent):
                latent.add(owner)

    def table(dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rope_table(cache.config.rope, dim, positions)

    return Filled(slots, frozenset(latent), 0, cache.starts, table)


def _copy(store: Store, seen: int) -> Store:
    """The tokens of a windowed slot in a growing store, or a recurrent state."""
    if isinstance(store, StateStore):
        batch, *shape = store.state.shape
        state = StateStore(tuple(shape), batch, device=store.state.device)  # type: ignore[arg-type]
        state.state.copy_(store.state)
        return state
    assert isinstance(store, SlotStore)
    slot = store.last(store.kept(seen), seen).map(torch.clone)
    widths = (tuple(slot.k.shape[2:]), tuple(slot.v.shape[2:]))
    copy = GrowingSlot(
        widths, len(slot.k), 0, window=store.window, dtype=store.dtype, fp8=store.fp8, device=slot.k.device
    )
    copy.slot = slot
    return copy
