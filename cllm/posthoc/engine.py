"""cllm's and transformers' models behind one face: fill a cache, compress it, go on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from cllm.cache.accounting import cache_bytes, mha_twin
from cllm.cache.cache import KVCache
from cllm.cache.stores import GrowingSlot
from cllm.errors import UserError
from cllm.model.decoder import Decoder
from cllm.posthoc import cache as own
from cllm.posthoc import hf
from cllm.posthoc.code import Compressor
from cllm.posthoc.compress import Filled
from cllm.posthoc.held import held_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Engine(ABC):
    """A model and its kind of cache."""

    head: nn.Module
    """From hidden states to logits."""
    _slots: list[int] | None = None

    @abstractmethod
    def new_cache(self, follows: dict[int, int] | None = None) -> Any:
        """An empty cache; with `follows`, one in which those slots store nothing and read another's."""

    @abstractmethod
    def hidden(self, ids: Tensor, cache: Any) -> Tensor:
        """Final hidden states (B, T, d_model) of `ids` (B, T), which are added to `cache`."""

    @abstractmethod
    def filled(self, cache: Any) -> Filled:
        """The slots of `cache` that can be compressed."""

    @abstractmethod
    def compress(self, cache: Any, method: Compressor, *, measure: bool = True) -> Any:
        """`cache` compressed; see `compress_cache` and `compress_dynamic`."""

    @abstractmethod
    def nbytes(self, cache: Any) -> int:
        """Bytes that `cache` stores."""

    @abstractmethod
    def mha_nbytes(self, *, tokens: int, batch: int, element: int) -> int:
        """Bytes of the cache of the same model with full attention and a KV head for every query head."""

    @abstractmethod
    def projections(self, slot: int) -> tuple[nn.Linear, nn.Linear]:
        """The key and value projections of a slot's owner. Raises `UserError` where keys are more than projected."""

    @torch.no_grad()
    def slots(self) -> list[int]:
        """The slots that can be compressed. The first call runs a pass of one token."""
        if self._slots is None:
            device, cache = self.head.weight.device, self.new_cache()
            assert isinstance(device, torch.device)
            self.hidden(torch.zeros(1, 1, dtype=torch.long, device=device), cache)
            self._slots = list(self.filled(cache).slots)
        return self._slots

    def logits(self, ids: Tensor, cache: Any) -> Tensor:
        """(B, T, vocabulary)."""
        return self.head(self.hidden(ids, cache))


class DecoderEngine(Engine):
    """A cllm decoder and `KVCache`."""

    def __init__(self, model: Decoder):
        self.model, self.head = model, model.head

    def new_cache(self, follows: dict[int, int] | None = None) -> KVCache:
        return _Following(self.model, follows) if follows else KVCache(self.model.config)

    def hidden(self, ids: Tensor, cache: KVCache) -> Tensor:
        return self.model.hidden(ids, cache=cache)

    def filled(self, cache: KVCache) -> Filled:
        return own.filled(cache)

    def compress(self, cache: KVCache, method: Compressor, *, measure: bool = True) -> own.CompressedKVCache:
        return own.compress_cache(cache, method, measure=measure)

    def nbytes(self, cache: KVCache) -> int:
        return cache.nbytes()

    def mha_nbytes(self, *, tokens: int, batch: int, element: int) -> int:
        return cache_bytes(mha_twin(self.model.config), context=tokens, batch=batch, bytes_per_element=element)

    def projections(self, slot: int) -> tuple[nn.Linear, nn.Linear]:
        if not self.model.plan.owned(slot).is_plain:
            raise UserError(f"slot {slot} is a latent; allowed: slots of keys and values")
        attention: Any = self.model.blocks[slot]
        owner = attention.attention.owner
        _check_plain(slot, owner.k_norm)
        return owner.k_proj, owner.v_proj


class _Following(KVCache):
    """A growing cache in which some slots store nothing."""

    def __init__(self, model: Decoder, follows: dict[int, int]):
        super().__init__(model.config)
        self._follows = follows

    def _allocate(self, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        super()._allocate(batch, device, dtype)
        for slot, source in self._follows.items():
            store = self.stores[source]
            assert isinstance(store, GrowingSlot)
            self.stores[slot] = own.FollowingSlot(store)


class TransformersEngine(Engine):
    """A transformers decoder and `DynamicCache`; sequences without padding."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        head = model.get_output_embeddings()
        assert head is not None
        self.head = head

    def new_cache(self, follows: dict[int, int] | None = None) -> DynamicCache:
        cache = DynamicCache(config=self.model.config)
        for slot, source in (follows or {}).items():
            followed: Any = cache.layers[source]
            cache.layers[slot] = hf.FollowingLayer(followed)
        return cache

    def hidden(self, ids: Tensor, cache: Any) -> Tensor:
        return self.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state

    def filled(self, cache: Any) -> Filled:
        return hf.filled(cache, self.model, None)

    def compress(self, cache: Any, method: Compressor, *, measure: bool = True) -> Any:
        special = getattr(method, "compress_dynamic", None)  # transformers' own caches compress as they are filled
        return (
            special(cache, self.model) if special else hf.compress_dynamic(cache, method, self.model, measure=measure)
        )

    def nbytes(self, cache: Any) -> int:
        if hasattr(cache, "nbytes"):
            return cache.nbytes()
        return held_bytes([tensor for layer in cache.layers for tensor in hf.layer_tensors(layer)])

    def mha_nbytes(self, *, tokens: int, batch: int, element: int) -> int:
        config = self.model.config.get_text_config()
        width = 2 * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        if getattr(config, "kv_lora_rank", None):
            width = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        return config.num_hidden_layers * config.num_attention_heads * width * tokens * batch * element

    def projections(self, slot: int) -> tuple[nn.Linear, nn.Linear]:
        layers: Any = getattr(self.model.base_model, "layers", None)
        attention = None if layers is None else getattr(layers[slot], "self_attn", None)
        if getattr(attention, "kv_a_proj_with_mqa", None) is not None:
            raise UserError(f"slot {slot} is a latent; allowed: slots of keys and values")
        if attention is None or not (hasattr(attention, "k_proj") and hasattr(attention, "v_proj")):
            raise UserError(
                f"{type(self.model).__name__}: slot {slot} has no projections of its own for keys and values; allowed: "
                "models with layers.N.self_attn.k_proj and v_proj, as Llama's"
            )
        _check_plain(slot, getattr(attention, "k_norm", None))
        return attention.k_proj, attention.v_proj


def _check_plain(slot: int, k_norm: nn.Module | None) -> None:
    if k_norm is not None:
        raise UserError(f"slot {slot}: its keys are normalised (qk_norm) and are no product of a weight; allowed: none")


def engine_of(model: nn.Module) -> Engine:
    """The engine of a decoder, a cllm model of transformers' kind, or any transformers decoder."""
    from cllm.hub.model import CLLMForCausalLM

    if isinstance(model, Decoder):
        return DecoderEngine(model)
    if isinstance(model, CLLMForCausalLM):
        return DecoderEngine(model.model)
    return TransformersEngine(model)  # type: ignore[arg-type]
