"""Caches of contexts that many questions read: each question begins after the context, and leaves no trace.

    context = context_of(engine, cache, room=64)
    cache = context.begin()           # holds the context only, and has room for 64 tokens
    hidden = engine.hidden(ids, cache)
    cache = context.begin()           # again

A compressed cache is decoded once, not in every pass: its keys and values are copied into an uncompressed cache. The
model reads the same numbers, so scores do not change. Only methods whose later tokens are treated in a special way stay
as they are: those that select tokens, compress again, share slots, or bring a cache class of their own. So do caches
from which tokens were evicted: an uncompressed cache would count those that are left, and give later tokens wrong
positions.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from cllm.cache.cache import KVCache
from cllm.cache.stores import FixedSlot, GrowingSlot, SlotStore, StateStore, Step
from cllm.errors import UserError
from cllm.posthoc.cache import CompressedKVCache
from cllm.posthoc.engine import DecoderEngine, TransformersEngine
from cllm.posthoc.hf import CompressedDynamicCache, CompressedLayer, SharingLayer
from cllm.posthoc.method import Engine
from cllm.posthoc.stores import CompressedSlot, SharingSlot


class Context(ABC):
    """The cache of a batch of contexts."""

    rows: int
    """Sequences of a pass; those after the contexts are padding, and their results mean nothing."""

    @abstractmethod
    def begin(self) -> Any:
        """A cache that holds the contexts only. The one returned before must not be used again."""


class ForkedContext(Context):
    """A cache that grows: every fork shares the tensors of the context."""

    def __init__(self, cache: Any, rows: int):
        self._cache, self.rows = cache, rows

    def begin(self) -> Any:
        return fork(self._cache)


def fork(cache: Any) -> Any:
    """A copy of a cache to which tokens can be added, while `cache` stays as it is.

    Tensors that growing caches never change in place are shared; all others are copied.
    """
    return copy.deepcopy(cache, {id(kept): kept for kept in _never_changed(cache)})


def _never_changed(cache: Any) -> list[Any]:
    kept: list[Any] = []
    if isinstance(cache, KVCache):
        kept += [cache.config, cache.plan]
        for store in cache.stores.values():
            if isinstance(store, CompressedSlot):
                kept.append(store.prefix)
            if isinstance(store, CompressedSlot | GrowingSlot):
                kept += store.tensors().values()
    elif isinstance(cache, DynamicCache | CompressedDynamicCache):
        layers: list[Any] = cache.layers
        for layer in layers:
            if isinstance(layer, CompressedLayer):
                kept.append(layer.prefix)
            if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer, CompressedLayer):
                kept += [layer.keys, layer.values]
    kept += [part for name in ("model", "method", "config") if (part := getattr(cache, name, None)) is not None]
    return kept


class _Allocated(KVCache):
    """A cache that has memory before its first pass."""

    @torch.inference_mode(False)
    def allocate(self, rows: int, like: KVCache) -> None:
        """Allocate the memory of `rows` sequences, with the device and dtype of another cache of the model."""
        assert like.column is not None
        dtypes = {store.dtype for store in like.stores.values() if isinstance(store, SlotStore)}
        self.batch = rows
        self._allocate(rows, like.column.device, next(iter(dtypes), torch.float32))


class StaticContext(Context):
    """A static `KVCache` that one batch of contexts after the other is copied into.

    Passes write into it in place. Going back to the end of the context only sets a counter, except for windows, whose
    rings lose old tokens, and for recurrent states: these are copied again.
    """

    def __init__(self, engine: DecoderEngine, rows: int, room: int):
        """
        Args:
            engine: of the decoder that reads the cache.
            rows: sequences.
            room: tokens of a sequence, context included.

        Raises:
            UserError: for a plan that static caches do not support.
        """
        self.cache, self.rows = _Allocated(engine.model.config, max_len=room), rows
        self._source: KVCache | None = None

    def load(self, source: KVCache) -> None:
        """Replace the content by that of `source`, which must not change until the next call."""
        assert source.batch is not None
        if self.cache.batch is None:
            self.cache.allocate(self.rows, source)
        self._source = source
        for owner in self.cache.stores:
            self._copy(owner)
        self._rewind(source.seen)

    def begin(self) -> KVCache:
        assert self._source is not None, "load a context first"
        for owner, store in self.cache.stores.items():
            if isinstance(store, StateStore) or (isinstance(store, FixedSlot) and store.window is not None):
                self._copy(owner)
        self._rewind(self._source.seen)
        return self.cache

    def _copy(self, owner: int) -> None:
        assert self._source is not None
        source, target, seen = self._source.stores[owner], self.cache.stores[owner], self._source.seen
        target.reset()
        if isinstance(source, StateStore):
            assert isinstance(target, StateStore)
            target.state.copy_(self._padded(source.state))
            return
        assert isinstance(source, SlotStore)
        assert isinstance(target, FixedSlot)
        kept = min(source.kept(seen), target.size)
        target.pending = target.pack(source.unpack(source.last(kept, seen)).map(self._padded))
        assert self.cache.column is not None
        target.commit(Step(kept, seen - kept, self.cache.column))

    def _padded(self, tensor: Tensor) -> Tensor:
        missing = self.rows - len(tensor)
        return torch.cat((tensor, tensor.new_zeros(missing, *tensor.shape[1:]))) if missing else tensor

    def _rewind(self, seen: int) -> None:
        assert self.cache.column is not None
        for store in self.cache.stores.values():
            if isinstance(store, FixedSlot):
                store.most, store.pending = 0, None
        self.cache.seen = seen
        self.cache.column.fill_(seen)


def uncompressed(cache: Any, engine: Engine) -> Any:
    """`cache`, or if it is compressed and later tokens are ordinary ones, what it holds in an uncompressed cache."""
    if not isinstance(cache, CompressedDynamicCache) or not _is_ordinary(cache):
        return cache
    assert isinstance(engine, TransformersEngine)
    plain = engine.new_cache()
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, CompressedLayer):
            keys, values = (tensor.contiguous() for tensor in layer.read())
            exact: Any = DynamicLayer()
            exact.lazy_initialization(keys, values)
            exact.keys, exact.values = keys, values
            plain.layers[i] = exact
        else:
            plain.layers[i] = layer
    return plain


def can_be_static(engine: Engine, cache: Any) -> bool:
    """Whether the content of a filled cache can be copied into a static one."""
    if not isinstance(engine, DecoderEngine) or not isinstance(cache, KVCache) or cache.starts is not None:
        return False
    try:
        KVCache(engine.model.config, max_len=cache.seen + 1)
    except UserError:
        return False  # a plan whose layers read windows of several sizes
    return not isinstance(cache, CompressedKVCache) or _is_ordinary(cache)


def _is_ordinary(cache: CompressedKVCache | CompressedDynamicCache) -> bool:
    """Whether tokens after the compressed ones are stored and read, and have the positions, as in an uncompressed
    cache."""
    parts: list[Any] = list(cache.stores.values()) if isinstance(cache, CompressedKVCache) else list(cache.layers)
    return (
        cache.method.recompress is None
        and cache.method.every is None
        and not cache.method.selects_tokens
        and not any(part.prefix.sinks.evicted for part in parts if isinstance(part, CompressedSlot | CompressedLayer))
        and not any(isinstance(part, SharingSlot | SharingLayer) for part in parts)
    )
