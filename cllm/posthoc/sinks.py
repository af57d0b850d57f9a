"""Attention sinks: the first tokens of every sequence, which get much attention whatever they are (StreamingLLM,
arXiv 2309.17453). They are few, and their keys and values are unlike all others, so a code fitted to all tokens
approximates them badly.

Therefore the first tokens of a prefix are stored exactly, and a method gets the others. The sinks are stored in one
tensor with the tokens after the prefix, in front of them. Attention does not depend on the order of its tokens, so a
kernel reads the compressed tokens first, then this exact stretch:

    column of the cache     0 1 2 3 | 4 5 6 7 8 9 | 10 11      sinks | compressed | later
    as a kernel reads it    4 5 6 7 8 9 | 0 1 2 3 | 10 11      compressed | sinks | later

Later tokens keep their columns. The sinks of a padded sequence are its first tokens after the padding. If tokens were
evicted from a slot, S counts those that are left. They have no gaps between them: the last one is before the first
later token, and a sequence with too few tokens begins with as much padding as it takes (`eviction.py`).

Shapes: B batch, S stored tokens of the prefix, s sinks, T later tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.cache.slot import Slot
from cllm.posthoc.tensor_tree import TensorTree


@dataclass(frozen=True)
class Sinks(TensorTree):
    """Which tokens of a prefix are sinks."""

    count: int
    """Number of sinks, s, at most `length`."""
    length: int
    """Stored tokens of the prefix, S."""
    starts: Tensor | None
    """(B,) columns of padding before each sequence, the cache's own tensor; None: no padding. A sequence of fewer than
    s tokens has all of them among its sinks, after padding."""
    evicted: int = 0
    """Tokens of the prefix that are no longer stored, padding included."""

    @property
    def tokens(self) -> int:
        """Tokens of the prefix, evicted ones included."""
        return self.length + self.evicted

    @property
    def before_tail(self) -> int:
        """Tokens of the prefix that are not stored with the tokens after it: all but the sinks."""
        return self.tokens - self.count

    @property
    def rest(self) -> int:
        """Number of stored tokens that are not sinks, S - s."""
        return self.length - self.count

    def of(self, x: Tensor) -> Tensor:
        """(B, s, ...): the sinks of `x` (B, S, ...), a copy."""
        if self.starts is None:
            return x[:, : self.count].clone()
        return _rows(x, self.first(x.device) + torch.arange(self.count, device=x.device))

    def without(self, x: Tensor) -> Tensor:
        """(B, S - s, ...): the other tokens of `x` (B, S, ...), in order; a view if there is no padding."""
        if self.starts is None or not self.count:
            return x[:, self.count :]
        columns = torch.arange(self.rest, device=x.device)
        return _rows(x, columns + self.count * (columns >= self.first(x.device)))

    def join(self, rest: Slot, exact: Slot) -> Slot:
        """All tokens, (B, S + T, ...) each, in the order of their columns.

        Args:
            rest: the compressed tokens (B, S - s, ...).
            exact: the sinks, then the later tokens, (B, s + T, ...).
        """
        if self.starts is None and self.count:  # in one copy
            k, v = (
                torch.cat((e[:, : self.count], r, e[:, self.count :]), 1)
                for e, r in zip(exact[:2], rest[:2], strict=True)
            )
            return Slot(k, v)
        joined = rest.join(exact)
        if self.starts is None or not self.count:
            return joined
        columns, first = torch.arange(joined.k.shape[1], device=joined.k.device), self.first(joined.k.device)
        moved = torch.where(columns < first + self.count, columns - first + self.rest, columns - self.count)
        indices = torch.where((columns < first) | (columns >= self.length), columns, moved)
        return joined.map(lambda t: _rows(t, indices))

    def first(self, device: torch.device) -> Tensor:
        """(B, 1), or (1, 1) without padding: the index of the first sink among the stored tokens."""
        if self.starts is None:
            return torch.zeros(1, 1, dtype=torch.long, device=device)
        return (self.starts[:, None] - self.evicted).clamp(min=0, max=self.rest)


def _rows(x: Tensor, indices: Tensor) -> Tensor:
    """(B, n, ...): the tokens of `x` (B, m, ...) at `indices` (B, n)."""
    return x[torch.arange(len(x), device=x.device)[:, None], indices]
