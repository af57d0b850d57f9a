"""The search of a learning rate, as a function of results.

Nothing is stored: the outcome follows from the losses of the points, so it is never computed twice from other data, and
a study that goes on finds its search where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cllm.study.points import Grid, Point, Variant

LossOf = Callable[[Point], float | None]
"""The final validation loss of a point; None: it has no result yet."""


@dataclass(frozen=True, slots=True)
class Round:
    """One round of a search."""

    tokens: int
    losses: dict[float, float | None]
    """The loss at each learning rate; None: not finished."""


@dataclass(frozen=True, slots=True)
class Search:
    """The search of one variant so far."""

    rounds: tuple[Round, ...]
    """The last round may be unfinished; later ones are not listed."""
    chosen: tuple[float, ...]
    """The rates that are kept, the best first; empty until the last round is finished, and if all of one diverged."""
    missing: tuple[Point, ...]
    """Points of the last listed round without a result."""

    @property
    def diverged(self) -> bool:
        """Whether every rate of a round diverged, so that the search has ended without one."""
        return bool(self.rounds) and not self.chosen and not self.missing

    @property
    def tried(self) -> list[float]:
        """The rates of all rounds."""
        return _tried(self.rounds)

    @property
    def at_edge(self) -> bool:
        """Whether the best rate is the smallest or largest of several, so that a better one may lie outside."""
        values = self.tried
        return len(values) > 1 and bool(self.chosen) and self.chosen[0] in (min(values), max(values))


def _tried(rounds: Sequence[Round]) -> list[float]:
    return list(dict.fromkeys(rate for part in rounds for rate in part.losses))


def search(grid: Grid, variant: Variant, loss_of: LossOf) -> Search:
    """The search of a variant's rate, as far as there are results. Of rates with equal losses the first is better.

    A rate with a loss that is not finite is not kept, even if fewer are left than would be.

    With as many values as are kept there is nothing to search, and no round.

    While the best rate is at the edge of those tried, the next one beyond it is a round of its own, with the tokens of
    the last: at most `extend` of them.
    """
    assert grid.study.rates is not None
    halving = grid.study.rates.search_of(variant.design)
    if not halving.sizes:
        return Search((), tuple(halving.values), ())
    seed = grid.study.seeds_of(variant.design)[0]
    left = list(halving.values)
    counts = [*halving.sizes[1:], halving.keep]
    rounds, finite = list[Round](), dict[float, float]()
    for tokens, count in zip(halving.budgets, counts, strict=True):
        points = {rate: grid.point(variant, tokens, seed, rate, search=True) for rate in left}
        losses = {rate: loss_of(point) for rate, point in points.items()}
        rounds.append(Round(tokens, losses))
        missing = tuple(point for rate, point in points.items() if losses[rate] is None)
        if missing:
            return Search(tuple(rounds), (), missing)
        finite = {rate: loss for rate, loss in losses.items() if loss is not None and math.isfinite(loss)}
        left = sorted(finite, key=finite.__getitem__)[:count]
        if not left:
            break
    for _ in range(halving.extend if left else 0):
        beyond = halving.beyond(_tried(rounds), left[0])
        if beyond is None:
            break
        point = grid.point(variant, halving.tokens, seed, beyond, search=True)
        loss = loss_of(point)
        rounds.append(Round(halving.tokens, {beyond: loss}))
        if loss is None:
            return Search(tuple(rounds), (), (point,))
        if math.isfinite(loss):
            finite[beyond] = loss
            left = sorted(finite, key=finite.__getitem__)[: halving.keep]
    return Search(tuple(rounds), tuple(left), ())
