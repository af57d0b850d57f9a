"""How much context, or how many sequences, fit a budget of memory: found by arithmetic, then shown by a run.

    weights + cache + what one decoding step needs on top <= budget

Weights and cache are known to the byte. What a step needs is measured at smaller points and taken to grow with the
batch; the run at the size found measures it again, and the size is corrected until the two agree. An allocator hands
out whole pages, a tensor at a time, so that a size a little smaller may need as much: where that was still too much,
more is taken off, a thousandth of the budget and then twice as much each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from cllm.cache.accounting import cache_bytes
from cllm.cache.cache import KVCache
from cllm.model.decoder import Decoder
from decode_bench.designs import Design, Point
from decode_bench.measure import fill, free, measure_step, weight_bytes

ALIGN = 64
"""Contexts are whole multiples of this many tokens."""
LONGEST = 2**30
"""A cache that still fits at this many tokens does not grow with the context."""
TRIES = 8


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n up to `limit` with `fits(n)`, which holds up to some n and not beyond; 0 if not even for 1."""
    low, high = 0, 1
    while high < limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit)
    if high == limit and fits(limit):
        return limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def overhead(rows: Iterable[dict[str, Any]]) -> dict[int, int]:
    """{batch: most bytes that a step needed beside weights and cache}, from rows with a measured peak."""
    found: dict[int, int] = {}
    for row in rows:
        if row.get("peak_bytes") is not None:
            extra = row["peak_bytes"] - row["weight_bytes"] - row["cache_bytes"]
            found[row["batch"]] = max(extra, found.get(row["batch"], 0))
    return found


def expected_overhead(measured: dict[int, int], batch: int) -> int:
    """Bytes of a step for `batch` sequences: what was measured for as many or more, or for fewer in proportion."""
    return max((extra * max(batch, known) // known for known, extra in measured.items()), default=0)


class Search:
    """The search of one design in a budget of `budget` bytes; `measured` is `overhead` of smaller points."""

    def __init__(self, design: Design, decoder: Decoder, budget: int, measured: dict[int, int], repeat: int):
        self.design, self.decoder, self.budget, self.repeat = design, decoder, budget, repeat
        self.measured = dict(measured)
        self.weights = weight_bytes(decoder)

    def room(self, batch: int) -> int:
        """Bytes for the cache beside a step of `batch` sequences."""
        return self.budget - self.weights - expected_overhead(self.measured, batch)

    def cache(self, context: int, batch: int) -> int:
        return cache_bytes(self.design.model, context=context, batch=batch, storage=self.design.storage)

    def context(self) -> dict[str, Any]:
        """The longest context of one sequence, stepped kernel by kernel."""
        return self._search(lambda n: Point(ALIGN * n, 1), LONGEST // ALIGN, eager=True)

    def batch(self, context: int) -> dict[str, Any]:
        """The most sequences of `context` tokens, and how fast they decode."""
        return self._search(lambda n: Point(context, n), 2**20, eager=False)

    def _search(self, point_of: Callable[[int], Point], limit: int, *, eager: bool) -> dict[str, Any]:
        tried: list[dict[str, Any]] = []
        best: dict[str, Any] | None = None
        too_many = limit + 1
        margin, failed = 0, False

        def fits(n: int) -> bool:
            point = point_of(n)
            return n < too_many and self.cache(point.context, point.batch) <= self.room(point.batch)

        while len(tried) < TRIES:
            n = largest(fits, limit)
            if n == limit:
                return {"unbounded": f"the cache still fits at {point_of(limit)}"}
            point = point_of(n)
            if n == 0 or (best is not None and point <= Point(best["context"], best["batch"])):
                break
            row = self._run(point, eager)
            tried.append({"point": str(point), "used_bytes": row["used_bytes"]})
            excess = row["used_bytes"] - self.budget
            margin = max(2 * margin, excess, self.budget // 1000) if failed and excess > 0 else 0
            failed = excess > 0
            extra = row["used_bytes"] - self.weights - self.cache(point.context, point.batch)
            self.measured = {point.batch: extra + margin}
            if failed:
                too_many = n
            else:
                best = {"context": point.context, "batch": point.batch, **row}
        if best is None:
            raise RuntimeError(f"nothing fits {self.budget} bytes beside weights of {self.weights}; tried: {tried}")
        return best | {"tried": tried}

    def _run(self, point: Point, eager: bool) -> dict[str, Any]:
        """A step at `point`, and the bytes that were used: the peak, or on a CPU, where there is none, weights and
        cache."""
        free(self.decoder.embed.weight.device)
        cache = KVCache(self.design.model, max_len=point.context, storage=self.design.storage)
        fill(self.decoder, cache, point.batch)
        row = measure_step(self.decoder, cache, self.repeat, eager=eager)
        return row | {"used_bytes": row["peak_bytes"] or self.weights + cache.nbytes()}
