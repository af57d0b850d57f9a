"""The number by which runs are compared: perplexity, or a number of a suite (`--score`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cllm.evaluate.score_choice import ScoreChoice
from cllm.evaluate.seeds import Group, Row, percent_above

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
    """In the record of the suite, after its task if one was named."""
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


def of_choice(choice: ScoreChoice) -> Quality:
    """A number of a suite."""
    return Quality(
        head=choice.head,
        of=lambda row: row.suites.get(choice.name),
        form=lambda _: choice.number.form,
        higher_is_better=choice.number.higher_is_better,
        suite=choice.suite.name,
        key=choice.name.removeprefix(f"{choice.suite.name}_"),
    )
