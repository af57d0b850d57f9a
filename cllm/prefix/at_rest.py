"""Exact caches that are stored in fewer bytes: coded by a post-hoc method when stored, decoded when loaded.

A decode step never sees the code, so codes may be slow to read, such as entropy codes (`kvtc`). Loading gives an
ordinary cache, near the one that was stored.
"""

from __future__ import annotations

import dataclasses
import logging

import torch

from cllm.cache.cache import KVCache
from cllm.cache.copies import copy_store
from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.posthoc.cache import CompressedKVCache, compress_cache
from cllm.posthoc.entropy import shared_streams
from cllm.posthoc.method import Compressor
from cllm.posthoc.registry import parse
from cllm.prefix.pack import Packed, pack, unpack

log = logging.getLogger(__name__)


def method_at_rest(spec: object, where: str) -> Compressor:
    """The method of a spec such as `kvtc:ratio=8`. Raises `UserError`, beginning with `where`, for one that cannot code
    a cache without its model."""
    if not isinstance(spec, str):
        raise UserError(f"{where}: at_rest is a {type(spec).__name__}; allowed: a method such as kvtc:ratio=8, or None")
    method = parse(spec, f"{where}: at_rest")
    if method.watches or method.calibrates:
        raise UserError(f"{where}: at_rest is {spec}, which calibrates on tokens; allowed: another method")
    if method.evicts:
        raise UserError(f"{where}: at_rest is {spec}, which drops tokens; allowed: a method that keeps all of them")
    if wrong := [option for option in ("recompress", "every") if getattr(method, option) is not None]:
        raise UserError(f"{where}: at_rest is {spec}; {wrong[0]} has no meaning for a stored prefix; leave it out")
    return method


def pack_at_rest(cache: KVCache, method: Compressor) -> Packed:
    """An exact `cache`, coded and packed. If the method refuses it, as for a prompt that is too short, it is packed
    exactly, and the reason is logged.

    Raises `UserError` as `pack` does, and for a cache that is already compressed.
    """
    exact = pack(cache)
    if isinstance(cache, CompressedKVCache):
        raise UserError(f"the cache is compressed by {cache.method.name} already; allowed with at_rest: an exact cache")
    try:
        coded = pack(compress_cache(cache, method, measure=False))
    except UserError as error:
        log.info("a prefix of %d tokens is stored exactly: %s", cache.seen, error)
        return exact
    layout = {**coded.layout, "at_rest": {"croppable": exact.is_croppable, "length": cache.seen}}
    return dataclasses.replace(coded, layout=layout)


def unpack_at_rest(packed: Packed, config: ModelConfig, *, max_len: int | None) -> KVCache:
    """The decoded cache of what `pack_at_rest` coded. Arguments and errors are those of `unpack`."""
    rest = packed.layout["at_rest"]
    length, croppable = int(rest["length"]), bool(rest["croppable"])
    if max_len is not None and max_len < length:
        raise UserError(
            f"max_len of a cache is {max_len}, and the stored prefix has {length} tokens; allowed: {length} or more"
        )
    coded = unpack(packed, config)
    if length != coded.seen and not (croppable and 0 < length < coded.seen):
        raise ValueError(f"{length} of {coded.seen} tokens")
    cache = KVCache(config, max_len=max_len)
    cache.batch, cache.seen, cache.closed, cache.starts = coded.batch, length, coded.closed, coded.starts
    assert coded.column is not None
    cache.column = torch.full_like(coded.column, length)
    with shared_streams():
        cache.stores = {j: copy_store(store, coded.seen, max_len, length) for j, store in coded.stores.items()}
    return cache
