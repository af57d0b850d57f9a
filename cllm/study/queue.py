"""The points that a study asks for, by priority, and those that are left.

1. With a known rate: one seed of every variant at that rate.
2. Searches of rates, the first round of all variants first, and in it the first rate of all variants: a variant's next
   run then finds its code compiled.
3. Every variant at the rates found: its first seed, then the next.

Smaller token budgets come first in each. The list follows from the results alone, so several processes agree on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from cllm.config import Config
from cllm.errors import UserError
from cllm.runs import RunFolder
from cllm.study.layout import Layout
from cllm.study.points import Grid, Point
from cllm.study.rates import Search, search
from cllm.study.results import Result, evaluated_as, read_result
from cllm.version import EVALUATION, code_version

Work = Literal["train", "evaluate"]


class Queue:
    """The points of a grid and their results.

    Args:
        grid: the points.
        layout: the files.
        evaluation: version of the evaluation's code; by default that of this code.
    """

    def __init__(self, grid: Grid, layout: Layout, evaluation: str | None = None):
        self.grid, self.layout = grid, layout
        self.commands = grid.study.evaluate.commands()
        version = evaluation or (code_version(EVALUATION) if self.commands else "")
        self.evaluated = evaluated_as(self.commands, version) if self.commands else None
        self.marks = [evaluated_as([command], version) for command in self.commands]
        """The hash of each command and of the code, see measuring.py."""
        self._results: dict[str, tuple[int, Result]] = {}

    def result(self, point: Point) -> Result | None:
        """The result of a point; None if it has none."""
        file = self.layout.result(point)
        try:
            changed = file.stat().st_mtime_ns
        except FileNotFoundError:
            return None
        known = self._results.get(point.name)
        if known is None or known[0] != changed:
            try:
                known = changed, read_result(file)
            except UserError as error:
                raise UserError(f"{error}; delete it to train the point again") from None
            self._results[point.name] = known
        return known[1]

    def loss(self, point: Point) -> float | None:
        """The final loss of a point, infinity if it is not finite; None without a result."""
        result = self.result(point)
        if result is None:
            return None
        return math.inf if result.loss is None else result.loss

    def searches(self) -> dict[str, Search]:
        """The search of every variant by its label; empty without `rates`."""
        if self.grid.study.rates is None:
            return {}
        return {variant.label: search(self.grid, variant, self.loss) for variant in self.grid.variants}

    def wanted(self) -> list[Point]:
        """All points that are known to be needed so far, by priority, finished ones included."""
        found: dict[str, Point] = {}
        for point in self._by_priority():
            found.setdefault(point.key, point)
        return list(found.values())

    def _by_priority(self) -> Iterator[Point]:
        grid, study = self.grid, self.grid.study
        budgets = sorted(study.tokens)
        most = max(len(study.seeds_of(variant.design)) for variant in grid.variants)
        searches = self.searches()
        for tokens in budgets if study.rates is not None else ():
            for variant in grid.variants:
                assert study.rates is not None
                for known in study.rates.known_of(variant.design):
                    yield grid.point(variant, tokens, study.seeds_of(variant.design)[0], known)
        for n in range(max((len(found.rounds) for found in searches.values()), default=0)):
            parts = [(variant, part) for variant in grid.variants for part in searches[variant.label].rounds[n : n + 1]]
            for place in range(max((len(part.losses) for _, part in parts), default=0)):
                for variant, part in parts:
                    seed = study.seeds_of(variant.design)[0]
                    for rate in list(part.losses)[place : place + 1]:
                        yield grid.point(variant, part.tokens, seed, rate, search=True)
        for n in range(most):
            for tokens in budgets:
                for variant in grid.variants:
                    rates = searches[variant.label].chosen if searches else (None,)
                    for seed in study.seeds_of(variant.design)[n : n + 1]:
                        yield from (grid.point(variant, tokens, seed, rate) for rate in rates)

    @property
    def is_blocked(self) -> bool:
        """Whether further points will follow from the searches."""
        return any(not found.chosen and not found.diverged for found in self.searches().values())

    def work(self, point: Point) -> Work | None:
        """The work that is left on a point; None if it is finished."""
        result = self.result(point)
        if result is None:
            return "train"
        if not self.lacks_evaluations(point, result):
            return None
        return "evaluate" if self.layout.run(point).newest_checkpoint() is not None else None

    def lacks_evaluations(self, point: Point, result: Result) -> bool:
        """Whether a result lacks the study's evaluations by this code; they need a checkpoint of the run."""
        if point.search or self.evaluated is None or result.loss is None:
            return False
        return result.evaluated != self.evaluated

    def left(self) -> list[tuple[Point, Work]]:
        """The work that is left, by priority; that on runs which are trained already comes first."""
        found = [(point, work) for point in self.wanted() if (work := self.work(point)) is not None]
        return sorted(found, key=lambda item: item[1] != "evaluate")


def is_trained(run: RunFolder, config: Config) -> bool:
    """Whether a run was validated after its last step, or was ended by a callback, and has that step's checkpoint.

    Args:
        run: the run's folder, which may be missing.
        config: the config that it is trained with.
    """
    last = run.early_stop() or config.train.steps
    saved = config.train.checkpoint_every is None or last in dict(run.checkpoints())
    return saved and run.is_validated_at(last)
