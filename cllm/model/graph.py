"""One decoding step as a CUDA graph: all kernels of a pass of one token, launched by one call.

The kernels of a small model's step take less time on the device than their launches on the host. With a static cache,
only values on the device depend on the number of tokens, so that the launches can be captured once and replayed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cllm.cache.cache import KVCache
from cllm.cache.stores import SlotStore, Store
from cllm.errors import UserError
from cllm.model.decoder import Decoder

_WARM_UP = 2


class StepGraph:
    """A captured step of `decoder` over `cache`, which must be static and prefilled.

        graph = StepGraph(decoder, cache)
        logits = graph(tokens)       # (B, V), overwritten by the next call

    Raises:
        UserError: for a cache that grows, is empty, or is not on a GPU.
    """

    @torch.inference_mode()
    def __init__(self, decoder: Decoder, cache: KVCache):
        if not cache.is_static:
            raise UserError("a CUDA graph needs a static cache: KVCache(config, max_len=...)")
        if cache.batch is None or cache.column is None or not cache.column.is_cuda:
            raise UserError("a CUDA graph needs a cache on a GPU with tokens in it: run a prefill first")
        self.decoder, self.cache = decoder, cache
        self.addresses = self._addresses()
        self.ids = torch.zeros(cache.batch, 1, dtype=torch.long, device=cache.column.device)
        seen, kept = cache.seen, {j: {n: t.clone() for n, t in s.tensors().items()} for j, s in _states(cache)}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):  # compiles, and chooses kernels
                self._rewind(seen)
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self._rewind(seen)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._step()
        self._rewind(seen)
        for owner, store in _states(cache):  # a replay overwrites the slots' new entries, but states have changed
            for name, tensor in store.tensors().items():
                tensor.copy_(kept[owner][name])
        for store in cache.stores.values():
            if isinstance(store, SlotStore):  # in a ring, the new entry has overwritten an older token
                store.crop(seen, seen + 1)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) after `tokens` (B,) int64.

        Raises:
            UserError: if the cache is full, or for another batch size than the cache's.
        """
        cache = self.cache
        assert cache.max_len is not None
        if len(tokens) != len(self.ids):
            raise UserError(f"cache: holds {len(self.ids)} sequences and was handed {len(tokens)}")
        if cache.seen >= cache.max_len:
            raise UserError(
                f"cache: {cache.seen} tokens stored and 1 to come, but it was made for max_len {cache.max_len}"
            )
        self.ids.copy_(tokens.view(-1, 1))
        self.graph.replay()
        cache.seen += 1
        return self.logits

    @property
    def is_valid(self) -> bool:
        """Whether the captured tensors are still in use. A cache of another batch has other tensors, and so has a model
        that was moved, converted or given another vocabulary."""
        return self._addresses() == self.addresses

    def _addresses(self) -> tuple[int, ...]:
        """Addresses of all cached tensors and of a few weights: few, because they are checked in every step."""
        cached = [t for store in self.cache.stores.values() for t in store.tensors().values()]
        weights = (self.decoder.embed.weight, self.decoder.norm.weight, self.decoder.head.weight)
        return tuple(t.data_ptr() for t in (*cached, self.cache.column, self.cache.starts, *weights) if t is not None)

    def _step(self) -> Tensor:
        return self.decoder(self.ids, cache=self.cache)[:, 0]

    def _rewind(self, seen: int) -> None:
        assert self.cache.column is not None
        self.cache.seen = seen
        self.cache.column.fill_(seen)


def _states(cache: KVCache) -> list[tuple[int, Store]]:
    """Owners with a recurrent state, and their stores."""
    return [(j, store) for j, store in cache.stores.items() if "state" in store.tensors()]
