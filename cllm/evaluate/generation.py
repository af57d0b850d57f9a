"""What a model writes after a compressed prefix, beside what it writes after the same prefix kept exact.

Greedy decoding, one token a pass, each cache fed what was chosen from it: after the first token that differs the two
texts go their own ways, so the share of equal tokens falls faster than any loss grows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cllm.posthoc.method import Engine


def greedy(engine: Engine, cache: Any, first: Tensor, n: int) -> Tensor:
    """The likeliest continuation (B, n) int64 of what `cache` holds and `first` (B, 1); both go into the cache."""
    found = [first]
    for _ in range(n):
        found.append(engine.logits(found[-1], cache)[:, -1:].argmax(dim=-1))
    return torch.cat(found[1:], dim=1)


@dataclass
class Agreement:
    """Sums over sequences."""

    sequences: int = 0
    tokens: int = 0
    same: int = 0
    """Tokens that are those of the exact continuation at the same place."""
    until: int = 0
    """Tokens before the first that differs."""

    def add(self, found: Tensor, exact: Tensor) -> None:
        """Count continuations (B, n)."""
        equal = found == exact
        self.sequences += len(equal)
        self.tokens += equal.numel()
        self.same += int(equal.sum())
        self.until += int(equal.long().cumprod(dim=1).sum())

    def figures(self) -> dict[str, float]:
        """What a record says; nothing where nothing was generated."""
        if not self.sequences:
            return {}
        return {
            "generated_tokens": self.tokens,
            "generated_same_percent": 100 * self.same / self.tokens,
            "generated_same_until": self.until / self.sequences,
        }
