"""The longest context, or the largest batch, that fits a memory budget: computed first, then confirmed by a run.

    weights + cache + overhead of one decoding step <= budget

Weights and cache are known to the byte. The overhead of a step is measured at smaller points and assumed to grow with
the batch. A run at the computed size measures the overhead again, and the size is corrected until both agree. An
allocator rounds each tensor up to pages, so a slightly smaller size may need as much memory. If a corrected size still
does not fit, a margin is subtracted: a thousandth of the budget, doubled each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.decode.designs import Design, Point
from benchmarks.decode.measure import fill, measure_step, weight_bytes
from benchmarks.timing import free
from cllm.cache.accounting import cache_bytes
from cllm.cache.cache import KVCache
from cllm.model.decoder import Decoder

ALIGN = 64
"""Contexts are multiples of this many tokens."""
LONGEST = 2**30
"""A cache that still fits at this many tokens does not grow with the context."""
TRIES = 8
"""Most runs of one search."""


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n up to `limit` for which `fits(n)` is true; 0 if `fits(1)` is false. `fits` must be monotonic."""
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
    """{batch: most bytes that a step needed besides weights and cache}, from rows with a measured peak."""
    most: dict[int, int] = {}
    for row in rows:
        if row.get("peak_bytes") is not None:
            extra = row["peak_bytes"] - row["weight_bytes"] - row["cache_bytes"]
            most[row["batch"]] = max(extra, most.get(row["batch"], 0))
    return most


def expected_overhead(measured: dict[int, int], batch: int) -> int:
    """Bytes of a step of `batch` sequences: the largest measurement, those of smaller batches scaled up to `batch`."""
    return max((extra * max(batch, known) // known for known, extra in measured.items()), default=0)


class Search:
    """Searches for one design in `budget` bytes; `measured` is the `overhead` at smaller points."""

    def __init__(self, design: Design, decoder: Decoder, budget: int, measured: dict[int, int], repeat: int):
        self.design, self.decoder, self.budget, self.repeat = design, decoder, budget, repeat
        self.measured = dict(measured)
        self.weights = weight_bytes(decoder)

    def room(self, batch: int) -> int:
        """Bytes left for the cache when a step has `batch` sequences."""
        return self.budget - self.weights - expected_overhead(self.measured, batch)

    def cache(self, context: int, batch: int) -> int:
        return cache_bytes(self.design.model, context=context, batch=batch, storage=self.design.storage)

    def context(self) -> dict[str, Any]:
        """The longest context of one sequence; its step is not recorded as a CUDA graph."""
        return self._search(lambda n: Point(ALIGN * n, 1), LONGEST // ALIGN, eager=True)

    def batch(self, context: int) -> dict[str, Any]:
        """The largest batch of sequences of `context` tokens, and its step."""
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
        """A step at `point`, and the bytes in use: the peak on a GPU, weights and cache on a CPU."""
        free(self.decoder.embed.weight.device)
        cache = KVCache(self.design.model, max_len=point.context, storage=self.design.storage)
        fill(self.decoder, cache, point.batch)
        row = measure_step(self.decoder, cache, self.repeat, eager=eager)
        return row | {"used_bytes": row["peak_bytes"] or self.weights + cache.nbytes()}
