"""Learning curves fitted by L(t) = E + A / t^b, t in tokens, and where two of them cross.

For a given b the best E and A are those of a linear regression, so b is searched on a grid. Uncertainty is that of a
bootstrap of residuals with a fixed seed: the same results give the same numbers. Curves with as many points get the
same draws, because validations are on the same text: what is high in one is often high in the other.

A curve within one run is not the curve of runs of different lengths: the learning rate falls towards its end. So a
crossing is predicted for such curves, and says little about runs with another schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_EXPONENTS = np.geomspace(0.03, 3.0, 400)
_DRAWS = 2000
"""With 200, one crossing of trained designs had an upper end that moved by 20 % with the seed; with 2,000, by 8 %."""
LEAST = 6
"""Least points of a fit."""
SKIPPED = 0.1
"""Share of a run at its beginning that is not fitted: warm-up and the first fall."""
HORIZON = 100.0
"""Crossings are searched up to this multiple of the tokens so far."""
_QUANTILES = (0.05, 0.95)
_ENOUGH = 0.9
"""Share of the draws that must cross for a crossing to be reported."""


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted curve, and fits of resampled data."""

    parameters: tuple[float, float, float]
    """E in nats per token, A, b."""
    draws: Array
    """(draws, 3), the same for resampled residuals."""
    last: float
    """Tokens of the last point."""

    def interval(self, n: int) -> tuple[float, float]:
        """The 90 % interval of the n-th parameter."""
        low, high = np.quantile(self.draws[:, n], _QUANTILES)
        return float(low), float(high)

    def at(self, tokens: float) -> float:
        """The fitted loss after a number of tokens."""
        e, a, b = self.parameters
        return e + a / tokens**b


@dataclass(frozen=True, slots=True)
class Crossing:
    """Where two fitted curves are predicted to cross, beyond the last point."""

    tokens: float | None
    """None: they do not cross up to `HORIZON` times the tokens so far, or not clearly."""
    interval: tuple[float, float] | None = None
    """90 % of the draws."""

    @property
    def text(self) -> str:
        """`about 1.2e+09 tokens (8e+08 to 3e+09)`."""
        if self.tokens is None or self.interval is None:
            return "no crossing predicted"
        low, high = self.interval
        return f"about {self.tokens:.2g} tokens ({low:.2g} to {high:.2g})"


def fit_curve(points: Sequence[tuple[float, float]], seed: int = 0) -> Fit | None:
    """Fit a learning curve of (tokens, loss); None with fewer than `LEAST` points after the first tenth."""
    used = sorted(point for point in points if points and point[0] > SKIPPED * max(t for t, _ in points))
    if len(used) < LEAST:
        return None
    tokens, losses = (np.array(column, dtype=np.float64) for column in zip(*used, strict=True))
    scale = float(tokens[-1])
    best = _least_squares(tokens / scale, losses[None, :])[0]
    fitted = best[0] + best[1] * (tokens / scale) ** -best[2]
    residuals = (losses - fitted) * np.sqrt(len(used) / (len(used) - 3))  # three parameters make them too small
    generator = np.random.default_rng(seed)
    resampled = fitted + generator.choice(residuals, size=(_DRAWS, len(used)))
    draws = _least_squares(tokens / scale, resampled)
    in_tokens = draws.copy()
    in_tokens[:, 1] *= scale ** draws[:, 2]
    e, a, b = (float(value) for value in best)
    return Fit((e, a * scale**b, b), in_tokens, scale)


def _least_squares(t: Array, losses: Array) -> Array:
    """The best (E, A, b) for each row of `losses` (rows, points) at times `t` (points), with E and A not negative."""
    basis = t[None, :] ** -_EXPONENTS[:, None]  # exponents, points
    mean, basis_mean = losses.mean(axis=1, keepdims=True), basis.mean(axis=1, keepdims=True)
    slope, wrong = _regression(losses - mean, basis - basis_mean)  # rows, exponents
    level = mean - slope * basis_mean.T
    through_zero = level < 0  # then E is 0, and A alone is fitted
    alone, wrong_alone = _regression(losses, basis)
    slope, level = np.where(through_zero, alone, slope), np.where(through_zero, 0.0, level)
    best = np.where(through_zero, wrong_alone, wrong).argmin(axis=1)
    rows = np.arange(len(losses))
    return np.stack([level[rows, best], slope[rows, best], _EXPONENTS[best]], axis=1)


def _regression(y: Array, x: Array) -> tuple[Array, Array]:
    """The best factor of each row of `x` for each row of `y`, not negative, and the sum of squared errors."""
    products, squares = y @ x.T, (x**2).sum(axis=1)
    factor = np.maximum(products / squares, 0.0)
    return factor, (y**2).sum(axis=1, keepdims=True) - 2 * factor * products + factor**2 * squares


def crossing(design: Fit, baseline: Fit) -> Crossing:
    """Where the curve of a design crosses the baseline's beyond the last point of both."""
    last = max(design.last, baseline.last)
    times = np.geomspace(last, HORIZON * last, 2000)
    best = _first_change(np.array([design.parameters]), np.array([baseline.parameters]), times)[0]
    draws = _first_change(design.draws, baseline.draws, times)
    crossed = draws[np.isfinite(draws)]
    if not np.isfinite(best) or len(crossed) < _ENOUGH * len(draws):
        return Crossing(None)
    low, high = np.quantile(crossed, _QUANTILES)
    return Crossing(float(best), (float(low), float(high)))


def _first_change(one: Array, other: Array, times: Array) -> Array:
    """The first of `times` after which the difference of two curves changes its sign, for each row; NaN if none."""

    def values(parameters: Array) -> Array:
        e, a, b = (parameters[:, n, None] for n in range(3))
        return e + a * times[None, :] ** -b

    sign = np.sign(values(one) - values(other))
    changed = sign != sign[:, :1]
    first = changed.argmax(axis=1)
    return np.where(changed.any(axis=1), times[first], np.nan)
