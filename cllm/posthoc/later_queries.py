"""The queries of tokens after a compressed prefix, recorded while they are decoded.

A cache records them in its own passes only: it begins before a pass and ends after it. What a layer computes several
times in a pass counts once, as it was computed last.

Shapes: B batch, T tokens of a pass, H query heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cllm.posthoc.readers import SlotReader
from cllm.posthoc.tensor_tree import Change
from cllm.posthoc.turns import add_hook


class LaterQueries:
    """The last queries before RoPE of the layers that read a cache's slots."""

    def __init__(self, readers: Mapping[int, Sequence[SlotReader]], last: int | None) -> None:
        """
        Args:
            readers: of each slot.
            last: queries to keep; None: those since `forget`.
        """
        self.readers, self._last = readers, last
        self._queries: dict[int, Tensor] = {}
        self._pass: dict[int, Tensor] = {}
        self._handles: list[Any] = []

    def __deepcopy__(self, memo: object) -> LaterQueries:
        """A recorder of the same model, with copies of the queries."""
        copy = LaterQueries(self.readers, self._last)
        copy._queries = {layer: q.clone() for layer, q in self._queries.items()}
        return copy

    def begin(self) -> None:
        """Record the queries of all passes until `end`."""
        self._stop()
        for reader in {reader.layer: reader for of_slot in self.readers.values() for reader in of_slot}.values():

            def record(_: nn.Module, args: tuple[Tensor, ...], q: Tensor, reader: SlotReader = reader) -> None:
                self._pass[reader.layer] = q.detach().reshape(*q.shape[:2], *reader.output.shape[1:])

            self._handles += add_hook(reader.queries, record, reader.inside)

    def end(self) -> None:
        """Keep what the pass has recorded."""
        for layer, new in self._pass.items():
            q = torch.cat((self._queries[layer], new), dim=1) if layer in self._queries else new
            self._queries[layer] = (q if self._last is None else q[:, -self._last :]).clone()
        self._stop()

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._pass = [], {}

    def forget(self) -> None:
        """Drop the queries, unless the last ones are kept."""
        if self._last is None:
            self._queries = {}

    def crop(self, tokens: int) -> None:
        """Drop the queries of the last `tokens` tokens."""
        self._queries = {layer: q[:, : max(q.shape[1] - tokens, 0)].clone() for layer, q in self._queries.items()}

    def replace(self, change: Change) -> None:
        """Replace every tensor by `change(tensor)`."""
        self._queries = {layer: change(q) for layer, q in self._queries.items()}

    def tensors(self) -> list[Tensor]:
        """The queries that a cache stores."""
        return list(self._queries.values())

    def of(self, layer: int, tokens: int) -> Tensor:
        """The queries (B, m, H, D) of a layer for the last m of `tokens` tokens."""
        return self._queries[layer][:, -tokens:]

    def consecutive(self, layer: int, tokens: int) -> int:
        """How many last tokens have a query."""
        return min(self._queries[layer].shape[1], tokens)
