"""Text generated after a compressed prefix, compared with that after the same prefix kept exact.

Decoding is greedy, one token per pass, and each cache is fed its own tokens. After the first different token the two
texts diverge, so the share of equal tokens falls faster than the loss grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cllm.posthoc.method import Engine


def greedy(engine: Engine, cache: Any, first: Tensor, n: int) -> Tensor:
    """The greedy continuation (B, n), int64, of the cached tokens and `first` (B, 1); all are added to the cache."""
    found = [first]
    for _ in range(n):
        found.append(engine.logits(found[-1], cache)[:, -1:].argmax(dim=-1))
    return torch.cat(found[1:], dim=1)


@dataclass
class Agreement:
    """Agreement of continuations, summed over sequences."""

    sequences: int = 0
    tokens: int = 0
    same: int = 0
    """Tokens equal to those of the exact continuation at the same position."""
    until: int = 0
    """Tokens before the first different one."""

    def add(self, found: Tensor, exact: Tensor) -> None:
        """Count continuations (B, n)."""
        equal = found == exact
        self.sequences += len(equal)
        self.tokens += equal.numel()
        self.same += int(equal.sum())
        self.until += int(equal.long().cumprod(dim=1).sum())

    def figures(self) -> dict[str, float]:
        """The numbers for a record; empty if nothing was generated."""
        if not self.sequences:
            return {}
        return {
            "generated_tokens": self.tokens,
            "generated_same_percent": 100 * self.same / self.tokens,
            "generated_same_until": self.until / self.sequences,
        }
