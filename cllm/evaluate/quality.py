"""The number by which runs are compared: perplexity, or a number of a suite (`--score SUITE[/NUMBER]`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cllm.errors import UserError, nearest
from cllm.evaluate.seeds import Group, Row, percent_above
from cllm.evaluate.suites.suite import Number, Suite

Form = Callable[[float], str]
"""Writes a number for a table."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quality:
    """A number of every run, and how tables and figures show it."""

    head: str
    """Above its column, and at the axis of a figure."""
    of: Callable[[Row], float | None]
    """The number of a run; None: not measured."""
    form: Callable[[float], Form]
    """The form of means of about this size, and of deviations from them."""
    higher_is_better: bool = False
    suite: str | None = None
    """The suite that measures it; None: perplexity, of an evaluation or of the training."""
    key: str = "perplexity"
    """In the record of the suite."""
    relative: bool = False
    """Whether differences are in percent of the baseline's number."""

    @property
    def name(self) -> str:
        """Its name in files with full precision: `SUITE_KEY`, as in `Row.suites`."""
        return self.key if self.suite is None else f"{self.suite}_{self.key}"

    @property
    def better(self) -> str:
        """The direction of better runs in a figure."""
        return "up" if self.higher_is_better else "down"

    def text(self, group: Group) -> str | None:
        """The mean over a group's runs, with the standard deviation if there are several; None if not measured."""
        mean, deviation = group.mean(self.of), group.deviation(self.of)
        if mean is None:
            return None
        form = self.form(mean)
        return form(mean) if deviation is None else f"{form(mean)} ± {form(deviation)}"

    def difference(self, group: Group, baseline: Group) -> str | None:
        """The difference between the means of two groups, with its sign; None if one of them was not measured."""
        mean, base = group.mean(self.of), baseline.mean(self.of)
        if mean is None or base is None:
            return None
        if self.relative:
            above = percent_above(mean, base)
            return None if above is None else f"{above:+.1f} %"
        return ("+" if mean >= base else "-") + self.form(base)(abs(mean - base))


PERPLEXITY = Quality(
    head="perplexity",
    of=lambda row: row.perplexity,
    form=lambda mean: ("{:.3f}" if mean < 1e4 else "{:.3g}").format,
    relative=True,
)


def of_suite(suite: Suite, number: Number) -> Quality:
    """A number of a suite."""
    name = f"{suite.name}_{number.key}"
    return Quality(
        head=number.head if number.head.startswith(suite.name) else f"{suite.name}, {number.head}",
        of=lambda row: row.suites.get(name),
        form=lambda _: number.form,
        higher_is_better=number.higher_is_better,
        suite=suite.name,
        key=number.key,
    )


def parse_score(text: str, known: Mapping[str, Suite], option: str = "--score") -> tuple[Suite, Number]:
    """The suite and its number that `SUITE` or `SUITE/NUMBER` names; without NUMBER, the first one that is compared.

    Raises:
        UserError: naming `option`, for an unknown suite or number, and for a suite that is not compared.
    """
    name, slash, key = text.partition("/")
    scored = {suite.name: suite for suite in known.values() if suite.compared_numbers()}
    if name not in scored:
        raise UserError(f"{option} {text}: no such suite; {nearest(name, scored)}")
    suite = scored[name]
    if not slash:
        return suite, suite.compared_numbers()[0]
    numbers = {number.key: number for number in (*suite.numbers, *suite.compared_numbers())}
    if key not in numbers:
        raise UserError(f"{option} {text}: {name} has no such number; {nearest(key, numbers)}")
    return suite, numbers[key]
