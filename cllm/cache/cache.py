"""The KV cache of a decoder: one store for each slot of the KV plan (`KVPlan.slots`), and nothing else.

    cache = KVCache(config.model)                      # grows with every token
    cache = KVCache(config.model, max_len=32768)       # allocated once, at the first pass
    hidden = decoder.hidden(input_ids, cache=cache)    # appends the new tokens

A token's *column* is its index in the padded sequence; all sequences of a batch are at the same column, and `starts` is
the number of padding columns before each. `KVCache` is a transformers `Cache`: `generate` passes it on, reorders it for
beams and crops it for assisted decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from cllm.cache.accounting import Storage
from cllm.cache.stores import FixedSlot, GrowingSlot, SlotStore, StateStore, Step, Store
from cllm.cache.views import CachedLayer
from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.plan.plan import KVPlan

_SLOTS_DEPEND_ON = ("d_model", "n_heads", "resolved_head_dim", "rope", "norm_eps", "qk_norm", "q_bias", "kv_bias")
"""Config fields, besides the plan, that must be equal for one model to reuse another's cache."""


def check_max_len(max_len: Any) -> None:
    """Raise `UserError` unless `max_len` is None or a number of tokens."""
    if max_len is not None and (isinstance(max_len, bool) or not isinstance(max_len, Integral) or max_len < 1):
        raise UserError(f"max_len of a cache is {max_len!r}; allowed: 1 or more, or None to let it grow")


class KVCache(Cache):
    """The cached slots and states of one batch."""

    def __init__(self, config: ModelConfig, *, max_len: int | None = None, storage: Storage = "model"):
        """
        Args:
            config: the decoder's.
            max_len: tokens to allocate memory for at once (static); None: grow with every pass.
            storage: `model`: the model's dtype; `fp8`: e4m3 with a bf16 factor for every token and head, a relative
                error of at most 1/16.

        Raises:
            UserError: for a max_len below 1, and for a static cache of a plan in which one layer reads slots that keep
                different numbers of tokens.
        """
        super().__init__(layers=[])
        check_max_len(max_len)
        self.config, self.plan, self.max_len, self.storage = config, config.plan(), max_len, storage
        if max_len is not None:
            _check_rings(self.plan, max_len)
        self.stores: dict[int, Store] = {}
        self.seen = 0
        """Tokens stored, padding included."""
        self.batch: int | None = None
        self.starts: Tensor | None = None
        """(B,) int64: columns of padding before each sequence; None: none. Set by the first pass."""
        self.column: Tensor | None = None
        """(1,) int64: `seen`, on the device."""
        self.closed: str | None = None
        """The reason why no more tokens can be added, if there is one."""

    # ---- one forward pass --------------------------------------------------------------------------------------------

    @property
    def is_static(self) -> bool:
        return self.max_len is not None

    @property
    def records_queries(self) -> bool:
        """Whether it needs the queries of all tokens of a pass, in all layers that read its slots."""
        return False

    def check(self, config: ModelConfig) -> None:
        """Raise `UserError` for the config of a model whose slots differ from those of this cache's model."""
        if config is self.config:
            return
        for key in _SLOTS_DEPEND_ON:
            mine, other = getattr(self.config, key), getattr(config, key)
            if mine != other:
                name = key.removeprefix("resolved_")
                raise UserError(f"the cache was made for another model: its {name} is {mine}, the model's {other}")

    def check_plan(self, plan: KVPlan) -> None:
        """Raise `UserError` for the KV plan of another model."""
        if plan != self.plan:
            raise UserError("the cache was made for another model: its KV plan is not the model's")

    @torch.inference_mode(False)  # a cache filled in inference mode can go on outside of it
    def begin(self, plan: KVPlan, ids: Tensor, starts: Tensor | None, dtype: torch.dtype) -> Step:
        """Begin a pass over `ids` (B, T) of a model with `plan`, which computes in `dtype`.

        Raises:
            UserError: for another model's plan, another batch size, or more tokens than there is room for.
        """
        batch, length = ids.shape
        if self.closed is not None and self.seen:
            raise UserError(self.closed)
        self.check_plan(plan)
        if self.max_len is not None and self.seen + length > self.max_len:
            raise UserError(
                f"cache: {self.seen} tokens stored and {length} to come, but it was made for max_len {self.max_len}"
            )
        if self.batch is None or (self.seen == 0 and batch != self.batch):
            self.batch, self.stores = batch, {}
            self._allocate(batch, ids.device, dtype)
        if batch != self.batch:
            raise UserError(f"cache: holds {self.batch} sequences and was handed {batch}")
        if self.seen == 0:
            self.starts = None if starts is None else starts.clone()
        assert self.column is not None
        return Step(length, 0 if self.is_static and length == 1 else self.seen, self.column)

    def finish(self, step: Step) -> None:
        """End a pass: its tokens are stored."""
        assert self.column is not None
        for store in self.stores.values():
            store.commit(step)
        self.column += step.length
        self.seen += step.length

    def _allocate(self, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        head_dim, fp8 = self.config.resolved_head_dim, self.storage == "fp8"
        for owner in self.plan.slots:
            window, source = self.plan.kept(owner), self.plan.owned(owner)
            state = source.state_shape(self.config.n_heads, head_dim)
            if state is not None:
                self.stores[owner] = StateStore(state, batch, device=device)
                continue
            kind: type[SlotStore] = FixedSlot if self.is_static else GrowingSlot
            size = 0 if self.max_len is None else min(window or self.max_len, self.max_len)
            widths = source.widths(head_dim)
            self.stores[owner] = kind(widths, batch, size, window=window, dtype=dtype, fp8=fp8, device=device)

    # ---- for people --------------------------------------------------------------------------------------------------

    def nbytes(self) -> int:
        """Bytes of all stored tensors, of a static cache its entire memory. `accounting.cache_bytes` predicts it."""
        return sum(store.nbytes() for store in self.stores.values())

    def __repr__(self) -> str:
        kind = "growing" if self.max_len is None else f"static, max_len {self.max_len}"
        return f"KVCache({kind}, {self.seen} tokens, {len(self.stores)} owners, {self.nbytes():,} bytes)"

    def __len__(self) -> int:
        return len(self.plan)

    # ---- for transformers --------------------------------------------------------------------------------------------

    is_compileable = False
    """Keeps transformers from compiling the model because of this cache."""

    @property
    def layers(self) -> list[Any]:
        """The keys and values that each layer of the plan reads, see `CachedLayer`."""
        return [CachedLayer(self, i) for i in range(len(self.plan))]

    @layers.setter
    def layers(self, value: list[Any]) -> None:
        """Ignored: transformers' constructor sets an empty list, and stores are kept instead."""

    @property
    def is_initialized(self) -> bool:
        return self.batch is not None

    @property
    def is_croppable(self) -> bool:
        """Whether any number of the last tokens can be dropped."""
        return all(isinstance(store, SlotStore) and store.window is None for store in self.stores.values())

    @property
    def batch_size(self) -> int:
        """Sequences, or -1 before the first pass."""
        return -1 if self.batch is None else self.batch

    @property
    def is_sliding(self) -> list[bool]:
        return [layer.window is not None for layer in self.plan.layers]

    @property
    def max_batch_size(self) -> int | None:
        return self.batch

    @property
    def max_cache_len(self) -> int:
        return -1 if self.max_len is None else self.max_len

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens stored, padding included."""
        return self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """`max_len`, or -1."""
        return self.max_cache_len

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """`max_len`, or -1."""
        return self.max_cache_len

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(keys, offset) of a full mask, which is not used: layers make their own."""
        return self.seen + query_length, 0

    def update(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Raise `UserError`: other models' layers expect another layout."""
        raise UserError("a KVCache serves cllm models only; other models need a cache of their own")

    def reset(self) -> None:
        """Drop all tokens. A static cache keeps its memory for the next batch of the same size."""
        if self.batch is None:
            return
        if self.is_static:
            for store in self.stores.values():
                store.reset()
        else:
            self.stores, self.batch = {}, None
        self.starts = self.closed = None
        self._count(0)

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` tokens; a negative number drops that many, and 0 none, as in transformers.

        Raises:
            UserError: if the next token needs tokens that a window or a recurrent state has dropped; nothing is cropped
                then.
        """
        max_length = int(max_length)  # assisted decoding counts with tensors
        length = max(self.seen + max_length, 0) if max_length <= 0 else max_length
        if length >= self.seen:
            return
        for store in self.stores.values():  # all or none
            store.can_crop(length, self.seen)
        for store in self.stores.values():
            store.crop(length, self.seen)
        if length == 0:
            self.starts = self.closed = None
        self._count(length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace sequence b by sequence beam_idx[b]; (B,) int64."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of `indices` (n,) int64, in that order."""
        self._rearrange(lambda t: t.index_select(0, indices.to(t.device)), len(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times, copies adjacent."""
        if self.batch is not None:
            self._rearrange(lambda t: t.repeat_interleave(repeats, dim=0), self.batch * repeats)

    @torch.inference_mode(False)
    def _rearrange(self, change: Callable[[Tensor], Tensor], batch: int) -> None:
        if self.batch is None:
            return
        for store in self.stores.values():
            store.replace(change)
        if self.starts is not None:
            starts = change(self.starts)
            self.starts = self.starts.copy_(starts) if batch == self.batch else starts
        self.batch = batch

    def _count(self, seen: int) -> None:
        self.seen = seen
        if self.column is not None:
            self.column.fill_(seen)


def _check_rings(plan: KVPlan, max_len: int) -> None:
    """A pass of one token reads entire rings, so the rings that one layer reads must have the same size."""
    for i in range(len(plan)):
        for slots, _ in plan.attended(i):
            kept = {j: min(plan.kept(j) or max_len, max_len) for j in slots}
            if len(set(kept.values())) > 1:
                sizes = ", ".join(f"layer {j} keeps {n}" for j, n in kept.items())
                raise UserError(
                    f"layer {i} reads slots that keep different numbers of tokens ({sizes}), which a static cache "
                    "(max_len) cannot; use a growing one"
                )
