"""The rounds of a search of learning rates by successive halving (Jamieson and Talwalkar, arXiv 1502.07943)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Halving:
    """The search of one design's learning rate by successive halving.

    Every round trains the values that are left, on twice as many tokens as the round before, and keeps the better half.
    """

    values: Sequence[float]
    """Learning rates of the first round."""
    tokens: int
    """Tokens of a run in the last round."""
    keep: int
    """Number of rates that are left."""
    extend: int = 0
    """Most rates that are added beyond the values."""

    @property
    def sizes(self) -> list[int]:
        """The number of rates in each round: halved, rounded up, until `keep` are left; with `keep` values none."""
        found = [len(self.values)] if len(self.values) > self.keep else []
        while found and -(-found[-1] // 2) > self.keep:
            found.append(-(-found[-1] // 2))
        return found

    @property
    def budgets(self) -> list[int]:
        """Tokens of a run in each round: `tokens` in the last, half as many in the round before it."""
        n = len(self.sizes)
        return [max(1, self.tokens >> (n - 1 - i)) for i in range(n)]

    def beyond(self, tried: Iterable[float], best: float) -> float | None:
        """The rate to try next if the best of those tried is the smallest or largest, by the ratio to its neighbour."""
        known = sorted(tried)
        if best not in (known[0], known[-1]) or len(known) < 2:
            return None
        return float(f"{best * best / known[1 if best == known[0] else -2]:.6g}")

    @property
    def reachable(self) -> list[float]:
        """The values, and all rates that the search may add to them."""
        found = list(self.values)
        for edge in (min, max) if self.sizes else ():
            tried = list(self.values)
            for _ in range(self.extend):
                if (rate := self.beyond(tried, edge(tried))) is not None:
                    tried.append(rate)
            found += tried[len(self.values) :]
        return found
