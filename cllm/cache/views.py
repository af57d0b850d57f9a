"""A cache as other libraries read it: keys and values of every layer, laid out as transformers' caches are."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from cllm.cache.stores import SlotStore, Store
from cllm.errors import UserError
from cllm.plan.plan import KVPlan


class Readable(Protocol):
    """The parts of a cache that its views read."""

    plan: KVPlan
    stores: dict[int, Store]
    seen: int

    @property
    def is_initialized(self) -> bool: ...


class CachedLayer:
    """Read-only view of the keys and values that layer `layer` reads from a cache."""

    is_compileable = False
    supports_early_init = False

    def __init__(self, cache: Readable, layer: int):
        self.cache, self.layer = cache, layer

    @property
    def keys(self) -> Tensor | None:
        """(B, KV heads, tokens, head_dim), after RoPE; with a window, the last tokens. None if the cache is empty.

        Raises:
            UserError: for a layer that fuses slots, whose keys are stored nowhere, for latents and states, and for keys
                that are stored before RoPE.
        """
        return self._read("keys")

    @property
    def values(self) -> Tensor | None:
        """As `keys`."""
        return self._read("values")

    @property
    def is_initialized(self) -> bool:
        return self.cache.is_initialized

    @property
    def is_sliding(self) -> bool:
        return self.cache.plan.layers[self.layer].window is not None

    def get_seq_length(self) -> int:
        """Tokens stored, padding included."""
        return self.cache.seen

    def __repr__(self) -> str:
        sources = ", ".join(str(j) for j in self.cache.plan.reads(self.layer))
        return f"CachedLayer({self.layer}, reads {sources})"

    def _read(self, name: Literal["keys", "values"]) -> Tensor | None:
        plan, cache = self.cache.plan, self.cache
        read = plan.keys(self.layer) if name == "keys" else plan.values(self.layer)
        if plan.reads_at_once(self.layer):
            raise UserError(
                f"cache.layers[{self.layer}].{name}: the layer reads several slots by {read.key}: "
                f"{read.text(self.layer)}; allowed: layers that read one slot"
            )
        if not read.is_stored:
            raise UserError(
                f"cache.layers[{self.layer}].{name}: the layer fuses {name} of the layers {list(read.layers)}, which "
                "are stored; its own are not"
            )
        if not plan.source(self.layer).is_plain:
            kind = type(plan.source(self.layer)).__name__.lower()
            raise UserError(f"cache.layers[{self.layer}].{name}: the layer reads a {kind}, and no {name}")
        if name == "keys" and plan.source(self.layer).rotates_at_read:
            raise UserError(
                f"cache.layers[{self.layer}].keys: layer {read.layers[0]} stores its keys before RoPE, as its values"
            )
        store = cache.stores.get(read.layers[0])
        if store is None or cache.seen == 0:
            return None
        assert isinstance(store, SlotStore)
        slot = store.unpack(store.last(store.kept(cache.seen), cache.seen))
        return (slot.k if name == "keys" else slot.v).transpose(1, 2)
