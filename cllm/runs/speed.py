"""The training speed of a run."""

from __future__ import annotations

import statistics
from array import array
from collections.abc import Iterable


def median_speed(rates: Iterable[float | None]) -> float | None:
    """The median of the speeds that a run logged, without the first one, which includes compilation and warm-up.

    Args:
        rates: `throughput/tokens_per_s` of the rows of metrics, in their order; None and 0 are no measurements.

    Returns:
        Tokens a second. A single speed is returned as it is; without any, the result is None.
    """
    known = array("d", (rate for rate in rates if rate))
    return statistics.median(known[1:] or known) if known else None
