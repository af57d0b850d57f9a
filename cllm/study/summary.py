"""The results of one version as rows of designs: what a report shows, from the folder of results alone.

Results are never mixed over versions of the code, declarations of the study, or data. The version with the most
finished runs of full length is shown; the others are listed.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cllm.errors import UserError
from cllm.evaluate.score_choice import suite_of
from cllm.evaluate.suites.registry import suites
from cllm.evaluate.tasks.suite import ALL, TaskSuite
from cllm.statistics import Difference, Mean, paired
from cllm.study.busy import BusyShare
from cllm.study.curves import Crossing, Fit, crossing, fit_curve
from cllm.study.points import Grid, Point, Variant
from cllm.study.rates import Search, search
from cllm.study.results import Result
from cllm.study.schema import Study


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """A number of an evaluation."""

    suite: str
    label: str
    """The suite, the spec of post-hoc compression, and the set."""
    head: str
    form: Callable[[Any], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A variant at one token budget and one learning rate, over its seeds."""

    variant: Variant
    tokens: int
    results: tuple[Result, ...]
    """One for each seed, in the order of the seeds."""
    note: str
    """Where its learning rate comes from."""
    difference: Difference | None
    """To the baseline; None for the baseline itself."""
    fit: Fit | None
    crossing: Crossing | None
    """Of the mean curves over the seeds that it and the baseline have; None without both fits."""

    @property
    def loss(self) -> Mean:
        return Mean.of([result.loss for result in self.results if result.loss is not None])

    @property
    def first(self) -> Result:
        return self.results[0]

    @property
    def label(self) -> str:
        return self.variant.label

    def mean_of(self, value: Callable[[Result], float | None]) -> Mean | None:
        """The mean of a number over the seeds that have it; None if none has."""
        found = [number for result in self.results if (number := value(result)) is not None]
        return Mean.of(found) if found else None

    def curve(self, tag: str) -> list[tuple[float, float]]:
        """The mean over the seeds of a tag of validation, (tokens, value), where all of them have it."""
        return _mean_curve(self.results, tag)


@functools.lru_cache(maxsize=256)
def _fit(curve: tuple[tuple[float, float], ...]) -> Fit | None:
    """`fit_curve`, once for each curve: the baseline's is that of many rows."""
    return fit_curve(curve)


def _mean_curve(results: Sequence[Result], tag: str = "val/loss") -> list[tuple[float, float]]:
    values = [dict(result.curve(tag)) for result in results]
    common = sorted(set.intersection(*(set(each) for each in values))) if values else []
    return [(float(t), sum(each[t] for each in values) / len(values)) for t in common]


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """A study's results."""

    study: Study
    code: str
    rows: tuple[Row, ...]
    searches: dict[str, Search]
    """By the label of the variant; empty without a search."""
    used: tuple[Result, ...]
    """All results of the version, those of the search included."""
    others: tuple[tuple[str, Result], ...]
    """(reason, result) of results that are not used."""
    scores: tuple[tuple[Score, dict[str, Mean]], ...]
    """Numbers of evaluations, by the label of the row."""
    busy: tuple[BusyShare, ...] = ()
    """How long devices were busy; empty without files of sessions."""
    unread: tuple[str, ...] = ()
    """Files that could not be read, each with the reason."""

    def rows_of(self, tokens: int) -> list[Row]:
        """The rows of one token budget."""
        return [row for row in self.rows if row.tokens == tokens]

    @property
    def diverged(self) -> list[Result]:
        """The runs of full length without a finite loss, by name. Rows are means without them."""
        lost = [result for result in self.used if result.loss is None and not result.content["search"]]
        return sorted(lost, key=lambda result: result.name)

    @property
    def budgets(self) -> list[int]:
        """The token budgets that have rows, the largest first."""
        return sorted({row.tokens for row in self.rows}, reverse=True)


def summarise(study: Study, results: Sequence[Result], only: Sequence[str] = ()) -> Summary:
    """Put the results of a study together.

    Raises:
        UserError: if no result belongs to the study.
    """
    expected: dict[str, tuple[Grid, dict[str, Point]]] = {}
    for code in sorted({result.code for result in results}):
        grid = Grid(study, code, only)
        expected[code] = grid, {point.name: point for point in grid.all_points()}
    fitting = [result for result in results if result.name in expected[result.code][1]]
    if not fitting:
        raise UserError(f"study {study.name}: has no result of its present settings yet among {len(results)} files")
    code = max(expected, key=lambda code: _weight([r for r in fitting if r.code == code]))
    data = Counter(str(result.content["data"]) for result in fitting if result.code == code).most_common()
    main_data = min(name for name, count in data if count == data[0][1])
    used, others = [], []
    for result in results:
        if result.code != code:
            others.append(("other version of the code", result))
        elif result.name not in expected[code][1]:
            others.append(("other settings", result))
        elif str(result.content["data"]) != main_data:
            others.append(("other data", result))
        else:
            used.append(result)
    grid, _ = expected[code]
    by_name = {result.name: result for result in used}
    searches = _searches(grid, by_name)
    rows = _rows(grid, by_name, searches)
    return Summary(
        study=study,
        code=code,
        rows=tuple(rows),
        searches=searches,
        used=tuple(used),
        others=tuple(others),
        scores=tuple(_scores([row for row in rows if row.tokens == max(study.tokens)] or rows)),
    )


def _weight(results: Sequence[Result]) -> tuple[int, int, str]:
    """The rank of a version: its long runs, all its runs, the time of the last."""
    long = sum(not result.content["search"] for result in results)
    return long, len(results), max((result.content["finished"] for result in results), default="")


def _searches(grid: Grid, by_name: dict[str, Result]) -> dict[str, Search]:
    def loss(point: Point) -> float | None:
        result = by_name.get(point.name)
        return None if result is None else (math.inf if result.loss is None else result.loss)

    if grid.study.rates is None:
        return {}
    return {variant.label: search(grid, variant, loss) for variant in grid.variants}


def _rows(grid: Grid, by_name: dict[str, Result], searches: dict[str, Search]) -> list[Row]:
    rows: list[Row] = []
    for tokens in sorted(grid.study.tokens, reverse=True):
        chosen = {}
        for variant in grid.variants:
            found, note = _best(grid, variant, tokens, by_name, searches.get(variant.label))
            if found:
                chosen[variant] = found, note
        for variant, (found, note) in chosen.items():
            base = chosen.get(grid.baseline_of(variant))
            rows.append(_row(variant, tokens, found, note, None if base is None else base[0]))
    return rows


def _row(variant: Variant, tokens: int, found: list[Result], note: str, base: list[Result] | None) -> Row:
    difference = across = None
    if base is not None and base is not found:
        difference = paired(_losses(found), _losses(base))
        common = _losses(found).keys() & _losses(base).keys()
        fits = [_fit(tuple(_mean_curve([r for r in of if r.content["seed"] in common]))) for of in (found, base)]
        across = crossing(fits[0], fits[1]) if fits[0] is not None and fits[1] is not None else None
    return Row(
        variant=variant,
        tokens=tokens,
        results=tuple(found),
        note=note,
        difference=difference,
        fit=_fit(tuple(_mean_curve(found))),
        crossing=across,
    )


def _losses(results: Sequence[Result]) -> dict[int, float]:
    return {result.content["seed"]: result.loss for result in results if result.loss is not None}


def _best(
    grid: Grid, variant: Variant, tokens: int, by_name: dict[str, Result], found: Search | None
) -> tuple[list[Result], str]:
    """The results of a variant at the learning rate to show, and a note on it.

    Of the rates found and the known one it is that with the lowest loss, among those with the most seeds. While the
    search goes on, of all that it has tried.
    """

    def at(rate: float | None) -> list[Result]:
        points = [grid.point(variant, tokens, seed, rate) for seed in grid.study.seeds_of(variant.design)]
        results = (by_name.get(point.name) for point in points)
        return [result for result in results if result is not None and result.loss is not None]

    if found is None:
        return at(None), "as configured"
    assert grid.study.rates is not None
    known = grid.study.rates.known_of(variant.design)
    rates = dict.fromkeys([*found.chosen, *known, *(found.tried if found.missing else ())])
    candidates = {rate: results for rate in rates if (results := at(rate))}
    if not candidates:
        return [], ""
    most = max(map(len, candidates.values()))
    full = {rate: results for rate, results in candidates.items() if len(results) == most}
    best = min(full, key=lambda rate: Mean.of(list(_losses(full[rate]).values())).mean)
    if best in found.chosen:
        return full[best], "edge" if found.at_edge else "found"
    if best not in known:
        return full[best], "the search goes on"
    if not found.rounds:  # as many values as a search would keep
        outcome = "no search"
    elif found.diverged:
        outcome = "all rates of a round diverged"
    elif found.chosen:
        outcome = f"the search found {found.chosen[0]:g}"
    else:
        outcome = "not searched yet"
    return full[best], f"known; {outcome}"


# ---- evaluations


def evaluated_records(rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """The records of complete evaluations by the name of the result.

    Evaluations by another version of their code than most are left out.
    """
    versions = Counter(result.evaluated for row in rows for result in row.results if result.evaluated is not None)
    if not versions:
        return {}
    most = max(versions.values())
    version = min(name for name, count in versions.items() if count == most)
    results = (result for row in rows for result in row.results)
    return {result.name: result.content["evaluations"] for result in results if result.evaluated == version}


def _scores(rows: Sequence[Row]) -> list[tuple[Score, dict[str, Mean]]]:
    """The mean of each number of the evaluations over the seeds of each row."""
    records = evaluated_records(rows)
    values: dict[tuple[str, str], dict[str, dict[str, float]]] = {}  # a number for each result, that is for each seed
    scores: dict[tuple[str, str], Score] = {}
    varied = _varied_options([record for found in records.values() for record in found])
    for row in rows:
        for result in row.results:
            for record in records.get(result.name, ()):
                for score, key in _numbers(record, varied):
                    value = record.get(key)
                    if isinstance(value, int | float) and not isinstance(value, bool):
                        identity = (score.label, score.head)
                        scores.setdefault(identity, score)
                        values.setdefault(identity, {}).setdefault(row.label, {})[result.name] = value
    return [
        (scores[name], {label: Mean.of(list(numbers.values())) for label, numbers in found.items()})
        for name, found in values.items()
    ]


_OPTIONS = {
    "window": "--window",
    "stride": "--stride",
    "prefix": "--prefix",
    "max_tokens": "--max-tokens",
    "calibration": "--calibration",
}
"""Options of perplexity, alone and after a prefix, by their key in a record."""


def _label(record: dict[str, Any]) -> str:
    """The label of a record that no suite of samples made."""
    name = suite_of(record)
    measured, on = record.get("spec") or name, record.get("set")
    return measured if on in (None, name) else f"{measured}, {on}"


def _varied_options(records: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """For each label of perplexity, the keys of `_OPTIONS` with several values among its records."""
    found: dict[str, dict[str, set[Any]]] = {}
    for record in records:
        if isinstance(suites().get(suite_of(record)), TaskSuite):
            continue
        place = found.setdefault(_label(record), {key: set() for key in _OPTIONS})
        for key, values in place.items():
            values.add(record.get(key))
    return {label: [key for key, values in place.items() if len(values) > 1] for label, place in found.items()}


def _numbers(record: dict[str, Any], varied: dict[str, list[str]]) -> list[tuple[Score, str]]:
    """The numbers of a record, with their keys; none for one of refused specs or a single task of a suite of samples.

    Args:
        varied: the options of perplexity that belong into a label, because records with it differ in them.
    """
    if "refused" in record:
        return []
    name = suite_of(record)
    suite = suites().get(name)
    if isinstance(suite, TaskSuite):
        if record["task"] != ALL:
            return []
        label = suite.label(record)
    else:
        label = _label(record)
        label += "".join(f", {_OPTIONS[key]} {record.get(key)}" for key in varied.get(label, ()))
    if suite is None:
        return [(Score(suite=name, label=label, head="loss", form="{:.4f}".format), "loss")]
    return [(Score(suite=name, label=label, head=n.head, form=n.form), n.key) for n in suite.numbers]
