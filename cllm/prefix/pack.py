"""A filled cache as named tensors and JSON, and back, bit for bit.

Slots are packed as they are stored: growing and static ones with their tokens in order, windows with the tokens that
are left, fp8 slots with their factors, halves, latents, recurrent states, and compressed prefixes with their exact
tails. A packed cache can be opened as a growing or as a static one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cllm.cache.cache import KVCache
from cllm.cache.copies import exact_slot
from cllm.cache.slot import Slot
from cllm.cache.stores import FP8, SCALE, FixedSlot, SlotStore, StateStore, Store
from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.model.rope import rope_table
from cllm.posthoc.cache import CompressedKVCache
from cllm.posthoc.code import Prefix
from cllm.posthoc.compress import Outcome
from cllm.posthoc.method import Compressor
from cllm.posthoc.registry import compose, methods
from cllm.posthoc.stores import CompressedSlot, SharingSlot
from cllm.prefix.trees import DTYPES, Tensors, read_tree, write_tree

_ALIGNED = 64
"""Bytes to which torch aligns memory on a CPU."""


@dataclass(frozen=True)
class Packed:
    """A cache without its model."""

    layout: dict[str, Any]
    """JSON: what the tensors are."""
    tensors: dict[str, Tensor]
    """The tensors by name, on one device. They are never written to."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def seen(self) -> int:
        """Tokens of the cache, padding included."""
        return self.layout["seen"]

    @property
    def is_croppable(self) -> bool:
        """Whether the first tokens alone are the cache of a shorter prefix: exact slots without windows only, also if
        they are coded at rest."""
        if "at_rest" in self.layout:
            return self.layout["at_rest"]["croppable"]
        return (
            all(
                owner["kind"] == "slot" and owner["kept"] == self.seen and owner["window"] is None
                for owner in self.layout["owners"].values()
            )
            and not self.layout["orders"]
        )

    def to(self, device: torch.device) -> Packed:
        """On `device`; a copy unless it is there already, in memory as torch aligns it.

        Views of a mapped file begin anywhere, and the rounding of products on a CPU depends on the alignment.
        """
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return replace(self, tensors={n: t.clone() if t.data_ptr() % _ALIGNED else t for n, t in moved.items()})

    def cropped(self, length: int) -> Packed:
        """The first `length` tokens of a croppable cache; tensors are views. A code at rest is cropped when decoded.

        Raises `ValueError` for another cache.
        """
        if not self.is_croppable:
            raise ValueError(f"{length} of {self.seen} tokens of a cache that cannot be cropped")
        if "at_rest" in self.layout:
            return replace(self, layout={**self.layout, "at_rest": {**self.layout["at_rest"], "length": length}})
        owners = {j: {**owner, "kept": length} for j, owner in self.layout["owners"].items()}
        layout = {**self.layout, "seen": length, "owners": owners}
        return Packed(layout, {n: t if n == "starts" else t[:, :length] for n, t in self.tensors.items()})


# ---- packing ---------------------------------------------------------------------------------------------------------


def pack(cache: Any) -> Packed:
    """`cache` packed. Tensors that later passes write to are copied, all others shared with it.

    Raises:
        UserError: for an empty cache, one of another class, and a compressed one that a file cannot hold, by the name
            of the method, or of the class and field.
    """
    if not isinstance(cache, KVCache):
        raise UserError(f"cache is a {type(cache).__name__}; allowed: cllm.cache.cache.KVCache, and compressed ones")
    if not cache.seen or cache.batch is None:
        raise UserError("the cache is empty; fill it with a prompt first")
    if isinstance(cache, CompressedKVCache) and (in_host := cache.host_nbytes()):
        raise UserError(
            f"{cache.method.name}: {in_host:,} bytes of the cache are in host memory, and all tensors of a stored "
            "prefix are on one device; allowed: methods that keep none there, such as shadowkv with values=device"
        )
    tensors = Tensors()
    layout: dict[str, Any] = {
        "seen": cache.seen,
        "batch": cache.batch,
        "closed": cache.closed,
        "storage": cache.storage,
        "padded": cache.starts is not None,
        "owners": {str(j): _pack_store(j, store, cache, tensors) for j, store in cache.stores.items()},
        "orders": {},  # of dimensions in memory, on which the rounding of later products depends
    }
    if cache.starts is not None:
        tensors.add("starts", cache.starts.clone())
    if isinstance(cache, CompressedKVCache):
        layout["compressed"] = _pack_compression(cache)
    packed = {}
    for name, tensor in tensors.named.items():
        order = [dim for _, dim in sorted(zip((-n for n in tensor.stride()), range(tensor.ndim), strict=True))]
        if order != sorted(order) and tensor.numel():
            layout["orders"][name] = order
            tensor = tensor.permute(order)
        packed[name] = tensor.detach().contiguous()
    return Packed(layout, packed)


def _pack_store(owner: int, store: Store, cache: KVCache, tensors: Tensors) -> dict[str, Any]:
    if isinstance(store, StateStore):
        tensors.add(f"{owner}.state", store.state.clone())
        return {"kind": "state"}
    if isinstance(store, SharingSlot):
        source = next(j for j, other in cache.stores.items() if other is store.source)
        return {"kind": "sharing", "source": source}
    if isinstance(store, CompressedSlot):
        tail = _pack_slot(f"{owner}.tail", store.tail, cache.seen - store.prefix.sinks.before_tail, tensors)
        return {"kind": "compressed", "prefix": write_tree(store.prefix, f"{owner}.prefix", tensors), "tail": tail}
    if isinstance(store, SlotStore) and type(store).last is not SlotStore.last:
        return {"kind": "slot", **_pack_slot(str(owner), store, cache.seen, tensors)}
    raise UserError(f"the cache cannot be stored: layer {owner} has a {type(store).__name__}")


def _pack_slot(name: str, store: SlotStore, past: int, tensors: Tensors) -> dict[str, Any]:
    kept = store.kept(past)
    slot = store.last(kept, past)
    if isinstance(store, FixedSlot):  # later passes write into its tensors
        slot = slot.map(torch.clone)
    for field, tensor in zip(Slot._fields, slot, strict=True):
        if tensor is not None:
            tensors.add(f"{name}.{field}", tensor)
    dtype = str(store.dtype).removeprefix("torch.")
    return {"kept": kept, "window": store.window, "fp8": store.fp8, "dtype": dtype}


def _pack_compression(cache: CompressedKVCache) -> dict[str, Any]:
    method = cache.method
    if method.recompress is not None and (method.watches or method.calibrates):
        raise UserError(
            f"{method.name}: recompress={method.recompress} needs what the method was calibrated to, which no file "
            "holds; allowed: null"
        )
    if cache.later is not None:
        raise UserError(
            f"{method.name}: every={method.every} records the queries of later tokens, for which a stored prefix has "
            "no model; allowed: null"
        )
    errors = {str(slot): found for slot, found in cache.outcome.errors.items()}
    return {
        "method": describe_method(method),
        "measure": cache.measure,
        "tokens": cache.compressed,
        "fitted": cache.fitted,
        "sinks": cache.sinks,
        "seconds": cache.seconds,
        "outcome": {
            "seconds": cache.outcome.seconds,
            "errors": errors,
            "read_flops": cache.outcome.read_flops,
        },
    }


def describe_method(method: Compressor) -> dict[str, Any]:
    """A method and its options as JSON, without what it was calibrated to."""
    then = method.after_plus
    return {
        "name": method.name,
        "options": method.model_dump(mode="json", exclude_unset=True),
        "coder": None if then is None else describe_method(then),
    }


# ---- unpacking -------------------------------------------------------------------------------------------------------


def unpack(packed: Packed, config: ModelConfig, *, max_len: int | None = None) -> KVCache:
    """The cache, for a model of `config`, on the device of the tensors.

    Args:
        packed: of the same model.
        config: the model's.
        max_len: None for a growing cache; tokens of a static one.

    Raises:
        UserError: for a `max_len` that is too small, and as `KVCache` does.
        ValueError, KeyError, TypeError: for a layout that `pack` did not write for such a model.
    """
    layout, tensors = packed.layout, dict(packed.tensors)
    for name, order in layout["orders"].items():
        tensors[name] = tensors[name].permute([order.index(dim) for dim in range(len(order))])
    seen, compression = layout["seen"], layout.get("compressed")
    if max_len is not None and max_len < seen:
        raise UserError(
            f"max_len of a cache is {max_len}, and the stored prefix has {seen} tokens; allowed: {seen} or more"
        )
    if compression is None:
        cache = KVCache(config, max_len=max_len, storage=layout["storage"])
    else:
        cache = _empty_compressed(config, compression, max_len)
    first = next(iter(tensors.values()))
    cache.batch, cache.seen, cache.closed = layout["batch"], seen, layout["closed"]
    cache.column = torch.full((1,), seen, dtype=torch.long, device=first.device)
    cache.starts = tensors["starts"].clone() if layout["padded"] else None
    if set(layout["owners"]) != {str(j) for j in cache.plan.slots}:
        raise ValueError(f"it has the slots of the layers {', '.join(layout['owners'])}")
    sharing = {}
    for owner in cache.plan.slots:
        entry = layout["owners"][str(owner)]
        if entry["kind"] == "sharing":
            sharing[owner] = entry["source"]
            continue
        cache.stores[owner] = _unpack_store(owner, entry, cache, tensors)
    for owner, source in sharing.items():
        cache.stores[owner] = SharingSlot(cache.stores[source])  # type: ignore[arg-type]
    cache.stores = {owner: cache.stores[owner] for owner in cache.plan.slots}
    return cache


def _unpack_store(owner: int, entry: dict[str, Any], cache: KVCache, tensors: Mapping[str, Tensor]) -> Store:
    assert cache.batch is not None
    source, head_dim = cache.plan.owned(owner), cache.config.resolved_head_dim
    if entry["kind"] == "state":
        shape = source.state_shape(cache.config.n_heads, head_dim)
        state = tensors[f"{owner}.state"]
        if shape is None or state.shape != (cache.batch, *shape) or state.dtype != torch.float32:
            raise ValueError(f"the state of layer {owner} is {list(state.shape)}")
        store = StateStore(shape, cache.batch, device=state.device)
        store.state.copy_(state)
        return store
    if entry["kind"] == "compressed":
        table = functools.partial(rope_table, cache.config.rope, source.head_size(head_dim))
        prefix = read_tree(entry["prefix"], tensors, table)
        if not isinstance(prefix, Prefix):
            raise ValueError(f"the prefix of layer {owner} is a {type(prefix).__name__}")
        slot = _unpack_slot(f"{owner}.tail", entry["tail"], tensors)
        compressed = CompressedSlot(prefix, slot)
        if cache.max_len is not None:
            if prefix.sinks.evicted:
                raise UserError(
                    f"max_len of a cache is {cache.max_len}, and tokens of the stored prefix were evicted, which "
                    "leaves gaps between the columns of a static cache; allowed: None"
                )
            room, past = cache.max_len - prefix.sinks.rest, cache.seen - prefix.sinks.rest
            compressed.tail = exact_slot(slot, past, room, window=None, dtype=slot.k.dtype, fp8=False)
        return compressed
    if entry["kind"] != "slot":
        raise ValueError(f"layer {owner} has a store of the kind {entry['kind']}")
    slot, window = _unpack_slot(str(owner), entry, tensors), cache.plan.kept(owner)
    _check_slot(owner, slot, entry, cache)
    size = None if cache.max_len is None else min(window or cache.max_len, cache.max_len)
    dtype = DTYPES[entry["dtype"]]
    restored = exact_slot(slot, cache.seen, size, window=window, dtype=dtype, fp8=entry["fp8"])
    if isinstance(restored, FixedSlot) and entry["kept"] < min(cache.seen, restored.size):
        restored.most = cache.seen - entry["kept"] + restored.size  # a window that a crop has emptied in part
    return restored


def _unpack_slot(name: str, entry: dict[str, Any], tensors: Mapping[str, Tensor]) -> Slot:
    slot = Slot(*(tensors.get(f"{name}.{field}") for field in Slot._fields))  # type: ignore[arg-type]
    if slot.k is None or slot.v is None or slot.k.shape[1] != entry["kept"]:
        raise ValueError(f"the slot {name} does not have {entry['kept']} tokens")
    return slot


def _check_slot(owner: int, slot: Slot, entry: dict[str, Any], cache: KVCache) -> None:
    """Raise `ValueError` unless `slot` has the shapes and dtypes that this cache stores for `owner`."""
    kept = entry["kept"]
    other = not isinstance(cache, CompressedKVCache) and entry["fp8"] != (cache.storage == "fp8")
    if other or not 0 <= kept <= cache.seen:  # windows of a compressed cache keep the format of the exact one
        raise ValueError(f"the slot of layer {owner} has another format")
    dtype = FP8 if entry["fp8"] else DTYPES[entry["dtype"]]
    widths = cache.plan.owned(owner).widths(cache.config.resolved_head_dim)
    for tensor, scale, width in zip(slot[:2], slot[2:4], widths, strict=True):
        assert tensor is not None
        expected = (cache.batch, kept, *width)
        wrong = tensor.shape != expected or tensor.dtype != dtype or (scale is not None) != entry["fp8"]
        if wrong or (scale is not None and (scale.shape != expected[:-1] or scale.dtype != SCALE)):
            raise ValueError(f"the slot of layer {owner} is {list(tensor.shape)} {tensor.dtype}, not {list(expected)}")


def _empty_compressed(config: ModelConfig, data: dict[str, Any], max_len: int | None) -> CompressedKVCache:
    outcome = data["outcome"]
    errors = {int(slot): found for slot, found in outcome["errors"].items()}
    room = None if max_len is None else max_len - data["tokens"]
    method = _read_method(data["method"])
    for option, tokens in (("recompress", method.recompress), ("every", method.every)):
        if room is not None and tokens is not None:
            raise UserError(f"{method.name}: {option}={tokens} does not go with max_len; allowed: one of the two")
    cache = CompressedKVCache.empty(config, method, measure=data["measure"], max_len=max_len, room=room)
    cache.compressed, cache.sinks, cache.seconds = data["tokens"], data["sinks"], data["seconds"]
    cache.fitted = data.get("fitted", data["tokens"])  # older files have none
    cache.outcome = Outcome(outcome["seconds"], errors, outcome.get("read_flops", 0))  # older files have none
    return cache


def _read_method(data: dict[str, Any]) -> Compressor:
    known = methods()
    if data["name"] not in known:
        raise UserError(f'the prefix was compressed by "{data["name"]}", which is not installed')
    method = known[data["name"]].model_validate(data["options"])
    return method if data["coder"] is None else compose(method, _read_method(data["coder"]))
