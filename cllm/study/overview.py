"""One table of a study's designs by their cache: share of bytes, parameters, loss, main numbers of suites."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cllm.counts import count_text
from cllm.evaluate.score_choice import suite_of
from cllm.evaluate.suites.registry import suites
from cllm.evaluate.tasks.suite import ALL, AS_IS, TaskSuite
from cllm.statistics import Mean
from cllm.study.summary import Row, Summary, evaluated_records
from cllm.tables import Column, markdown

_DASH = "–"
_NOTE = (
    "By falling share of mha's cache, then by loss. ±: the standard error over the seeds; with one seed, that over the "
    "samples of a suite, and none for the loss. Suites: their main number, uncompressed."
)


@dataclass(frozen=True, slots=True)
class _Value:
    """A suite's main number for one row."""

    mean: float
    error: float | None
    form: Callable[[Any], str]

    @property
    def text(self) -> str:
        return self.form(self.mean) + ("" if self.error is None else f" ± {self.error:.2g}")


def share(row: Row) -> float:
    """Resident cache of a row's design relative to mha's."""
    return row.first.content["summary"]["kv_vs_mha"]["resident"]


def overview(summary: Summary) -> list[str]:
    """The section of the report, for the largest budget that has rows; empty without a suite of samples."""
    if not summary.budgets:
        return []
    rows = sorted(summary.rows_of(summary.budgets[0]), key=lambda row: (-round(share(row), 4), row.loss.mean))
    values = _main_numbers(rows)
    if not values:
        return []
    columns = [
        Column[Row]("design", lambda row: row.label, left=True),
        Column[Row]("cache × mha", lambda row: f"{share(row):.4f}"),
        Column[Row]("parameters", lambda row: count_text(row.first.content["summary"]["parameters"])),
        Column[Row]("loss", lambda row: _loss(row.loss)),
    ]
    for label, by_row in values.items():
        columns.append(Column(label, lambda row, found=by_row: found[row.label].text if row.label in found else _DASH))  # type: ignore[misc]
    return ["## Designs by cache bytes", markdown(columns, rows), _NOTE]


def _loss(mean: Mean) -> str:
    return f"{mean.mean:.4f}" + ("" if mean.error is None else f" ± {mean.error:.4f}")


def _main_numbers(rows: list[Row]) -> dict[str, dict[str, _Value]]:
    """The main number of each suite by its label with the number's name, then by the label of the row."""
    records = evaluated_records(rows)
    found: dict[str, dict[str, _Value]] = {}
    for row in rows:
        seeds: dict[str, dict[str, tuple[dict[str, Any], TaskSuite]]] = {}
        for result in row.results:
            for record in records.get(result.name, ()):
                suite = suites().get(suite_of(record))
                if isinstance(suite, TaskSuite) and _is_main(record, suite):
                    seeds.setdefault(suite.label(record), {})[result.name] = record, suite
        for label, by_result in seeds.items():
            suite = next(iter(by_result.values()))[1]
            number = next(number for number in suite.numbers if number.key == suite.main)
            mean = Mean.of([record[suite.main] for record, _ in by_result.values()])
            alone = next(iter(by_result.values()))[0].get(f"{suite.main}_stderr")
            error = alone if mean.n == 1 else mean.error
            found.setdefault(f"{label}, {number.head}", {})[row.label] = _Value(mean.mean, error, number.form)
    return found


def _is_main(record: dict[str, Any], suite: TaskSuite) -> bool:
    """Whether a record has the suite's main number over all tasks, from an uncompressed cache."""
    if "refused" in record or record.get("task") != ALL or record.get("spec") != AS_IS:
        return False
    return isinstance(record.get(suite.main), int | float)
