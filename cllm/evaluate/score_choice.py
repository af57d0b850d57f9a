"""The number that `--score` names: `SUITE[:TASK][/NUMBER]`, and its value in a record.

copying                       the main number of a suite, the mean over its tasks
ruler/score                   another number of it
copying:distance=512/loss     a number of one task
ruler:length=4096             the mean over tasks of the evaluation with this option; ruler:vt,length=4096: one task
lm_eval:hellaswag/acc_norm    a metric of one of lm-evaluation-harness's tasks
perplexity/ar_loss            a number of the perplexity evaluation
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from cllm.errors import UserError, nearest
from cllm.evaluate.suites.registry import DEFAULT, suites
from cllm.evaluate.suites.suite import Number, Record, Suite
from cllm.evaluate.tasks.suite import ALL

_ERROR = "_stderr"
_LOWER_IS_BETTER = ("perplexity", "bits_per_byte", "loss", "brier", "ter", "mse", "nll")
"""Parts of the names of lm-eval's metrics that are better if they are lower."""


class Value(NamedTuple):
    """A number of a record."""

    value: float
    error: float | None = None
    """Standard error; None: unknown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreChoice:
    """A number of a suite."""

    suite: Suite
    number: Number
    """Its head does not name the suite."""
    task: str | None = None
    """One task, options such as `length=4096`, or `TASK,OPTION=VALUE`; None: the mean over tasks, or with
    `Suite.has_any_metric` the only task there is."""

    @property
    def name(self) -> str:
        """In files with full precision: `SUITE_KEY`, or `SUITE_TASK_KEY`."""
        return "_".join(part for part in (self.suite.name, self.task, self.number.key) if part)

    @property
    def text(self) -> str:
        """As a user may write it: `SUITE:TASK/NUMBER`."""
        return f"{self.suite.name}{'' if self.task is None else f':{self.task}'}/{self.number.key}"

    @property
    def head(self) -> str:
        """Above its column: `copying distance=512, accuracy %`."""
        if self.suite.named_by_number:
            return self.number.head
        where = self.suite.name if self.task is None else f"{self.suite.name} {self.task}"
        return self.number.head if self.number.head.startswith(self.suite.name) else f"{where}, {self.number.head}"

    @property
    def titled(self) -> Number:
        """The number under the column's head."""
        return replace(self.number, head=self.head)

    @property
    def is_main(self) -> bool:
        """Whether a comparison shows it without being asked."""
        return self.task is None and self.number.key in [number.key for number in self.suite.compared_numbers()]

    def _task_in(self, record: Record) -> str:
        """The task that is meant in a record, once the options that its evaluation had are left out."""
        settings = record.get("settings") or {}
        parts = [part for part in (self.task or "").split(",") if not _is_set(part, settings)]
        return ",".join(parts) or ALL

    def value(self, record: Record) -> Value | None:
        """The number in a record of the suite; None if the record is of another task, or lacks the number."""
        if self.suite.has_any_metric:
            if self.task not in (None, record.get("task")):
                return None
            numbers = record.get("metrics", {})
        else:
            if "task" in record and record["task"] != self._task_in(record):
                return None
            numbers = record
        found, error = numbers.get(self.number.key), numbers.get(self.number.key + _ERROR)
        if isinstance(found, bool) or not isinstance(found, int | float):
            return None
        return Value(found, error if isinstance(error, int | float) else None)


def _is_set(text: str, settings: Mapping[str, Any]) -> bool:
    """Whether a text such as `length=1024|2048` is an option of an evaluation."""
    key, _, value = text.partition("=")
    if key not in settings:
        return False
    found = settings[key]
    return value == ("|".join(map(str, found)) if isinstance(found, list) else str(found))


def parse_score_choice(text: str, known: Mapping[str, Suite], option: str = "--score") -> ScoreChoice:
    """The number that `SUITE[:TASK][/NUMBER]` names; without NUMBER, the first one of the suite that is compared.

    Raises:
        UserError: naming `option`, for an unknown suite or number, and for a suite without a main number if no NUMBER
            is given.
    """
    suite = known.get(text.partition("/")[0].partition(":")[0])
    where, slash, key = text.rpartition("/") if "/" in text else (text, "", "")
    if suite is not None and "=" in where and key not in _keys(suite) and not suite.has_any_metric:
        where, slash, key = text, "", ""  # the slash is in an option, as in wikitext:path=a/b.txt
    name, _, task = where.partition(":")
    if suite is not None and suite.has_any_metric:
        if not key:
            raise UserError(f"{option} {text}: names no metric; allowed: {name}:TASK/METRIC, as lm_eval:hellaswag/acc")
        return ScoreChoice(suite=suite, number=_metric(key), task=task or None)
    scored = {suite.name: suite for suite in known.values() if suite.compared_numbers()}
    if suite is None or (name not in scored and not (suite.named_by_number and slash)):
        raise UserError(f"{option} {text}: no such suite; {nearest(name, scored)}")
    numbers = {number.key: number for number in suite.numbers}
    if not slash:
        main = suite.compared_numbers()[0]
        return ScoreChoice(suite=suite, number=numbers.get(main.key, main), task=task or None)
    numbers = _keys(suite)
    if key not in numbers:
        raise UserError(f"{option} {text}: {name} has no such number; {nearest(key, numbers)}")
    return ScoreChoice(suite=suite, number=numbers[key], task=task or None)


def _keys(suite: Suite) -> dict[str, Number]:
    return {number.key: number for number in (*suite.compared_numbers(), *suite.numbers)}


def _metric(key: str) -> Number:
    """A metric of lm-evaluation-harness."""
    better = not any(part in key for part in _LOWER_IS_BETTER)
    return Number(key=key, head=key, higher_is_better=better)


def suite_of(record: Mapping[str, Any]) -> str:
    """The name of the suite that has made a record."""
    if name := record.get("suite"):
        return str(name)
    return next((suite.name for suite in suites().values() if suite.makes_unnamed(record)), DEFAULT)
