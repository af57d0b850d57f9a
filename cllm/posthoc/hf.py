"""Compressed layers inside a transformers cache, for decoders whose attention reads a `DynamicCache`.

    compressed = compress_dynamic(cache, method, model)          # `cache` itself is not changed
    model(input_ids, past_key_values=compressed)                 # or model.generate(...)

transformers' tensors are (B, G, n, D); in the rest of cllm they are (B, n, G, D).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from cllm.cache.slot import Slot
from cllm.errors import UserError
from cllm.posthoc.absorb import absorb
from cllm.posthoc.code import Prefix
from cllm.posthoc.compress import Outcome, encode
from cllm.posthoc.method import Compressor
from cllm.posthoc.slots import CompressibleSlots, JointRead
from cllm.posthoc.tensor_tree import Change, once_each, total_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Kinds of RoPE whose angles depend only on the position."""


class CompressedLayer(DynamicLayer):
    """A compressed prefix; `keys` and `values` are its sinks and the later tokens."""

    keys: Tensor
    values: Tensor

    def __init__(self, prefix: Prefix, sinks: Slot):
        super().__init__()
        self.prefix = prefix
        self.lazy_initialization(sinks.k, sinks.v)
        self.keys, self.values = _transposed(sinks.k).contiguous(), _transposed(sinks.v).contiguous()
        self.is_shared = False
        """Whether another layer returns this one's tokens."""
        self.in_pass: tuple[Tensor, Tensor] | None = None
        """The keys and values returned in this pass, kept until its end if `is_shared`; otherwise freed after the
        layer."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The reconstructed prefix, then the later tokens, then the new ones."""
        super().update(key_states, value_states)
        read = self.read()
        if self.is_shared:
            self.in_pass = read
        return read

    def read(self) -> tuple[Tensor, Tensor]:
        """(B, G, n, D) keys and values of all tokens."""
        read = self.prefix.join(Slot(_transposed(self.keys), _transposed(self.values)))
        return _transposed(read.k), _transposed(read.v)

    @property
    def compressed(self) -> int:
        """Tokens of the prefix, sinks and evicted tokens included."""
        return self.prefix.sinks.tokens

    def first_later(self, n: int) -> Slot:
        """The first `n` tokens after the prefix, (B, n, G, D) each."""
        sinks = self.prefix.sinks.count
        return Slot(*(_transposed(t[..., sinks : sinks + n, :]) for t in (self.keys, self.values)))

    def absorb(self, prefix: Prefix) -> None:
        """Put `prefix`, which ends with the first tokens after the present one, in the place of both."""
        sinks, joined = self.prefix.sinks.count, prefix.sinks.tokens - self.compressed
        self.prefix = prefix
        self.keys, self.values = (
            torch.cat((t[..., :sinks, :], t[..., sinks + joined :, :]), dim=-2) for t in (self.keys, self.values)
        )

    def get_seq_length(self) -> int:
        return self.compressed + self.later_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys of a pass, and the column of the first. Stored tokens are at the last columns; a mask needs no more."""
        evicted = self.prefix.sinks.evicted
        return self.get_seq_length() + query_length - evicted, evicted

    @property
    def later_tokens(self) -> int:
        """Number of tokens after the prefix."""
        return self.keys.shape[-2] - self.prefix.sinks.count

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens. Raises `UserError` if some of them are compressed."""
        drop = -tokens_to_remove if tokens_to_remove <= 0 else max(self.get_seq_length() - tokens_to_remove, 0)
        if drop > self.later_tokens:
            raise UserError(
                f"cache: cannot drop {drop} tokens: the first {self.compressed} of {self.get_seq_length()} are "
                f"compressed; allowed: up to {self.later_tokens}"
            )
        left = self.keys.shape[-2] - drop
        self.keys, self.values = self.keys[..., :left, :].clone(), self.values[..., :left, :].clone()

    def rearrange(self, change: Change) -> None:
        """Replace every tensor by `change(tensor)`."""
        self.prefix, self.keys, self.values = self.prefix.map(change), change(self.keys), change(self.values)

    def reset(self) -> None:
        raise UserError("a compressed cache cannot be reset; make a new one")

    def stored(self) -> list[Tensor]:
        """All stored tensors."""
        return [*self.prefix.storage(), self.keys, self.values]


class SharingLayer(DynamicLayer):
    """Stores nothing: attention gets the keys and values of another layer, earlier in the same pass."""

    def __init__(self, source: DynamicLayer):
        super().__init__()
        self.source: Any = source
        self.is_initialized = True
        if isinstance(source, CompressedLayer):
            source.is_shared = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values of the other layer."""
        if isinstance(self.source, CompressedLayer):
            assert self.source.in_pass is not None, "a layer shares one below it"
            return self.source.in_pass
        return self.source.keys, self.source.values

    def get_seq_length(self) -> int:
        return self.source.get_seq_length()

    def crop(self, tokens_to_remove: int) -> None:
        pass

    def rearrange(self, change: Change) -> None:
        """Do nothing: no tensor is stored."""

    def stored(self) -> list[Tensor]:
        """No tensors."""
        return []


class CompressedDynamicCache(Cache):
    """A cache in which some layers begin with a compressed prefix. `compress_dynamic` returns one."""

    outcome: Outcome
    """The cost of the last compression."""
    seconds = 0.0
    """Spent on all compressions so far."""

    def __init__(
        self, cache: Cache, method: Compressor, model: PreTrainedModel, starts: Tensor | None, *, measure: bool = True
    ):
        super().__init__(layers=[])
        self.method, self.model, self.starts, self.measure = method.released(), model, starts, measure
        self._compress(cache, method)

    def _compress(self, cache: Cache, method: Compressor) -> None:
        cached = compressible_layers(cache, self.model, self.starts)
        self._latent = cached.latent
        if cache is self:
            before = {i: layer.prefix for i, layer in enumerate(self.layers) if isinstance(layer, CompressedLayer)}
            cached = cached.again(before, None)
        prefixes, self.outcome = encode(method, cached, measure=self.measure)
        self.seconds += self.outcome.seconds
        if method.later_queries() is not None:
            raise UserError(
                f"{self.method.name}: every={self.method.every}: transformers caches do not see the queries of later "
                "tokens, which vote; allowed: caches of cllm models"
            )
        if any(prefix.selects for prefix, _ in prefixes.values()):
            raise UserError(
                f"{self.method.name}: select: transformers' attention reads all tokens; allowed: caches of cllm models"
            )
        if len({prefix.sinks.evicted for prefix, _ in prefixes.values()}) > 1:
            raise UserError(
                f"{self.method.name}: transformers makes one mask for all layers, which therefore keep equal numbers "
                "of tokens; allowed: caches of cllm models, or a method with equal budgets"
            )
        shares = self.method.shares()
        layers: list[Any] = []
        for i, layer in enumerate(cache.layers):
            if i in shares:
                layers.append(SharingLayer(layers[shares[i]]))
            elif i in prefixes:
                layers.append(CompressedLayer(*prefixes[i]))
            else:
                layers.append(layer if cache is self else _copy(layer))
        self.layers = layers
        self._fitted = self._compressed_layers[0].compressed

    @property
    def _compressed_layers(self) -> list[CompressedLayer]:
        return [layer for layer in self.layers if isinstance(layer, CompressedLayer)]

    def _compress_later(self, method: Compressor) -> None:
        """Compress the tokens since the last compression, if the method's options say that it is time."""
        first, again, every = self._compressed_layers[0], method.encodes_every, method.absorbs_every
        if again is not None and first.get_seq_length() - self._fitted >= again:
            self._compress(self, method)
        while every is not None and self._compressed_layers[0].later_tokens >= every:
            layers = {i: layer for i, layer in enumerate(self.layers) if isinstance(layer, CompressedLayer)}
            block = {i: layer.first_later(every) for i, layer in layers.items()}
            prefixes, seconds = absorb(method, {i: of.prefix for i, of in layers.items()}, block, self._latent)
            for i, layer in layers.items():
                layer.absorb(prefixes[i])
            self.seconds += seconds

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As in transformers; after the last layer later tokens are compressed, if the method has `recompress` or
        `every`."""
        result = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == len(self.layers) - 1:
            for layer in self._compressed_layers:
                layer.in_pass = None
            self._compress_later(self.method)
        return result

    def nbytes(self) -> int:
        """Bytes of all stored tensors; a shared one counts once."""
        return total_bytes([tensor for layer in self.layers for tensor in layer_tensors(layer)])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence b becomes what sequence beam_idx[b] was: (B,) int64."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of `indices` (n,) int64, in that order."""
        self._rearrange(lambda t: t.index_select(0, indices.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times, copies next to each other."""
        self._rearrange(lambda t: t.repeat_interleave(repeats, dim=0))

    def _rearrange(self, change: Callable[[Tensor], Tensor]) -> None:
        change = once_each(change)
        layers: list[Any] = self.layers
        for layer in layers:
            if isinstance(layer, CompressedLayer | SharingLayer):
                layer.rearrange(change)
            else:
                layer.keys, layer.values = change(layer.keys), change(layer.values)
        self.starts = None if self.starts is None else change(self.starts)


def compress_dynamic(
    cache: Cache, method: Compressor, model: PreTrainedModel, *, starts: Tensor | None = None, measure: bool = True
) -> Any:
    """A filled `DynamicCache` of `model`, compressed by `method`; `cache` itself is not changed.

    Args:
        cache: filled by `model`, with attention layers only.
        method: for example `parse("xkv:ratio=4")`.
        model: the model, whose RoPE is undone.
        starts: (B,) int64, tokens of padding before each sequence; None: no padding. Positions count from the first
            token after it, as in `generate`; outside of it, pass the model `position_ids`.
        measure: compute reconstruction errors, into `outcome.errors`.

    Returns:
        A `CompressedDynamicCache`, or the method's own kind of cache (`Compressor.transformers_cache`).

    Raises:
        UserError: for a cache that is empty or has layers of another kind, for a RoPE whose angles depend on the
            length, for padding with a method that brings its own cache, and as the method does.
    """
    if not isinstance(cache, DynamicCache) or cache.get_seq_length() == 0:
        raise UserError(f"{method.name}: the cache is a {type(cache).__name__}; allowed: a DynamicCache, filled")
    if (own := method.transformers_cache(cache, model)) is None:
        return CompressedDynamicCache(cache, method, model, starts, measure=measure)
    if starts is not None and starts.any():
        raise UserError(
            f"{method.name}: {type(own).__name__} knows no padding, and {int(starts.max())} tokens are padding; "
            "allowed: prompts of one length"
        )
    return own


def compressible_layers(cache: Cache, model: PreTrainedModel, starts: Tensor | None) -> CompressibleSlots:
    """The layers of `cache` that can be compressed. The `keys` of an MLA layer are the latent (B, 1, n, R)."""
    config = model.config.get_text_config()
    slots, latent, incompressible = {}, set(), 0
    evicted: dict[int, int] = {}
    k: Any
    v: Any
    for i, layer in enumerate(cache.layers):
        stored: Any = layer.source if isinstance(layer, SharingLayer) else layer
        if isinstance(stored, DynamicSlidingWindowLayer):
            incompressible += sum(t.nbytes for t in layer_tensors(stored))
            continue
        if isinstance(stored, CompressedLayer):
            k, v = stored.read()
        elif type(stored) is DynamicLayer:
            k, v = stored.keys, stored.values
        else:
            raise UserError(f"layer {i}: its cache is a {type(layer).__name__}; allowed: attention with a DynamicLayer")
        slots[i] = Slot(k.transpose(1, 2), v.transpose(1, 2))
        if isinstance(stored, CompressedLayer) and stored.prefix.sinks.evicted:
            evicted[i] = stored.prefix.sinks.evicted
        if getattr(config, "kv_lora_rank", None) == k.shape[-1] and k.shape[1] == 1:
            latent.add(i)
    total = incompressible + sum(
        (slot.k.nbytes + slot.v.nbytes) * (slot.k.shape[1] + evicted.get(i, 0)) // slot.k.shape[1]
        for i, slot in slots.items()
    )
    reads = tuple(JointRead(i, (i,)) for i in slots)
    rope = _rope(getattr(model.base_model, "rotary_emb", None))
    return CompressibleSlots(slots, frozenset(latent), starts, total, incompressible, rope, reads, evicted)


def check_rope(rotary: Any) -> None:
    """Raise `UserError` unless `rotary`, the `rotary_emb` of a model, is one known kind of RoPE for all layers."""
    if rotary is None or getattr(rotary, "rope_type", None) not in _ROPE_TYPES:
        seen = "none" if rotary is None else getattr(rotary, "rope_type", "unknown")
        raise UserError(f"rope type is {seen}; allowed: {', '.join(_ROPE_TYPES)}: keys are rotated back")


def _rope(rotary: Any) -> Callable[[int, Tensor], tuple[Tensor, Tensor]]:
    """cos and sin of a model's `rotary_emb`, in the layout of `rope_table`."""

    def table(dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        check_rope(rotary)
        cos, sin = rotary(torch.empty(0, dtype=torch.float32, device=positions.device), positions)
        if cos.shape[-1] != dim:
            raise UserError(f"RoPE turns {cos.shape[-1]} of {dim} channels; allowed: all of them")
        cos, sin = (t.unflatten(-1, (2, -1))[..., None, :, :] for t in (cos, sin))  # B, n, 1, 2, D/2
        return cos, torch.stack((-sin[..., 0, :], sin[..., 1, :]), dim=-2)

    return table


def layer_tensors(layer: Any) -> list[Tensor]:
    """All tensors that a layer of a cache stores."""
    if isinstance(layer, CompressedLayer | SharingLayer):
        return layer.stored()
    return [] if layer.keys is None else [layer.keys, layer.values]


def layer_configs(config: Any) -> list[Any]:
    """The text config of a transformers model for each of its layers, some of which may have settings of their own."""
    return (
        list(config.per_layer_config)
        if getattr(config, "is_heterogeneous", False)
        else [config] * config.num_hidden_layers
    )


def heads_of(config: Any) -> tuple[int, int]:
    """KV heads, and channels of a head, of a layer with this config."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(1, 2)


def _copy(layer: Any) -> Any:
    copy = object.__new__(type(layer))
    copy.__dict__.update({k: v.clone() if isinstance(v, Tensor) else v for k, v in vars(layer).items()})
    return copy
