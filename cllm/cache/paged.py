"""One forward pass over another library's paged cache, in which every request has pages of its own.

A pass is one row of tokens: those of the first request, then those of the second, and so on. An owner hands its new
keys and values to the cache and gets the cached ones of all requests back, in the same order, the new ones included.

Shapes: T tokens of the row, S tokens that readers see, G KV heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.cache.slot import Slot
from cllm.cache.stores import Step, Store

Update = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Stores keys and values (1, T, G, D) of one owner, and returns those of all requests, (1, S, G, D) each."""


class PagedSlot(Store):
    """The pages of one owner. They belong to the paged cache, which also frees them."""

    def __init__(self, update: Update):
        self.update = update

    def extend(self, new: Slot) -> Slot:
        """The slot that readers attend to, (1, S, G, D) each, from the `new` tokens as readers see them.

        A page has room for keys and values of one shape, so a slot of one half fills both halves of its pages.
        """
        k, v = new.k, new.v
        keys, values = self.update(k if k.shape[2] else v, v if v.shape[2] else k)
        return Slot(keys[:, :, : k.shape[2]], values[:, :, : v.shape[2]])

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def commit(self, step: Step) -> None:
        pass

    def can_crop(self, length: int, past: int) -> None:
        raise NotImplementedError("the paged cache frees pages by request")

    def crop(self, length: int, past: int) -> None:
        raise NotImplementedError("the paged cache frees pages by request")

    def replace(self, change: Callable[[Tensor], Tensor]) -> None:
        raise NotImplementedError("the paged cache orders requests itself")

    def reset(self) -> None:
        raise NotImplementedError("the paged cache frees pages by request")


@dataclass(frozen=True, slots=True)
class PagedPass:
    """One pass over the tokens of several requests."""

    stores: Mapping[int, PagedSlot]
    """By owner."""
    queries: Sequence[int]
    """Tokens of each request in this pass, all at least 1."""
    cached: Sequence[Sequence[int]]
    """For each kind of owner, full or windowed: the tokens of each request in the slots that readers see."""

    is_static = False

    def ends(self, device: torch.device) -> Tensor:
        """(requests,) int64: the index of each request's last token in the row."""
        return torch.tensor(self.queries, device=device).cumsum(0) - 1
