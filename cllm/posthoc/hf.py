"""Compressed layers inside a transformers cache, for decoders whose attention reads a `DynamicCache`.

    compressed = compress_dynamic(cache, method, model)          # `cache` is left as it was
    model(input_ids, past_key_values=compressed)                 # or model.generate(...)

transformers lays tensors out as (B, G, n, D); here they are (B, n, G, D) as everywhere in cllm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from cllm.cache.slot import Slot
from cllm.errors import UserError
from cllm.posthoc.code import Compressor, Prefix
from cllm.posthoc.compress import Filled, Outcome, encode
from cllm.posthoc.held import Change, held_bytes, remember

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Kinds of RoPE whose angles depend on the position alone."""


class CompressedLayer(DynamicLayer):
    """A compressed prefix; `keys` and `values` are its sinks and the tokens since."""

    keys: Tensor
    values: Tensor

    def __init__(self, prefix: Prefix, sinks: Slot):
        super().__init__()
        self.prefix = prefix
        self.compressed = prefix.sinks.length
        """Tokens of the prefix, sinks included."""
        self.lazy_initialization(sinks.k, sinks.v)
        self.keys, self.values = _laid_out(sinks.k).contiguous(), _laid_out(sinks.v).contiguous()
        self.followed = False
        """Whether another layer reads this one."""
        self.seen: tuple[Tensor, Tensor] | None = None
        """What attention got in the pass under way, where the layer is followed: the others' is free after it."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The prefix as attention reads it, made anew, then the tokens since, then these."""
        super().update(key_states, value_states)
        read = self.read()
        if self.followed:
            self.seen = read
        return read

    def read(self) -> tuple[Tensor, Tensor]:
        """(B, G, n, D) keys and values of all tokens."""
        read = self.prefix.join(Slot(_laid_out(self.keys), _laid_out(self.values)))
        return _laid_out(read.k), _laid_out(read.v)

    def get_seq_length(self) -> int:
        return self.compressed + self.since

    @property
    def since(self) -> int:
        """Tokens after the prefix."""
        return self.keys.shape[-2] - self.prefix.sinks.count

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens. Raises `UserError` where they are not all exact ones."""
        drop = -tokens_to_remove if tokens_to_remove <= 0 else max(self.get_seq_length() - tokens_to_remove, 0)
        if drop > self.since:
            raise UserError(
                f"cache: cannot drop {drop} tokens: the first {self.compressed} of {self.get_seq_length()} are "
                f"compressed; allowed: up to {self.since}"
            )
        left = self.keys.shape[-2] - drop
        self.keys, self.values = self.keys[..., :left, :].clone(), self.values[..., :left, :].clone()

    def rearrange(self, change: Change) -> None:
        """Put `change(tensor)` in the place of every tensor."""
        self.prefix, self.keys, self.values = self.prefix.map(change), change(self.keys), change(self.values)

    def reset(self) -> None:
        raise UserError("a compressed cache cannot be reset; make a new one")

    def held(self) -> list[Tensor]:
        """All tensors stored."""
        return [*self.prefix.storage(), self.keys, self.values]


class FollowingLayer(DynamicLayer):
    """Nothing: attention gets what another layer, earlier in the same pass, gives its own."""

    def __init__(self, source: DynamicLayer):
        super().__init__()
        self.source: Any = source
        self.is_initialized = True
        if isinstance(source, CompressedLayer):
            source.followed = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values of the layer that is followed."""
        if isinstance(self.source, CompressedLayer):
            assert self.source.seen is not None, "a layer follows one below it"
            return self.source.seen
        return self.source.keys, self.source.values

    def get_seq_length(self) -> int:
        return self.source.get_seq_length()

    def crop(self, tokens_to_remove: int) -> None:
        pass

    def rearrange(self, change: Change) -> None:
        """Nothing to change."""

    def held(self) -> list[Tensor]:
        """None."""
        return []


class CompressedDynamicCache(Cache):
    """Layers some of which begin with a compressed prefix. Made by `compress_dynamic`."""

    outcome: Outcome
    """Of the last compression."""
    seconds = 0.0
    """Of all compressions so far."""

    def __init__(
        self, cache: Cache, method: Compressor, model: PreTrainedModel, starts: Tensor | None, *, measure: bool = True
    ):
        super().__init__(layers=[])
        self.method, self.model, self.starts, self.measure = method.released(), model, starts, measure
        self._compress(cache, method)

    def _compress(self, cache: Cache, method: Compressor) -> None:
        prefixes, self.outcome = encode(method, filled(cache, self.model, self.starts), measure=self.measure)
        self.seconds += self.outcome.seconds
        if any(prefix.landmarks is not None for prefix, _ in prefixes.values()):
            raise UserError(
                f"{self.method.name}: select: transformers' attention reads all tokens; allowed: caches of cllm models"
            )
        follows = self.method.follows()
        layers: list[Any] = []
        for i, layer in enumerate(cache.layers):
            if i in follows:
                layers.append(FollowingLayer(layers[follows[i]]))
            elif i in prefixes:
                layers.append(CompressedLayer(*prefixes[i]))
            else:
                layers.append(layer if cache is self else _copy(layer))
        self.layers = layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As in transformers; after the last layer, everything is compressed again where the method says so."""
        result = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == len(self.layers) - 1:
            since = next(layer.since for layer in self.layers if isinstance(layer, CompressedLayer))
            for layer in self.layers:
                if isinstance(layer, CompressedLayer):
                    layer.seen = None
            if self.method.recompress is not None and since >= self.method.recompress:
                self._compress(self, self.method)
        return result

    def nbytes(self) -> int:
        """Bytes of all that is stored, shared tensors once."""
        return held_bytes([tensor for layer in self.layers for tensor in layer_tensors(layer)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence b becomes what sequence beam_idx[b] was: (B,) int64."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of `indices` (n,) int64, in that order."""
        self._rearrange(lambda t: t.index_select(0, indices.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times, side by side."""
        self._rearrange(lambda t: t.repeat_interleave(repeats, dim=0))

    def _rearrange(self, change: Callable[[Tensor], Tensor]) -> None:
        once = remember(change)
        for layer in self.layers:
            if isinstance(layer, CompressedLayer | FollowingLayer):
                layer.rearrange(once)
            else:
                held: Any = layer
                held.keys, held.values = once(held.keys), once(held.values)
        self.starts = None if self.starts is None else once(self.starts)


def compress_dynamic(
    cache: Cache, method: Compressor, model: PreTrainedModel, *, starts: Tensor | None = None, measure: bool = True
) -> CompressedDynamicCache:
    """A filled `DynamicCache` of `model`, compressed by `method`; `cache` itself is not changed.

    Args:
        cache: filled by `model`; of attention layers only.
        starts: (B,) int64, tokens of padding before each sequence; None: none.

    Raises:
        UserError: for a cache that is empty or has layers of another kind, for a RoPE whose angles change with the
            length, and as the method does.
    """
    if not isinstance(cache, DynamicCache) or cache.get_seq_length() == 0:
        raise UserError(f"{method.name}: the cache is a {type(cache).__name__}; allowed: a DynamicCache, filled")
    return CompressedDynamicCache(cache, method, model, starts, measure=measure)


def filled(cache: Cache, model: PreTrainedModel, starts: Tensor | None) -> Filled:
    """The layers of `cache` that can be compressed. In a layer of MLA, `keys` hold the latent (B, 1, n, R)."""
    config = model.config.get_text_config()
    slots, latent, beside = {}, set(), 0
    k: Any
    v: Any
    for i, layer in enumerate(cache.layers):
        stored: Any = layer.source if isinstance(layer, FollowingLayer) else layer
        if isinstance(stored, DynamicSlidingWindowLayer):
            beside += sum(t.nbytes for t in layer_tensors(stored))
            continue
        if isinstance(stored, CompressedLayer):
            k, v = stored.read()
        elif type(stored) is DynamicLayer:
            k, v = stored.keys, stored.values
        else:
            raise UserError(f"layer {i}: its cache is a {type(layer).__name__}; allowed: attention with a DynamicLayer")
        slots[i] = Slot(k.transpose(1, 2), v.transpose(1, 2))
        if getattr(config, "kv_lora_rank", None) == k.shape[-1] and k.shape[1] == 1:
            latent.add(i)
    total = beside + sum(slot.k.nbytes + slot.v.nbytes for slot in slots.values())
    table = _table(getattr(model.base_model, "rotary_emb", None))
    return Filled(slots, frozenset(latent), 0, starts, total, beside, table)


def _table(rotary: Any) -> Callable[[int, Tensor], tuple[Tensor, Tensor]]:
    """cos and sin of a model's own `rotary_emb` as `rope_table` lays them out."""

    def table(dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        if rotary is None or getattr(rotary, "rope_type", None) not in _ROPE_TYPES:
            seen = "none" if rotary is None else getattr(rotary, "rope_type", "unknown")
            raise UserError(f"rope type is {seen}; allowed: {', '.join(_ROPE_TYPES)}: keys are rotated back")
        cos, sin = rotary(torch.empty(0, dtype=torch.float32, device=positions.device), positions)
        if cos.shape[-1] != dim:
            raise UserError(f"RoPE turns {cos.shape[-1]} of {dim} channels; allowed: all of them")
        cos, sin = (t.unflatten(-1, (2, -1))[..., None, :, :] for t in (cos, sin))  # B, n, 1, 2, D/2
        return cos, torch.stack((-sin[..., 0, :], sin[..., 1, :]), dim=-2)

    return table


def layer_tensors(layer: Any) -> list[Tensor]:
    """All tensors that a layer of a cache stores."""
    if isinstance(layer, CompressedLayer | FollowingLayer):
        return layer.held()
    return [] if layer.keys is None else [layer.keys, layer.values]


def _laid_out(t: Tensor) -> Tensor:
    return t.transpose(1, 2)


def _copy(layer: Any) -> Any:
    copy = object.__new__(type(layer))
    copy.__dict__.update({k: v.clone() if isinstance(v, Tensor) else v for k, v in vars(layer).items()})
    return copy
