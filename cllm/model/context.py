"""The state that all layers of one forward pass share: positions, documents, RoPE tables, masks, the cache's layout.

Shapes: B batch, T tokens of this pass, S tokens in the slots that are read.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cllm.cache.slot import Slot
from cllm.cache.stores import SlotStore, Step, rows
from cllm.config import ModelConfig, Rope
from cllm.kernels.attention import Documents, Mask, document_boundaries
from cllm.kernels.decode import Visible
from cllm.model.rope import rope_table
from cllm.model.sources import RopeTables, unpacked
from cllm.plan.plan import KVPlan

if TYPE_CHECKING:
    from cllm.cache.cache import KVCache


@dataclass(frozen=True, slots=True)
class CacheLayout:
    """Where the tokens of cached slots are. A token's column is its index in the padded sequence."""

    column: Tensor
    """(1,) int64: column of the first token of this pass, on the device."""
    starts: Tensor | None
    """(B,) int64: columns of padding before each sequence."""
    total: int | None
    """Columns up to the end of this pass, if slots hold tokens in order; None if slots are rings."""

    def visible_range(self, size: int) -> tuple[Tensor, Tensor | None]:
        """Index (1,) of the last token in slots of `size` tokens, and the first index (B,) that each sequence sees."""
        if self.total is None:
            return self.column, self.starts
        first = None if self.starts is None else self.starts - (self.total - size)
        return torch.full_like(self.column, size - 1), first


@dataclass(frozen=True, slots=True)
class Group:
    """Requests of a row of tokens whose attention is one call (`requests.py`)."""

    queries: slice | Tensor
    """The tokens of one request; or (n,) int64, one token of each of n requests."""
    entries: Mapping[int, slice | Tensor]
    """For slots of a total number of entries: those of the request; or (n, S) int64, padded on the left."""
    context: Context

    def query(self, q: Tensor) -> Tensor:
        """(1, t, ...) or (n, 1, ...): the tokens of `q` (1, T, ...)."""
        return q[:, self.queries] if isinstance(self.queries, slice) else q[0, self.queries][:, None]

    def slot(self, slot: Slot) -> Slot:
        """(1, S, ...) or (n, S, ...): the entries of `slot` (1, total, ...)."""
        entries = self.entries[slot.k.shape[1]]
        return slot.map(lambda t: t[:, entries] if isinstance(entries, slice) else t[0, entries])

    def put(self, out: Tensor, result: Tensor) -> None:
        """Write a `result` in the shape of `query` to its tokens in `out` (1, T, ...)."""
        if isinstance(self.queries, slice):
            out[:, self.queries] = result
        else:
            out[0, self.queries] = result[:, 0]


@dataclass(slots=True)
class Context:
    """The state that all layers of one forward pass share. It computes each table and mask once."""

    rope_config: Rope
    positions: Tensor
    """(B or 1, T) integers."""
    _: KW_ONLY
    document_ids: Tensor | None = None
    """(B, S) integers for all tokens that may be seen; None: each row is one document."""
    documents: Documents | None = None
    """Boundaries of `document_ids`. On a GPU they are computed here, so that compiled blocks need not compute them."""
    backend: str = "auto"
    """Name of the attention backend."""
    recompute_fusion: bool = False
    """Recompute fused keys and values in the backward instead of saving them."""
    cache_layout: CacheLayout | None = None
    """None: every slot holds the tokens of this pass and no others."""
    step: Step | None = None
    """The pass as the cache sees it; None without a cache."""
    is_text: Tensor | None = None
    """(B, T) booleans, False for padding; None without padding."""
    tail: Context | None = None
    """Context of the last tokens, if only they continue after this layer has written its slot (prefill).

    Layers above get `x` (B, n, d_model) of those n tokens, and this context too: an owner that projects the output of a
    lower layer writes its slot for all tokens, or for n if it mixes in a slot of n (`tail_slots`). A tail may have a
    tail of its own, of the last token."""
    groups: tuple[Group, ...] = ()
    """The requests of the row, if it holds several; empty: each row is one sequence."""
    ends: Tensor | None = None
    """(requests,) int64: the last token of each request of the row; None: each row is one sequence."""
    new_entries: dict[int, Tensor] = field(default_factory=dict)
    """For slots of a total number of entries: (T,) int64, the entries of this pass's tokens, if there are requests."""
    streams: dict[int, Tensor] = field(default_factory=dict)
    """The normalised outputs (B, T, d_model) of the layers in `KVPlan.inputs`."""
    _slot_rope: dict[tuple[int, int, bool], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _rope: dict[tuple[int, bool], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _masks: dict[tuple[int | None, bool, int], Mask] = field(default_factory=dict)
    _visible: dict[tuple[int | None, bool, int], Visible] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ids = self.document_ids
        if ids is not None and self.documents is None and ids.is_cuda and ids.shape[1] == self.length:
            self.documents = document_boundaries(ids)

    @property
    def length(self) -> int:
        """Tokens of this pass, T."""
        return self.positions.shape[1]

    @property
    def is_decoding(self) -> bool:
        """Whether each sequence has one query and cached slots before it. Such a pass runs decoding kernels."""
        return self.cache_layout is not None and self.length == 1

    def after_write(self, x: Tensor) -> tuple[Context, Tensor]:
        """Context and `x` (B, T, ...) for the rest of a layer: all tokens, or those of the last `tail` if it is set."""
        if self.tail is None:
            return self, x
        rest = self.tail if self.tail.tail is None else self.tail.tail
        return rest, self.last_of(x, rest.length)

    def over(self, x: Tensor) -> Context:
        """The context of the tokens of `x` (B, T or n, ...): this one, or `tail` if only its n tokens are left."""
        return self if self.tail is None or x.shape[1] == self.length else self.tail.over(x)

    def of_tail(self, x: Tensor) -> Tensor:
        """(B, n, ...): the last tokens of `x` (B, T, ...), if several go on; else `x` as it is."""
        if self.tail is None or self.ends is not None or self.tail.length == 1:
            return x
        return self.last_of(x, self.tail.length)

    def last_of(self, x: Tensor, n: int = 1) -> Tensor:
        """(B, n, ...) or, of a row of requests, (1, requests, ...): the last tokens of `x` (B, T, ...).

        An `x` of which only they are left is returned as it is.
        """
        if self.ends is None:
            return x[:, -n:]
        return x if x.shape[1] == len(self.ends) else x[:, self.ends]

    def with_tail(self, n: int) -> Context:
        """This context with a `tail` of the last `n` > 1 tokens, which still write windows of their own input."""
        layout = self.cache_layout
        if layout is not None:
            layout = replace(layout, column=layout.column + (self.length - n))
        tail = Context(
            self.rope_config,
            self.positions[:, -n:],
            document_ids=self.document_ids,
            backend=self.backend,
            cache_layout=layout,
            step=self.step,
        )
        return replace(self, tail=tail)

    def rope(self, dim: int, windowed: bool) -> tuple[Tensor, Tensor]:
        """cos and signed sin for a head dimension, as `rope_table` returns them; `windowed` as in `Rope.of`."""
        key = (dim, windowed)
        if key not in self._rope:
            self._rope[key] = rope_table(self.rope_config.of(windowed), dim, self.positions)
        return self._rope[key]

    def ropes(self, windowed: bool) -> RopeTables:
        """`rope` as a function of the head dimension."""
        return functools.partial(self.rope, windowed=windowed)

    def newest(self, slot: Slot, dtype: torch.dtype) -> Slot:
        """The tokens of this pass (B, T, ...) in a slot as readers see it; fp8 numbers become `dtype`."""
        layout = self.cache_layout
        if self.new_entries:
            return slot.map(lambda t: t[:, self.new_entries[t.shape[1]]])
        if layout is None or self.step is None:
            return slot.map(lambda t: t[:, -self.length :])
        if layout.total is None:  # a ring
            place = layout.column % slot.k.shape[1]
            new = slot.map(lambda t: rows(t).index_select(1, place).view(t.dtype))
        else:
            new = slot.map(lambda t: t[:, -self.length :])
        return unpacked(new, dtype)

    def slot_rope(self, dim: int, size: int, windowed: bool) -> tuple[Tensor, Tensor]:
        """As `rope`, for all tokens of a slot of `size` tokens as readers see it.

        Cached tokens are at the positions before those of this pass, without gaps.
        """
        if self.cache_layout is None or self.step is None:
            return self.rope(dim, windowed)
        key = (dim, size, windowed)
        if key not in self._slot_rope:
            index = torch.arange(size, device=self.positions.device)
            if self.cache_layout.total is None:  # a ring
                positions = self.positions - (self.cache_layout.column - index) % size
            else:
                cached = index[: size - self.length]
                positions = torch.cat((self.positions[:, :1] + (cached - len(cached)), self.positions), dim=1)
            self._slot_rope[key] = rope_table(self.rope_config.of(windowed), dim, positions)
        return self._slot_rope[key]

    def prepare(self, plan: KVPlan, head_dim: int, sizes: Mapping[int, int] | None = None) -> None:
        """Compute every table and mask that the layers of `plan` need, outside of compiled code.

        `sizes` are the tokens in each slot as readers see it; by default T.
        """
        rope = self.rope_config
        for i, layer in enumerate(plan.layers):
            self.rope(plan.source(i).rope_dim(head_dim), rope.is_windowed(plan, plan.key_slots(i)[0]))
            for slot, own in ((i, layer.own), (len(plan) + i, layer.local)):
                if own is not None and own.rotates_at_read:
                    size = self.length if sizes is None else sizes[slot]
                    self.slot_rope(own.head_size(head_dim), size, rope.is_windowed(plan, slot))
            for slots, window in plan.attended(i):
                size = self.length if sizes is None else min((sizes[j] for j in slots if j in sizes), default=0)
                if size and self.is_decoding:
                    self.visible(window, plan.reads_above(i), size)
                elif size:
                    self.mask(window, plan.reads_above(i), size)

    def mask(self, window: int | None, exclude_self: bool, size: int) -> Mask:
        """The mask over slots of `size` tokens, for a pass of several tokens."""
        key = (window, exclude_self, size)
        if key not in self._masks:
            ids = None if self.document_ids is None else self.document_ids[:, -size:]
            self._masks[key] = Mask(window, exclude_self, ids, self.documents if size == self.length else None)
        return self._masks[key]

    def visible(self, window: int | None, exclude_self: bool, size: int) -> Visible:
        """The entries that the one query of each sequence sees, in slots of `size` entries."""
        key = (window, exclude_self, size)
        if key not in self._visible:
            assert self.cache_layout is not None
            column, first = self.cache_layout.visible_range(size)
            self._visible[key] = Visible(column, first, window, exclude_self)
        return self._visible[key]


def sequence_context(
    config: ModelConfig,
    plan: KVPlan,
    tokens: Tensor,
    positions: Tensor | None,
    document_ids: Tensor | None,
    starts: Tensor | None,
    step: Step | None,
    cache: KVCache | None,
    *,
    backend: str,
    recompute_fusion: bool,
) -> Context:
    """The context of a pass over `tokens` (B, T), of which only shape and device count.

    `positions`, `document_ids` and `starts` are as for `Decoder.hidden`. `step` is that of the pass over a `cache`.
    """
    length, device = tokens.shape[1], tokens.device
    past = 0 if step is None else step.past
    columns, documents = torch.arange(length, device=device), None
    if step is not None:
        columns = columns + step.column
    if positions is None:
        positions = columns[None] if starts is None else (columns - starts[:, None]).clamp(min=0)
    if starts is not None and (length > 1 or cache is None):  # padding becomes a separate document
        document_ids = (torch.arange(past + length, device=device) >= starts[:, None]).long()
        if document_ids.is_cuda and past == 0:
            documents = document_boundaries(document_ids, 2 * len(document_ids))
    layout = sizes = None
    if step is not None and cache is not None:
        rings = cache.is_static and length == 1
        layout = CacheLayout(step.column, starts, None if rings else past + length)
        sizes = {
            j: store.size if rings else store.kept(past) + length
            for j, store in cache.stores.items()
            if isinstance(store, SlotStore)
        }
    is_text = None if starts is None else columns >= starts[:, None]
    context = Context(
        config.rope,
        positions,
        document_ids=document_ids,
        documents=documents,
        backend=backend,
        recompute_fusion=recompute_fusion,
        cache_layout=layout,
        step=step,
        is_text=is_text,
    )
    context.prepare(plan, config.resolved_head_dim, sizes)
    return context
