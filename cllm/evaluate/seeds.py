"""A run as a row of a comparison, and runs that differ in their seed only as one row: mean and standard deviation."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One run. None is "not measured"."""

    run: str
    design: str
    parameters: int
    kv_resident: float
    """Bytes of cache for each token of the context."""
    kv_resident_vs_mha: float
    kv_read: float
    """Bytes read for each token of the context when one token is decoded."""
    kv_read_vs_mha: float
    tokens: int
    """Tokens trained on so far."""
    loss: float | None = None
    """Nats a token on the set."""
    perplexity: float | None = None
    perplexity_vs_baseline: float | None = None
    """In percent: 5 is a perplexity 5 % above the baseline's."""
    bits_per_byte: float | None = None
    tokens_per_s: float | None = None
    """Median over the training's rows."""
    source: str | None = None
    """`evaluate`: measured by evaluate.py; `training`: the last validation of the training."""
    step: int | None = None
    """Optimizer step of the loss."""
    last_step: int = 0
    """Optimizer step of the newest row of metrics."""
    steps: int = 0
    """Optimizer steps that the run was to take."""
    suites: dict[str, float] = dataclasses.field(default_factory=dict)
    """Numbers of evaluation suites other than perplexity, by `SUITE_KEY`; those that were not measured are missing."""


CONSTANTS = ("design", "parameters", "kv_resident", "kv_resident_vs_mha", "kv_read", "kv_read_vs_mha")
"""Fields of `Row` that are equal for runs that differ in their seed only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Runs that differ in their seed only. A run without such others is a group of one."""

    name: str
    """The run's name, or the beginning that the runs' names share."""
    rows: tuple[Row, ...]
    vs_baseline: float | None = None
    """Mean perplexity over the mean of the baseline's group, in percent as `Row.perplexity_vs_baseline`."""

    @classmethod
    def single(cls, row: Row) -> Group:
        """A run by itself."""
        return cls(name=row.run, rows=(row,), vs_baseline=row.perplexity_vs_baseline)

    @property
    def runs(self) -> list[str]:
        """Names of the runs."""
        return [row.run for row in self.rows]

    def mean(self, value: str | Callable[[Row], float | None]) -> float | None:
        """Mean of a field of the rows, or of a function of them; None unless all rows have it."""
        values = self._values(value)
        if len(values) == 1:  # a count stays a whole number
            return values[0]
        return statistics.fmean(values) if values else None

    def deviation(self, value: str | Callable[[Row], float | None]) -> float | None:
        """Sample standard deviation (n - 1) of the same; None for a single run, and unless all rows have it."""
        values = self._values(value)
        if not all(map(math.isfinite, values)):  # a run that diverged
            return math.nan
        return statistics.stdev(values) if len(values) > 1 else None

    def _values(self, value: str | Callable[[Row], float | None]) -> list[float]:
        found = [getattr(row, value) if isinstance(value, str) else value(row) for row in self.rows]
        return [number for number in found if number is not None] if None not in found else []


def group_name(runs: Sequence[str]) -> str:
    """The beginning that the names share, without a separator or `seed` at its end: `mha-seed1`, `mha-seed2`: `mha`.

    If they share none, all names.
    """
    if len(runs) == 1:
        return runs[0]
    shared = re.sub(r"[0-9]+$", "", os.path.commonprefix(list(runs))).rstrip("-_.")  # noqa: RUF071
    return re.sub(r"(^|[-_.]+)(seed|s)$", "", shared, flags=re.IGNORECASE) or ", ".join(runs)


def percent_above(value: float | None, base: float | None) -> float | None:
    """100 (value / base - 1); None if one of them is."""
    return None if value is None or base is None else 100 * (value / base - 1)
