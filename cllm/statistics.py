"""Means, standard errors, and paired differences with Student's t intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of a number over seeds."""

    n: int
    mean: float
    error: float | None
    """Standard error, the sample standard deviation (n - 1) over the root of n; None for one value."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """The mean of at least one value."""
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(len(values), statistics.fmean(values), error)

    @property
    def reach(self) -> float | None:
        """Half of the 95 % confidence interval of the mean, by Student's t; None for one value."""
        return None if self.error is None else t_quantile(0.5 + CONFIDENCE / 2, self.n - 1) * self.error

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval of the mean, by Student's t; None for one value."""
        return None if (reach := self.reach) is None else (self.mean - reach, self.mean + reach)


@dataclass(frozen=True, slots=True)
class Difference:
    """A design's loss minus the baseline's, paired by seed."""

    pairs: Mean | None
    """None without a seed that both have."""

    @property
    def verdict(self) -> str:
        """The conclusion that the interval allows. Lower is better."""
        if self.pairs is None:
            return "no common seed"
        if self.pairs.interval is None:
            return "one seed: no interval"
        low, high = self.pairs.interval
        if low <= 0 <= high:
            return "not distinguishable"
        return "better" if high < 0 else "worse"


def paired(design: Mapping[int, float], baseline: Mapping[int, float]) -> Difference:
    """The difference of two designs over the seeds that both have.

    Args:
        design: loss by seed.
        baseline: loss by seed.
    """
    common = sorted(design.keys() & baseline.keys())
    return Difference(Mean.of([design[seed] - baseline[seed] for seed in common]) if common else None)


def t_cdf(t: float, freedom: int) -> float:
    """The cumulative distribution of Student's t with a whole number of degrees of freedom.

    Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    cos, sin = math.cos(angle), math.sin(angle)
    total, term = 0.0, 1.0
    if freedom % 2:
        term = cos
        for k in range(1, freedom // 2 + 1):
            total += term
            term *= cos * cos * 2 * k / (2 * k + 1)
        within = 2 / math.pi * (angle + sin * total)
    else:
        for k in range(1, freedom // 2 + 1):
            total += term
            term *= cos * cos * (2 * k - 1) / (2 * k)
        within = sin * total
    return 0.5 + within / 2


def t_quantile(p: float, freedom: int) -> float:
    """The value that Student's t is below with probability `p`, 0.5 <= p < 1."""
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < p:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < p else (low, middle)
    return (low + high) / 2
