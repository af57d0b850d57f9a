"""Whether a cache was filled by a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cllm.cache.cache import KVCache
from cllm.cache.stores import SlotStore
from cllm.errors import UserError
from cllm.posthoc.engine import DecoderEngine
from cllm.posthoc.hf import heads_of, layer_configs
from cllm.posthoc.method import Engine

if TYPE_CHECKING:
    from transformers import Cache


def check_cache(engine: Engine, model: nn.Module, cache: Cache) -> None:
    """Refuse a cache that another model has filled, as far as its class, layers, heads and dtype show it.

    Raises:
        UserError: naming the difference.
    """
    if isinstance(engine, DecoderEngine) != isinstance(cache, KVCache):
        wanted = "KVCache" if isinstance(engine, DecoderEngine) else "DynamicCache"
        raise _another(f"it is a {type(cache).__name__}, the model fills a {wanted}")
    if isinstance(cache, KVCache):
        assert isinstance(engine, DecoderEngine)
        cache.check(engine.model.config)
        if cache.plan != engine.model.plan:
            raise _another("its KV plan is not the model's")
        stores = [store for store in cache.stores.values() if isinstance(store, SlotStore)]
        kept = [tensor for store in stores for tensor in store.tensors().values() if not store.fp8]
    else:
        kept = _check_layers(model, cache)
    _check_dtype(model, kept)


def _check_layers(model: nn.Module, cache: Any) -> list[Tensor]:
    """Compare a transformers cache with the model's config. Returns its keys."""
    own: Any = model.config
    config = own.get_text_config()
    found = [getattr(layer, "keys", None) for layer in cache.layers]
    stored = [key if isinstance(key, Tensor) else None for key in found]
    if len(cache.layers) != config.num_hidden_layers:
        raise _another(f"it has {len(cache.layers)} layers, the model {config.num_hidden_layers}")
    if getattr(config, "kv_lora_rank", None) is None:
        for key, of_layer in zip(stored, layer_configs(config), strict=True):
            heads, size = heads_of(of_layer)
            if key is not None and key.dim() == 4 and (key.shape[1], key.shape[3]) != (heads, size):
                raise _another(f"it has {key.shape[1]} heads of {key.shape[3]}, the model {heads} of {size}")
    return [key for key in stored if key is not None]


def _check_dtype(model: nn.Module, kept: list[Tensor]) -> None:
    """Keys and values have the model's dtype; of a model in fp32, autocast stores them in half precision."""
    own = next(model.parameters()).dtype
    for tensor in kept:
        if tensor.is_floating_point() and tensor.dtype != own and own != torch.float32:
            raise _another(f"its dtype is {_name(tensor.dtype)}, the model's {_name(own)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _another(difference: str) -> UserError:
    return UserError(f"compress: the cache was filled by another model: {difference}")
