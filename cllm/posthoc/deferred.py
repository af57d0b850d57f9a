"""Keys and values of a compressed slot that a pass of one token reads without having them made.

In such a pass a slot's `k` and `v` are `Deferred`: they stand where tensors would, have their shape, and attention
leaves the reading to them. Whoever needs the numbers, as a layer that cuts slots to a common length does, gets them by
indexing.

Shapes: B batch, S compressed tokens, T exact ones (sinks, then tokens since), H query heads, G KV heads, D channels of
a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cllm.cache.slot import Slot
from cllm.kernels.decode import Stored, Visible, decode_attention
from cllm.kernels.lowrank_decode import Table, lowrank_decode
from cllm.kernels.selection import Factored
from cllm.posthoc.code import Prefix


@dataclass(frozen=True)
class Deferred:
    """The keys or the values (B, S + T, G, D) of a slot whose prefix is stored as factors."""

    prefix: Prefix
    part: Literal["k", "v"]
    since: Slot
    """(B, T, G, D) each, sinks first."""
    table: Table
    """RoPE of the S compressed positions."""

    @property
    def shape(self) -> torch.Size:
        """That of the tensor."""
        batch, since, *width = getattr(self.since, self.part).shape
        return torch.Size((batch, self.prefix.sinks.rest + since, *width))

    def __getitem__(self, key: Any) -> Tensor:
        return self.tensor()[key]

    def tensor(self) -> Tensor:
        """Made in full, in the cache's dtype, tokens in the order of their columns."""
        return getattr(self.prefix.join(self.since), self.part)

    def attend(
        self,
        queries: Sequence[Tensor],
        keys: Sequence[Stored],
        values: Sequence[Stored],
        visible: Visible,
        *,
        scale: float,
    ) -> list[Tensor]:
        """What `decode_attention` gives, of parts that are `Deferred`. Where some are tensors, or the layer has a
        window, all are made."""
        parts: list[Any] = [part.data for part in (*keys, *values)]
        if visible.window is not None or not all(isinstance(part, Deferred) for part in parts):
            made = [Stored(p.data.tensor(), p.scale) if isinstance(p.data, Deferred) else p for p in (*keys, *values)]
            return decode_attention(queries, made[: len(keys)], made[len(keys) :], visible, scale=scale)
        factored = [part.factored() for part in parts]
        return lowrank_decode(
            queries,
            factored[: len(keys)],
            factored[len(keys) :],
            self.table,
            visible,
            scale=scale,
            selection=parts[0].prefix.landmarks,
        )

    def factored(self) -> Factored:
        """As the kernel takes it."""
        factors = getattr(self.prefix, self.part).factors()
        assert factors is not None, "a slot is deferred where it has factors"
        a, b = factors
        return Factored(a, b, getattr(self.since, self.part))
