"""Look-ups of measurements by design: changes of the loss under one set of conditions, and decode steps."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from cllm.planner.conditions import Conditions
from cllm.planner.gpus import GPUS
from cllm.planner.table import DecodeStep, LossChange, Table
from cllm.section import Section

_EQUAL_RATIOS = 0.1
"""Measurements of one compression belong together if their ratios differ by at most this share."""


class Estimate(Section):
    """A loss change and how far it can be trusted."""

    value: float
    low: float | None
    """Least end of the 95 % confidence intervals of all measurements; None with one measurement of one seed."""
    high: float | None
    measurements: list[LossChange]
    """Those of the design or compression; the first one gave `value`."""


def estimate(found: Sequence[LossChange]) -> Estimate | None:
    """The first measurement of those under one set of conditions, with the range over all at about its ratio of bytes;
    None without any."""
    if not found:
        return None
    ordered = [m for m in found if _have_equal_bytes(m, found[0])]
    alone = len(ordered) == 1 and ordered[0].standard_error is None
    low = None if alone else min(m.loss_change - m.reach for m in ordered)
    high = None if alone else max(m.loss_change + m.reach for m in ordered)
    return Estimate(value=ordered[0].loss_change, low=low, high=high, measurements=ordered)


def _have_equal_bytes(one: LossChange, other: LossChange) -> bool:
    if one.ratio is None or other.ratio is None:
        return True
    return math.isclose(one.ratio, other.ratio, rel_tol=_EQUAL_RATIOS)


class Measurements:
    """Tables, by design.

    Args:
        tables: of equal measurements those of the first table come first.
        conditions: losses that were measured under others are left out.
    """

    def __init__(self, tables: Sequence[Table], conditions: Conditions):
        self.conditions = conditions
        self._losses: dict[str, dict[str | None, list[LossChange]]] = {}
        self._others: dict[str, list[LossChange]] = {}
        for change in (change for table in tables for change in table.losses):
            if (key := change.key) is None:
                continue
            if conditions.include(change):
                self._losses.setdefault(key, {}).setdefault(change.spec, []).append(change)
            else:
                self._others.setdefault(key, []).append(change)
        self._steps = [(step.key, step) for table in tables for step in table.decode]

    def design(self, key: str | None) -> Estimate | None:
        """The change of a design's loss against mha."""
        return estimate(self._losses.get(key, {}).get(None, [])) if key else None

    def compressions(self, key: str | None) -> dict[str, Estimate]:
        """The changes by compression, measured on this design."""
        found = self._losses.get(key, {}) if key else {}
        return {spec: e for spec, m in found.items() if spec is not None and (e := estimate(m)) is not None}

    def others(self, keys: Collection[str | None]) -> list[LossChange]:
        """The losses of these designs that were measured under other conditions."""
        return [change for key, found in self._others.items() if key in keys for change in found]

    def specs(self) -> set[str]:
        """Every compression with a measurement under the conditions, whatever the design."""
        return {spec for found in self._losses.values() for spec in found if spec is not None}

    def decode_factor(
        self, key: str | None, gpu: Sequence[str], bound_s: float
    ) -> tuple[float, DecodeStep, bool] | None:
        """Measured seconds of a step over bytes / the data sheet's bandwidth, of the step with the nearest bound.

        Steps of the same GPU come before others, and then steps of the same plan. Bounds are compared in seconds,
        because what a step takes beyond its bound is mostly a constant time.

        Args:
            key: of the plan.
            gpu: the names that its driver reports; empty: not known.
            bound_s: the seconds that reading takes at the data sheet's bandwidth.

        Returns:
            The factor, the step it is from, and whether GPU and plan are those asked for; None without any steps.
        """
        bandwidth = {name: g.bandwidth for g in GPUS.values() for name in g.reported}
        known = [(k, step) for k, step in self._steps if step.gpu in bandwidth]
        if not known:
            return None

        def distance(pair: tuple[str | None, DecodeStep]) -> tuple[bool, bool, float]:
            other, step = pair
            return (
                step.gpu not in gpu,
                key is None or other != key,
                abs(math.log(step.bytes_read / bandwidth[step.gpu] / bound_s)),
            )

        other, step = min(known, key=distance)
        exact = step.gpu in gpu and key is not None and other == key
        return step.step_s * bandwidth[step.gpu] / step.bytes_read, step, exact
