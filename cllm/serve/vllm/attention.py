"""vLLM's attention layers of a plan's cache entries and reads, and the calls of its kernels.

vLLM makes the cache of the entries, finds the block tables, and builds the metadata that kernels take. Its attention
layers are not called: a read may need the keys of one entry and the values of another, so this module calls the
kernels' implementations, with the tensors of the entries that the plan names.

Shapes: T tokens of a step, of all requests, H query heads and G KV heads of this rank, D channels of a head, m owners
side by side.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention

from cllm.serve.vllm.layout import Call, Entry, LayerRead

BACKENDS = ("CPU_ATTN", "FLASH_ATTN")
"""Attention backends of vLLM that take keys and values as two tensors, so that they may be those of two entries."""


class Pair:
    """A cache whose keys and values are two tensors [blocks, G, block, D], in place of the one that vLLM makes.

    Implementations of attention divide a cache into keys and values at once, each by other methods.
    """

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values
        self.dtype, self.device, self.shape, self.ndim = keys.dtype, keys.device, keys.shape, keys.ndim

    def size(self) -> torch.Size:
        """That of the keys."""
        return self.keys.shape

    def view(self, *_: Any) -> Pair:
        """The same: the keys have the shape of the keys of a cache that vLLM makes."""
        return self

    def transpose(self, first: int, second: int) -> Pair:
        """Both tensors transposed."""
        return Pair(self.keys.transpose(first, second), self.values.transpose(first, second))

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        return self.keys, self.values

    def split(self, size: int, dim: int = 0) -> tuple[Tensor, Tensor]:
        """Keys and values."""
        return self.keys, self.values


class EntryAttention(Attention):
    """The layer that vLLM makes a cache entry for. It attends with the window of the entry."""

    def __init__(self, entry: Entry, n_heads: int, scale: float, cache_config: CacheConfig | None, prefix: str):
        ranks = get_tensor_model_parallel_world_size()
        super().__init__(
            n_heads // ranks,
            entry.head_size,
            scale,
            num_kv_heads=entry.n_kv_heads // ranks,
            cache_config=cache_config,
            per_layer_sliding_window=entry.window,
            prefix=prefix,
        )
        self.entry = entry

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> Any:
        """The shape of a page: without a second half for an entry of keys alone or values alone."""
        spec = super().get_kv_cache_spec(vllm_config)
        return spec if self.entry.content == "both" else replace(spec, head_size_v=0)

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the cache, [blocks, G, block, m D] each; of an entry of one half, the same tensor."""
        cache = self.kv_cache
        if self.entry.content != "both":
            return cache, cache
        if self.attn_backend.get_name() == "CPU_ATTN":
            blocks, heads, size, _ = cache.shape
            keys, values = cache.view(blocks, heads, 2 * size, -1).chunk(2, dim=2)
        else:
            keys, values = cache.split(self.entry.head_size, dim=-1)
        return keys, values


def cache_of(keys: EntryAttention, values: EntryAttention) -> Any:
    """The cache that an implementation reads, with the keys of one entry and the values of another.

    Raises:
        RuntimeError: if vLLM has put the two into groups with different block tables, against `layout.cache_groups`.
    """
    if keys is values:
        return keys.kv_cache
    slots = get_forward_context().slot_mapping
    if slots[keys.layer_name] is not slots[values.layer_name]:
        raise RuntimeError(f"{keys.layer_name} and {values.layer_name} are in different cache groups of vLLM")
    return Pair(keys.tensors()[0], values.tensors()[1])


class Reading(nn.Module):
    """The attention of a layer over the entries that the plan names."""

    def __init__(
        self, read: LayerRead, entries: dict[Entry, EntryAttention], window: int | None, prefix: str, cache_config: Any
    ):
        super().__init__()
        entry = entries[read.calls[0].keys]
        self.calls = [(call, entries[call.keys], entries[call.values]) for call in read.calls]
        layer = entry
        if read.attending == "own":
            layer = Attention(
                entry.num_heads,
                entry.head_size,
                entry.impl.scale,
                num_kv_heads=entry.num_kv_heads,
                cache_config=cache_config,
                per_layer_sliding_window=window,
                prefix=prefix,
                kv_sharing_target_layer_name=entry.layer_name,
            )
            self.layer = layer
        self.layer_name, self.impl = layer.layer_name, layer.impl
        if read.attending == "borrowed":
            self.impl = entry.attn_backend.get_impl_cls()(
                entry.num_heads,
                entry.head_size,
                entry.impl.scale,
                entry.num_kv_heads,
                None,
                window,
                entry.kv_cache_dtype,
            )

    @property
    def metadata(self) -> Any:
        """That of this step for the layer's attention; None while vLLM measures the memory that a step takes."""
        found = get_forward_context().attn_metadata
        return found[self.layer_name] if isinstance(found, dict) else found

    def forward(self, q: Tensor) -> list[tuple[Call, Tensor]]:
        """The output (T, H, m D) of each call, for queries `q` of that shape."""
        metadata, outputs = self.metadata, []
        for call, keys, values in self.calls:
            out = torch.zeros_like(q)
            if metadata is not None:
                self.impl.forward(keys, q, None, None, cache_of(keys, values), metadata, output=out)
            outputs.append((call, out))
        return outputs


def write(keys: EntryAttention, values: EntryAttention, k: Tensor, v: Tensor) -> None:
    """Write the tokens of a step, (T, G, m D) each, into the cache."""
    slots = get_forward_context().slot_mapping
    slots = slots.get(keys.layer_name) if isinstance(slots, dict) else None
    if slots is not None:
        keys.impl.do_kv_cache_update(keys, k, v, cache_of(keys, values), slots)
