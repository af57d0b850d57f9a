"""Attention sinks: the first tokens of every sequence, which get much attention whatever they say (StreamingLLM,
arXiv 2309.17453). Their keys and values are few and unlike all others: a code that is fitted to all tokens loses them.

The first tokens of a prefix are therefore stored exactly, and a method gets the others. The sinks are stored in one
tensor with the tokens after the prefix, before them. Attention does not depend on the order of its tokens, so a kernel
reads the compressed tokens first, then this exact stretch:

    column of the cache     0 1 2 3 | 4 5 6 7 8 9 | 10 11      sinks | compressed | since
    as a kernel reads it    4 5 6 7 8 9 | 0 1 2 3 | 10 11      compressed | sinks | since

Tokens since keep their columns. Of a padded sequence the sinks are its first tokens that are no padding.

Shapes: B batch, S tokens of the prefix, s sinks, T tokens since.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.cache.slot import Slot
from cllm.posthoc.held import Held


@dataclass(frozen=True)
class Sinks(Held):
    """Which tokens of a prefix are sinks."""

    count: int
    """s, at most `length`."""
    length: int
    """S."""
    starts: Tensor | None
    """(B,) columns of padding before each sequence; None: there are none. The cache's own tensor. A sequence of fewer
    tokens than s has all of them among its sinks, with padding before."""

    @property
    def rest(self) -> int:
        """Tokens that are no sinks, S - s."""
        return self.length - self.count

    def of(self, x: Tensor) -> Tensor:
        """(B, s, ...): the sinks of `x` (B, S, ...), a copy."""
        if self.starts is None:
            return x[:, : self.count].clone()
        return _rows(x, self._first() + torch.arange(self.count, device=x.device))

    def without(self, x: Tensor) -> Tensor:
        """(B, S - s, ...): the other tokens of `x` (B, S, ...), in order; a view where there is no padding."""
        if self.starts is None or not self.count:
            return x[:, self.count :]
        columns = torch.arange(self.rest, device=x.device)
        return _rows(x, columns + self.count * (columns >= self._first()))

    def join(self, rest: Slot, since: Slot) -> Slot:
        """All tokens in the order of their columns, (B, S + T, ...) each, of the compressed ones `rest` (B, S - s, ...)
        and the exact ones `since` (B, s + T, ...), sinks first."""
        if self.starts is None:
            sinks, later = since.map(lambda t: t[:, : self.count]), since.map(lambda t: t[:, self.count :])
            return sinks.join(rest).join(later) if self.count else rest.join(since)
        joined = rest.join(since)
        if not self.count:
            return joined
        columns, first = torch.arange(joined.k.shape[1], device=joined.k.device), self._first()
        moved = torch.where(columns < first + self.count, columns - first + self.rest, columns - self.count)
        places = torch.where((columns < first) | (columns >= self.length), columns, moved)
        return joined.map(lambda t: _rows(t, places))

    def _first(self) -> Tensor:
        """(B, 1): the column of the first sink."""
        assert self.starts is not None
        return self.starts[:, None].clamp(max=self.rest)


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """(B, n, ...): the tokens of `x` (B, m, ...) at `places` (B, n)."""
    return x[torch.arange(len(x), device=x.device)[:, None], places]
