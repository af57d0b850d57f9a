"""Settings of `evaluate_suites:`: suites of samples that are measured during training."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from cllm.section import MAX_COUNT, Section


class SuiteSchedule(Section):
    """A suite and when to measure it. `evaluate_suites` is a list of these."""

    suite: str = Field(min_length=1)
    """A suite of samples and its options, as for `evaluate.py --suite`, such as copying:samples=8."""
    every: int = Field(ge=1, le=MAX_COUNT)
    """Steps between measurements; the last step of the run is measured too."""
    name: str | None = Field(None, max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name in the tags, suite/NAME/...; null: the name of the suite."""
    at_most: float | None = Field(None, gt=0, lt=1)
    """Share of the time of training that the suite may take; null: any. A measurement that would exceed it, if it took
    as long as the last one, is left out. The first and that of the last step are made in any case."""

    @property
    def label(self) -> str:
        """The name in the tags."""
        return self.name or self.suite.partition(":")[0].strip()


def check_suites(suites: Sequence[SuiteSchedule], strategy: str) -> None:
    """Raises `ValueError` for two suites of one name, and for a strategy under which no process has all weights."""
    labels = [entry.label for entry in suites]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"evaluate_suites has two entries called {twice[0]!r}; give one of them another name")
    if suites and strategy == "zero3":
        raise ValueError(
            "evaluate_suites is set, but train.strategy is zero3, under which no process has all weights; allowed with "
            "it: auto, single, ddp, zero1, zero2; or evaluate checkpoints with evaluate.py --suite"
        )
