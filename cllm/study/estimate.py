"""Tokens per second so far, and the seconds that a point takes: what a study needs to stop in time."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from cllm.rows import rows_backwards
from cllm.runs import RunFolder
from cllm.study.results import Result

STARTUP = 30.0
"""Seconds from the start of a run to its first step, until one was measured."""
_RECENT = 5
"""Number of measurements that an estimate is the median of."""


class Estimates:
    """What was measured in this process or is known from results.

    Args:
        tokens_per_second: expected speed of a run, until one is measured.
        overridden: use that speed always.
    """

    def __init__(self, tokens_per_second: float | None = None, *, overridden: bool = False):
        self._expected, self._overridden = tokens_per_second, overridden
        self._speeds: dict[str, float] = {}
        self._startups: list[float] = []
        self._evaluations: list[float] = []

    def learn(self, results: Iterable[Result]) -> None:
        """Take speeds and durations of evaluations from results, the newest last."""
        for result in sorted(results, key=lambda result: result.content["finished"]):
            if result.tokens_per_s:
                self._speeds[result.variant.design] = result.tokens_per_s
            if seconds := result.content.get("evaluation_seconds"):
                self._evaluations.append(seconds)

    def measured(self, design: str, tokens_per_s: float) -> None:
        """Record the present speed of a run of a design."""
        self._speeds[design] = tokens_per_s

    def started(self, seconds: float) -> None:
        """Record the seconds from a process's start to its first step."""
        self._startups.append(seconds)

    @property
    def startup(self) -> float:
        """Seconds from a run's start to its first step."""
        return statistics.median(self._startups[-_RECENT:]) if self._startups else STARTUP

    @property
    def evaluation(self) -> float:
        """Seconds of the evaluation of a point; 0 until one was measured."""
        return statistics.median(self._evaluations[-_RECENT:]) if self._evaluations else 0.0

    def speed(self, design: str) -> float | None:
        """Tokens per second of a run of a design: its own, else the slowest of any, else the expected one."""
        if self._overridden or not self._speeds:
            return self._expected
        return self._speeds.get(design, min(self._speeds.values()))

    def seconds(self, design: str, tokens: float, *, evaluated: bool) -> float | None:
        """Seconds of a run of `tokens` with its start, and its evaluation; None if no speed is known."""
        speed = self.speed(design)
        if speed is None:
            return None
        return self.startup + tokens / speed + (self.evaluation if evaluated else 0.0)


def progress(run: RunFolder) -> tuple[int, float | None]:
    """(tokens so far, tokens per second) by the newest rows of a run; (0, None) without rows."""
    tokens, speed = 0, None
    for n, (_, row) in enumerate(rows_backwards(run.metrics_file)):
        tokens = tokens or row.get("tokens", 0)
        speed = row.get("throughput/tokens_per_s")
        if speed is not None or n > 4:
            break
    return tokens, speed


def saved_share(run: RunFolder, steps: int) -> float:
    """The share of a run's steps that its newest checkpoint has."""
    saved = run.checkpoints()
    return min(1.0, saved[-1][0] / steps) if saved else 0.0
