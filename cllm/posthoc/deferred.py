"""Keys and values of a compressed slot that a decode step reads in their stored form.

In a decode step a slot's `k` and `v` are `StoredRead` objects in the place of tensors. They have a tensor's shape, and
attention calls their `attend`. Indexing one reconstructs the tensor, as for a layer that cuts slots to a common length.

Shapes: B batch, S compressed tokens, T exact ones (sinks, then later tokens), H query heads, G KV heads, D channels of
a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cllm.cache.slot import Slot
from cllm.kernels.decode import Stored, Visible, decode_attention
from cllm.kernels.lowrank_decode import lowrank_decode
from cllm.kernels.selection import Factored, Table
from cllm.posthoc.code import Prefix


@dataclass(frozen=True)
class StoredRead(ABC):
    """The keys or the values (B, S + T, G, D) of a compressed slot in a decode step."""

    prefix: Prefix
    kind: Literal["k", "v"]
    exact: Slot
    """(B, T, G, D) each, sinks first."""

    @property
    def shape(self) -> torch.Size:
        """The tensor's shape."""
        batch, exact, *width = getattr(self.exact, self.kind).shape
        return torch.Size((batch, self.prefix.sinks.rest + exact, *width))

    def __getitem__(self, key: Any) -> Tensor:
        return self.tensor()[key]

    def tensor(self) -> Tensor:
        """The reconstructed tensor, in the cache's dtype, tokens in the order of their columns."""
        return getattr(self.prefix.join(self.exact), self.kind)

    def attend(
        self,
        queries: Sequence[Tensor],
        keys: Sequence[Stored],
        values: Sequence[Stored],
        visible: Visible,
        *,
        scale: float,
    ) -> list[Tensor]:
        """`decode_attention` of keys and values, at least one of them of this class. If some are not, or the layer has
        a window, all are read as tensors."""
        parts: list[Any] = [part.data for part in (*keys, *values)]
        if visible.window is not None or not all(isinstance(part, type(self)) for part in parts):
            full = [Stored(p.data.tensor(), p.scale) if isinstance(p.data, StoredRead) else p for p in (*keys, *values)]
            return decode_attention(queries, full[: len(keys)], full[len(keys) :], visible, scale=scale)
        return self._attend(queries, parts, len(keys), visible, scale)

    @abstractmethod
    def _attend(
        self, queries: Sequence[Tensor], parts: Sequence[Any], n_keys: int, visible: Visible, scale: float
    ) -> list[Tensor]:
        """`attend` without a window over `parts` of this class, the first `n_keys` of them keys."""


@dataclass(frozen=True)
class Deferred(StoredRead):
    """The keys or the values of a slot whose prefix is stored as factors."""

    table: Table
    """RoPE of the S compressed positions."""

    def _attend(
        self, queries: Sequence[Tensor], parts: Sequence[Any], n_keys: int, visible: Visible, scale: float
    ) -> list[Tensor]:
        factored = [part.factored() for part in parts]
        return lowrank_decode(
            queries,
            factored[:n_keys],
            factored[n_keys:],
            self.table,
            visible,
            scale=scale,
            selection=parts[0].prefix.landmarks,
        )

    def factored(self) -> Factored:
        """The form that the kernel takes."""
        factors = getattr(self.prefix, self.kind).factors()
        assert factors is not None, "only slots that are stored as factors are deferred"
        a, b = factors
        return Factored(a, b, getattr(self.exact, self.kind))
