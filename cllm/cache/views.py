"""A cache as other libraries read it: keys and values of every layer, laid out as transformers' caches are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor

from cllm.cache.stores import SlotStore
from cllm.errors import UserError

if TYPE_CHECKING:
    from cllm.cache.cache import KVCache


class CachedLayer:
    """The keys and values that layer `layer` reads from a cache; for reading, not for writing."""

    is_compileable = False
    supports_early_init = False

    def __init__(self, cache: KVCache, layer: int):
        self.cache, self.layer = cache, layer

    @property
    def keys(self) -> Tensor | None:
        """(B, KV heads, tokens, head_dim), after RoPE; of a window, the last tokens. None: the cache is empty.

        Raises `UserError` for a layer that fuses slots, whose keys are stored nowhere, and for latents and states.
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
        if not read.is_stored:
            raise UserError(
                f"cache.layers[{self.layer}].{name}: the layer fuses {name} of the layers {list(read.layers)}, which "
                "are stored; its own are not"
            )
        if not plan.source(self.layer).is_plain:
            kind = type(plan.source(self.layer)).__name__.lower()
            raise UserError(f"cache.layers[{self.layer}].{name}: the layer reads a {kind}, and no {name}")
        store = cache.stores.get(read.layers[0])
        if store is None or cache.seen == 0:
            return None
        assert isinstance(store, SlotStore)
        slot = store.unpack(store.last(store.kept(cache.seen), cache.seen))
        return (slot.k if name == "keys" else slot.v).transpose(1, 2)
