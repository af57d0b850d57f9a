"""Stores that are filled with the tokens of other stores."""

from __future__ import annotations

import torch

from cllm.cache.slot import Slot
from cllm.cache.stores import FixedSlot, GrowingSlot, SlotStore, StateStore, Step, Store


def copy_store(store: Store, seen: int, max_len: int | None, length: int | None = None) -> Store:
    """A copy of a slot in a growing store or, for a static cache, in one of fixed size; or of a recurrent state.

    Args:
        store: exact, or compressed, which is decoded.
        seen: tokens of the cache.
        max_len: of the new cache.
        length: None, or how many of the first tokens to copy of a slot that has them all.
    """
    if isinstance(store, StateStore):
        batch, *shape = store.state.shape
        state = StateStore(tuple(shape), batch, device=store.state.device)  # type: ignore[arg-type]
        state.state.copy_(store.state)
        return state
    assert isinstance(store, SlotStore)
    slot = store.last(store.kept(seen), seen).map(lambda t: t[:, :length].clone())
    size = None if max_len is None else min(store.window or max_len, max_len)
    return exact_slot(
        slot, seen if length is None else length, size, window=store.window, dtype=store.dtype, fp8=store.fp8
    )


def exact_slot(
    slot: Slot, past: int, size: int | None, *, window: int | None, dtype: torch.dtype, fp8: bool
) -> GrowingSlot | FixedSlot:
    """A store with the tokens of `slot`, the last of `past` tokens: a growing one, or one for `size` tokens."""
    widths, device = (tuple(slot.k.shape[2:]), tuple(slot.v.shape[2:])), slot.k.device
    if size is None:
        growing = GrowingSlot(widths, len(slot.k), 0, window=window, dtype=dtype, fp8=fp8, device=device)
        growing.slot = slot
        return growing
    fixed = FixedSlot(widths, len(slot.k), size, window=window, dtype=dtype, fp8=fp8, device=device)
    kept = slot.k.shape[1]
    fixed.pending = slot
    fixed.commit(Step(kept, past - kept, torch.zeros(1, dtype=torch.long, device=device)))
    return fixed
