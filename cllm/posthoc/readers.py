"""The layers that read a slot: the queries that meet its keys, and what becomes of its values.

Shapes: B batch, T tokens, H query heads, G KV heads, D channels of a head, M d_model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cllm.errors import UserError

_SAMPLES = 512
"""Queries of a pass that are recorded, evenly spaced. A moment of 128 channels needs some hundreds."""


@dataclass(frozen=True)
class SlotReader:
    """One layer that reads a slot's keys, its values, or both."""

    layer: int
    queries: nn.Module
    """The module whose output is the queries before RoPE: (B, T, H, D) or (B, T, H · D)."""
    output: Tensor
    """(M, H, D): the output projection W_O."""
    keys: Tensor | None
    """(1 or G, 1 or D): factors on the slot's keys in what the layer reads; None: it reads no keys of this slot."""
    values: Tensor | None
    """The same for values."""


class RecordedQueries:
    """Queries before RoPE of some layers, recorded while a cache is filled."""

    def __init__(self) -> None:
        self._passes: dict[int, list[tuple[int, Tensor]]] = {}

    @contextmanager
    def record(self, readers: Sequence[SlotReader]) -> Iterator[None]:
        """Forget what was recorded, and record the queries of `readers` in all passes inside of the context."""
        modules = {reader.layer: (reader.queries, reader.output.shape[1:]) for reader in readers}
        self._passes, handles = {layer: [] for layer in modules}, []
        for layer, (module, heads) in modules.items():

            def hook(_: nn.Module, args: tuple[Tensor, ...], q: Tensor, layer: int = layer, heads=heads) -> None:
                q = q.detach().reshape(*q.shape[:2], *heads)
                self._passes[layer].append((q.shape[1], q[:, _sampled(q.shape[1], q.device)]))

            handles.append(module.register_forward_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def clear(self) -> None:
        """Forget all queries."""
        self._passes = {}

    def of(self, layer: int, tokens: int, is_text: Tensor | None) -> tuple[Tensor, Tensor]:
        """The queries (B, n, H, D) of a layer in the prompt, and which of them count, (B, n) booleans.

        Args:
            layer: one of those recorded.
            tokens: of the prompt, which is the last that was recorded.
            is_text: (B, tokens), False for padding; None: no padding.

        Raises:
            UserError: if the prompt's passes were not recorded.
        """
        kept: list[tuple[int, Tensor]] = []
        left = tokens
        for length, q in reversed(self._passes.get(layer, [])):
            if left < length:
                break
            kept, left = [(length, q), *kept], left - length
        if not kept:
            raise UserError(
                "the queries of the prompt were not recorded: fill the cache inside of `with method.watch(engine)`, "
                "and compress it before the next one and before release()"
            )
        queries = torch.cat([q for _, q in kept], dim=1)
        # A layer above the last one that a prompt has to reach computes the last token only, which is never padding.
        if left or is_text is None:
            return queries, queries.new_ones(queries.shape[:2], dtype=torch.bool)
        firsts = [sum(length for length, _ in kept[:i]) for i in range(len(kept))]
        places = [first + _sampled(length, q.device) for first, (length, q) in zip(firsts, kept, strict=True)]
        return queries, is_text[:, torch.cat(places)]


def _sampled(length: int, device: torch.device) -> Tensor:
    """Indices of at most `_SAMPLES` evenly spaced of `length` tokens, the last one included."""
    count = min(length, _SAMPLES)
    return length - 1 - torch.arange(count, device=device).flip(0) * length // count
