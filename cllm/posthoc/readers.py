"""The layers that read a slot: the queries that meet its keys, and what becomes of its values.

Shapes: B batch, T tokens, H query heads, G KV heads, D channels of a head, M d_model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cllm.errors import UserError
from cllm.posthoc.turns import add_hook

WINDOW = 256
"""Last queries of a prompt that are recorded. A second moment of 128 channels needs some hundreds."""


ALL = 2**40
"""More queries than any prompt has."""


def not_recorded(user: str) -> str:
    """The error of `user`, an option or a method, if no queries were recorded."""
    return (
        f"{user}: the queries of the prompt were not recorded: fill the cache inside of `with method.watch(engine)`, "
        "and compress it before release()"
    )


NOT_RECORDED = not_recorded("weight=queries")


@dataclass(frozen=True)
class SlotReader:
    """One layer that reads a slot's keys, its values, or both."""

    layer: int
    queries: nn.Module
    """The module whose output is the queries before RoPE: (B, T, H, D) or (B, T, H · D)."""
    stream: nn.Module
    """The module whose first argument is the residual stream (B, T, M) after attention: the norm of the MLP."""
    output: Tensor
    """(M, H, D): the output projection W_O."""
    keys: Tensor | None
    """(1 or G, 1 or D): factors on the slot's keys in what the layer reads; None: it reads no keys of this slot."""
    values: Tensor | None
    """The same for values."""
    inside: nn.Module | None = None
    """The layer itself, if other layers share its modules."""


class RecordedQueries:
    """The last queries before RoPE of some layers, recorded while a cache is filled. They stand for those to come."""

    def __init__(self, last: int | None = WINDOW, user: str = "weight=queries") -> None:
        """
        Args:
            last: queries to keep; None: all of the prompt.
            user: the option or method that errors name.
        """
        self._last, self._user = ALL if last is None else last, user
        self._queries: dict[int, Tensor] = {}
        self._streams: dict[int, Tensor] = {}
        self._sizes: dict[int, list[int]] = {}

    @contextmanager
    def record(self, readers: Mapping[int, Sequence[SlotReader]]) -> Iterator[None]:
        """Forget what was recorded, and record the queries of the readers of each slot in all passes inside of the
        context."""
        self.clear()
        handles = []
        for reader in {reader.layer: reader for of_slot in readers.values() for reader in of_slot}.values():

            def add(_: nn.Module, args: tuple[Tensor, ...], q: Tensor, reader: SlotReader = reader) -> None:
                new = q.detach().reshape(*q.shape[:2], *reader.output.shape[1:])[:, -self._last :]
                self._queries[reader.layer] = self._after(self._queries.get(reader.layer), new).clone()
                self._sizes.setdefault(reader.layer, []).append(q.shape[1])

            def measure(_: nn.Module, args: tuple[Tensor, ...], layer: int = reader.layer) -> None:
                new = args[0].detach()[:, -self._last :].float().square().sum(-1)
                self._streams[layer] = self._after(self._streams.get(layer), new)

            handles += add_hook(reader.queries, add, reader.inside)
            handles += add_hook(reader.stream, measure, reader.inside, before=True)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _after(self, before: Tensor | None, new: Tensor) -> Tensor:
        """The last tokens (B, m, ...) of two passes, one after the other."""
        if before is None or len(before) != len(new) or new.shape[1] >= self._last:
            return new
        return torch.cat((before, new), dim=1)[:, -self._last :]

    def clear(self) -> None:
        """Forget everything."""
        self._queries, self._streams, self._sizes = {}, {}, {}

    def of(self, layer: int, tokens: int) -> Tensor:
        """The queries (B, m, H, D) of a layer for the last m of the prompt's `tokens` tokens.

        Raises:
            UserError: if no queries were recorded.
        """
        if layer not in self._queries:
            raise UserError(not_recorded(self._user))
        return self._queries[layer][:, -self._consecutive(layer, tokens) :]

    def _consecutive(self, layer: int, tokens: int) -> int:
        """How many of the last recorded queries of a layer are those of the last tokens, one after another.

        All of them, if as many were computed as the prompt has tokens. A layer that is computed several times has them
        in its last pass.
        """
        sizes = self._sizes.get(layer, [1])
        return tokens if sum(sizes) == tokens else min(sizes[-1], tokens)

    def streams(self, layer: int, tokens: int) -> Tensor:
        """(B, m) fp32: the squared length of the residual stream after attention, for the same tokens as `of`."""
        m = self.of(layer, tokens).shape[1]
        return self._streams[layer][:, -m:]
